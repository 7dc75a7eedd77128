"""Where pages wait that were moved out of a frozen tree's way: memory that nothing leads to.

Getting memory from the kernel takes longer than copying into it: it is cleared first, and a virtual machine
may have to ask its host for it (2 s for each GiB). So as much as will be needed is got before the tree is
frozen.
"""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Protocol

from crcli.process.memory_room import spare_memory

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

_AT_ONCE = 1
"""So many huge pieces are got by one call: after each the thread has to wait for Python's lock, for up to
5 ms where others calculate."""

_SLOW_S, _SLOW_COUNT = 0.002, 2
"""So many calls that took so long for each huge piece (seconds; 0.2 ms is usual) got it from elsewhere."""

_PATIENCE_S, _PATIENCE_S_PER_GIB = 0.02, 0.5
"""For how long a dump is held up by getting memory (seconds, and for each GiB more), since that was begun."""

_ZEROS = bytes(_HUGE)


class Overflow:
    """A file of a tmpfs that is mounted nowhere; the kernel frees it with its descriptor.

    `limit` (bytes) is half of the memory that is free when it is made, in the host and in our cgroup: the
    rest is left to those who work here. `sharers` such files, made at the same time, have that half together.
    """

    def __init__(self, folder: Folder, sharers: int = 1) -> None:
        self.fd = folder.create_file("overflow")
        folder.remove("overflow")
        self._sharers = sharers
        self.limit = spare_memory() // 2 // sharers
        self.reserved = 0
        """How much of it has memory behind it, from its beginning (bytes)."""
        self._size = 0
        self._began = 0.0
        self._enough = threading.Event()
        self._thread: threading.Thread | None = None

    def measure_again(self) -> None:
        """Have the limit be no more than half of what is free now, beside what it has already."""
        self.limit = min(self.limit, self.reserved + spare_memory() // 2 // self._sharers)

    def reserve(self, size: int) -> None:
        """Begin to get memory for the first `size` bytes, in a thread; no more than `limit`."""
        self._size = min(size, self.limit)
        self._began = time.monotonic()
        if self._size >= _HUGE:
            self._thread = threading.Thread(target=self._get, name="overflow", daemon=True)
            self._thread.start()

    def settle(self, *, wait: bool) -> None:
        """Stop getting memory; `wait` says whether it may first take the time that it needs, in reason."""
        if self._thread is None:
            return
        if wait:
            most_s = _PATIENCE_S + _PATIENCE_S_PER_GIB * self._size / (1 << 30)
            self._thread.join(max(0.0, self._began + most_s - time.monotonic()))
        self._enough.set()
        self._thread.join()
        self._thread = None

    def left_s(self) -> float:
        """For how long it will go on getting memory (seconds), if that goes on as fast as so far."""
        if self._thread is None or not self.reserved:
            return 0.0
        spent = time.monotonic() - self._began
        return max(0.0, self._size - self.reserved) * spent / self.reserved

    def _get(self) -> None:
        slow = 0
        try:
            while self.reserved < self._size and not self._enough.is_set():
                if slow < _SLOW_COUNT:
                    began = time.monotonic()
                    self._get_huge()
                    slow += time.monotonic() - began > _SLOW_S * _AT_ONCE
                else:
                    self.reserved += os.pwrite(self.fd, memoryview(_ZEROS)[:_SMALL], self.reserved)
        except OSError:  # no memory: whoever fills it will be told
            return

    def _get_huge(self) -> None:
        count = min(_AT_ONCE, -(-(self._size - self.reserved) // _HUGE))
        os.ftruncate(self.fd, self.reserved + count * _HUGE)  # without it the kernel gives small ones
        os.posix_fallocate(self.fd, self.reserved, count * _HUGE)
        self.reserved += os.pwritev(self.fd, [_ZEROS] * count, self.reserved)

    def close(self) -> None:
        """Give the memory back."""
        self.settle(wait=False)
        os.close(self.fd)
