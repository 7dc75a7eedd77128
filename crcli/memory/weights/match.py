"""Memory covered by references into files: found by samples, proven byte by byte.

A block is covered piece by piece: where the last piece left off, else where a sample leads. Each piece is
extended as far as the bytes are equal, in steps that double, so that the work is in proportion to what is
found; what misleads is paid for out of a budget, and when that is spent the rest of the block is stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from crcli.memory.extents import PAGE
from crcli.memory.weights.references import Piece
from crcli.memory.weights.samples import samples
from crcli.memory.weights.views import element_bytes, source_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from crcli.memory.blocks import Run
    from crcli.memory.extents import SpaceKey
    from crcli.memory.weights.files import WeightsFile
    from crcli.memory.weights.samples import Index, Stream

_FIRST_STEP = 4096
_SHORTEST = 64
"""A piece shorter than this (bytes) is not worth its reference."""

_SHORTEST_BY_HINT = 512
_BUDGET = 8
"""How many times its own size of bytes may be compared in vain for a block."""

_MOST_FAILURES = 128
"""After so many samples in a row that lead nowhere a run is given up."""

_MOST_PIECES_PER_PAGE = 8
_TRIED_PER_SAMPLE = 4


class Stretch(NamedTuple):
    """Whole pages of a block, `pages` from page `at` on, that pieces cover without a gap."""

    at: int
    pages: int
    pieces: tuple[Piece, ...]


class _Found(NamedTuple):
    """Bytes `begin` to `end` of a block, which stand in a stream from `place` on."""

    begin: int
    end: int
    stream: int
    place: int


class _Hint(NamedTuple):
    """Where the next byte of a space may be: the stream and place after the last piece, and its last jump."""

    address: int
    stream: int
    place: int
    jump: int


class Matcher:
    """Finds what of a block stands in the files. Safe to call from several threads."""

    def __init__(self, files: Sequence[WeightsFile], index: Index) -> None:
        self.files = files
        self._index = index
        self._hints: dict[SpaceKey, _Hint] = {}

    def stretches(self, memory: Any, runs: Sequence[Run]) -> list[Stretch]:
        """Return the pages of a block (a buffer that `runs` describe) that need not be stored."""
        import numpy as np

        data = np.frombuffer(memory, dtype=np.uint8)
        found: list[Stretch] = []
        for run in runs:
            if data[run.at * PAGE : (run.at + run.pages) * PAGE].view("<u8").any():
                found += _Cover(self, data, run).stretches()
        return found

    def changed(self) -> set[int]:
        """The numbers of the files that were changed since they were opened."""
        return {number for number, file in enumerate(self.files) if file.has_changed()}

    def close(self) -> None:
        """Close the files."""
        for file in self.files:
            file.close()

    def read(self, stream: Stream, place: int, length: int) -> Any:
        """Return up to `length` bytes of a stream from `place` on (whole elements of it)."""
        length = max(0, min(length, stream.length - place))
        offset = stream.start + source_bytes(stream.view, place)
        return self.files[stream.file].read_view(stream.view, offset, length)


class _Cover:
    """One run of pages on its way to being covered."""

    def __init__(self, matcher: Matcher, data: Any, run: Run) -> None:
        self._matcher = matcher
        self._index = matcher._index
        self._data = data
        self._run = run
        self._low = run.at * PAGE
        self._high = self._low + run.pages * PAGE
        self._shift = run.start * PAGE - self._low  # from a place in the block to an address
        self._budget = _BUDGET * (self._high - self._low) + 16 * _FIRST_STEP
        self._failures = 0
        self._samples: Iterator[tuple[int, int, int]] | None = None
        self._next_sample: tuple[int, int, int] | None = None

    def stretches(self) -> list[Stretch]:
        return list(self._pages(self._pieces()))

    # --- pieces

    def _pieces(self) -> list[_Found]:
        hint = self._matcher._hints.get(self._run.space)
        found: list[_Found] = []
        at = self._low
        while self._high - at >= _SHORTEST and self._budget > 0:
            piece = (self._by_hint(at, hint) if hint is not None else None) or self._by_sample(at)
            if piece is None:
                break
            hint = self._hint_after(piece, hint)
            found.append(piece)
            at = piece.end
        if hint is not None and found:
            self._matcher._hints[self._run.space] = hint
        return found

    def _hint_after(self, piece: _Found, before: _Hint | None) -> _Hint:
        jump = 0
        if (
            before is not None
            and before.stream == piece.stream
            and before.address == piece.begin + self._shift
        ):
            jump = piece.place - before.place
        place = piece.place + piece.end - piece.begin
        return _Hint(piece.end + self._shift, piece.stream, place, jump or (before.jump if before else 0))

    def _by_hint(self, at: int, hint: _Hint) -> _Found | None:
        """What continues the last piece: right behind it, or as far behind it as the one before was."""
        place = hint.place + at + self._shift - hint.address
        for guess in dict.fromkeys((place, place + hint.jump)):
            stream = self._index.streams[hint.stream]
            if not 0 <= guess < stream.length or guess % element_bytes(stream.view):
                continue
            end = self._forward(at, stream, guess)
            if end - at >= min(_SHORTEST_BY_HINT, self._high - at):
                return _Found(at, end, hint.stream, guess)
        return None

    def _by_sample(self, at: int) -> _Found | None:
        """The piece that the next sample at or behind `at` leads to, which may begin before it."""
        for place, first, count in self._samples_from(at):
            best: _Found | None = None
            for row in range(first, first + min(count, _TRIED_PER_SAMPLE)):
                piece = self._around(at, place, int(self._index.owners[row]), int(self._index.places[row]))
                if piece is not None and (best is None or piece.end > best.end):
                    best = piece
            if best is not None:
                self._failures = 0
                return best
            self._failures += 1
            if self._budget <= 0 or self._failures == _MOST_FAILURES:
                break
        return None

    def _samples_from(self, at: int) -> Iterator[tuple[int, int, int]]:
        """Samples that the index has, from `at` on: each is given once, but for those that lie ahead."""
        if self._samples is None:
            self._samples = self._look_up()
        while True:
            if self._next_sample is None:
                self._next_sample = next(self._samples, None)
            if self._next_sample is None:
                return
            sample, self._next_sample = self._next_sample, None
            if sample[0] >= at:
                yield sample

    def _look_up(self) -> Iterator[tuple[int, int, int]]:
        """No generator: that would hold us, as we hold it, until garbage is collected, which some
        processes never do (see crcli.memory.lookahead)."""
        places, keys = samples(self._data[self._low : self._high])
        first, count = self._index.find(keys)
        known = count > 0
        return zip(
            (places[known] + self._low).tolist(), first[known].tolist(), count[known].tolist(), strict=True
        )

    def _around(self, at: int, place: int, owner: int, target: int) -> _Found | None:
        """Extend from a sample at `place` of the block, `target` of a stream, both ways; not before `at`."""
        stream = self._index.streams[owner]
        end = self._forward(place, stream, target)
        if end - place < 2 * 8:
            return None
        begin = self._backward(place, at, stream, target)
        if end - begin < _SHORTEST:
            return None
        return _Found(begin, end, owner, target - (place - begin))

    def _forward(self, at: int, stream: Stream, place: int) -> int:
        """How far the block is what the stream is, from `at` and `place` on."""
        import numpy as np

        step = _FIRST_STEP
        while at < self._high:
            theirs = self._matcher.read(stream, place, min(step, self._high - at))
            size = len(theirs)
            if not size:
                break
            differs = theirs != self._data[at : at + size]
            first = int(np.argmax(differs))
            if differs[first]:
                self._budget -= step
                element = element_bytes(stream.view)
                return at + first // element * element
            at, place = at + size, place + size
            if size < step:
                break
            step = min(2 * step, 1 << 18)
        return at

    def _backward(self, at: int, limit: int, stream: Stream, place: int) -> int:
        """How far before `at` the block is what the stream is before `place`, not before `limit`."""
        import numpy as np

        step = _FIRST_STEP
        element = element_bytes(stream.view)
        while at > limit and place > 0:
            size = min(step, at - limit, place) // element * element
            if not size:
                break
            theirs = self._matcher.read(stream, place - size, size)
            if len(theirs) < size:
                break
            differs = (theirs != self._data[at - size : at])[::-1]
            first = int(np.argmax(differs))
            if differs[first]:
                self._budget -= step
                return at - first // element * element
            at, place = at - size, place - size
            step = min(2 * step, 1 << 18)
        return at

    # --- pages

    def _pages(self, found: list[_Found]) -> Iterator[Stretch]:
        """The whole pages that pieces cover one after another, those that are all zero left out."""
        begin = 0
        while begin < len(found):
            end = begin + 1
            while end < len(found) and found[end].begin == found[end - 1].end:
                end += 1
            yield from self._whole_pages(found[begin:end])
            begin = end

    def _whole_pages(self, joined: list[_Found]) -> Iterator[Stretch]:
        first, last = -(-joined[0].begin // PAGE), joined[-1].end // PAGE
        if first >= last:
            return
        is_used = self._data[first * PAGE : last * PAGE].view("<u8").reshape(-1, PAGE // 8).any(axis=1)
        for at, end in _runs(is_used.tolist()):
            pieces = list(self._cut(joined, (first + at) * PAGE, (first + end) * PAGE))
            is_whole = sum(piece.length for piece in pieces) == (end - at) * PAGE
            if is_whole and len(pieces) <= _MOST_PIECES_PER_PAGE * (end - at):
                yield Stretch(first + at, end - at, tuple(pieces))

    def _cut(self, joined: list[_Found], begin: int, end: int) -> Iterator[Piece]:
        """The pieces of these bytes of the block; none when a border falls into an element."""
        for piece in joined:
            low, high = max(piece.begin, begin), min(piece.end, end)
            if low >= high:
                continue
            stream = self._index.streams[piece.stream]
            place = piece.place + low - piece.begin
            if place % element_bytes(stream.view) or (high - low) % element_bytes(stream.view):
                return
            yield Piece(stream.file, stream.view, stream.start + source_bytes(stream.view, place), high - low)


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """The runs of True in a list, as (first, after the last)."""
    begin: int | None = None
    for at, flag in enumerate([*flags, False]):
        if flag and begin is None:
            begin = at
        elif not flag and begin is not None:
            yield begin, at
            begin = None
