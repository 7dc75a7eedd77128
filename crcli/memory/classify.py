"""Pages told apart: zero, found in files of weights, in the store already, or new.

A page is known by its BLAKE3 digest. Sixteen pages that lie together at a border of 64 KiB, a group, are
looked for first, by one digest of them all: that takes a quarter of the time, and in most of a tree that was
dumped before nothing changed. Pages of other groups are looked for one by one, so that what moved is found as
well. What is left becomes chunks, of groups that are new from end to end or of single pages. Those that do
not fill one share it with what is left of other blocks: of a tree that changed here and there, each block has
a few. A group whose pages come from several chunks is noted, so that the next dump finds it whole.
"""

from __future__ import annotations

import threading
from operator import sub
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blake3 import blake3
from msgspec import Struct, field

from crcli.memory.extents import PAGE, ZERO_PAGE, Extent, Source, SpaceKey
from crcli.memory.weights.references import Reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from crcli.memory.weights.match import Matcher
    from crcli.memory.weights.references import Piece
    from crcli.store.base import Buffer

BLOCK_PAGES = 1024
"""Pages in one block at most (4 MiB): what is classified at once."""

GROUP_PAGES = 16
"""Pages that are looked for together."""

CHUNK_PAGES = 64
"""Pages in one chunk at most (256 KiB): large enough to compress well and to fetch in one read."""

DIGEST = 32
KEY = 8
"""So many bytes of a digest are enough to tell that it may be a known one."""

ZERO_GROUP = ZERO_PAGE * GROUP_PAGES
ZERO_GROUP_DIGEST = blake3(ZERO_GROUP).digest()
ZERO_PAGE_DIGEST = blake3(ZERO_PAGE).digest()

_TWIN_LIMIT = 1 << 18
"""New pages of this dump that are remembered for finding their twins (about 50 MB when full)."""

ZERO, NOWHERE = -2, -1
"""The places of a zero page, and of one that is in no chunk: no place in a chunk is one more than ZERO."""

_CHUNK_SHIFT = 17
_WEIGHTS = 1 << 60
"""A place is one number, `chunk << _CHUNK_SHIFT | page`, or the same of a reference with this bit set. An
extent's offset has 16 bits, so that the last page of one chunk and the first of the next are never
neighbours."""

_ALL_ZERO = [ZERO] * GROUP_PAGES


class Location(NamedTuple):
    """Where a page is: page number `page` of chunk `chunk` in this image's chunk table."""

    chunk: int
    page: int

    @classmethod
    def of(cls, place: int) -> Location:
        """The location of a page whose place is in a chunk."""
        return cls(*divmod(place, 1 << _CHUNK_SHIFT))


def place_in(chunk: int, page: int) -> int:
    """The place of a page of a chunk."""
    return chunk << _CHUNK_SHIFT | page


class KnownPages(Protocol):
    """What the store has already. Called from several threads."""

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """For each BLAKE3 digest of a page, the place where the store has it (NOWHERE where it does not)."""
        ...

    def find_groups(self, digests: Sequence[bytes]) -> list[Sequence[int] | None]:
        """For each BLAKE3 digest of a group, the places of its pages; None where it is not known."""
        ...


class ChunkSink(Protocol):
    """Takes new chunks on their way to the store. Called from several threads."""

    def reserve(self) -> int:
        """Give a number in the chunk table to a chunk that is about to be added."""
        ...

    def add(
        self,
        number: int,
        pieces: Sequence[Buffer],
        page_digests: Sequence[bytes],
        group_digests: Sequence[bytes],
        *,
        hurry: bool,
    ) -> None:
        """Store the chunk `number`, made of `pieces`; done with them on return.

        It begins with as many whole groups as there are `group_digests`. `hurry` says that the source is
        being held back, so that speed matters more than size.
        """
        ...

    def note_mixed(self, groups: Iterable[tuple[bytes, Sequence[int]]]) -> None:
        """Note groups whose pages have these places, so that a later dump finds each by its digest."""
        ...

    def refer(self, reference: Reference) -> int:
        """Give a reference into files of weights its number in the table of those."""
        ...


