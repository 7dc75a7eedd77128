"""What a running tree's memory consists of, estimated from some of its pages.

Pieces (the pages of one run that lie in one group of 16, see classify.py) are drawn by lot and told apart as
a dump would tell them apart: zero, known to the store, seen before in this tree, new. The tree may run on
meanwhile: nothing is stopped, nothing is written, and only pages that are in memory are read. What is drawn
is bounded by time, not by the size of the tree.
"""

from __future__ import annotations

import os
import random
import time
from bisect import bisect_right
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, Protocol

from blake3 import blake3

from crcli.memory.blocks import GROUP_PAGES, Run
from crcli.memory.chunking import CHUNK_PAGES
from crcli.memory.extents import PAGE, ZERO_PAGE, SpaceKey, SpaceKind
from crcli.memory.pagemap import AddressSpace, PageRun, PageState, zero_frame
from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from crcli.memory.weights.match import Matcher

_CLASSES = ((1 << 8, 0.25, 0.45), (1 << 12, 0.5, 0.8), (1 << 40, 0.55, 0.9))
"""Mappings of fewer pages than the first number are drawn from apart, since the small ones are what changes
from one dump to the next, and would hardly ever be hit beside a large one. The other two are the shares of
the time after which no more of them are searched for pages, and no more pieces drawn."""

_MOST_PIECES, _FEWEST_PIECES = 4096, 48
"""Pieces that are drawn from each class: at most, and however slow the host is."""

_BATCH = 16
_MOST_CHUNKS, _FEWEST_CHUNKS = 16, 3
_MOST_SLICES = 4096
"""Into so many parts a mapping is divided at most that is searched for pages, one part after another."""

_MOST_SPACES = 32
"""Processes that are looked into, the largest; the others are taken to be like them."""

_TWINS_ASKED = 6


class Lookup(Protocol):
    """What the store has already; None stands for what it has not. See image.index.KnownChunks."""

    def find_pages(self, digests: Sequence[bytes]) -> Sequence[object | None]:
        """Look up BLAKE3 digests of pages."""
        ...

    def find_groups(self, digests: Sequence[bytes]) -> Sequence[object | None]:
        """Look up BLAKE3 digests of whole groups."""
        ...


class Makeup(Struct, frozen=True):
    """What memory consists of, in bytes.

    `total` is all that CRIU sends: `zero`, `weights` (found in files of weights), `reused` (the store has it,
    or it comes twice) and `new`. `stored` is the size of what is new once it is compressed, `referred` is how
    much of the store's own memory the image will refer to.
    """

    total: int = 0
    zero: int = 0
    reused: int = 0
    new: int = 0
    stored: int = 0
    referred: int = 0
    weights: int = 0

    def __add__(self, other: Makeup) -> Makeup:
        return Makeup(
            self.total + other.total,
            self.zero + other.zero,
            self.reused + other.reused,
            self.new + other.new,
            self.stored + other.stored,
            self.referred + other.referred,
            self.weights + other.weights,
        )


class Subject(Struct, frozen=True):
    """A process whose memory counts. `expected` is about how much of it CRIU will send (bytes)."""

    pid: int
    expected: int


_Fresh = dict[bytes, tuple[int, int, bytes]]


class Counted(Struct):
    """Pages of one kind that were looked at, new ones or known ones.

    `seen` says how often each was met. A page that n processes share since a fork is sent n times and stored
    once: 1/n of it counts in `own`, the rest in `again`. Those are not in `seen`.
    """

    seen: Counter[bytes] = field(default_factory=Counter)
    alone: float = 0.0
    own: float = 0.0
    again: float = 0.0

    @property
    def sent(self) -> float:
        """All of them."""
        return self.alone + self.own + self.again

    def add(self, digest: bytes, pages: int, share: float) -> None:
        """Count `pages` pages with this digest, `share` of which are ours."""
        if share < 1:
            self.own += pages * share
            self.again += pages * (1 - share)
        else:
            self.alone += pages
            self.seen[digest] += 1

    def distinct(self, part: float) -> float:
        """How many there are once those that come twice are counted once; the sample is `part` of all."""
        return self.own + self.distinct_alone(part)

    def distinct_alone(self, part: float) -> float:
        """The same of those that no other process has."""
        return self.alone * distinct_share(self.seen.values(), part)


