"""Blocks of pages: so many as are classified at once, and what is known of one before that."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from crcli.memory.extents import PAGE, ZERO_PAGE, SpaceKey
from crcli.memory.places import NOWHERE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from crcli.memory.weights.references import Piece

BLOCK_PAGES = 1024
"""Pages in one block at most (4 MiB): what is classified at once."""

GROUP_PAGES = 16
"""Pages that are looked for together."""

DIGEST = 32
KEY = 8
"""So many bytes of a digest are enough to tell that it may be a known one."""

ZERO_GROUP = ZERO_PAGE * GROUP_PAGES
ZERO_GROUP_DIGEST = blake3(ZERO_GROUP).digest()
ZERO_PAGE_DIGEST = blake3(ZERO_PAGE).digest()


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


def heads_of(runs: Sequence[Run]) -> list[int]:
    """The first pages of the whole groups in a block."""
    return divide(runs, None)[0]


def divide(runs: Sequence[Run], places: list[int] | None) -> tuple[list[int], list[int]]:
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


def parts_of(runs: Sequence[Run], begin: int, end: int) -> list[tuple[int, int, int]]:
    """Where the pages from `begin` to `end` of a block are: of each part its place in the block, its address
    and its size (bytes)."""
    cut = [(run, max(begin, run.at), min(end, run.at + run.pages)) for run in runs]
    return [
        (first * PAGE, (run.start + first - run.at) * PAGE, (last - first) * PAGE)
        for run, first, last in cut
        if first < last
    ]


def ranges(pages: Sequence[int]) -> list[tuple[int, int]]:
    """These pages as ranges: the first page of each, and the one behind its last."""
    ends = [at for at in range(1, len(pages)) if pages[at] != pages[at - 1] + 1]
    return [
        (pages[begin], pages[end - 1] + 1)
        for begin, end in zip([0, *ends], [*ends, len(pages)], strict=True)
        if end
    ]