class MemoryCounts(Struct, frozen=True):
    """What arrived, in bytes: all, zero pages, those in files of weights, those in the store, new ones."""

    total: int = 0
    zero: int = 0
    weights: int = 0
    reused: int = 0
    new: int = 0

    def __add__(self, other: MemoryCounts) -> MemoryCounts:
        return MemoryCounts(
            self.total + other.total,
            self.zero + other.zero,
            self.weights + other.weights,
            self.reused + other.reused,
            self.new + other.new,
        )


class Classified(NamedTuple):
    """What became of a block: the extents of each run, the counts, the files of weights that were found."""

    extents: list[tuple[SpaceKey, list[Extent]]]
    counts: MemoryCounts
    files: frozenset[int]


class Run(NamedTuple):
    """Pages of one space that follow one another, `at` so many pages from the beginning of a block."""

    space: SpaceKey
    start: int
    pages: int
    lazy: bool
    at: int


class Found(NamedTuple):
    """Whole pages of a block, `pages` from page `at` on, that pieces of files cover; their BLAKE3."""

    at: int
    pages: int
    pieces: tuple[Piece, ...]
    digest: bytes


class Seen(NamedTuple):
    """What is known of a block that was looked at before.

    `found` is what stands in files of weights; `digests` are those of its whole groups, by first page, but
    for groups of which pages were found; `pages` are those of single pages, where they were seen to be asked
    for.
    """

    digests: Mapping[int, bytes]
    found: Sequence[Found]
    pages: Mapping[int, bytes]


class Ahead(NamedTuple):
    """A block that was looked at before, and lies elsewhere; `fetch` brings ranges of pages into memory."""

    seen: Seen
    fetch: Callable[[Sequence[tuple[int, int]]], None]


