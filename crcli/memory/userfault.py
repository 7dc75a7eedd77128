"""userfaultfd(2): a descriptor through which somebody else's missing pages are filled in.

CRIU registers the memory of a restored process and hands the descriptor over. From then on the kernel stops
a thread that touches a missing page until the page is given, and tells of whatever moves such memory: fork,
mremap, munmap, madvise. Layouts and numbers are those of linux/userfaultfd.h, the same on every machine.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
from enum import IntEnum
from fcntl import ioctl
from typing import TYPE_CHECKING, NamedTuple

from crcli.memory.buffers import address_of
from crcli.memory.extents import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crcli.store.base import Buffer

_UNREGISTER, _WAKE, _COPY, _ZEROPAGE = 0x8010AA01, 0x8010AA02, 0xC028AA03, 0xC020AA04
_RANGE, _COPYING, _ZEROING = struct.Struct("QQ"), struct.Struct("QQQQq"), struct.Struct("QQQq")
_MESSAGE = struct.Struct("B7xQQQ")


_SYS_USERFAULTFD = 282 if os.uname().machine == "aarch64" else 323
_API, _API_VERSION = 0xC018AA3F, 0xAA
_API_REQUEST = struct.Struct("QQQ")
_EVENTS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6
"""UFFD_FEATURE_EVENT_FORK, _REMAP, _REMOVE and _UNMAP: without these memory is not followed when it moves."""


_NEVER_MAPPED = (1 << 47) - 2 * PAGE
"""An address that no kernel gives a mapping by itself: nothing can be filled in there, but the try tells."""


def is_available() -> bool:
    """Whether this kernel lets us, with our rights, fill in other processes' memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (fd := libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)) < 0:
        return False
    try:
        ioctl(fd, _API, _API_REQUEST.pack(_API_VERSION, _EVENTS, 0))
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


class EventKind(IntEnum):
    """What the kernel tells."""

    PAGE_FAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class Event(NamedTuple):
    """One message. Addresses are page numbers.

    PAGE_FAULT: `start` was touched. FORK: `fd` is the child's descriptor. REMAP: `pages` pages moved from
    `start` to `to`. REMOVE and UNMAP: `pages` pages at `start` are empty now, or gone.
    """

    kind: EventKind
    start: int = 0
    pages: int = 0
    to: int = 0
    fd: int = -1


class MemoryGone(Exception):
    """The process whose memory this was has ended, or executes another program."""


class NoPlace(Exception):
    """Nothing that could be filled in is mapped at the first page."""


class MemoryMoves(Exception):
    """Nothing can be filled in before an event that waits was read; `pages` pages had been before that."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages)
        self.pages = pages


class Userfault:
    """One process's missing memory. Closing it lets the kernel give zeros for all that is still missing.

    Once closed it is that of a process that is gone.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)

    def read(self) -> Event | None:
        """The next event; None when there is none now. Raises MemoryGone."""
        if self.fd < 0:
            raise MemoryGone
        try:
            message = os.read(self.fd, _MESSAGE.size)
        except BlockingIOError:
            return None
        if len(message) < _MESSAGE.size:
            return None
        number, *words = _MESSAGE.unpack(message)
        kind = EventKind(number)
        if kind == EventKind.PAGE_FAULT:
            return Event(kind, words[1] // PAGE, 1)
        if kind == EventKind.FORK:
            return Event(kind, fd=words[0] & 0xFFFF_FFFF)
        if kind == EventKind.REMAP:
            return Event(kind, words[0] // PAGE, words[2] // PAGE, words[1] // PAGE)
        return Event(kind, words[0] // PAGE, (words[1] - words[0]) // PAGE)

    def copy(self, start: int, data: Buffer) -> int:
        """Fill pages in from page `start` on, and wake who waits for them; return how many it were.

        It ends before a page that is there already: 0 when the first is such a page. Raises NoPlace when they
        are not all in one mapping, MemoryGone, MemoryMoves.
        """
        with address_of(data) as address:
            request = bytearray(_COPYING.pack(start * PAGE, address, len(data), 0, 0))
            return self._fill(_COPY, request, len(data))

    def zero(self, start: int) -> None:
        """Fill in a page of zeros, unless it is there already. Raises MemoryGone, MemoryMoves."""
        if not self._fill(_ZEROPAGE, bytearray(_ZEROING.pack(start * PAGE, PAGE, 0, 0)), PAGE):
            self.wake(start, 1)

    def leave(self, runs: Iterable[tuple[int, int]]) -> None:
        """Have these runs of pages be ordinary memory from now on: it is for the kernel to bring them."""
        for start, pages in runs:
            ioctl(self.fd, _UNREGISTER, _RANGE.pack(start * PAGE, pages * PAGE))

    def is_gone(self) -> bool:
        """Whether the process has ended, or executes another program."""
        try:
            self._fill(_ZEROPAGE, bytearray(_ZEROING.pack(_NEVER_MAPPED, PAGE, 0, 0)), PAGE)
        except MemoryGone:
            return True
        except (NoPlace, MemoryMoves, OSError):
            pass
        return False

    def wake(self, start: int, pages: int) -> None:
        """Have who waits for these pages look again. Raises MemoryGone."""
        if self.fd < 0:
            raise MemoryGone
        ioctl(self.fd, _WAKE, _RANGE.pack(start * PAGE, pages * PAGE))

    def _fill(self, code: int, request: bytearray, length: int) -> int:
        if self.fd < 0:
            raise MemoryGone
        try:
            ioctl(self.fd, code, request, True)
        except OSError as error:
            done = max(0, int.from_bytes(request[-8:], sys.byteorder, signed=True)) // PAGE
            if error.errno == errno.EAGAIN:
                raise MemoryMoves(done) from None
            if error.errno in (errno.ESRCH, errno.ENOSPC):  # ENOSPC: kernels before 4.15
                raise MemoryGone from None
            if error.errno == errno.ENOENT and not done:
                raise NoPlace from None
            if error.errno in (errno.EEXIST, errno.ENOENT):
                return done
            raise
        return length // PAGE

    def close(self) -> None:
        """Let go of the memory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
