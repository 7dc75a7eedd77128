"""Which processes have been put to sleep by us: noted where `crcli doctor` finds it, though all be killed.

A note is a file named PID-START in a folder of this host's, which the hand that works on the process keeps
locked (flock). One that nobody keeps, of a process that still sleeps, is of a hand that was killed together
with its crcli. What others have put to sleep (`cuda-checkpoint`) has no note.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from crcli.process.identity import ProcessId

_DEFAULT_STATE = "/var/lib/crcli"

_ALONE_S = 120.0
"""For how long one tree waits for another to be put to sleep (seconds)."""


class Care:
    """The notes of one hand. They cannot be kept where there is no place for them: then nothing is noted."""

    def __init__(self) -> None:
        self._kept: dict[ProcessId, int] = {}

    def take(self, process: ProcessId) -> None:
        """It is noted that we work on the process."""
        if process in self._kept:
            return
        try:
            os.makedirs(_folder(), mode=0o700, exist_ok=True)
            fd = os.open(_path(process), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, _boot())
        except OSError:
            os.close(fd)  # another hand's: that one will see to it
            return
        self._kept[process] = fd

    def let_go(self, process: ProcessId) -> None:
        """It is noted no more."""
        if (fd := self._kept.pop(process, -1)) >= 0:
            _remove(process)
            os.close(fd)


@contextmanager
def alone() -> Iterator[None]:
    """Within the block no other crcli of this host puts a tree to sleep, as far as they know of one another.

    One that takes longer than _ALONE_S is not waited for: it may hang.
    """
    try:
        os.makedirs(_folder(), mode=0o700, exist_ok=True)
        fd = os.open(_folder(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        _lock_within(fd, _ALONE_S)
        yield
    finally:
        os.close(fd)


def _lock_within(fd: int, limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            time.sleep(0.01)


def neglected() -> list[ProcessId]:
    """The processes that are noted, live, and have nobody who works on them; other notes are cleared away."""
    found = []
    for process in _noted():
        try:
            fd = os.open(_path(process), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if process.alive() and os.read(fd, 64) == _boot():
                found.append(process)
            else:
                _remove(process)
        except OSError:
            pass  # a hand keeps it
        finally:
            os.close(fd)
    return found


def is_cared_for(process: ProcessId) -> bool:
    """Whether a hand, of whatever crcli, works on the process now."""
    try:
        fd = os.open(_path(process), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)


def forget(process: ProcessId) -> None:
    """Remove the note of a process that sleeps no more."""
    _remove(process)


def _noted() -> list[ProcessId]:
    try:
        names = sorted(os.listdir(_folder()))
    except OSError:
        return []
    return [ProcessId(*map(int, name.split("-"))) for name in names if re.fullmatch(r"\d+-\d+", name)]


def _folder() -> str:
    return os.path.join(os.environ.get("CRCLI_STATE_DIR") or _DEFAULT_STATE, "gpu")


def _path(process: ProcessId) -> str:
    return os.path.join(_folder(), f"{process.pid}-{process.start_time}")


def _remove(process: ProcessId) -> None:
    try:
        os.unlink(_path(process))
    except OSError:
        pass


def _boot() -> bytes:
    """What tells this run of the kernel from the next: start times begin anew with it."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read().strip()
    except OSError:
        return b""