class _Shared(Struct):
    """A chunk of what is left of several blocks."""

    number: int
    memory: bytearray = field(default_factory=lambda: bytearray(CHUNK_PAGES * PAGE))
    page_digests: list[bytes] = field(default_factory=list)
    group_digests: list[bytes] = field(default_factory=list)
    awaited: int = 0
    """So many of its pages are not in `memory` yet."""

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another page."""
        return len(self.page_digests) == CHUNK_PAGES


class _Part(NamedTuple):
    """New pages of a block (by their place in it), which are these groups or in none, and where they go: from
    page `at` of the chunk `number` on. They are all of it where it is not `shared`."""

    number: int
    at: int
    pages: list[int]
    groups: list[int]
    shared: _Shared | None = None


class Classifier:
    """Turns blocks of pages into extents and new chunks. Safe to call from several threads.

    `finish` stores the last chunks.
    """

    def __init__(self, known: KnownPages | None, sink: ChunkSink, matcher: Matcher | None = None) -> None:
        self.known = known
        """What the store has; set before the first block."""
        self._sink = sink
        self._matcher = matcher
        self._twins: dict[bytes, int] = {}
        self._open: dict[bool, _Shared] = {}
        """The chunks that have room, for pages of whole groups and for others."""
        self._claims = threading.Lock()

    def classify(
        self,
        memory: bytearray,
        runs: Sequence[Run],
        *,
        hurry: bool = False,
        weights: bool = True,
        ahead: Ahead | None = None,
    ) -> Classified:
        """Store what is new of the pages that `runs` describe in `memory`; return all their extents.

        Without `weights` nothing is looked for in files. With `ahead` the pages need not be in `memory` yet.
        """
        if ahead is not None and (whole := self._classify_whole(runs, ahead.seen)) is not None:
            return whole
        view = memoryview(memory)
        places = [NOWHERE] * max((run.at + run.pages for run in runs), default=0)
        if ahead is not None:
            files = self._place_weights(ahead.seen.found, places)
        elif weights and self._matcher is not None:
            files = self._place_weights(find_weights(self._matcher, memory, runs), places)
        else:
            files = set()
        heads, pages = _divide(runs, places if files else None)
        groups = self._place_groups(memory, heads, places, ahead.seen.digests if ahead is not None else {})
        pages += [page for head in groups for page in range(head, head + GROUP_PAGES)]
        given = ahead.seen.pages if ahead is not None else {}
        if ahead is not None:
            ahead.fetch(_ranges(sorted(page for page in pages if page not in given)))
        unknown = self._place_pages(memory, pages, places, given)
        parts = self._claim(unknown, groups, places)
        if ahead is not None:
            ahead.fetch(_ranges(sorted(given.keys() & {page for part in parts for page in part.pages})))
        for part in parts:
            self._put(part, _pieces(view, part.pages), unknown, groups, hurry=hurry)
        mixed = set(groups).difference(*(part.groups for part in parts))
        self._sink.note_mixed((groups[head], places[head : head + GROUP_PAGES]) for head in mixed)
        extents = [(run.space, _extents(run, places)) for run in runs]
        counts = _count(places, sum(len(part.pages) for part in parts), bool(files))
        return Classified(extents, counts, frozenset(files))

    def finish(self) -> None:
        """Store the chunks that still have room. No other thread classifies meanwhile."""
        while self._open:
            self._store(self._open.popitem()[1], hurry=False)

    def _classify_whole(self, runs: Sequence[Run], seen: Seen) -> Classified | None:
        """Classify a block that is one find in files from end to end, or all zeros; None for any other.

        Much of a large model's memory is such blocks, and the other way takes ten times as long for them.
        """
        pages = sum(run.pages for run in runs)
        if len(seen.found) == 1 and seen.found[0].pages == pages:
            (found,) = seen.found
            place = _WEIGHTS | self._refer(found) << _CHUNK_SHIFT
            extents = [(run.space, [_extent(run.start, run.pages, place + run.at, run.lazy)]) for run in runs]
            counts = MemoryCounts(total=pages * PAGE, weights=pages * PAGE)
            return Classified(extents, counts, frozenset(piece.file for piece in found.pieces))
        zeros = [digest == ZERO_GROUP_DIGEST for digest in seen.digests.values()]
        if len(zeros) * GROUP_PAGES == pages and all(zeros):
            extents = [(run.space, [_extent(run.start, run.pages, ZERO, run.lazy)]) for run in runs]
            return Classified(extents, MemoryCounts(total=pages * PAGE, zero=pages * PAGE), frozenset())
        return None

    def _refer(self, found: Found) -> int:
        return self._sink.refer(Reference(found.pieces, found.pages * PAGE, found.digest))

    def _place_weights(self, found: Iterable[Found], places: list[int]) -> set[int]:
        """Place the pages that are found in files of weights; return the numbers of those files."""
        files: set[int] = set()
        for one in found:
            first = _WEIGHTS | self._refer(one) << _CHUNK_SHIFT
            places[one.at : one.at + one.pages] = range(first, first + one.pages)
            files.update(piece.file for piece in one.pieces)
        return files

    def _place_groups(
        self, memory: bytearray, heads: list[int], places: list[int], given: Mapping[int, bytes]
    ) -> dict[int, bytes]:
        """Place the groups that are zero or known; return the digests of the others, by first page.

        Those that are `given` were hashed before.
        """
        digests = {head: given[head] for head in heads} if given else _digests_of_groups(memory, heads)
        for head in [head for head, digest in digests.items() if digest == ZERO_GROUP_DIGEST]:
            del digests[head]
            places[head : head + GROUP_PAGES] = _ALL_ZERO
        if self.known is not None:
            found = self.known.find_groups(list(digests.values()))
            for head, there in zip(list(digests), found, strict=True):
                if there is not None:
                    del digests[head]
                    places[head : head + GROUP_PAGES] = there
        return digests

    def _place_pages(
        self, memory: bytearray, pages: list[int], places: list[int], given: Mapping[int, bytes]
    ) -> dict[int, bytes]:
        """Place the pages that are zero or known; return the digests of the others.

        Those that are `given` were hashed before.
        """
        view, is_zero = memoryview(memory), memory.startswith
        digests: dict[int, bytes] = {}
        for page in pages:
            digest = given.get(page)
            if digest == ZERO_PAGE_DIGEST or (digest is None and is_zero(ZERO_PAGE, page * PAGE)):
                places[page] = ZERO
            else:
                digests[page] = digest or blake3(view[page * PAGE : (page + 1) * PAGE]).digest()
        if self.known is not None:
            found = self.known.find(list(digests.values()))
            for page, place in zip(list(digests), found, strict=True):
                if place != NOWHERE:
                    del digests[page]
                    places[page] = place
        return digests

    def _claim(self, unknown: dict[int, bytes], groups: dict[int, bytes], places: list[int]) -> list[_Part]:
        """Place the other pages: where their twins are, or in new chunks, which are ours to bring there."""
        with self._claims:
            fresh = {digest: page for page, digest in unknown.items() if digest not in self._twins}
            parts = list(self._cut(set(fresh.values()), unknown, groups))
            for part in parts:
                for place, page in enumerate(part.pages, place_in(part.number, part.at)):
                    places[page] = fresh[unknown[page]] = place
            if len(fresh) < len(unknown):
                for page, digest in unknown.items():
                    places[page] = fresh[digest] if digest in fresh else self._twins[digest]
            if len(self._twins) < _TWIN_LIMIT:
                self._twins.update(fresh)
        return parts

    def _cut(
        self, fresh: set[int], digests: Mapping[int, bytes], groups: Mapping[int, bytes]
    ) -> Iterator[_Part]:
        """Divide pages among chunks; the groups that are whole among them stay so."""
        whole = [head for head in groups if fresh.issuperset(range(head, head + GROUP_PAGES))]
        of_whole = [page for head in whole for page in range(head, head + GROUP_PAGES)]
        for pages, heads in ((of_whole, whole), (sorted(fresh.difference(of_whole)), [])):
            end = len(pages) - len(pages) % CHUNK_PAGES
            for at in range(0, end, CHUNK_PAGES):
                own = heads[at // GROUP_PAGES : (at + CHUNK_PAGES) // GROUP_PAGES]
                yield _Part(self._sink.reserve(), 0, pages[at : at + CHUNK_PAGES], own)
            yield from self._share(pages[end:], heads[end // GROUP_PAGES :], digests, groups)

    def _share(
        self, pages: list[int], heads: list[int], digests: Mapping[int, bytes], groups: Mapping[int, bytes]
    ) -> Iterator[_Part]:
        """Divide what is left of a block among chunks that blocks share."""
        are_whole = bool(heads)
        while pages:
            if (shared := self._open.get(are_whole)) is None:
                shared = self._open[are_whole] = _Shared(self._sink.reserve())
            at = len(shared.page_digests)
            some, pages = pages[: CHUNK_PAGES - at], pages[CHUNK_PAGES - at :]
            own, heads = heads[: len(some) // GROUP_PAGES], heads[len(some) // GROUP_PAGES :]
            shared.page_digests += (digests[page] for page in some)
            shared.group_digests += (groups[head] for head in own)
            shared.awaited += len(some)
            if shared.is_full:
                del self._open[are_whole]
            yield _Part(shared.number, at, some, own, shared)

    def _put(
        self,
        part: _Part,
        pieces: Sequence[memoryview],
        digests: Mapping[int, bytes],
        groups: Mapping[int, bytes],
        *,
        hurry: bool,
    ) -> None:
        """Bring pages to where they go; store the chunk if they are the last that it waits for."""
        if (shared := part.shared) is None:
            page_digests = [digests[page] for page in part.pages]
            group_digests = [groups[head] for head in part.groups]
            self._sink.add(part.number, pieces, page_digests, group_digests, hurry=hurry)
            return
        end = part.at * PAGE
        for piece in pieces:
            begin, end = end, end + len(piece)
            shared.memory[begin:end] = piece
        with self._claims:
            shared.awaited -= len(part.pages)
            is_whole = shared.is_full and not shared.awaited
        if is_whole:
            self._store(shared, hurry=hurry)

    def _store(self, shared: _Shared, *, hurry: bool) -> None:
        memory = memoryview(shared.memory)[: len(shared.page_digests) * PAGE]
        self._sink.add(shared.number, [memory], shared.page_digests, shared.group_digests, hurry=hurry)


def _divide(runs: Sequence[Run], places: list[int] | None) -> tuple[list[int], list[int]]:
    """The first pages of the whole groups in a block, and the pages in none; without those that `places`, if
    it is given, has a place for."""
    heads: list[int] = []
    loose: list[int] = []
    for run in runs:
        end = run.at + run.pages
        first = min(run.at + -run.start % GROUP_PAGES, end)
        last = first + (end - first) // GROUP_PAGES * GROUP_PAGES
        heads += range(first, last, GROUP_PAGES)
        loose += range(run.at, first)
        loose += range(last, end)
    if places is not None:
        broken = [head for head in heads if places[head : head + GROUP_PAGES].count(NOWHERE) < GROUP_PAGES]
        loose += (page for head in broken for page in range(head, head + GROUP_PAGES))
        heads = sorted(set(heads).difference(broken))
        loose = [page for page in loose if places[page] == NOWHERE]
    return heads, loose


def _digests_of_groups(memory: bytearray, heads: list[int]) -> dict[int, bytes]:
    view, is_zero = memoryview(memory), memory.startswith
    return {
        head: ZERO_GROUP_DIGEST
        if is_zero(ZERO_GROUP, head * PAGE)
        else blake3(view[head * PAGE : (head + GROUP_PAGES) * PAGE]).digest()
        for head in heads
    }


def _pieces(view: memoryview, pages: list[int]) -> list[memoryview]:
    """These pages as few contiguous views."""
    return [view[begin * PAGE : end * PAGE] for begin, end in _ranges(pages)]


def _ranges(pages: Sequence[int]) -> list[tuple[int, int]]:
    """These pages as ranges: the first page of each, and the one behind its last."""
    ends = [at for at in range(1, len(pages)) if pages[at] != pages[at - 1] + 1]
    return [
        (pages[begin], pages[end - 1] + 1)
        for begin, end in zip([0, *ends], [*ends, len(pages)], strict=True)
        if end
    ]


def find_weights(matcher: Matcher, memory: bytearray, runs: Sequence[Run]) -> Iterator[Found]:
    """Return what of a block, which `runs` describe, stands in files of weights."""
    view = memoryview(memory)
    for at, pages, pieces in matcher.stretches(memory, runs):
        yield Found(at, pages, pieces, blake3(view[at * PAGE : (at + pages) * PAGE]).digest())


def heads_of(runs: Sequence[Run]) -> list[int]:
    """The first pages of the whole groups in a block."""
    return _divide(runs, None)[0]


def stretches(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where, in these places, each stretch of pages that follow one another begins and ends."""
    steps = enumerate(map(sub, places[1:], places), 1)
    ends = [at for at, step in steps if step != 1 and (step or places[at] != ZERO)]
    return zip([0, *ends], [*ends, len(places)], strict=True)


