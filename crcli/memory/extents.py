"""Memory described: whose pages, where, and what they hold.

Addresses are counted in pages of 4096 bytes. An address space is a process's private memory or one
shared-memory object; CRIU names both by number, and so do we.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PAGE = 4096
ZERO_PAGE = bytes(PAGE)


class SpaceKind(IntEnum):
    """What an address space belongs to. The numbers are part of the image format."""

    PROCESS = 1
    SHARED = 2


class SpaceKey(NamedTuple):
    """One address space: a process by its pid inside its namespace, or a shared object by CRIU's number."""

    kind: SpaceKind
    number: int


class Source(IntEnum):
    """What an extent's pages are taken from. The numbers are part of the image format."""

    ZERO = 0
    CHUNK = 1
    WEIGHTS = 2


class Extent(NamedTuple):
    """A run of `pages` pages at page number `start`, all from one source.

    For Source.CHUNK, page i of the run is page `offset + i` of chunk `chunk` (an index into the image's
    chunk table); for Source.WEIGHTS the same of a reference into files (an index into the image's table of
    those). `lazy` is CRIU's word that the pages may be filled in after the skeleton was restored
    (private anonymous memory); the others are needed earlier.
    """

    start: int
    pages: int
    source: Source
    chunk: int = 0
    offset: int = 0
    lazy: bool = True

    @property
    def end(self) -> int:
        """The first page number after the run."""
        return self.start + self.pages


class Origin(NamedTuple):
    """Where the bytes of an extent are kept: a chunk or a reference, by its number."""

    source: Source
    number: int


def coalesce(extents: list[Extent]) -> list[Extent]:
    """Sort by address and join neighbours that continue one another."""
    extents.sort()
    return join([extent] for extent in extents)


def join(runs: Iterable[list[Extent]]) -> list[Extent]:
    """The extents of runs that ascend, as those of each do; the last of one and the first of the next are
    joined where they continue one another, as those of a run are already."""
    joined: list[Extent] = []
    for run in runs:
        if joined and _continues(joined[-1], run[0]):
            joined[-1] = joined[-1]._replace(pages=joined[-1].pages + run[0].pages)
            joined += run[1:]
        else:
            joined += run
    return joined


def _continues(last: Extent, extent: Extent) -> bool:
    return (
        last.end == extent.start
        and last.source == extent.source
        and last.lazy == extent.lazy
        and (
            extent.source == Source.ZERO
            or (last.chunk == extent.chunk and last.offset + last.pages == extent.offset)
        )
    )


def distinct_bytes(spaces: Mapping[SpaceKey, Sequence[Extent]]) -> tuple[int, int]:
    """How much memory is zeros, and how much is other (bytes): what several spaces have alike counts once."""
    zeros, others = 0, 0
    seen: set[tuple[int, ...]] = set()
    for extents in spaces.values():
        for start, pages, source, number, offset, _ in extents:
            if len(spaces) > 1:
                key = (start, pages, int(source), number, offset)
                if key in seen:
                    continue
                seen.add(key)
            if source == Source.ZERO:
                zeros += pages
            else:
                others += pages
    return zeros * PAGE, others * PAGE


def filled_spans(extents: Iterable[Extent]) -> list[tuple[int, int]]:
    """The addresses of pages that are not zeros: the first, and the one behind the last, of each run."""
    spans: list[tuple[int, int]] = []
    for extent in sorted(extents):
        if extent.source == Source.ZERO:
            continue
        start, end = extent.start * PAGE, extent.end * PAGE
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return spans
