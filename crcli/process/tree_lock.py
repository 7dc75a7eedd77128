"""One dump of a tree at a time on a host: a lock that vanishes with whoever holds it.

Only one tracer can hold a process, and what the kernel notes of writes (for `--pre-copy`) is noted once: a
second dump of a tree would fail, or have the first one miss a page. The lock is flock(2) on /proc/PID/maps of
the tree's root: a file of this very process, whoever gets its pid later, which leaves nothing behind, and
which opens for those alone who may trace the process, so that nobody else can hold up a dump. That of each
ancestor is locked as well, shared: a dump waits for that of a tree around or inside its own, not for one
beside it.
"""

from __future__ import annotations

import fcntl
import os
import time
from typing import TYPE_CHECKING

from crcli.process.file_locks import kernel_locks, try_lock
from crcli.process.identity import read_stat

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from crcli.process.identity import ProcessId

_STEP_S = 0.01


class TreeLock:
    """The lock of one tree. A context manager: leaving it releases the lock.

    Where /proc does not let us lock a file, it is left out: then nobody is kept out.
    """

    def __init__(self, root: ProcessId) -> None:
        self._root = root
        self._fds: list[int] = []
        self._todo = [(pid, fcntl.LOCK_SH) for pid in _ancestors(root.pid)] + [(root.pid, fcntl.LOCK_EX)]
        """What is not locked yet. All lock from the top down, so that no two wait for one another."""

    @property
    def fds(self) -> tuple[int, ...]:
        """The descriptors that hold it. A process that inherits them holds it too, until `release`."""
        return tuple(self._fds)

    def take(self) -> bool:
        """Take what can be taken of it at once; return whether that is all."""
        while self._todo:
            pid, how = self._todo[0]
            fd = _open(pid)
            if fd >= 0 and not try_lock(fd, how):
                os.close(fd)
                return False
            if fd >= 0:
                self._fds.append(fd)
            del self._todo[0]
        return True

    def wait(self, limit_s: float) -> bool:
        """Take it, waiting for others so long (seconds); return whether it is ours."""
        end = time.monotonic() + limit_s
        while not self.take():
            if time.monotonic() >= end:
                return False
            time.sleep(_STEP_S)
        return True

    def holder(self) -> int:
        """The pid of a process that keeps us from the rest of it; 0 where it cannot be told."""
        if not self._todo:
            return 0
        pid, how = self._todo[0]
        return next(_holders(pid, among=("WRITE",) if how == fcntl.LOCK_SH else ("READ", "WRITE")), 0)

    def release(self) -> None:
        """Let others have it, whoever has inherited it from us; safe to call again."""
        for fd in self._fds:
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> TreeLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _open(pid: int) -> int:
    """The file that stands for a process; -1 where we may not open it, or the process is gone."""
    try:
        return os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _ancestors(pid: int) -> list[int]:
    """The processes above one, the highest first; process 1, which is never dumped, is left out."""
    found: list[int] = []
    try:
        while (pid := read_stat(pid).ppid) > 1 and pid not in found:
            found.append(pid)
    except ProcessLookupError:
        pass
    return found[::-1]


def _holders(pid: int, among: tuple[str, ...]) -> Iterator[int]:
    """Who has locked the file of a process in one of these ways, as far as we see them."""
    try:
        inode = os.stat(f"/proc/{pid}/maps").st_ino
    except OSError:
        return
    for lock in kernel_locks():
        if (lock.kind, lock.inode) == ("FLOCK", inode) and lock.mode in among and lock.pid > 0:
            yield lock.pid
