"""Memory in rounds: whatever changes between them, what is laid together is what the tree had at the end."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crcli.criu.page_server import PageProtocolError, receive_pages
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey, SpaceKind
from crcli.memory.frames import Frames, changed
from crcli.memory.intake import Intake
from crcli.memory.layers import Layer, Layers, count, cut, only_referred, without
from crcli.memory.pagemap import AddressSpace, PageRun, zero_frame
from crcli.memory.weights.references import Piece, Reference
from crcli.memory.weights.views import View
from crcli.pipeline import rounds
from crcli.pipeline.rounds import MOST_AUTO_ROUNDS, SHORT_MS, Round, Rounds
from crcli.pipeline.stages import PRE_COPY_AUTO
from tests.support.memory import KeepingSink, MemoryFile, page, rebuilt

A, B = SpaceKey(SpaceKind.PROCESS, 41), SpaceKey(SpaceKind.PROCESS, 42)
SHARED = SpaceKey(SpaceKind.SHARED, 7)

OPEN2, PARENT, ADD_F, FORCE_CLOSE = 4, 5, 6, 0x1024
HEADERS = {"new": struct.Struct("<IxxxxQQQ"), "old": struct.Struct("<IIQQ")}

slowly = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])

Memory = dict[SpaceKey, dict[int, int]]
"""The number of each page's contents, by space and page number."""


@dataclass
class Criu:
    """CRIU's end of the page server's protocol, for as long as one round lasts."""

    channel: socket.socket
    header: struct.Struct
    answers: dict[SpaceKey, bool] = field(default_factory=dict)

    def say(self, command: int, space: SpaceKey | None = None, start: int = 0, pages: int = 0) -> None:
        """Send one header."""
        owner = space.number << 8 | space.kind if space else 0
        self.channel.sendall(self.header.pack(command, pages, start * PAGE, owner))

    def hear(self, size: int) -> bytes:
        """Wait for an answer."""
        return self.channel.recv(size, socket.MSG_WAITALL)

    def dump(self, memory: Memory, clean: Mapping[SpaceKey, set[int]], *, is_last: bool) -> None:
        """Send a round as CRIU does: asked before, or (the last one) only as the pages go."""
        if not is_last:
            for space in memory:
                if space.kind == SpaceKind.PROCESS:
                    self.say(PARENT, space)
                    self.answers[space] = bool(struct.unpack("<i", self.hear(4))[0])
        for space, pages in memory.items():
            self.say(OPEN2, space)
            answer = bool(struct.unpack("<b", self.hear(1))[0])
            assert self.answers.setdefault(space, answer) == answer
            for number in sorted(pages):
                if answer and number in clean.get(space, ()):
                    self.say(ADD_F | 1 << 16, space, number, 1)
                else:
                    self.say(ADD_F | (4 | 2 * (number % 2)) << 16, space, number, 1)
                    self.channel.sendall(page(pages[number]))
        self.say(FORCE_CLOSE)
        assert self.hear(4) == bytes(4)


@contextmanager
def listening(intake: Intake, layout: str = "new") -> Iterator[Criu]:
    """CRIU's end of a channel; what comes through it is taken in, until the block ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    failures: list[BaseException] = []

    def take() -> None:
        try:
            receive_pages(ours, intake)
        except BaseException as error:
            failures.append(error)
            ours.shutdown(socket.SHUT_RDWR)

    receiver = threading.Thread(target=take, daemon=True)
    receiver.start()
    with ours, theirs:
        try:
            yield Criu(theirs, HEADERS[layout])
        except OSError:
            pass  # the receiver gave up
        receiver.join(10)
    assert not receiver.is_alive()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("layout", HEADERS)
def test_a_dump_that_failed_before_its_first_page_is_let_go(layout: str) -> None:
    """CRIU ends a session in which nothing was sent, and waits, the tree frozen, until it is answered."""
    with closing(Intake(None, KeepingSink())) as intake, listening(intake, layout) as criu:
        criu.channel.settimeout(5)
        criu.say(FORCE_CLOSE)
        assert criu.hear(4) == bytes(4)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[Memory, dict[SpaceKey, set[int]]]]:
    """For each round the tree's memory, and which of its pages were not written to since the one before."""
    numbers = st.integers(0, 6)
    pages = st.dictionaries(st.integers(0, 60), numbers, max_size=40)
    memory: Memory = {A: draw(pages)}
    history: list[tuple[Memory, dict[SpaceKey, set[int]]]] = [(memory, {})]
    for _ in range(draw(st.integers(0, 4))):
        later: Memory = {}
        clean: dict[SpaceKey, set[int]] = {}
        for space in draw(st.lists(st.sampled_from([A, B, SHARED]), min_size=1, unique=True)):
            written, gone = draw(pages), draw(st.sets(st.integers(0, 60), max_size=20))
            before = memory.get(space, {}) if draw(st.integers(0, 5)) else {}  # now and then all is new
            kept = {at: value for at, value in before.items() if at not in gone and at not in written}
            later[space] = kept | written
            clean[space] = set(kept)
        memory = later
        history.append((memory, clean))
    return history


