"""crcli's side of `crcli.notify`: finds the boards of a tree's processes, and writes there what happens.

What a board says was written by the process, which may be hostile or broken. So its descriptors are
duplicated, never opened by name, looked at before they are used, written to only where the process could
write as well, and nothing here waits longer than it was told to. A board that is not right is left out.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING

from crcli import kernel, notify
from crcli.process.identity import ProcessId, identify
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

NAME = notify.NAME
LINK = f"/memfd:{NAME} (deleted)"
"""How a board's descriptor looks in /proc/PID/fd."""

_F_GET_SEALS = 1034
_HIGHEST_FD = 1 << 20
_SEQUENCE_MASK = (1 << 30) - 1
_STEP_S = 0.002


class Board(Struct):
    """One process's board: duplicates of its memory, and of its pipe opened once more (-1: there is none)."""

    process: ProcessId
    memory: int
    wake: int = -1
    number: int = 0
    """The number of the last event that we wrote."""

    @property
    def identity(self) -> tuple[int, int]:
        """Which memory it is: processes can share one."""
        status = os.fstat(self.memory)
        return status.st_dev, status.st_ino

    @property
    def has_callbacks(self) -> bool:
        """Whether the process wants to be told before a dump."""
        return self._read(notify.AT_CALLBACKS) > 0

    @property
    def is_done(self) -> bool:
        """Whether its callbacks have run for the event that we wrote last, or never will."""
        return self._read(notify.AT_DONE) == self.number or not self.process.alive()

    def post(self, kind: int) -> bool:
        """Write down what happens, and wake the process. False when it cannot be told: its own affair."""
        try:
            event, restores = notify.EVENT.unpack(self._raw(notify.AT_EVENT, notify.EVENT.size))
            self.number = ((event >> 2) + 1) & _SEQUENCE_MASK
            restores = (restores + (kind == notify.RESTORED)) & 0xFFFF_FFFF
            data = notify.EVENT.pack(self.number << 2 | kind, restores)
            os.pwrite(self.memory, data, notify.AT_EVENT)
            os.write(self.wake, b"\1")
        except BlockingIOError:
            return True  # the pipe is full: that wakes it as well
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Give the duplicates back."""
        for fd in (self.memory, self.wake):
            if fd >= 0:
                os.close(fd)
        self.memory = self.wake = -1

    def _read(self, at: int) -> int:
        return int(notify.NUMBER.unpack(self._raw(at, notify.NUMBER.size))[0])

    def _raw(self, at: int, size: int) -> bytes:
        return os.pread(self.memory, size, at).ljust(size, b"\0")  # the process may have cut it short


class Boards:
    """The boards of a tree; a context manager that gives them back, and ends what it announced."""

    def __init__(self, held: Iterable[tuple[int, int]]) -> None:
        """`held` are the (pid, descriptor) of what may be boards, pids as we see them."""
        self._boards: list[Board] = []
        self._told: list[Board] = []
        known: set[tuple[int, int]] = set()
        for pid, fd in held:
            if (board := _open(pid, fd)) is None:
                continue
            if board.identity in known:
                board.close()
                continue
            known.add(board.identity)
            self._boards.append(board)

    @property
    def want_word(self) -> bool:
        """Whether any process wants to be told before a dump."""
        return any(board.has_callbacks for board in self._boards)

    def checkpoint(self, limit_s: float) -> list[ProcessId]:
        """Say that a dump comes, and wait for the callbacks, at most `limit_s` seconds.

        Returns those that were not done by then.
        """
        self._told = [board for board in self._boards if board.has_callbacks]
        waiting = [board for board in self._told if board.post(notify.CHECKPOINT)]
        end = time.monotonic() + limit_s
        while (waiting := [board for board in waiting if not board.is_done]) and time.monotonic() < end:
            time.sleep(_STEP_S)
        return [board.process for board in waiting]

    def resumed(self) -> None:
        """Say to those who were told of a dump that it is over. Says so once."""
        told, self._told = self._told, []
        for board in told:
            board.post(notify.RESUMED)

    def restored(self) -> None:
        """Say to all that they were restored."""
        for board in self._boards:
            board.post(notify.RESTORED)

    def __enter__(self) -> Boards:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resumed()
        for board in self._boards:
            board.close()
        self._boards.clear()


def find(pids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (pid, descriptor) of all that looks like a board, in /proc."""
    for pid in pids:
        try:
            fds = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for fd in fds:
            try:
                if os.readlink(f"/proc/{pid}/fd/{fd}") == LINK:
                    yield pid, int(fd)
            except OSError:
                continue


def _open(pid: int, fd: int) -> Board | None:
    """The board behind a descriptor of a process; None when it is none."""
    pidfd = memory = wake = -1
    try:
        pidfd = os.pidfd_open(pid)
        process = identify(pid)
        memory = kernel.pidfd_getfd(pidfd, fd)
        fcntl.fcntl(memory, _F_GET_SEALS)  # only memory has seals: reading anything else could take for ever
        head = notify.HEAD.unpack(os.pread(memory, notify.HEAD.size, 0).ljust(notify.HEAD.size, b"\0"))
        if head[:2] == (notify.MAGIC, notify.VERSION) and _is_writable(memory):
            if head[2] < _HIGHEST_FD:
                wake = _pipe(pidfd, head[2])
            board, memory = Board(process, memory, wake), -1
            return board
    except (OSError, ProcessLookupError):
        pass  # it ended, closed it, or this kernel has no pidfd_getfd (before 5.6)
    finally:
        for one in (pidfd, memory):
            if one >= 0:
                os.close(one)
    return None


def _pipe(pidfd: int, fd: int) -> int:
    """The writing end of a pipe of that process, opened once more so that it never blocks us; -1: none."""
    duplicate = kernel.pidfd_getfd(pidfd, fd)
    try:
        if not stat.S_ISFIFO(os.fstat(duplicate).st_mode) or not _is_writable(duplicate):
            return -1
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{duplicate}", flags)
    finally:
        os.close(duplicate)


def _is_writable(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)
