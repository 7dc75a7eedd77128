"""Transparent huge pages for memory of a restored process that it is soon to give up again.

The kernel gives pages of 2 MiB at once instead of 512 of 4 KiB: it is written, and read by a driver, in less
time. They are asked for by the skeleton's mappings (MADV_HUGEPAGE), and only where the program itself has no
say: what a program has mapped behaves as it did before.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from crcli.kernel import write_memory
from crcli.memory.buffers import address_of
from crcli.memory.extents import PAGE, Source
from crcli.memory.writing import write_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from crcli.memory.extents import Extent

HUGE_PAGES = 512
"""Pages of 4 KiB in a huge one, for processors whose pages are of 4 KiB."""

_A_ZERO = memoryview(b"\0")
_ENABLED = "/sys/kernel/mm/transparent_hugepage/enabled"


class Runs:
    """Runs of pages of one address space, ascending and disjoint, as (first page number, pages)."""

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        self._runs = sorted(runs)
        self._starts = [start for start, _ in self._runs]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._runs)

    def __len__(self) -> int:
        return len(self._runs)

    def divide(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """The pages from `start` to `end`, cut where a run begins or ends: (first, end, whether in a run)."""
        at = max(0, bisect_right(self._starts, start) - 1)
        while start < end:
            first, pages = self._runs[at] if at < len(self._runs) else (end, 0)
            if start < first:
                yield start, min(first, end), False
                start = min(first, end)
            if start < (last := min(first + pages, end)):
                yield start, last, True
                start = last
            at += 1


class HugeMemory(NamedTuple):
    """Memory of a process that stands still, for which huge pages were asked.

    `file` is its `/proc/PID/mem`, `runs` where it is, and `empty` the first page of each block of 2 MiB in it
    that holds nothing but zeros.
    """

    pid: int
    file: int
    runs: Runs
    empty: Sequence[int]

    def write(self, piece: memoryview, start: int) -> None:
        """Write pages from page `start` on. The kernel copies them once, and with a lock that it takes once;
        through `/proc/PID/mem` it would copy them twice, and take the lock for every 4 KiB."""
        done = 0
        try:
            with address_of(piece) as address:
                while done < len(piece):
                    done += write_memory(self.pid, start * PAGE + done, address + done, len(piece) - done)
        except OSError:  # the program has made it read-only, or the host allows no such call
            write_all(self.file, piece[done:], start * PAGE + done)

    def touch(self, blocks: Iterable[int]) -> None:
        """Have the kernel bring blocks that are empty."""
        for block in blocks:
            write_all(self.file, _A_ZERO, block * PAGE)


def can_be_had() -> bool:
    """Whether this host's kernel gives huge pages where they are asked for."""
    try:
        with open(_ENABLED, encoding="ascii") as file:
            return "[never]" not in file.read()
    except OSError:
        return False


def aligned(runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The parts of runs that whole huge pages can be had for."""
    for start, pages in runs:
        first = -(-start // HUGE_PAGES) * HUGE_PAGES
        last = (start + pages) // HUGE_PAGES * HUGE_PAGES
        if first < last:
            yield first, last - first


def empty_blocks(runs: Iterable[tuple[int, int]], extents: Iterable[Extent]) -> list[int]:
    """The first pages of the blocks of 2 MiB in `runs`, which are `aligned`, that hold nothing but zeros.

    `extents` are all of the address space, also those that CRIU restores. A block of which no page was there
    is none of these: it would take memory that nobody reckons with.
    """
    zeros: set[int] = set()
    filled: set[int] = set()
    for extent in extents:
        blocks = range(extent.start // HUGE_PAGES, (extent.end - 1) // HUGE_PAGES + 1)
        (zeros if extent.source == Source.ZERO else filled).update(blocks)
    empty = zeros - filled
    firsts = (first for start, pages in runs for first in range(start, start + pages, HUGE_PAGES))
    return [first for first in firsts if first // HUGE_PAGES in empty]