class Tally(Struct):
    """Pages that were looked at, counted. `absent` are pages that CRIU would not send after all."""

    zero: int = 0
    weights: int = 0
    absent: int = 0
    known: Counted = field(default_factory=Counted)
    new: Counted = field(default_factory=Counted)
    alone: _Fresh = field(default_factory=dict)
    shared: _Fresh = field(default_factory=dict)
    """Some of the new pages, by digest, as whose, where and what they are: of one process, and of several."""

    @property
    def sent(self) -> float:
        """The pages that CRIU would send."""
        return self.zero + self.weights + self.known.sent + self.new.sent

    @property
    def looked_at(self) -> float:
        """All pages that were read."""
        return self.sent + self.absent

    @property
    def sent_share(self) -> float:
        """The part of all pages that CRIU would send."""
        return self.sent / self.looked_at if self.looked_at else 1.0


def distinct_share(seen: Iterable[int], part: float) -> float:
    """How much of some pages is left when those that come twice are counted once (0 to 1).

    `seen` says how often each was met in a sample, which is the share `part` of all pages. A page that was
    met once may have twins that were not met; how many there are on average follows from the pages that were
    met twice. What was met more often is common: a larger sample would meet no others.
    """
    often = Counter(seen)
    met = sum(times * count for times, count in often.items())
    if not met:
        return 1.0
    copies = 1.0
    if often[1] and part < 1:
        copies += 2 * often[2] / often[1] * (1 - part) / part
    rare: float = (often[1] + often[2]) / (1 - (1 - part) ** copies)
    common = sum(count for times, count in often.items() if times > 2)
    return min(1.0, (rare + common) * part / met)


def make_up(tally: Tally, total_pages: float, part: float, ratios: tuple[float, float]) -> Makeup:
    """Carry a sample's shares over to `total_pages`, of which it is `part`.

    `ratios` are compressed size over size of the new pages that one process has, and that several share.
    """
    total = round(total_pages * PAGE)
    if not tally.sent:  # nothing could be read: take it for new
        return Makeup(total, new=total, stored=total)
    scale = total_pages * PAGE / tally.sent
    alone, shared = tally.new.distinct_alone(part) * scale, tally.new.own * scale
    zero, weights = round(tally.zero * scale), round(tally.weights * scale)
    new = round(alone + shared)
    return Makeup(
        total=total,
        zero=zero,
        reused=max(0, total - zero - weights - new),
        new=new,
        stored=round(alone * ratios[0] + shared * ratios[1]),
        referred=round(tally.known.distinct(part) * scale),
        weights=weights,
    )


class _Piece(NamedTuple):
    """Pages of one process that lie in one group."""

    space: AddressSpace
    run: PageRun


class _Slice(NamedTuple):
    """A part of a mapping of `size` pages."""

    size: int
    space: AddressSpace
    part: PageRun


