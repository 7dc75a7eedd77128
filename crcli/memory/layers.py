"""The memory of a dump that is made in rounds: what the last one sent, over what earlier ones did.

In each round every page of a space is either sent, or inherited: not written to since the round before. A
page that is neither is gone. Pure arithmetic on extents; which inherited pages may be believed is decided
elsewhere (frames.py).
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from crcli.memory.classify import MemoryCounts
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey, coalesce
from crcli.memory.pagemap import PageRun

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from crcli.memory.weights.references import Reference


class Layer(NamedTuple):
    """Pages as a round sent them (its number, from 0): nothing newer is known of them."""

    extent: Extent
    round: int


class Layers:
    """What the rounds so far have left: for each space the newest word of each of its pages."""

    def __init__(self) -> None:
        self._spaces: dict[SpaceKey, list[Layer]] = {}
        self.rounds = 0

    def __contains__(self, space: object) -> bool:
        """Whether the last round saw this space."""
        return space in self._spaces

    def add(
        self, sent: Mapping[SpaceKey, Sequence[Extent]], inherited: Mapping[SpaceKey, Sequence[PageRun]]
    ) -> None:
        """Take in a round. Pages that nobody sent stay unknown; spaces that are not in `sent` are gone."""
        spaces: dict[SpaceKey, list[Layer]] = {}
        for space, extents in sent.items():
            kept, _ = self.within(space, inherited.get(space, ()))
            spaces[space] = sorted([*kept, *(Layer(extent, self.rounds) for extent in extents)])
        self._spaces = spaces
        self.rounds += 1

    def within(self, space: SpaceKey, runs: Iterable[PageRun]) -> tuple[list[Layer], list[PageRun]]:
        """What is known of these pages, and those of which nothing is; both ascending."""
        layers = self._spaces.get(space, [])
        found: list[Layer] = []
        unknown: list[PageRun] = []
        for run in sorted(runs):
            place = run.start
            at = max(0, bisect_right(layers, place, key=_start) - 1)
            while at < len(layers) and layers[at].extent.start < run.end:
                extent, number = layers[at]
                if extent.end > place:
                    part = cut(extent, max(place, extent.start), min(run.end, extent.end))
                    if place < part.start:
                        unknown.append(PageRun(place, part.start))
                    found.append(Layer(part, number))
                    place = part.end
                at += 1
            if place < run.end:
                unknown.append(PageRun(place, run.end))
        return found, unknown

    def under(
        self, sent: Mapping[SpaceKey, Sequence[Extent]], inherited: Mapping[SpaceKey, Sequence[PageRun]]
    ) -> dict[SpaceKey, list[Extent]]:
        """The whole of each space in `sent`, with what it inherits laid under it.

        Raises ValueError where it inherits pages that no round has sent.
        """
        whole = {}
        for space, extents in sent.items():
            kept, unknown = self.within(space, inherited.get(space, ()))
            if unknown:
                raise ValueError(f"{space} inherits pages that nobody has: {unknown[0]}")
            whole[space] = coalesce([*extents, *(layer.extent for layer in kept)])
        return whole


def _start(layer: Layer) -> int:
    return layer.extent.start


def cut(extent: Extent, start: int, end: int) -> Extent:
    """The pages `start` to `end` of an extent that has them."""
    skipped = 0 if extent.source == Source.ZERO else start - extent.start
    return extent._replace(start=start, pages=end - start, offset=extent.offset + skipped)


def without(runs: Iterable[PageRun], taken: Iterable[PageRun]) -> list[PageRun]:
    """The pages of `runs` that are not in `taken` either; both ascend, and so does the result."""
    left: list[PageRun] = []
    cuts = list(taken)
    at = 0
    for run in runs:
        place = run.start
        while at < len(cuts) and cuts[at].start < run.end:
            if place < cuts[at].start:
                left.append(PageRun(place, cuts[at].start))
            place = max(place, cuts[at].end)
            if cuts[at].end > run.end:
                break
            at += 1
        if place < run.end:
            left.append(PageRun(place, run.end))
    return left


def only_referred(
    spaces: Mapping[SpaceKey, Sequence[Extent]], references: Sequence[Reference]
) -> tuple[dict[SpaceKey, list[Extent]], list[Reference]]:
    """The same memory, and the references that it has, with their new numbers.

    What was found in files of weights in one round may be written to before the next: then the image must not
    ask for those files.
    """
    listed = {e.chunk for extents in spaces.values() for e in extents if e.source == Source.WEIGHTS}
    number = {old: new for new, old in enumerate(sorted(listed))}
    renumbered = {
        space: [e._replace(chunk=number[e.chunk]) if e.source == Source.WEIGHTS else e for e in extents]
        for space, extents in spaces.items()
    }
    return renumbered, [references[old] for old in sorted(listed)]


def count(spaces: Mapping[SpaceKey, Sequence[Extent]], adopted: Collection[int]) -> MemoryCounts:
    """The counts of an image whose memory came in rounds; `adopted` are the chunks that the store had."""
    total = zero = weights = 0
    new: dict[int, list[tuple[int, int]]] = {}
    for extents in spaces.values():
        for extent in extents:
            total += extent.pages
            if extent.source == Source.ZERO:
                zero += extent.pages
            elif extent.source == Source.WEIGHTS:
                weights += extent.pages
            elif extent.chunk not in adopted:
                new.setdefault(extent.chunk, []).append((extent.offset, extent.offset + extent.pages))
    fresh = sum(map(_union, new.values()))
    reused = total - zero - weights - fresh
    return MemoryCounts(*(pages * PAGE for pages in (total, zero, weights, reused, fresh)))


def _union(spans: list[tuple[int, int]]) -> int:
    """How many numbers lie in at least one of these spans."""
    covered = end = 0
    for start, stop in sorted(spans):
        covered += max(0, stop - max(start, end))
        end = max(end, stop)
    return covered
