"""Whose turn it is, of all crclis of a host, to do what only one can do at a time."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from crcli.process.file_locks import kernel_locks, try_lock
from crcli.process.identity import read_proc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FOLDER = "/run/crcli"
"""Where our lock files are: nobody but root can make anything there."""

_TURN_LIMIT_S = 30.0
_STEP_S = 0.005


class HostTurn:
    """Our turn: others wait for theirs until `end`.

    They wait for half a minute at most, then they go on: what comes of that is an error, not a loss. The
    turn is flock(2) on two files. One is ours, `name`, which others cannot open, so that they cannot hold us
    up. The other is the folder `shared` in which the work is done: whoever has the same folder has it, in
    whatever mount namespace. Everybody can lock that, so it is waited for only while a process that belongs
    to root, or to our own user, has it.
    """

    def __init__(self, name: str, shared: str) -> None:
        self._fds: list[int] = []
        self._end = time.monotonic() + _TURN_LIMIT_S
        try:
            self._wait_for(open_ours(name), lambda fd: True)
            self._wait_for(_open(shared, os.O_DIRECTORY), lambda fd: any(map(_is_trusted, _holders(fd))))
        except BaseException:
            self.end()
            raise

    def _wait_for(self, fd: int, is_worth_it: Callable[[int], bool]) -> None:
        if fd < 0:
            return
        self._fds.append(fd)
        in_vain = 0
        while not try_lock(fd) and in_vain < 2 and time.monotonic() < self._end:
            in_vain = 0 if is_worth_it(fd) else in_vain + 1  # once: who had it has given it up meanwhile
            time.sleep(_STEP_S)

    def end(self) -> None:
        """Let others go on; the second time nothing happens."""
        while self._fds:
            fd = self._fds.pop()
            fcntl.flock(fd, fcntl.LOCK_UN)  # also for what we have forked meanwhile
            os.close(fd)


def open_ours(name: str) -> int:
    """A file of ours to be locked; -1 where there can be none."""
    with suppress(OSError):
        os.makedirs(FOLDER, 0o755, exist_ok=True)
    return _open(f"{FOLDER}/{name}.lock", os.O_CREAT | os.O_NOFOLLOW | os.O_RDWR)


def _open(path: str, flags: int) -> int:
    """A descriptor of the file; -1 where there is none for us."""
    try:
        return os.open(path, os.O_CLOEXEC | flags, 0o600)
    except OSError:
        return -1


def _holders(fd: int) -> Iterator[int]:
    """Who has locked a file, as far as we see them."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    wanted = ("FLOCK", device, status.st_ino)
    return (lock.pid for lock in kernel_locks() if (lock.kind, lock.device, lock.inode) == wanted)


def _is_trusted(pid: int) -> bool:
    """Whether a process is root's or our own user's in every way: one that became root by executing
    something (set-user-ID) still has whoever started it as its real user."""
    try:
        lines = read_proc(f"/proc/{pid}/status").splitlines()
    except OSError:
        return False
    users = {int(word) for line in lines if line.startswith(b"Uid:") for word in line.split()[1:]}
    return users <= {0, os.getuid()}
