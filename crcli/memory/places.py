"""Where pages are: one number for each, so that of a million there are lists, and arithmetic on them."""

from __future__ import annotations

from itertools import compress, repeat
from operator import ne, sub
from typing import TYPE_CHECKING, NamedTuple

from crcli.memory.extents import Extent, Source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ZERO, NOWHERE = -2, -1
"""The places of a zero page, and of one that is in no chunk: no place in a chunk is one more than ZERO."""

WEIGHTS = 1 << 60
"""The places of pages that stand in files of weights begin here."""

_CHUNK_SHIFT = 17
"""A place is one number, `chunk << _CHUNK_SHIFT | page`, or the same of a reference with the bit WEIGHTS set.
An extent's offset has 16 bits, so that the last page of one chunk and the first of the next are never
neighbours."""


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


def place_in_weights(reference: int) -> int:
    """The place of the first page of a reference into files of weights."""
    return WEIGHTS | reference << _CHUNK_SHIFT


def stretches(places: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where, in these places, each stretch of pages that follow one another begins and ends."""
    steps = map(sub, places[1:], places)
    breaks = compress(range(1, len(places)), map(ne, steps, repeat(1)))  # few, of hundreds of thousands
    ends = [at for at in breaks if places[at] != ZERO or places[at - 1] != ZERO]
    return zip([0, *ends], [*ends, len(places)], strict=True)


def extents_of(places: Sequence[int], start: int, lazy: bool) -> list[Extent]:
    """Pages of a space, from page `start` on, as extents, neighbours of one source joined."""
    new, chunk, last = tuple.__new__, Source.CHUNK, (1 << _CHUNK_SHIFT) - 1
    return [
        # Of a tree that was dumped often there are tens of thousands, hardly any of another source: the
        # constructor of a named tuple takes three times as long.
        new(Extent, (start + begin, end - begin, chunk, place >> _CHUNK_SHIFT, place & last, lazy))
        if 0 <= (place := places[begin]) < WEIGHTS
        else extent_at(start + begin, end - begin, place, lazy)
        for begin, end in stretches(places)
    ]


def extent_at(start: int, pages: int, place: int, lazy: bool) -> Extent:
    """Pages of a space, from page `start` on, that follow one another from `place` on; or all zero ones."""
    if place == ZERO:
        return Extent(start, pages, Source.ZERO, 0, 0, lazy)
    source = Source.WEIGHTS if place & WEIGHTS else Source.CHUNK
    number, page = divmod(place & ~WEIGHTS, 1 << _CHUNK_SHIFT)
    return Extent(start, pages, source, number, page, lazy)
