"""Memory that tests make up: runs of pages, a sink that keeps chunks, and memory put together again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from crcli.kernel import punch_hole
from crcli.memory.blocks import DIGEST, GROUP_PAGES
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey
from crcli.memory.places import NOWHERE, ZERO, place_in
from crcli.memory.weights.references import Reference
from crcli.store.base import Buffer


def page(number: int) -> bytes:
    """The page of this number: another for each, and all zeros for 0."""
    return number.to_bytes(8, "little") * (PAGE // 8)


@dataclass(frozen=True)
class Sent:
    """A run of pages as CRIU sends one: `contents` are the numbers of its pages."""

    space: SpaceKey
    start: int
    contents: tuple[int, ...]
    lazy: bool = True

    @property
    def bytes(self) -> bytes:
        """All its pages."""
        return b"".join(map(page, self.contents))


@dataclass
class KeepingSink:
    """A ChunkSink that keeps every chunk, and asserts what it is promised about them."""

    chunks: dict[int, bytes] = field(default_factory=dict)
    page_digests: dict[int, list[bytes]] = field(default_factory=dict)
    group_digests: dict[int, list[bytes]] = field(default_factory=dict)
    mixed: dict[bytes, Sequence[int]] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    reserved: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reserve(self) -> int:
        """See ChunkSink."""
        with self._lock:
            self.reserved += 1
            return self.reserved - 1

    def add(
        self,
        number: int,
        pieces: Sequence[Buffer],
        page_digests: Sequence[bytes],
        group_digests: Sequence[bytes],
        *,
        hurry: bool,
    ) -> None:
        """See ChunkSink."""
        raw = b"".join(pieces)
        assert number not in self.chunks
        assert digests_of(raw, 1) == list(page_digests)
        assert digests_of(raw, GROUP_PAGES)[: len(group_digests)] == list(group_digests)
        with self._lock:
            self.chunks[number] = raw
            self.page_digests[number] = list(page_digests)
            self.group_digests[number] = list(group_digests)

    def note_mixed(self, groups: Iterable[tuple[bytes, Sequence[int]]]) -> None:
        """See ChunkSink."""
        for digest, places in groups:
            assert len(places) == GROUP_PAGES
            with self._lock:
                self.mixed[digest] = places

    def refer(self, reference: Reference) -> int:
        """See ChunkSink."""
        with self._lock:
            self.references.append(reference)
            return len(self.references) - 1


@dataclass
class KnownFrom:
    """What an earlier dump put into its sink, as KnownPages; its chunks are numbered from `first` on."""

    sink: KeepingSink
    first: int

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """See KnownPages."""
        found = self._found(digests, self.sink.page_digests, 1)
        return [NOWHERE if place is None else place for place in found]

    def find_groups(self, digests: Sequence[bytes]) -> list[Sequence[int] | None]:
        """See KnownPages."""
        return [
            self._mixed(digest) if place is None else range(place, place + GROUP_PAGES)
            for digest, place in zip(
                digests, self._found(digests, self.sink.group_digests, GROUP_PAGES), strict=True
            )
        ]

    def _mixed(self, digest: bytes) -> list[int] | None:
        if (places := self.sink.mixed.get(digest)) is None:
            return None
        return [ZERO if place == ZERO else place_in(self.first, 0) + place for place in places]

    def _found(
        self, digests: Sequence[bytes], table: Mapping[int, list[bytes]], step: int
    ) -> list[int | None]:
        places = {
            digest: place_in(self.first + number, place * step)
            for number, listed in table.items()
            for place, digest in enumerate(listed)
        }
        assert all(len(digest) == DIGEST for digest in digests)
        return [places.get(digest) for digest in digests]


class MemoryFile:
    """An overflow of `limit` bytes; a context manager that frees it."""

    def __init__(self, limit: int) -> None:
        self.fd = os.memfd_create("overflow")
        self.limit = limit

    def give_back(self, offset: int, size: int) -> None:
        """As the real one, at once."""
        punch_hole(self.fd, offset, size)

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def digests_of(raw: bytes, pages: int) -> list[bytes]:
    """The digest of each whole run of so many pages."""
    step = pages * PAGE
    return [blake3(raw[at : at + step]).digest() for at in range(0, len(raw) - step + 1, step)]


def rebuilt(
    spaces: Mapping[SpaceKey, Sequence[Extent]], chunks: Mapping[int, bytes]
) -> dict[tuple[SpaceKey, int], tuple[bytes, bool]]:
    """Every page that extents describe, by its space and number: its bytes, and whether it is lazy.

    Asserts that the extents ascend and do not overlap.
    """
    found: dict[tuple[SpaceKey, int], tuple[bytes, bool]] = {}
    for space, extents in spaces.items():
        end = 0
        for extent in extents:
            assert extent.start >= end and extent.pages > 0
            end = extent.end
            for index in range(extent.pages):
                if extent.source == Source.ZERO:
                    raw = bytes(PAGE)
                else:
                    place = (extent.offset + index) * PAGE
                    raw = chunks[extent.chunk][place : place + PAGE]
                found[space, extent.start + index] = raw, extent.lazy
    return found


def expected(sent: Sequence[Sent]) -> dict[tuple[SpaceKey, int], tuple[bytes, bool]]:
    """The same, as it was sent."""
    return {
        (run.space, run.start + index): (page(number), run.lazy)
        for run in sent
        for index, number in enumerate(run.contents)
    }


class Standing:
    """A process that holds pages of these numbers in memory of its own, and stands still; a context manager.

    `start` is the number of the first page, as its own address space has it. The pages in `unreadable` are
    such that the program itself may not read them.
    """

    _PROGRAM = """
import ctypes, mmap, sys
raw = sys.stdin.buffer.read(int(sys.argv[1]))
memory = mmap.mmap(-1, len(raw), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = raw
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
for page in map(int, sys.argv[2:]):
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + page * 4096), ctypes.c_size_t(4096), 0)
print(address, flush=True)
sys.stdin.read()
"""

    def __init__(self, contents: Sequence[int], unreadable: Sequence[int] = ()) -> None:
        self.raw = b"".join(map(page, contents))
        self._command = [sys.executable, "-c", self._PROGRAM, str(len(self.raw)), *map(str, unreadable)]

    def __enter__(self) -> Standing:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(self.raw)
        self._process.stdin.flush()
        self.start = int(self._process.stdout.readline()) // PAGE
        self.pid = self._process.pid
        os.kill(self.pid, signal.SIGSTOP)
        return self

    def write(self, number: int, raw: bytes) -> None:
        """Have other bytes in a page, behind the process's back."""
        memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR)
        try:
            assert os.pwrite(memory, raw, (self.start + number) * PAGE) == len(raw)
        finally:
            os.close(memory)

    def wake(self) -> None:
        """Have it run again."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()

    def __exit__(self, *_: object) -> None:
        self.end()
