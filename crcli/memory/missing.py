"""Which pages of a running process are still missing, and where each of them is to go by now.

Pages are named by where they were at the dump, their *origin*. A program that runs moves, drops and doubles
its memory before all of it has come: a missing page goes where mremap took its place, and nowhere when the
program has dropped it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


class Stretch(NamedTuple):
    """`pages` missing pages: at the dump they were at page `origin`, they go to page `origin + shift`."""

    origin: int
    pages: int
    shift: int = 0

    @property
    def end(self) -> int:
        """The first origin after it."""
        return self.origin + self.pages

    @property
    def start(self) -> int:
        """Where it goes."""
        return self.origin + self.shift

    def part(self, origin: int, end: int) -> Stretch:
        """As much of it as lies between two origins, which may be nothing."""
        begin = max(self.origin, origin)
        return Stretch(begin, max(0, min(self.end, end) - begin), self.shift)


class Missing:
    """The missing pages of one address space."""

    def __init__(self, runs: Iterable[tuple[int, int]] = ()) -> None:
        """`runs` are (first page, pages), in any order, without overlaps."""
        self._stretches: list[Stretch] = []  # by origin; no page twice
        for origin, pages in sorted(runs):
            if self._stretches and self._stretches[-1].end == origin:
                origin, pages = self._stretches[-1].origin, self._stretches.pop().pages + pages
            self._stretches.append(Stretch(origin, pages))
        self._shifts = {0}

    def __bool__(self) -> bool:
        return bool(self._stretches)

    def copy(self) -> Missing:
        """The same, for a process that was forked."""
        other = Missing()
        other._stretches = list(self._stretches)
        other._shifts = set(self._shifts)
        return other

    @property
    def pages(self) -> int:
        """How many pages are missing."""
        return sum(stretch.pages for stretch in self._stretches)

    def within(self, origin: int, pages: int) -> list[Stretch]:
        """What is missing of these pages."""
        end = origin + pages
        return [self._stretches[at].part(origin, end) for at in range(*self._touched(origin, end))]

    def origin_of(self, page: int) -> int | None:
        """Which missing page belongs at `page` now; None when none does."""
        for shift in self._shifts:
            at = bisect_right(self._stretches, page - shift, key=lambda stretch: stretch.origin) - 1
            if at >= 0 and self._stretches[at].shift == shift and page - shift < self._stretches[at].end:
                return page - shift
        return None

    def drop(self, origin: int, pages: int) -> None:
        """These pages have come."""
        end = origin + pages
        first, last = self._touched(origin, end)
        self._stretches[first:last] = [
            piece
            for stretch in self._stretches[first:last]
            for piece in (stretch.part(stretch.origin, origin), stretch.part(end, stretch.end))
            if piece.pages
        ]

    def remove(self, start: int, pages: int) -> None:
        """Whatever belongs at these places is not wanted any more."""
        self._take(start, pages)

    def move(self, start: int, pages: int, to: int) -> None:
        """What belongs at `start` and after belongs at `to` and after from now on."""
        moved = [old._replace(shift=old.shift + to - start) for old in self._take(start, pages)]
        self.remove(to, pages)
        if moved:
            self._shifts.update(new.shift for new in moved)
            self._stretches += moved
            self._stretches.sort()  # fast: it is two sorted lists, or a few

    def _take(self, start: int, pages: int) -> list[Stretch]:
        """Take out and return what belongs at these places."""
        taken: list[Stretch] = []
        for shift in self._shifts:
            origin, end = start - shift, start - shift + pages
            first, last = self._touched(origin, end)
            left: list[Stretch] = []
            for stretch in self._stretches[first:last]:
                if stretch.shift != shift:
                    left.append(stretch)
                else:
                    taken.append(stretch.part(origin, end))
                    around = stretch.part(stretch.origin, origin), stretch.part(end, stretch.end)
                    left += [piece for piece in around if piece.pages]
            self._stretches[first:last] = left
        return taken

    def _touched(self, origin: int, end: int) -> tuple[int, int]:
        """The stretches that have pages of these, as a range of their places in the list."""
        first = bisect_right(self._stretches, origin, key=lambda stretch: stretch.end)
        last = bisect_left(self._stretches, end, key=lambda stretch: stretch.origin)
        return first, max(first, last)
