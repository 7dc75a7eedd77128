"""Where pages wait that were moved out of a frozen tree's way: memory that nothing leads to.

Getting memory from the kernel takes longer than copying into it: it is cleared first, and a virtual machine
may have to ask its host for it (2 s for each GiB). So as much as will be needed is got before the tree is
frozen.
"""

from __future__ import annotations

import mmap
import os
import queue
import select
import signal
import struct
import threading
import time
from typing import TYPE_CHECKING, Protocol

from crcli import kernel
from crcli.process.memory_room import spare_memory
from crcli.threads import Worker

if TYPE_CHECKING:

    class Folder(Protocol):
        """Where its file is made: a tmpfs (crcli.criu.workspace)."""

        def create_file(self, name: str) -> int:
            """Make a file; return a descriptor of it."""
            ...

        def remove(self, name: str) -> None:
            """Take a file's name away."""
            ...


_HUGE = 2 << 20
"""What the kernel gives at once where it has so much in one piece: filled twice as fast as small ones."""

_SMALL = 256 << 10
"""What it is asked for where pieces of that size have to come from a virtual machine's host. A tmpfs takes
one folio for a write, as large as that: small ones are cut from what is left of memory that was in use
lately, while those of 1 MiB and more are mostly such that the host has taken back, and must find again."""

_SLOW_S, _SLOW_COUNT = 0.002, 3
"""So many huge pieces that took so long each (seconds; 0.2 ms is usual) came from elsewhere."""

_LARGE = 64 << 20
"""So much (bytes) is worth a process: a thread waits for Python's lock after each piece, for up to 5 ms."""

_PATIENCE_S, _PATIENCE_S_PER_GIB = 0.02, 2.5
"""For how long a dump is held up by getting memory (seconds, and for each GiB more), since that was begun: as
long as a virtual machine's host takes to find it, which else a frozen tree waits for."""

_BESIDE = 128 << 20
"""What a dump needs beside it (bytes): blocks, packs on their way, processes that hash."""

_ZEROS = bytes(_HUGE)
_COUNT = struct.Struct("<Q")


class Overflow:
    """A file of a tmpfs that is mounted nowhere; the kernel frees it with its descriptor.

    `limit` (bytes) is half of the memory that is free when it is made, in the host and in our cgroup, beside
    what a dump needs: the rest is left to those who work here. `sharers` such files, made at the same time,
    have that half together.
    """

    def __init__(self, folder: Folder, sharers: int = 1) -> None:
        self.fd = folder.create_file("overflow")
        folder.remove("overflow")
        self._sharers = sharers
        self.limit = _room() // sharers
        self._reserved = mmap.mmap(-1, _COUNT.size)
        self._size = 0
        self._began = 0.0
        self._enough = threading.Event()
        self._thread: Worker | None = None
        self._pid = 0
        self._unneeded: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._giver: Worker | None = None
        self._is_closing = False
        self._beginning = threading.Lock()

    @property
    def reserved(self) -> int:
        """How much of it has memory behind it, from its beginning (bytes)."""
        (size,) = _COUNT.unpack(self._reserved[:])
        return int(size)

    def measure_again(self) -> None:
        """Have the limit be no more than half of what is free now, beside what it has already."""
        self.limit = min(self.limit, self.reserved + _room() // self._sharers)

    def reserve(self, size: int, *, may_fork: bool = False) -> None:
        """Begin to get memory for the first `size` bytes; no more than `limit`.

        `may_fork`: no thread was started yet.
        """
        self._size = min(size, self.limit)
        self._began = time.monotonic()
        if may_fork and self._size >= _LARGE:
            self._pid = kernel.quiet_fork()
            if self._pid == 0:
                self._get_and_exit()
        elif self._size >= _HUGE:
            thread = Worker(self._get, name="overflow")
            with kernel.signals_held():
                thread.start()
                self._thread = thread

    def settle(self, *, wait: bool) -> None:
        """Stop getting memory; `wait` says whether it may first take the time that it needs, in reason."""
        most_s = _PATIENCE_S + _PATIENCE_S_PER_GIB * self._size / (1 << 30)
        left_s = max(0.0, self._began + most_s - time.monotonic()) if wait else 0.0
        if self._thread is not None:
            self._thread.join(left_s)
            self._enough.set()
            self._thread.join()
            self._thread = None
        if self._pid:
            _wait_for_end(self._pid, left_s)
            pid, self._pid = self._pid, 0  # interrupted, this is called again
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def left_s(self) -> float:
        """For how long it will go on getting memory (seconds), if that goes on as fast as so far."""
        spent, reserved = time.monotonic() - self._began, self.reserved
        return max(0.0, self._size - reserved) * spent / reserved if reserved else 0.0

    def _get_and_exit(self) -> None:
        """What the process does. Never returns."""
        try:
            kernel.die_with_parent(signal.SIGKILL)
            kernel.close_all_but(self.fd)
            self._get()
        finally:
            os._exit(0)

    def _get(self) -> None:
        piece, slow = _HUGE, 0
        done = 0
        try:
            while done < self._size and not self._enough.is_set():
                began = time.monotonic()
                if piece == _HUGE:
                    os.ftruncate(self.fd, done + piece)  # without it the kernel gives small ones
                    os.posix_fallocate(self.fd, done, piece)
                done += os.pwrite(self.fd, memoryview(_ZEROS)[:piece], done)
                self._reserved[:] = _COUNT.pack(done)
                slow += time.monotonic() - began > _SLOW_S
                if slow == _SLOW_COUNT:
                    piece = _SMALL
        except OSError:  # no memory: whoever fills it will be told
            return

    def give_back(self, offset: int, size: int) -> None:
        """Let the kernel have a part back, soon: nobody reads it any more. Called from several threads.

        It takes the kernel 45 ms for each GiB, one after another, which nobody need wait for.
        """
        self._unneeded.put((offset, size))
        if self._giver is None:
            with self._beginning, kernel.signals_held():
                if self._giver is None:
                    giver = Worker(self._give, name="overflow-back")
                    giver.start()
                    self._giver = giver

    def _give(self) -> None:
        while (part := self._unneeded.get()) is not None and not self._is_closing:
            try:
                kernel.punch_hole(self.fd, *part)
            except OSError:  # then it goes with the whole
                continue

    def close(self) -> None:
        """Give all of the memory back."""
        self.settle(wait=False)
        self._is_closing = True
        if self._giver is not None:
            self._unneeded.put(None)
            self._giver.join()
        os.close(self.fd)


def _room() -> int:
    """How much memory may be had, all such files together (bytes)."""
    return max(0, spare_memory() - _BESIDE) // 2


def _wait_for_end(pid: int, most_s: float) -> None:
    """Return when a child of ours has ended, or so many seconds have passed."""
    ended = os.pidfd_open(pid)
    try:
        select.select([ended], [], [], most_s)
    finally:
        os.close(ended)
