"""Which processes have been put to sleep by us: noted where `crcli doctor` finds it, though all be killed.

A note is a file named PID-START in a folder of this host's, which the hand that works on the process keeps
locked (flock) from the moment that it has that name; it says in which run of the kernel, and for which crcli.
One that nobody keeps, of a process that still sleeps, is of a hand that was killed together with its crcli.
What others have put to sleep (`cuda-checkpoint`) has no note.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.config import state_folder
from crcli.process.identity import ProcessId, identify

if TYPE_CHECKING:
    from collections.abc import Iterator


_ALONE_S = 120.0
"""For how long one tree waits for another to be put to sleep (seconds)."""

_READERS_S, _STEP_S = 0.5, 0.005
"""How long somebody may hold a note who only looks at it (seconds)."""


class Care:
    """The notes of one hand. They cannot be kept where there is no place for them: then nothing is noted."""

    def __init__(self, crcli: ProcessId | None = None) -> None:
        """`crcli` is whom the hand works for: it is not over with a process when its hand is killed."""
        self._crcli = crcli
        self._kept: dict[ProcessId, int] = {}
        self._text = b"\n".join((_boot(), _name(crcli).encode() if crcli is not None else b""))

    def take(self, process: ProcessId) -> bool:
        """It is noted that we work on the process; False: another hand does, and it is to be left alone."""
        if process in self._kept:
            return True
        until = time.monotonic() + _READERS_S
        try:
            os.makedirs(_folder(), mode=0o700, exist_ok=True)
            while (fd := self._note(process)) < 0:
                if time.monotonic() > until:
                    return False
                time.sleep(_STEP_S)
        except OSError:
            return True
        self._kept[process] = fd
        return True

    def let_go(self, process: ProcessId) -> None:
        """It is noted no more."""
        if (fd := self._kept.pop(process, -1)) >= 0:
            _remove(process)
            os.close(fd)

    def _note(self, process: ProcessId) -> int:
        """A new note, or one that nobody keeps any more, kept by us; -1 while somebody else has it locked."""
        path = _path(process)
        unnamed = f"{path}.{os.getpid()}"
        fd = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, self._text)
            os.link(unnamed, path)
        except FileExistsError:
            os.close(fd)
            return self._take_over(process)
        except OSError:
            os.close(fd)
            raise
        finally:
            os.unlink(unnamed)
        return fd

    def _take_over(self, process: ProcessId) -> int:
        with _unkept(process) as theirs:
            if theirs < 0 or _works(_read(theirs)[1], besides=self._crcli):
                return -1
            os.ftruncate(theirs, 0)
            os.pwrite(theirs, self._text, 0)
            return os.dup(theirs)  # the lock is that of both


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
        with _unkept(process) as fd:
            if fd < 0:
                continue
            boot, crcli = _read(fd)
            if boot != _boot() or not process.alive():
                _remove(process)
            elif not _works(crcli, besides=_ourselves()):
                found.append(process)
    return found


def is_cared_for(process: ProcessId) -> bool:
    """Whether somebody, of whatever crcli, works on the process now: its hand, or who will have another."""
    try:
        fd = os.open(_path(process), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return _works(_read(fd)[1], besides=_ourselves())
    except OSError:
        return True
    finally:
        os.close(fd)


def forget(process: ProcessId) -> None:
    """Remove the note of a process that sleeps no more, unless a hand keeps it."""
    with _unkept(process) as fd:
        if fd >= 0:
            _remove(process)


@contextmanager
def _unkept(process: ProcessId) -> Iterator[int]:
    """Within the block a note that no hand keeps is locked by us: its descriptor, -1 where there is none."""
    try:
        fd = os.open(_path(process), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield -1
        return
    try:
        yield fd if _lock(fd, process) else -1
    finally:
        os.close(fd)


def _lock(fd: int, process: ProcessId) -> bool:
    """Lock a note; False where another has done it, or has removed the note meanwhile."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(fd), os.stat(_path(process)))
    except OSError:
        return False


def _read(fd: int) -> tuple[bytes, ProcessId | None]:
    """What a note says: the run of the kernel, and the crcli."""
    boot, _, crcli = os.pread(fd, 256, 0).partition(b"\n")
    return boot, _named(crcli.decode(errors="replace"))


def _works(crcli: ProcessId | None, besides: ProcessId | None) -> bool:
    """Whether this crcli, another than `besides`, lives: it replaces a hand of its own that was killed."""
    return crcli is not None and crcli != besides and crcli.alive()


def _ourselves() -> ProcessId:
    return identify(os.getpid())


def _noted() -> list[ProcessId]:
    try:
        names = sorted(os.listdir(_folder()))
    except OSError:
        return []
    return [process for name in names if (process := _named(name)) is not None]


def _name(process: ProcessId) -> str:
    return f"{process.pid}-{process.start_time}"


def _named(name: str) -> ProcessId | None:
    return ProcessId(*map(int, name.split("-"))) if re.fullmatch(r"\d+-\d+", name) else None


def _folder() -> str:
    return os.path.join(state_folder(), "gpu")


def _path(process: ProcessId) -> str:
    return os.path.join(_folder(), _name(process))


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
