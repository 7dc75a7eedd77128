"""Pages told apart: zero, found in files of weights, in the store already, or new.

A page is known by its BLAKE3 digest. Sixteen pages that lie together at a border of 64 KiB, a group, are
looked for first, by one digest of them all: that takes a quarter of the time, and in most of a tree that was
dumped before nothing changed. Pages of other groups are looked for one by one, so that what moved is found as
well. What is left becomes chunks (see chunking.py). A group whose pages come from several chunks is noted, so
that the next dump finds it whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from blake3 import blake3

from crcli.memory.blocks import (
    GROUP_PAGES,
    ZERO_GROUP,
    ZERO_GROUP_DIGEST,
    ZERO_PAGE_DIGEST,
    Ahead,
    Found,
    Run,
    Seen,
    divide,
    ranges,
)
from crcli.memory.chunking import Chunker
from crcli.memory.extents import PAGE, ZERO_PAGE
from crcli.memory.places import NOWHERE, WEIGHTS, ZERO, extent_at, extents_of, place_in_weights
from crcli.memory.weights.references import Reference
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from crcli.memory.chunking import ChunkSink
    from crcli.memory.extents import Extent, SpaceKey
    from crcli.memory.weights.match import Matcher

_ALL_ZERO = [ZERO] * GROUP_PAGES


class KnownPages(Protocol):
    """What the store has already. Called from several threads."""

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """For each BLAKE3 digest of a page, the place where the store has it (NOWHERE where it does not)."""
        ...

    def find_groups(self, digests: Sequence[bytes]) -> list[Sequence[int] | None]:
        """For each BLAKE3 digest of a group, the places of its pages; None where it is not known."""
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


class Classifier:
    """Turns blocks of pages into extents and new chunks. Safe to call from several threads.

    `finish` stores the last chunks.
    """

    def __init__(self, known: KnownPages | None, sink: ChunkSink, matcher: Matcher | None = None) -> None:
        self.known = known
        """What the store has; set before the first block."""
        self._sink = sink
        self._matcher = matcher
        self._chunker = Chunker(sink)

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
        heads, pages = divide(runs, places if files else None)
        groups = self._place_groups(memory, heads, places, ahead.seen.digests if ahead is not None else {})
        pages += [page for head in groups for page in range(head, head + GROUP_PAGES)]
        given = ahead.seen.pages if ahead is not None else {}
        if ahead is not None:
            ahead.fetch(ranges(sorted(page for page in pages if page not in given)))
        unknown = self._place_pages(memory, pages, places, given)
        if ahead is not None:  # before a chunk counts on them: they may turn out not to be to be had
            lacking = [page for page in unknown.keys() & given if self._chunker.may_want(unknown[page])]
            ahead.fetch(ranges(sorted(lacking)))
        parts = self._chunker.claim(unknown, groups, places)
        for part in parts:
            self._chunker.put(part, view, unknown, groups, hurry=hurry)
        mixed = set(groups).difference(*(part.groups for part in parts))
        self._sink.note_mixed((groups[head], places[head : head + GROUP_PAGES]) for head in mixed)
        extents = [
            (run.space, extents_of(places[run.at : run.at + run.pages], run.start, run.lazy)) for run in runs
        ]
        counts = _count(places, sum(len(part.pages) for part in parts), bool(files))
        return Classified(extents, counts, frozenset(files))

    def finish(self) -> None:
        """Store the chunks that still have room. No other thread classifies meanwhile."""
        self._chunker.finish()

    def _classify_whole(self, runs: Sequence[Run], seen: Seen) -> Classified | None:
        """Classify a block that is one find in files from end to end, or all zeros; None for any other.

        Much of a large model's memory is such blocks, and the other way takes ten times as long for them.
        """
        pages = sum(run.pages for run in runs)
        if len(seen.found) == 1 and seen.found[0].pages == pages:
            (found,) = seen.found
            place = place_in_weights(self._refer(found))
            extents = [
                (run.space, [extent_at(run.start, run.pages, place + run.at, run.lazy)]) for run in runs
            ]
            counts = MemoryCounts(total=pages * PAGE, weights=pages * PAGE)
            return Classified(extents, counts, frozenset(piece.file for piece in found.pieces))
        zeros = [digest == ZERO_GROUP_DIGEST for digest in seen.digests.values()]
        if len(zeros) * GROUP_PAGES == pages and all(zeros):
            extents = [(run.space, [extent_at(run.start, run.pages, ZERO, run.lazy)]) for run in runs]
            return Classified(extents, MemoryCounts(total=pages * PAGE, zero=pages * PAGE), frozenset())
        return None

    def _refer(self, found: Found) -> int:
        return self._sink.refer(Reference(found.pieces, found.pages * PAGE, found.digest))

    def _place_weights(self, found: Iterable[Found], places: list[int]) -> set[int]:
        """Place the pages that are found in files of weights; return the numbers of those files."""
        files: set[int] = set()
        for one in found:
            first = place_in_weights(self._refer(one))
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
        asked: list[int] = []
        digests: list[bytes] = []
        for page in pages:  # tens of thousands in a second, most of them known: little is done for those
            if (digest := given.get(page)) is None:
                if is_zero(ZERO_PAGE, page * PAGE):
                    places[page] = ZERO
                    continue
                digest = blake3(view[page * PAGE : (page + 1) * PAGE]).digest()
            asked.append(page)
            digests.append(digest)
        found = self.known.find(digests) if self.known is not None else [NOWHERE] * len(asked)
        unknown: dict[int, bytes] = {}
        for page, digest, place in zip(asked, digests, found, strict=True):
            if place != NOWHERE:
                places[page] = place
            elif digest == ZERO_PAGE_DIGEST:
                places[page] = ZERO
            else:
                unknown[page] = digest
        return unknown


def _digests_of_groups(memory: bytearray, heads: list[int]) -> dict[int, bytes]:
    view, is_zero = memoryview(memory), memory.startswith
    return {
        head: ZERO_GROUP_DIGEST
        if is_zero(ZERO_GROUP, head * PAGE)
        else blake3(view[head * PAGE : (head + GROUP_PAGES) * PAGE]).digest()
        for head in heads
    }


def find_weights(matcher: Matcher, memory: bytearray | memoryview, runs: Sequence[Run]) -> Iterator[Found]:
    """Return what of a block, which `runs` describe, stands in files of weights."""
    view = memoryview(memory)
    for at, pages, pieces in matcher.stretches(memory, runs):
        yield Found(at, pages, pieces, blake3(view[at * PAGE : (at + pages) * PAGE]).digest())


def _count(places: Sequence[int], new: int, with_weights: bool) -> MemoryCounts:
    zero = places.count(ZERO)
    weights = sum(place >= WEIGHTS for place in places) if with_weights else 0
    reused = len(places) - zero - weights - new
    return MemoryCounts(*(count * PAGE for count in (len(places), zero, weights, reused, new)))