@slowly
@given(histories(), st.sampled_from(["new", "old"]), st.sampled_from([None, 0, 40 * PAGE, 1 << 30]))
def test_rounds_laid_together_are_the_last_memory(
    history: list[tuple[Memory, dict[SpaceKey, set[int]]]], layout: str, limit: int | None
) -> None:
    """Spoken as CRIU speaks, in both layouts of its headers: pages written, dropped, new; spaces that begin,
    end, and come again."""
    sink, layers = KeepingSink(), Layers()
    with (
        MemoryFile(limit or 0) as overflow,
        closing(Intake(None, sink, overflow if limit else None)) as intake,
    ):
        for number, (memory, clean) in enumerate(history):
            is_last = number == len(history) - 1
            intake.begin_round(layers, is_last=is_last)
            with listening(intake, layout) as criu:
                criu.dump(memory, clean, is_last=is_last)
            assert SHARED not in criu.answers or not criu.answers[SHARED]
            if not is_last:
                taken = intake.end_round()
                private = [value for space, pages in memory.items() if space != SHARED for value in pages]
                assert taken.counts.total <= len(private) * PAGE
                layers.add(taken.spaces, taken.inherited)
        spaces, counts = intake.finish()
    whole = layers.under(spaces, intake.inherited)
    found = {key: raw for key, (raw, _) in rebuilt(whole, sink.chunks).items()}
    assert found == {
        (space, at): page(value) for space, pages in memory.items() for at, value in pages.items()
    }
    assert set(whole) == set(memory)
    everything = count(whole, adopted=())
    assert everything.total == len(found) * PAGE >= counts.total
    assert everything.new == len({raw for raw in found.values() if any(raw)}) * PAGE
    assert everything.zero == sum(not any(raw) for raw in found.values()) * PAGE


def test_pages_that_are_needed_early_are_kept_over_rounds() -> None:
    """What the trial needs is at hand also where only an early round sent it, as far as it is still there."""
    memory: Memory = {A: {2: 1, 4: 2, 6: 3, 8: 4}}
    with closing(Intake(None, KeepingSink())) as intake:
        layers = Layers()
        for written in ({}, {4: 9}, {}):
            memory[A] |= written
            clean = {A: set(memory[A]) - set(written)} if layers.rounds else {}
            intake.begin_round(layers, is_last=layers.rounds == 2)
            with listening(intake) as criu:
                criu.dump(memory, clean, is_last=layers.rounds == 2)
            if layers.rounds < 2:
                taken = intake.end_round()
                layers.add(taken.spaces, taken.inherited)
                memory[A].pop(8, None)
        assert sorted(intake.kept[A]) == [(2, page(1)), (4, page(9)), (6, page(3))]


def test_pages_inherited_from_nowhere_are_refused() -> None:
    """Before any round, CRIU has been told that there is no parent: headers without contents are an error."""
    with (
        closing(Intake(None, KeepingSink())) as intake,
        pytest.raises(PageProtocolError, match="without"),
        listening(intake) as criu,
    ):
        criu.say(OPEN2, A)
        assert criu.hear(1) == b"\0"
        criu.say(ADD_F | 1 << 16, A, 5, 3)
        criu.hear(1)


