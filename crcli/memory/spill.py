"""Pages that are moved out of a tree's way, into a file that others of crcli read.

They do not pass through this process: what comes out of a socket goes through a pipe by reference, and is
copied once.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

_PIECE_BYTES = 256 << 10
"""How much goes into the overflow at once. A tmpfs takes one folio for a write, as large as that: small ones
are cut from what is left of memory that was in use lately, while those of 1 MiB and more are mostly such that
a virtual machine's host has taken back, and must find again (2 s for each GiB instead of 0.1)."""


class Overflow(Protocol):
    """Where pages wait that do not fit the blocks: a file of bounded size, named by its descriptor."""

    fd: int
    limit: int

    def give_back(self, offset: int, size: int) -> None:
        """Free a part that nobody reads any more (bytes). Called from several threads."""
        ...


class Spill:
    """What was moved into an overflow (or, without one, room for nothing). One thread adds, several read."""

    def __init__(self, overflow: Overflow | None) -> None:
        self._overflow = overflow
        self.end = 0
        """Where the next bytes go."""
        self._pipe: tuple[int, int] | None = None
        self._nowhere: int | None = None

    def has_room(self) -> bool:
        """Whether more may be added."""
        return self._overflow is not None and self.end < self._overflow.limit

    def take(self, source: int, size: int) -> None:
        """Add so many bytes out of a socket."""
        target = self._file.fd

        def put(reader: int, count: int) -> int:
            done = os.splice(reader, target, count, offset_dst=self.end)
            self.end += done
            return done

        self._move(source, size, put)

    def discard(self, source: int, size: int) -> None:
        """Have so many bytes come out of a socket, and let go of them: nothing is copied."""
        nowhere = self._nowhere = self._nowhere or os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        self._move(source, size, lambda reader, count: os.splice(reader, nowhere, count))

    def append(self, data: memoryview) -> None:
        """Add bytes that are here."""
        if os.pwrite(self._file.fd, data, self.end) != len(data):
            raise OSError("the overflow area is full")
        self.end += len(data)

    def read(self, offset: int, size: int) -> bytes:
        """So many of them."""
        return os.pread(self._file.fd, size, offset)

    def read_into(self, view: memoryview, offset: int) -> None:
        """As many of them as there is room for."""
        if os.preadv(self._file.fd, [view], offset) != len(view):
            raise OSError("the overflow area lost pages")

    def give_back(self, offset: int, size: int) -> None:
        """Free what nobody reads any more. Called from several threads."""
        self._file.give_back(offset, size)

    def close(self) -> None:
        """Take no more; what is there can be read for as long as the overflow exists."""
        for fd in (*(self._pipe or ()), *(() if self._nowhere is None else (self._nowhere,))):
            os.close(fd)
        self._pipe = self._nowhere = None

    @property
    def _file(self) -> Overflow:
        assert self._overflow is not None
        return self._overflow

    def _move(self, source: int, size: int, put: Callable[[int, int], int]) -> None:
        """Have `put` take so many bytes out of a pipe; they do not pass through this process."""
        if self._pipe is None:
            self._pipe = os.pipe()
            try:
                fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, _PIECE_BYTES)
            except OSError:  # the user's pipe budget is spent; a small pipe works as well, slower
                pass
        reader, writer = self._pipe
        while size:
            got = os.splice(source, writer, size)
            if not got:
                raise ConnectionError("CRIU closed the page connection in the middle of a run")
            size -= got
            while got:
                got -= put(reader, got)