def _extents(run: Run, places: list[int]) -> list[Extent]:
    """One run's pages as extents, neighbours of one source joined."""
    own, start, lazy = places[run.at : run.at + run.pages], run.start, run.lazy
    new, chunk, last = tuple.__new__, Source.CHUNK, (1 << _CHUNK_SHIFT) - 1
    return [
        # Of a tree that was dumped often there are tens of thousands, hardly any of another source: the
        # constructor of a named tuple takes three times as long.
        new(Extent, (start + begin, end - begin, chunk, place >> _CHUNK_SHIFT, place & last, lazy))
        if 0 <= (place := own[begin]) < _WEIGHTS
        else _extent(start + begin, end - begin, place, lazy)
        for begin, end in stretches(own)
    ]


def _extent(start: int, pages: int, place: int, lazy: bool) -> Extent:
    if place == ZERO:
        return Extent(start, pages, Source.ZERO, 0, 0, lazy)
    source = Source.WEIGHTS if place & _WEIGHTS else Source.CHUNK
    number, page = divmod(place & ~_WEIGHTS, 1 << _CHUNK_SHIFT)
    return Extent(start, pages, source, number, page, lazy)


def _count(places: Sequence[int], new: int, with_weights: bool) -> MemoryCounts:
    zero = places.count(ZERO)
    weights = sum(place >= _WEIGHTS for place in places) if with_weights else 0
    reused = len(places) - zero - weights - new
    return MemoryCounts(*(count * PAGE for count in (len(places), zero, weights, reused, new)))