class _Pieces:
    """All pieces of some runs, without a list of them; they are numbered through."""

    def __init__(self) -> None:
        self._runs: list[tuple[AddressSpace, PageRun]] = []
        self._counts: list[int] = []
        self._ends: list[int] = []
        self.pages = 0
        self.stand_for = 0.0
        """For how many pages these are a sample."""
        self.are_unseen = False
        """Whether there was no time to come upon any."""

    @property
    def cut(self) -> bool:
        """Whether there are more pages than these."""
        return self.stand_for > self.pages

    def add(self, space: AddressSpace, runs: Iterable[PageRun]) -> None:
        for run in runs:
            self._runs.append((space, run))
            self._counts.append((run.end - 1) // GROUP_PAGES - run.start // GROUP_PAGES + 1)
            self.pages += run.end - run.start

    def draw(self, most: int) -> list[int]:
        """The numbers of so many different pieces at most, in random order; the same ones each time."""
        self._ends = list(accumulate(self._counts))
        total = self._ends[-1] if self._ends else 0
        return random.Random(total).sample(range(total), min(most, total))

    def piece(self, number: int) -> _Piece:
        """One of those that were drawn."""
        at = bisect_right(self._ends, number)
        space, run = self._runs[at]
        group = run.start // GROUP_PAGES + number - (self._ends[at] - self._counts[at])
        start, end = group * GROUP_PAGES, (group + 1) * GROUP_PAGES
        return _Piece(space, PageRun(max(start, run.start), min(end, run.end)))


class Sampler:
    """Samples one tree, once. A context manager: leaving it lets go of the processes."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        known: Lookup | None,
        ratio_of: Callable[[bytes], float],
        budget_s: float,
        matcher: Matcher | None = None,
    ) -> None:
        """`ratio_of` compresses a chunk as the writer would: stored over raw size. `budget_s` bounds the
        work (seconds), down to the few pieces without which nothing could be said. With a `matcher` what
        stands in files of weights is told apart too."""
        self._subjects = sorted(subjects, key=lambda one: one.expected, reverse=True)[:_MOST_SPACES]
        self._others = len(subjects) - 1
        chosen = sum(subject.expected for subject in self._subjects)
        self._others_too = sum(subject.expected for subject in subjects) / chosen if chosen else 1.0
        self._known = known
        self._matcher = matcher
        self._ratio_of = ratio_of
        self._began = time.thread_time(), time.monotonic()
        self._budget = budget_s
        self._spaces: list[AddressSpace] = []

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *_: object) -> None:
        for space in self._spaces:
            space.close()

    def makeup(self) -> Makeup:
        """What the processes' own memory consists of. Processes that end meanwhile are left out."""
        classes = self._scan()
        tallies = [
            self._look_at(pieces, until) for pieces, (_, _, until) in zip(classes, _CLASSES, strict=True)
        ]
        self._settle(classes, tallies)
        found = Makeup()
        for pieces, tally in zip(classes, tallies, strict=True):
            if pieces.pages:
                stand_for = pieces.stand_for * self._others_too
                part = min(1.0, tally.looked_at / stand_for)
                found += make_up(tally, stand_for * tally.sent_share, part, self._ratios(tally))
        if any(pieces.are_unseen for pieces in classes):
            expected = sum(subject.expected for subject in self._subjects) * self._others_too
            unseen = max(0, round(expected) - found.total)
            found += Makeup(unseen, new=unseen, stored=unseen)  # as in `make_up`: take it for new
        return found

    def _settle(self, classes: list[_Pieces], tallies: list[Tally]) -> None:
        """Where not all of a class was searched for pages: the kernel counts how many there are in all."""
        both = list(zip(classes, tallies, strict=True))
        seen = sum(pieces.pages * tally.sent_share for pieces, tally in both if not pieces.cut)
        guessed = sum(pieces.stand_for * tally.sent_share for pieces, tally in both if pieces.cut)
        rest = sum(subject.expected for subject in self._subjects) / PAGE - seen
        for pieces in classes:
            if pieces.cut and guessed:
                pieces.stand_for = max(float(pieces.pages), pieces.stand_for * rest / guessed)

    def shared_makeup(self, path: str, size: int) -> Makeup:
        """What a shared object consists of, that `path` opens and that holds `size` bytes."""
        tally = Tally()
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return Makeup(size, new=size, stored=size)
        try:
            groups = -(-os.fstat(fd).st_size // (GROUP_PAGES * PAGE))
            order = random.Random(groups).sample(range(groups), min(_MOST_PIECES, groups))
            for count, number in enumerate(order):
                if count >= _FEWEST_PIECES and self._spent() > 0.9:
                    break
                at = number * GROUP_PAGES * PAGE
                if _holds_data(fd, at):
                    self._tell_apart([(fd, at // PAGE, os.pread(fd, GROUP_PAGES * PAGE, at), 1.0)], tally)
        finally:
            os.close(fd)
        pages = size / PAGE
        return make_up(tally, pages, min(1.0, tally.sent / pages), self._ratios(tally))

    def _spent(self) -> float:
        """The share of the time that is used up: our own, or three times as much by the clock."""
        ours, passed = time.thread_time() - self._began[0], time.monotonic() - self._began[1]
        return max(ours, passed / 3) / self._budget

    def _scan(self) -> list[_Pieces]:
        """The pieces in mappings of each class."""
        slices = self._slices()
        found: list[_Pieces] = []
        before = 0
        for limit, until, _ in _CLASSES:
            found.append(self._pieces_of([one for one in slices if before <= one[0] < limit], until))
            before = limit
        return found

    def _slices(self) -> list[_Slice]:
        """What can be searched for pages: one process after another, each in random order."""
        slices: list[_Slice] = []
        for subject in self._subjects:
            try:
                space = AddressSpace(subject.pid)
                self._spaces.append(space)
                own = [_Slice(size, space, part) for size, part in space.slices(_MOST_SLICES)]
            except OSError:
                continue
            slices += random.Random(len(own)).sample(own, len(own))
        return slices

    def _pieces_of(self, slices: list[_Slice], until: float) -> _Pieces:
        """The pieces of these slices, or of as many as there is time for: a little more where none is found,
        as in a mapping of which hardly anything is used."""
        pieces = _Pieces()
        everything = sum(part.end - part.start for _, _, part in slices)
        scanned = 0
        for _, space, part in slices:
            if self._spent() > (until if pieces.pages else 1.0):
                break
            scanned += part.end - part.start
            try:
                pieces.add(space, space.sent(part))
            except OSError:
                continue
        pieces.stand_for = pieces.pages * everything / scanned if scanned else 0.0
        pieces.are_unseen = not pieces.pages and scanned < everything
        return pieces

    def _look_at(self, pieces: _Pieces, until: float) -> Tally:
        """Draw from these pieces until that share of the time is spent."""
        tally = Tally()
        order = pieces.draw(_MOST_PIECES)
        for at in range(0, len(order), _BATCH):
            enough = _FEWEST_PIECES if tally.new.sent > _FEWEST_PIECES else _FEWEST_PIECES * 4
            if at >= enough and self._spent() > until:  # the less is new, the easier it is missed
                break
            drawn = map(pieces.piece, order[at : at + _BATCH])
            batch = [read for piece in drawn for read in self._read(piece, tally)]
            self._tell_apart(batch, tally)
        return tally

    def _read(self, piece: _Piece, tally: Tally) -> Iterable[tuple[int, int, bytes, float]]:
        """The pages of a piece that can be read: whose, where, their bytes, and what share of them is ours.

        Others (swapped out, or gone since) say nothing; the page of zeros that all share is not sent.
        """
        space, run = piece
        try:
            if space.has_alone(run):
                yield space.pid, run.start, space.read(run), 1.0
                return
            states = space.states(run)
            if len(states) < run.end - run.start:  # the process has ended
                return
            shares = self._shares(space, run, states)
            zero = zero_frame() or -1
            if all(state.in_memory and state.frame != zero for state in states):
                yield space.pid, run.start, space.read(run), sum(shares) / len(shares)
                return
            for number, (state, share) in enumerate(zip(states, shares, strict=True), start=run.start):
                if state.in_memory and state.frame == zero:
                    tally.absent += 1
                elif state.in_memory:
                    yield space.pid, number, space.read(PageRun(number, number + 1)), share
        except OSError:
            return

    def _shares(self, space: AddressSpace, run: PageRun, states: list[PageState]) -> list[float]:
        """Of each page one part for each process of the tree that has the same, at the same address, since a
        fork: CRIU sends it for all of them, and it is stored once."""
        others = [other for other in self._spaces if other is not space]
        asked = (
            others if len(others) <= _TWINS_ASKED else random.Random(run.start).sample(others, _TWINS_ASKED)
        )
        same = [0] * len(states)
        for other in asked:
            try:
                theirs = other.states(run)
            except OSError:
                continue
            for at, (us, them) in enumerate(zip(states, theirs, strict=False)):
                same[at] += us.in_memory and us.frame > 0 and us.frame == them.frame
        return [1 / (1 + count * self._others / max(1, len(asked))) for count in same]

    def _tell_apart(self, batch: list[tuple[int, int, bytes, float]], tally: Tally) -> None:
        """Count the pages that were read as a dump would: groups are looked for first, then pages."""
        rest = self._without_known_groups(self._without_weights(batch, tally), tally)
        pages: list[tuple[bytes, int, int, bytes, float]] = []
        for owner, start, raw, share in rest:
            for offset in range(0, len(raw), PAGE):
                page = raw[offset : offset + PAGE]
                if page == ZERO_PAGE:
                    tally.zero += 1
                else:
                    number = start + offset // PAGE
                    pages.append((blake3(page).digest(), owner, number, page, share))
        found: Sequence[object | None] = [None] * len(pages)
        if self._known is not None:
            found = self._known.find_pages([page[0] for page in pages])
        for (digest, owner, number, page, share), there in zip(pages, found, strict=True):
            kind = tally.new if there is None else tally.known
            kind.add(digest, 1, share)
            fresh = tally.alone if share == 1 else tally.shared
            if there is None and len(fresh) < _MOST_CHUNKS * CHUNK_PAGES:
                fresh.setdefault(digest, (owner, number, page))

    def _without_weights(
        self, batch: list[tuple[int, int, bytes, float]], tally: Tally
    ) -> list[tuple[int, int, bytes, float]]:
        """Count what is found in files of weights; return the rest."""
        if self._matcher is None:
            return batch
        rest: list[tuple[int, int, bytes, float]] = []
        for owner, start, raw, share in batch:
            run = Run(SpaceKey(SpaceKind.PROCESS, owner), start, len(raw) // PAGE, True, 0)
            at = 0
            for stretch in self._matcher.stretches(raw, [run]):
                tally.weights += stretch.pages
                if stretch.at > at:
                    rest.append((owner, start + at, raw[at * PAGE : stretch.at * PAGE], share))
                at = stretch.at + stretch.pages
            if at * PAGE < len(raw):
                rest.append((owner, start + at, raw[at * PAGE :], share))
        return rest

    def _without_known_groups(
        self, batch: list[tuple[int, int, bytes, float]], tally: Tally
    ) -> list[tuple[int, int, bytes, float]]:
        if self._known is None:
            return batch
        whole = [read for read in batch if len(read[2]) == GROUP_PAGES * PAGE]
        digests = [blake3(raw).digest() for _, _, raw, _ in whole]
        known: set[int] = set()
        for read, digest, there in zip(whole, digests, self._known.find_groups(digests), strict=True):
            if there is not None:
                tally.known.add(digest, GROUP_PAGES, read[3])
                known.add(id(read))
        return [read for read in batch if id(read) not in known]

    def _ratios(self, tally: Tally) -> tuple[float, float]:
        return self._ratio(tally.alone), self._ratio(tally.shared)

    def _ratio(self, pages_of: _Fresh) -> float:
        """Compressed size over size of new pages: chunks are made of them as a dump makes them."""
        fresh = sorted(pages_of.values())
        chunks = [fresh[at : at + CHUNK_PAGES] for at in range(0, len(fresh), CHUNK_PAGES)]
        random.Random(len(chunks)).shuffle(chunks)
        raw = stored = 0.0
        for count, pages in enumerate(chunks[:_MOST_CHUNKS]):
            if count >= _FEWEST_CHUNKS and self._spent() > 1:
                break
            chunk = b"".join(page for _, _, page in pages)
            raw += len(chunk)
            stored += len(chunk) * self._ratio_of(chunk)
        return stored / raw if raw else 1.0


def _holds_data(fd: int, at: int) -> bool:
    """Whether a file on tmpfs has anything here, or a hole."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA) < at + GROUP_PAGES * PAGE
    except OSError:
        return False
