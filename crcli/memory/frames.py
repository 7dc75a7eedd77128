"""Whether a page that the kernel calls unwritten is still the page that it was.

The kernel's soft-dirty bits say which pages a process has written to, and CRIU goes by them. They say nothing
of pages that came to an address in another way: mremap(2) moves whole page tables (2 MiB) and leaves their
bits as they are, a read of memory that was given back (MADV_DONTNEED) brings the kernel's huge page of zeros,
and KSM puts a merged page in place of what was written. In all of these the address has another page frame
than before. So the frames of a tree are noted before a round, and what is inherited from that round is
believed only where the same frame is at the same address still.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from crcli.memory.pagemap import AddressSpace, PageRun

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from crcli.memory.layers import Layer

_WHERE = 0b11 << 62 | (1 << 55) - 1
"""Of a pagemap entry: in memory, swapped out, and the frame (or the place in swap)."""

_WINDOW = 1 << 13
"""Pages whose frames are read at once."""


class Frames:
    """Where the pages of one process's private memory were, at one time. Zero stands for nowhere."""

    def __init__(self, parts: list[tuple[int, Any]]) -> None:
        self._parts = parts
        self._starts = [start for start, _ in parts]

    @classmethod
    def of(cls, memory: AddressSpace) -> Frames:
        """Note them now; the process may run meanwhile. Raises OSError when it has ended."""
        parts = []
        for _, part in memory.slices():
            found = _frames(memory, part)
            if found.any():
                parts.append((part.start, found))
        return cls(parts)

    def at(self, run: PageRun) -> Any:
        """Where these pages were: an array with a number for each."""
        import numpy as np

        found = np.zeros(run.end - run.start, np.uint64)
        at = max(0, bisect_right(self._starts, run.start) - 1)
        while at < len(self._parts) and self._starts[at] < run.end:
            start, part = self._parts[at]
            first, last = max(start, run.start), min(start + len(part), run.end)
            if first < last:
                found[first - run.start : last - run.start] = part[first - start : last - start]
            at += 1
        return found


def changed(memory: AddressSpace, layers: Sequence[Layer], then: Sequence[Frames | None]) -> list[PageRun]:
    """The pages of `layers` (ascending) that have another frame than before the round that sent them.

    `then` are the process's frames before each round, None where it was not seen.
    """
    now = _Window(memory)
    found: list[PageRun] = []
    for layer in layers:
        whole = PageRun(layer.extent.start, layer.extent.end)
        before = then[layer.round]
        if before is None:
            found.append(whole)
            continue
        expected = before.at(whole)
        different = (expected != now.at(whole)) | (expected == 0)
        if different.any():
            found.extend(_runs(different, whole.start))
    return found


class _Window:
    """The frames of a process that stands still, read in pieces as they are asked for in ascending order."""

    def __init__(self, memory: AddressSpace) -> None:
        self._memory = memory
        self._start = self._end = 0
        self._frames: Any = None

    def at(self, run: PageRun) -> Any:
        if not self._start <= run.start <= run.end <= self._end:
            self._start, self._end = run.start, max(run.end, run.start + _WINDOW)
            self._frames = _frames(self._memory, PageRun(self._start, self._end))
        return self._frames[run.start - self._start : run.end - self._start]


def _frames(memory: AddressSpace, run: PageRun) -> Any:
    import numpy as np

    return np.frombuffer(memory.entries(run), "<u8") & np.uint64(_WHERE)


def _runs(chosen: Any, first: int) -> Iterator[PageRun]:
    """The stretches of an array that are true, as pages from `first` on."""
    import numpy as np

    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0)).tolist()
    yield from (
        PageRun(first + begin, first + end) for begin, end in zip(edges[::2], edges[1::2], strict=True)
    )
