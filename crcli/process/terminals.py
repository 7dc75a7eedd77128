"""Pseudo-terminals of this host by their numbers (N of /dev/pts/N): which are free, and whose turn it is."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.process.identity import read_proc

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

FOLDER = "/run/crcli"
"""Where our lock file is: nobody but root can make anything there."""

_TERMINALS = "/dev/pts"
_TURN_LIMIT_S = 30.0
_STEP_S = 0.005


def free_terminals(wanted: Collection[int], more: int = 0) -> list[int]:
    """The numbers that new pseudo-terminals get here (N of /dev/pts/N), ascending.

    They reach to the greatest `wanted`, and are twice as many and so many `more`, where this process can open
    so many. What is not among them is in use: /dev/pts does not show those whose other side is closed, but
    that somebody has still open.
    """
    opened: list[int] = []
    numbers: list[int] = []
    try:
        while len(numbers) < 2 * len(wanted) + more or numbers[-1] < max(wanted):
            opened.append(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
            numbers.append(kernel.terminal_number(opened[-1]))
    except OSError:
        pass  # none there, or no more of them
    finally:
        for fd in opened:
            os.close(fd)
    return numbers


class TerminalTurn:
    """Our turn to open terminals under chosen numbers: other restores wait for theirs until `end`.

    They wait for half a minute at most, then they go on: what comes of that is an error, not a loss. The turn
    is flock(2) on two files. One is ours, which others cannot open, so that they cannot hold restores up. The
    other is the folder of the terminals: whoever has the same terminals has it, in whatever mount namespace.
    Everybody can lock that, so it is waited for only while a process that belongs to root, or to our own
    user, has it.
    """

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._end = time.monotonic() + _TURN_LIMIT_S
        self._wait_for(_open_ours(), lambda fd: True)
        self._wait_for(_open(_TERMINALS, os.O_DIRECTORY), lambda fd: any(map(_is_trusted, _holders(fd))))

    def _wait_for(self, fd: int, is_worth_it: Callable[[int], bool]) -> None:
        if fd < 0:
            return
        self._fds.append(fd)
        in_vain = 0
        while not _lock(fd) and in_vain < 2 and time.monotonic() < self._end:
            in_vain = 0 if is_worth_it(fd) else in_vain + 1  # once: who had it has given it up meanwhile
            time.sleep(_STEP_S)

    def end(self) -> None:
        """Let others go on; the second time nothing happens."""
        while self._fds:
            fd = self._fds.pop()
            fcntl.flock(fd, fcntl.LOCK_UN)  # also for what we have forked meanwhile
            os.close(fd)


def _open_ours() -> int:
    with suppress(OSError):
        os.makedirs(FOLDER, 0o755, exist_ok=True)
    return _open(f"{FOLDER}/terminals.lock", os.O_CREAT | os.O_NOFOLLOW)


def _open(path: str, flags: int) -> int:
    """A descriptor of the file; -1 where there is none for us."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags, 0o600)
    except OSError:
        return -1


def _lock(fd: int) -> bool:
    """Whether the file is locked by us now, or never can be by anybody."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holders(fd: int) -> Iterator[int]:
    """Who has locked a file, as far as we see them, from lines of /proc/locks such as
    `1: FLOCK  ADVISORY  WRITE 812 00:15:2 0 EOF`."""
    status = os.fstat(fd)
    name = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in read_proc("/proc/locks").decode().splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and fields[5] == name:
            yield int(fields[4])


def _is_trusted(pid: int) -> bool:
    """Whether a process is root's or our own user's in every way: one that became root by executing
    something (set-user-ID) still has whoever started it as its real user."""
    try:
        lines = read_proc(f"/proc/{pid}/status").splitlines()
    except OSError:
        return False
    users = {int(word) for line in lines if line.startswith(b"Uid:") for word in line.split()[1:]}
    return users <= {0, os.getuid()}
