"""Pages taken in: first out of the tree's way, then classified, hashed, compressed and handed on.

One thread receives. What it receives goes into an overflow area (memory of a file that is mounted nowhere,
bounded by what the host has to spare) without passing through this process and, when that is full, into a
few blocks of our own. Until all pages are here the workers wait at a gate, so that the tree stands frozen
for little more than one copy of its memory. Then (or as soon as all blocks are full) they turn blocks into
extents: zero pages cost nothing, pages that the store has are referred to, the rest become new chunks,
handed to the sink. Without a free block the receiver waits, the socket fills, and CRIU waits too: memory
stays bounded and nothing is dropped.
"""

from __future__ import annotations

import fcntl
import os
import queue
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blake3 import blake3

from crcli.kernel import punch_hole
from crcli.memory.extents import PAGE, ZERO_PAGE, Extent, Source, SpaceKey, SpaceKind, coalesce
from crcli.memory.replay import AMOUNT_EVERY_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.store.base import Buffer

BLOCK_PAGES = 256
BLOCK_COUNT = 64
"""Blocks of crcli's own memory: with 1 MiB each, what it holds of a tree's pages beyond the overflow."""

CHUNK_PAGES = 64
"""Pages in one chunk at most (256 KiB): large enough to compress well and to fetch in one read."""

DIGEST = 32
_KEEP_RUN, _KEEP_PAGES = 64, 16 << 10
"""Early pages that are kept for the trial: runs up to this long, and so many pages in all (64 MiB)."""

_TWIN_LIMIT = 1 << 18
"""New pages of this dump that are remembered for finding their twins (about 50 MB when full)."""


class Location(NamedTuple):
    """Where a page is: page number `page` of chunk `chunk` in this image's chunk table."""

    chunk: int
    page: int


class KnownPages(Protocol):
    """What the store has already, page by page."""

    def find(self, digests: Sequence[bytes]) -> list[Location | None]:
        """For each BLAKE3 digest of a page, where the store has that page (None where it does not)."""
        ...


class ChunkSink(Protocol):
    """Takes new chunks on their way to the store. Called from several threads."""

    def reserve(self) -> int:
        """Give a number in the chunk table to a chunk that is about to be added."""
        ...

    def add(
        self, number: int, pieces: Sequence[Buffer], page_digests: Sequence[bytes], *, hurry: bool
    ) -> None:
        """Store the chunk `number`, made of `pieces`; done with them on return.

        `hurry` says that the source is being held back, so that speed matters more than size.
        """
        ...


@dataclass(frozen=True)
class MemoryCounts:
    """What arrived, in bytes: all of it, the zero pages, those that the store had, and the new ones."""

    total: int = 0
    zero: int = 0
    reused: int = 0
    new: int = 0

    def __add__(self, other: MemoryCounts) -> MemoryCounts:
        return MemoryCounts(
            self.total + other.total, self.zero + other.zero, self.reused + other.reused, self.new + other.new
        )


class _Run(NamedTuple):
    space: SpaceKey
    start: int
    pages: int
    lazy: bool
    at: int
    """Offset in the block, in pages."""


@dataclass
class _Block:
    memory: bytearray = field(default_factory=lambda: bytearray(BLOCK_PAGES * PAGE))
    runs: list[_Run] = field(default_factory=list)
    used: int = 0


@dataclass
class _Spilled:
    """A block's worth of pages that lies in the overflow, from `offset` (bytes) on."""

    offset: int
    runs: list[_Run] = field(default_factory=list)
    used: int = 0


class Overflow(Protocol):
    """Where pages wait that do not fit the blocks: a file of bounded size, named by its descriptor."""

    fd: int
    limit: int


