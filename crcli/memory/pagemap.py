"""Which pages of a running process CRIU would send: read from /proc, with the process undisturbed.

CRIU sends the pages of private mappings that are in memory or swapped out, those of a mapped file only where
the process has changed them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

from crcli.memory.extents import PAGE
from crcli.process.maps import areas

if TYPE_CHECKING:
    from collections.abc import Iterator

_USER_END = 1 << 47
"""The first address that is the kernel's own (its vsyscall page lies there)."""

_READABLE = frozenset((b"r--p", b"r-xp", b"rw-p", b"rwxp", b"-w-p", b"-wxp", b"--xp"))
"""The permissions of private areas that hold anything: what may only be written to, or run, can be read."""

_SENT = re.compile(rb"[\x40-\x43\x80-\x83]+")
"""Runs of top bytes of pagemap entries: in memory (0x80) or swapped out (0x40), and not of a file (0x20),
nor a guard (0x04). Bit 0 says that nobody else has mapped the page, bit 1 belongs to userfaultfd."""

_SLICE_PAGES = 32 << 20 >> 12
_ENTRY = 8
_PRESENT, _WRITTEN, _FRAME = 1 << 63, 1 << 55, (1 << 55) - 1


class PageRun(NamedTuple):
    """Pages `start` to `end` (page numbers) of one process, all of which CRIU would send."""

    start: int
    end: int


class PageState(NamedTuple):
    """One page as pagemap shows it. Who shares it sees the same `frame` (0: not for us to see)."""

    in_memory: bool
    frame: int


class AddressSpace:
    """The memory of one running process, to look into. Close it. Methods raise OSError when it has ended."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        except BaseException:
            os.close(self._pagemap)
            raise

    def close(self) -> None:
        """Let go of it."""
        os.close(self._pagemap)
        os.close(self._memory)

    def slices(self, most: int | None = None) -> list[tuple[int, PageRun]]:
        """Its private mappings, cut where they are large, with the size of each in pages: each mapping into
        no more than `most`, as there are programs that reserve a whole TiB, and more, and use little of it.

        Those that nothing can be read from are left out.
        """
        return [
            (end - start, PageRun(at, min(end, at + step)))
            for start, end in self._private
            for step in (max(_SLICE_PAGES, -((start - end) // most) if most else 0),)
            for at in range(start, end, step)
        ]

    def sent(self, part: PageRun) -> Iterator[PageRun]:
        """The runs of pages in `part` that CRIU would send."""
        tops = os.pread(self._pagemap, (part.end - part.start) * _ENTRY, part.start * _ENTRY)[7::_ENTRY]
        for found in _SENT.finditer(tops):
            yield PageRun(part.start + found.start(), part.start + found.end())

    def has_alone(self, run: PageRun) -> bool:
        """Whether all these pages are in memory, and no other process has any of them."""
        tops = os.pread(self._pagemap, (run.end - run.start) * _ENTRY, run.start * _ENTRY)[7::_ENTRY]
        return len(tops) == run.end - run.start and not tops.strip(b"\x81\x83")

    def states(self, run: PageRun) -> list[PageState]:
        """What became of these pages by now."""
        count = run.end - run.start
        entries = os.pread(self._pagemap, count * _ENTRY, run.start * _ENTRY)
        return [
            PageState(bool(entry & _PRESENT), entry & _FRAME)
            for entry in struct.unpack(f"<{len(entries) // _ENTRY}Q", entries)
        ]

    def entries(self, run: PageRun) -> bytes:
        """What pagemap says of these pages, 8 bytes each; zero where nothing is mapped."""
        size = (run.end - run.start) * _ENTRY
        return os.pread(self._pagemap, size, run.start * _ENTRY).ljust(size, b"\0")

    def read(self, run: PageRun) -> bytes:
        """The bytes of these pages. Ask only for pages that are in memory: others would be brought there."""
        return os.pread(self._memory, (run.end - run.start) * PAGE, run.start * PAGE)

    @cached_property
    def _private(self) -> list[tuple[int, int]]:
        found = []
        for area in areas(self.pid):
            if area.permissions in _READABLE:
                start, end = area.bounds
                is_kernels = area.padded_name and area.name.startswith((b"[v", b"[uprobes"))
                if end <= _USER_END and not is_kernels:
                    found.append((start // PAGE, end // PAGE))
        return found


@cache
def tracks_writes() -> bool:
    """Whether this kernel notes which pages a process writes to (CONFIG_MEM_SOFT_DIRTY)."""
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        page[0] = 1
        return bool(_own_entry(page) & _WRITTEN)


@cache
def zero_frame() -> int:
    """The frame of the kernel's page of zeros, which it shows where something was read but never written.

    0 when the kernel does not let us see frames (CAP_SYS_ADMIN).
    """
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        assert page[0] == 0  # it is there now
        return _own_entry(page) & _FRAME


def _own_entry(page: mmap.mmap) -> int:
    """What pagemap says of the first page of a mapping of ours."""
    first = ctypes.c_char.from_buffer(page)
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(ctypes.addressof(first) // PAGE * _ENTRY)
        (entry,) = struct.unpack("<Q", pagemap.read(_ENTRY))
    return int(entry)