def test_a_round_that_is_cut_off_can_be_forgotten() -> None:
    """Its pages are dropped, also those of a run that came in part; the next round is whole."""
    sink, layers = KeepingSink(), Layers()
    with closing(Intake(None, sink)) as intake:
        intake.begin_round(layers, is_last=False)
        with pytest.raises(ConnectionError), listening(intake) as criu:
            criu.say(OPEN2, A)
            criu.hear(1)
            criu.say(ADD_F | 4 << 16, A, 5, 3)
            criu.channel.sendall(page(1) + page(2)[:100])
            criu.channel.close()
        intake.end_round()
        intake.begin_round(layers, is_last=True)
        with listening(intake) as criu:
            criu.dump({A: {5: 7}}, {}, is_last=True)
        spaces, counts = intake.finish()
    assert {key: raw for key, (raw, _) in rebuilt(spaces, sink.chunks).items()} == {(A, 5): page(7)}
    assert counts.total == PAGE


runs_of_pages = st.lists(st.integers(0, 80), max_size=30, unique=True).map(
    lambda pages: [PageRun(at, at + 1) for at in sorted(pages)]
)


def joined(runs: list[PageRun]) -> list[PageRun]:
    """The same pages in as few runs as possible."""
    whole: list[PageRun] = []
    for run in runs:
        if whole and whole[-1].end == run.start:
            whole[-1] = PageRun(whole[-1].start, run.end)
        else:
            whole.append(run)
    return whole


def pages_of(runs: list[PageRun]) -> list[int]:
    """The pages of runs, in their order."""
    return [at for run in runs for at in range(run.start, run.end)]


@given(runs_of_pages, runs_of_pages, st.booleans(), st.booleans())
def test_pages_without_others(some: list[PageRun], others: list[PageRun], one: bool, two: bool) -> None:
    """However they are cut, what is left of pages is those that are not among the others."""
    left = without(joined(some) if one else some, joined(others) if two else others)
    assert pages_of(left) == [at for at in pages_of(some) if at not in set(pages_of(others))]


@given(runs_of_pages, runs_of_pages, st.integers(1, 7))
def test_what_is_known_of_pages(sent: list[PageRun], asked: list[PageRun], step: int) -> None:
    """Each page is either found, at its place in its chunk, or said to be unknown."""
    layers = Layers()
    whole = joined(sent)
    layers.add({A: [Extent(run.start, run.end - run.start, Source.CHUNK, 3, run.start) for run in whole]}, {})
    found, unknown = layers.within(A, joined(asked)[::step])
    wanted = pages_of(joined(asked)[::step])
    known = [at for layer in found for at in range(layer.extent.start, layer.extent.end)]
    assert all(layer.extent.offset == layer.extent.start and layer.round == 0 for layer in found)
    assert known == [at for at in wanted if at in set(pages_of(sent))]
    assert pages_of(unknown) == [at for at in wanted if at not in set(pages_of(sent))]


def test_cuts_of_zeros_stay_zeros() -> None:
    """An extent's offset moves along with its start, except where it has none."""
    assert cut(Extent(10, 5, Source.CHUNK, 1, 100), 12, 14) == Extent(12, 2, Source.CHUNK, 1, 102)
    assert cut(Extent(10, 5, Source.ZERO), 12, 14) == Extent(12, 2, Source.ZERO)


def test_an_image_has_the_references_that_it_uses() -> None:
    """What only an early round found in files of weights is not asked for; what is left gets new numbers."""
    references = [Reference((Piece(file, View.BYTES, 0, PAGE),), PAGE, bytes(32)) for file in range(4)]
    spaces = {A: [Extent(1, 1, Source.WEIGHTS, 3), Extent(2, 1, Source.CHUNK, 0), Extent(3, 1, Source.ZERO)]}
    spaces[B] = [Extent(5, 1, Source.WEIGHTS, 1), Extent(6, 1, Source.WEIGHTS, 3)]
    renumbered, left = only_referred(spaces, references)
    assert left == [references[1], references[3]]
    assert renumbered[A] == [Extent(1, 1, Source.WEIGHTS, 1), *spaces[A][1:]]
    assert renumbered[B] == [Extent(5, 1, Source.WEIGHTS, 0), Extent(6, 1, Source.WEIGHTS, 1)]