class Intake:
    """Turns runs of pages into extents and chunks. `receive` and `flush` belong to one receiving thread."""

    def __init__(
        self, known: KnownPages | None, sink: ChunkSink, overflow: Overflow | None = None, workers: int = 2
    ) -> None:
        self._known = known
        self._sink = sink
        self._overflow = overflow
        self._gate = threading.Event()
        self._blocks = threading.Semaphore(BLOCK_COUNT)
        self._spare: list[_Block] = []
        self._full: queue.SimpleQueue[_Block | _Spilled | None] = queue.SimpleQueue()
        self._open: _Block | None = None
        self._spill: _Spilled | None = None
        self._spill_end = 0
        self._pipe: tuple[int, int] | None = None
        self._twins: dict[bytes, int] = {}  # digest -> chunk * CHUNK_PAGES + page
        self._claims = threading.Lock()
        self._lock = threading.Lock()
        self._spaces: dict[SpaceKey, list[Extent]] = {}
        self._counts = MemoryCounts()
        self._failure: BaseException | None = None
        self.kept: dict[SpaceKey, list[tuple[int, bytes]]] = {}
        """Short runs of pages that CRIU itself looks at (the vdso among them), by first page number."""
        self._kept_pages = 0
        self._received = 0
        self._workers = [
            threading.Thread(target=self._work, name=f"intake-{number}", daemon=True)
            for number in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def begin_space(self, space: SpaceKey) -> None:
        """Note that an address space exists, even if no page of it should come."""
        with self._lock:
            self._spaces.setdefault(space, [])
        self.kept.setdefault(space, [])

    def receive(self, channel: socket.socket, space: SpaceKey, start: int, pages: int, lazy: bool) -> None:
        """Take `pages` pages of a run out of `channel`, in which nothing but their bytes comes next.

        Blocks while all memory is in use. Raises what a worker has died of, if one has, and
        ConnectionError when the channel ends.
        """
        while pages:
            self._raise_failure()
            if self._spill_room():
                taken = self._receive_spilled(channel, space, start, pages, lazy)
            else:
                block = self._open = self._open or self._free_block()
                taken = self._receive_into(block, channel, _Run(space, start, pages, lazy, block.used))
            start += taken
            pages -= taken
            self._received += taken

    def open_gate(self) -> None:
        """Let the workers begin: the tree's state is here, or there is no more room for it."""
        self._gate.set()

    def flush(self) -> None:
        """Hand on what has been received so far."""
        if self._open is not None:
            self._full.put(self._open)
            self._open = None
        if self._spill is not None:
            self._full.put(self._spill)
            self._spill = None

    def finish(
        self, amount: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[dict[SpaceKey, list[Extent]], MemoryCounts]:
        """Wait for the workers, and return every space's extents, sorted and joined, and the counts.

        `amount` is told now and then how many bytes are done, of how many.
        """
        self.flush()
        self._end_workers()
        for worker in self._workers:
            while worker.is_alive():
                worker.join(AMOUNT_EVERY_S)
                amount(self._counts.total, self._received * PAGE)
        self.close()
        self._raise_failure()
        return {space: coalesce(extents) for space, extents in self._spaces.items()}, self._counts

    def abandon(self) -> None:
        """End without finishing: what is still queued is dropped."""
        self._failure = self._failure or InterruptedError("the dump was given up")
        self.close()

    def close(self) -> None:
        """End the workers (after what is queued); safe to call again."""
        self._end_workers()
        for worker in self._workers:
            worker.join()
        self._workers = []
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def _end_workers(self) -> None:
        self.open_gate()
        for _ in self._workers:
            self._full.put(None)

    def _free_block(self) -> _Block:
        """A block that nobody uses; when there is none, the workers are let in, and one is waited for."""
        if not self._blocks.acquire(blocking=False):
            self.open_gate()
            while not self._blocks.acquire(timeout=0.5):
                self._raise_failure()
        return self._spare.pop() if self._spare else _Block()

    def _receive_into(self, block: _Block, channel: socket.socket, run: _Run) -> int:
        taken = min(run.pages, BLOCK_PAGES - block.used)
        view = memoryview(block.memory)[run.at * PAGE : (run.at + taken) * PAGE]
        receive_exactly(channel, view)
        block.runs.append(run._replace(pages=taken))
        if self._keeps(run.space, taken, run.lazy):
            self._keep(run.space, run.start, bytes(view))
        block.used += taken
        if block.used == BLOCK_PAGES:
            self._full.put(block)
            self._open = None
        return taken

    def _spill_room(self) -> bool:
        return self._overflow is not None and self._spill_end < self._overflow.limit

    def _receive_spilled(
        self, channel: socket.socket, space: SpaceKey, start: int, pages: int, lazy: bool
    ) -> int:
        """Move pages from the channel into the overflow; the bytes do not pass through this process."""
        assert self._overflow is not None
        if self._spill is None:
            self._spill = _Spilled(self._spill_end)
        spill = self._spill
        taken = min(pages, BLOCK_PAGES - spill.used)
        begin = self._spill_end
        self._splice(channel.fileno(), self._overflow.fd, taken * PAGE)
        if self._keeps(space, taken, lazy):
            self._keep(space, start, os.pread(self._overflow.fd, taken * PAGE, begin))
        spill.runs.append(_Run(space, start, taken, lazy, spill.used))
        spill.used += taken
        if spill.used == BLOCK_PAGES:
            self._full.put(spill)
            self._spill = None
        return taken

    def _keeps(self, space: SpaceKey, pages: int, lazy: bool) -> bool:
        return (
            not lazy
            and space.kind == SpaceKind.PROCESS
            and pages <= _KEEP_RUN
            and self._kept_pages + pages <= _KEEP_PAGES
        )

    def _keep(self, space: SpaceKey, start: int, pages: bytes) -> None:
        self.kept[space].append((start, pages))
        self._kept_pages += len(pages) // PAGE

    def _splice(self, source: int, target: int, size: int) -> None:
        if self._pipe is None:
            self._pipe = os.pipe()
            try:
                fcntl.fcntl(self._pipe[1], fcntl.F_SETPIPE_SZ, BLOCK_PAGES * PAGE)
            except OSError:  # the user's pipe budget is spent; a small pipe works as well, slower
                pass
        reader, writer = self._pipe
        while size:
            got = os.splice(source, writer, size)
            if not got:
                raise ConnectionError("CRIU closed the page connection in the middle of a run")
            size -= got
            while got:
                put = os.splice(reader, target, got, offset_dst=self._spill_end)
                self._spill_end += put
                got -= put

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _under_pressure(self) -> bool:
        """Whether the receiver is being held back, or would be next."""
        return not self._spill_room() and self._full.qsize() >= BLOCK_COUNT // 2

    def _work(self) -> None:
        self._gate.wait()
        own = _Block()
        while (item := self._full.get()) is not None:
            if self._failure is None:
                try:
                    self._classify(item if isinstance(item, _Block) else self._fetch(item, own))
                except BaseException as error:  # raised again in the receiving thread, or by finish
                    self._failure = error
            if isinstance(item, _Block):
                item.runs = []
                item.used = 0
                self._spare.append(item)
                self._blocks.release()

    def _fetch(self, spilled: _Spilled, block: _Block) -> _Block:
        """Read spilled pages into a worker's own block, and give their memory back."""
        assert self._overflow is not None
        view = memoryview(block.memory)[: spilled.used * PAGE]
        if os.preadv(self._overflow.fd, [view], spilled.offset) != len(view):
            raise OSError("the overflow area lost pages")
        punch_hole(self._overflow.fd, spilled.offset, len(view))
        block.runs, block.used = spilled.runs, spilled.used
        return block

    def _classify(self, block: _Block) -> None:
        digests = _digests(block.memory, block.used)
        extents = self._take_whole(block, digests)
        zero = reused = 0
        if extents is None:
            places, reused = self._places(block.memory, digests)
            extents = [(run.space, extent) for run in block.runs for extent in _extents(run, places)]
            zero = digests.count(None)
        new = block.used - zero - reused
        counts = MemoryCounts(block.used * PAGE, zero * PAGE, reused * PAGE, new * PAGE)
        with self._lock:
            self._counts += counts
            for space, extent in extents:
                self._spaces.setdefault(space, []).append(extent)

    def _take_whole(self, block: _Block, digests: list[bytes | None]) -> list[tuple[SpaceKey, Extent]] | None:
        """Store a block of nothing but new pages, the common case, and return its extents.

        None when a page is zero, known, or another's twin: then each page is looked at by itself.
        """
        distinct = set(digests)
        if None in distinct or len(distinct) != len(digests):
            return None
        names: list[bytes] = digests  # type: ignore[assignment]  # none is None
        if self._known is not None and any(self._known.find(names)):
            return None
        groups = [names[first : first + CHUNK_PAGES] for first in range(0, len(names), CHUNK_PAGES)]
        with self._claims:
            if not self._twins.keys().isdisjoint(distinct):
                return None
            chunks = [self._claim(group) for group in groups]
        view = memoryview(block.memory)
        for place, (number, group) in enumerate(zip(chunks, groups, strict=True)):
            begin = place * CHUNK_PAGES * PAGE
            piece = view[begin : begin + len(group) * PAGE]
            self._sink.add(number, [piece], group, hurry=self._under_pressure())
        return [(run.space, extent) for run in block.runs for extent in _cut(run, chunks)]

    def _places(self, memory: bytearray, digests: list[bytes | None]) -> tuple[list[Location | None], int]:
        """Where each page of a block is (None: zero), and how many were stored before; stores the rest."""
        asked = {index: digest for index, digest in enumerate(digests) if digest is not None}
        places = self._known_places(digests, asked)
        unknown = {index: digest for index, digest in asked.items() if places[index] is None}
        fresh: dict[bytes, int] = {}
        with self._claims:
            for index, digest in unknown.items():
                if digest not in self._twins:
                    fresh.setdefault(digest, index)
            names = list(fresh)
            groups = [names[first : first + CHUNK_PAGES] for first in range(0, len(names), CHUNK_PAGES)]
            chunks = [self._claim(group) for group in groups]
            found = {
                digest: Location(number, page)
                for number, group in zip(chunks, groups, strict=True)
                for page, digest in enumerate(group)
            }
            for index, digest in unknown.items():
                twin = found.get(digest)
                places[index] = twin or Location(*divmod(self._twins[digest], CHUNK_PAGES))
        view = memoryview(memory)
        for number, group in zip(chunks, groups, strict=True):
            pieces = _pieces(view, [fresh[digest] for digest in group])
            self._sink.add(number, pieces, group, hurry=self._under_pressure())
        return places, len(asked) - len(fresh)

    def _known_places(self, digests: list[bytes | None], asked: dict[int, bytes]) -> list[Location | None]:
        places: list[Location | None] = [None] * len(digests)
        if self._known is not None:
            found = self._known.find(list(asked.values()))
            for index, place in zip(asked, found, strict=True):
                places[index] = place
        return places

    def _claim(self, group: list[bytes]) -> int:
        """Take a number for a new chunk of these pages, so that no other worker stores their twins."""
        number = self._sink.reserve()
        if len(self._twins) < _TWIN_LIMIT:
            base = number * CHUNK_PAGES
            self._twins.update(zip(group, range(base, base + len(group)), strict=True))
        return number


def receive_exactly(channel: socket.socket, view: memoryview, *, end_allowed: bool = False) -> bool:
    """Fill `view`; return False when the channel ended before its first byte and that is allowed."""
    got = channel.recv_into(view, 0, socket.MSG_WAITALL)
    if got == 0 and end_allowed:
        return False
    while got < len(view):
        more = channel.recv_into(view[got:], 0, socket.MSG_WAITALL)
        if not more:
            raise ConnectionError("CRIU closed the page connection in the middle of a run")
        got += more
    return True


def _digests(memory: bytearray, used: int) -> list[bytes | None]:
    """The BLAKE3 digest of each page, None for a zero page."""
    view = memoryview(memory)
    is_zero = memory.startswith
    return [
        None if is_zero(ZERO_PAGE, at) else blake3(view[at : at + PAGE]).digest()
        for at in range(0, used * PAGE, PAGE)
    ]


def _pieces(view: memoryview, members: list[int]) -> list[memoryview]:
    """The pages at `members` (ascending) as few contiguous views."""
    pieces: list[memoryview] = []
    begin = previous = members[0]
    for index in members[1:]:
        if index != previous + 1:
            pieces.append(view[begin * PAGE : (previous + 1) * PAGE])
            begin = index
        previous = index
    pieces.append(view[begin * PAGE : (previous + 1) * PAGE])
    return pieces


def _extents(run: _Run, places: list[Location | None]) -> list[Extent]:
    """One run's pages as extents, neighbours of one source joined."""
    extents: list[Extent] = []
    start, count, first = run.start, 0, places[run.at]
    for index in range(run.pages):
        place = places[run.at + index]
        if count and _follows(first, count, place):
            count += 1
            continue
        if count:
            extents.append(_extent(start, count, first, run.lazy))
        start, count, first = run.start + index, 1, place
    extents.append(_extent(start, count, first, run.lazy))
    return extents


def _cut(run: _Run, chunks: list[int]) -> list[Extent]:
    """A run of a block that was stored whole as `chunks`: one extent for each chunk that it touches."""
    extents: list[Extent] = []
    at, end = run.at, run.at + run.pages
    while at < end:
        chunk, page = divmod(at, CHUNK_PAGES)
        count = min(end - at, CHUNK_PAGES - page)
        start = run.start + at - run.at
        extents.append(Extent(start, count, Source.CHUNK, chunks[chunk], page, run.lazy))
        at += count
    return extents


def _follows(first: Location | None, count: int, place: Location | None) -> bool:
    if first is None or place is None:
        return first is place
    return place.chunk == first.chunk and place.page == first.page + count


def _extent(start: int, count: int, place: Location | None, lazy: bool) -> Extent:
    if place is None:
        return Extent(start, count, Source.ZERO, 0, 0, lazy)
    return Extent(start, count, Source.CHUNK, place.chunk, place.page, lazy)
