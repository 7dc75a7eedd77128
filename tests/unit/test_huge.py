"""Huge pages for what goes to GPUs: where the driver put it, cut into whole huge pages, and what is empty."""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from crcli.gpu.saved import added, ordinary_memory
from crcli.memory.extents import PAGE, Extent, Source
from crcli.memory.huge import HUGE_PAGES, Runs, aligned, empty_blocks

Spans = list[tuple[int, int]]


@st.composite
def spans(draw: st.DrawFn, most: int = 40) -> Spans:
    """Ascending, disjoint runs."""
    found, at = [], 0
    for gap, pages in draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, most)), max_size=8)):
        found.append((at + gap, pages))
        at += gap + pages
    return found


def pages_of(runs: Iterable[tuple[int, int]]) -> list[int]:
    """Page by page."""
    return [page for start, pages in runs for page in range(start, start + pages)]


@given(spans(), spans())
def test_added_memory_is_what_was_not_there(before: Spans, after: Spans) -> None:
    """Page by page; neighbours are one run."""
    found = added(before, after)
    assert pages_of(found) == [page for page in pages_of(after) if page not in set(pages_of(before))]
    assert all(sum(one) < other[0] for one, other in itertools.pairwise(found))


@given(spans(), st.integers(0, 60), st.integers(0, 60))
def test_runs_divide_what_is_in_them_from_what_is_not(runs: Spans, start: int, pages: int) -> None:
    """All pages once, in order, each with the right word."""
    inside = set(pages_of(runs))
    parts = list(Runs(runs).divide(start, start + pages))
    told = [(page, is_in) for first, end, is_in in parts for page in range(first, end)]
    assert told == [(page, page in inside) for page in range(start, start + pages)]
    assert all(first < end for first, end, _ in parts)


@given(spans(2000))
def test_aligned_parts_are_whole_huge_pages_and_as_large_as_can_be(runs: Spans) -> None:
    """Less than a huge page is left out at either end."""
    for start, pages in runs:
        (*found,) = aligned([(start, pages)])
        if not found:
            assert pages < 2 * HUGE_PAGES
            continue
        ((first, count),) = found
        assert first % HUGE_PAGES == count % HUGE_PAGES == 0
        assert 0 <= first - start < HUGE_PAGES
        assert 0 <= start + pages - first - count < HUGE_PAGES


def test_blocks_without_contents_are_found() -> None:
    """One page that is not zero is enough for the kernel to bring a block; where no page was, none is."""
    first = 4 * HUGE_PAGES
    extents = [
        Extent(first, HUGE_PAGES + 1, Source.CHUNK, 0, 0),
        Extent(first + HUGE_PAGES + 1, 2 * HUGE_PAGES, Source.ZERO),
        Extent(first + 5 * HUGE_PAGES - 1, 1, Source.WEIGHTS, 0, 0),
    ]
    found = empty_blocks([(first, 6 * HUGE_PAGES)], extents)
    assert found == [first + number * HUGE_PAGES for number in (2, 3)]


def test_memory_that_comes_and_goes_is_seen_in_the_map() -> None:
    """Private and writable memory of no file; what cannot be written to is none."""
    before = ordinary_memory(os.getpid())
    size = 64 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        found = added(before, ordinary_memory(os.getpid()))
        assert sum(pages for _, pages in found) * PAGE >= size
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ):
        assert sum(pages for _, pages in added(before, ordinary_memory(os.getpid()))) * PAGE < size
    assert ordinary_memory(1 << 30) == []