# --- page frames -------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mremap.restype = ctypes.c_void_p
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


@pytest.mark.skipif(not zero_frame(), reason="needs root, to see page frames")
def test_pages_that_came_another_way_are_not_believed() -> None:
    """Moved by mremap, dropped and read again, never seen: each is noticed, and what stayed is believed."""
    size = 64 * PAGE
    with mmap.mmap(-1, 8 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for at in range(0, len(memory), PAGE):
            memory[at : at + 8] = at.to_bytes(8, "big")
        with closing(AddressSpace(os.getpid())) as before:
            then = Frames.of(before)
        _libc.mremap(address + size, size, size, 3, address)  # onto the first part
        memory.madvise(mmap.MADV_DONTNEED, 2 * size, size)
        assert memory[2 * size] == 0
        first = address // PAGE
        layers = [Layer(Extent(first + 64 * part, 64, Source.CHUNK), 0) for part in (0, 2, 3, 4)]
        with closing(AddressSpace(os.getpid())) as now:
            found = changed(now, layers, [then])
            assert pages_of(found) == [*range(first, first + 64), *range(first + 128, first + 192)]
            assert changed(now, layers[3:], [None]) == [PageRun(first + 256, first + 320)]
            assert changed(now, layers[2:], [Frames([])]) != []


# --- how many rounds ---------------------------------------------------------------------------------------


def rounds_made(wish: int, sizes: list[int], late_after: int = 99) -> int:
    """How many rounds a tree of 1000 bytes gets, a byte a millisecond, that sends so many each time."""
    with closing(Intake(None, KeepingSink())) as intake:
        made = Rounds(None, intake, None, None, answer_limits=False)  # type: ignore[arg-type]
        left = iter(sizes)
        with patch.object(made, "_make_one", lambda: made.done.append(Round(next(left), 1.0))):
            made.make(wish, 1000, float, lambda _: len(made.done) >= late_after)
    return len(made.done)


def test_auto_ends_when_rounds_do_not_pay() -> None:
    """Little is left, or it no longer halves, or there were enough; and none where the tree is small."""
    assert rounds_made(PRE_COPY_AUTO, [1000, 400, int(SHORT_MS) - 1, 0]) == 3
    assert rounds_made(PRE_COPY_AUTO, [1000, 700, 100]) == 2
    assert rounds_made(PRE_COPY_AUTO, [1 << 20 >> n for n in range(1, 20)]) == MOST_AUTO_ROUNDS
    with closing(Intake(None, KeepingSink())) as intake:
        small = Rounds(None, intake, None, None, answer_limits=False)  # type: ignore[arg-type]
        assert small.make(PRE_COPY_AUTO, 1000, lambda _: SHORT_MS - 1, lambda _: False) == ()
        assert small.done == []


def test_a_number_is_kept_but_for_a_deadline() -> None:
    """So many rounds, whatever they bring, as long as there is time."""
    assert rounds_made(3, [5, 5, 5, 5]) == 3
    assert rounds_made(3, [5, 5, 5, 5], late_after=1) == 1


def test_what_is_lacking_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without tracking, or without a sight of page frames, there are no rounds."""
    monkeypatch.setattr(rounds, "tracks_writes", lambda: True)
    monkeypatch.setattr(rounds, "zero_frame", lambda: 5)
    assert rounds.rounds_here(2) == (2, ())
    monkeypatch.setattr(rounds, "zero_frame", lambda: 0)
    with pytest.raises(rounds.HostLacks, match="CAP_SYS_ADMIN"):
        rounds.rounds_here(2)
    wish, findings = rounds.rounds_here(PRE_COPY_AUTO)
    assert wish == 0 and [finding.name for finding in findings] == ["pre-copy-left-out"]
