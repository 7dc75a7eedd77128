"""Pages taken in: whatever arrives is described, stored once, and held in no more memory than allowed."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crcli.memory import intake
from crcli.memory.blocks import BLOCK_PAGES, GROUP_PAGES, Run
from crcli.memory.chunking import CHUNK_PAGES, Chunker
from crcli.memory.classify import Classified, Classifier, KnownPages, MemoryCounts
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey, SpaceKind
from crcli.memory.intake import Intake
from crcli.records import field
from tests.support.memory import (
    KeepingSink,
    KnownFrom,
    MemoryFile,
    Sent,
    digests_of,
    expected,
    page,
    rebuilt,
)

A, B = SpaceKey(SpaceKind.PROCESS, 41), SpaceKey(SpaceKind.PROCESS, 42)
SHARED = SpaceKey(SpaceKind.SHARED, 7)
TINY_BLOCKS = {"BLOCK_PAGES": GROUP_PAGES, "BLOCK_COUNT": 2}
"""Limits that force back-pressure: two blocks of one group."""

USUAL_BLOCKS = {"BLOCK_PAGES": BLOCK_PAGES, "BLOCK_COUNT": intake.BLOCK_COUNT}

slowly = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def sent_runs(draw: st.DrawFn, fewest: int = 0) -> list[Sent]:
    """Runs of up to three spaces: zero pages, twins within and across spaces, pages of their own, gaps."""
    runs: list[Sent] = []
    for space in draw(st.lists(st.sampled_from([A, B, SHARED]), min_size=min(fewest, 1), unique=True)):
        start = draw(st.integers(0, 1 << 20))
        for _ in range(draw(st.integers(fewest, 5))):
            kind = draw(st.sampled_from(["mixed", "zero", "own", "same"]))
            length = draw(st.integers(1, 70))
            first = draw(st.integers(1, 1 << 30))
            contents = {
                "mixed": lambda n=length: draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)),
                "zero": lambda n=length: [0] * n,
                "own": lambda n=length, f=first: range(f, f + n),
                "same": lambda n=length: [9] * n,
            }[kind]()
            runs.append(Sent(space, start, tuple(contents), draw(st.booleans())))
            start += length + draw(st.sampled_from([0, 0, 1, 5, 100]))
    return runs


@contextmanager
def channel_with(runs: Sequence[Sent]) -> Iterator[socket.socket]:
    """A socket out of which the runs' pages come, one after another, as fast as they are taken."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)

    def send() -> None:
        with theirs:
            try:
                for run in runs:
                    theirs.sendall(run.bytes)
            except OSError:
                pass  # the receiver gave up

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with ours:
        yield ours
    sender.join(10)
    assert not sender.is_alive()


def take_in(
    runs: Sequence[Sent],
    sink: KeepingSink,
    known: KnownPages | None = None,
    overflow: MemoryFile | None = None,
    at_once: bool = False,
) -> tuple[dict[SpaceKey, list[Extent]], MemoryCounts]:
    """Send the runs through an intake, that works on them at once or later; return what it made of them."""
    taking = Intake(known, sink, overflow)
    try:
        if at_once:
            taking.open_gate()
        with channel_with(runs) as channel:
            for run in runs:
                taking.begin_space(run.space)
                taking.receive(channel, run.space, run.start, len(run.contents), run.lazy)
        return taking.finish()
    finally:
        taking.close()


def assert_taken(runs: Sequence[Sent], spaces: dict[SpaceKey, list[Extent]], counts: MemoryCounts) -> None:
    """Assert that the counts add up, and that nothing is stored that did not have to be."""
    contents = [number for run in runs for number in run.contents]
    assert counts.total == len(contents) * PAGE == counts.zero + counts.reused + counts.new
    assert counts.zero == contents.count(0) * PAGE
    assert set(spaces) == {run.space for run in runs}


@slowly
@given(sent_runs(), st.sampled_from([None, 0, 5 * PAGE, 40 * PAGE, 1 << 30]), st.booleans(), st.booleans())
def test_memory_is_what_it_was(runs: list[Sent], limit: int | None, tiny: bool, at_once: bool) -> None:
    """With any overflow and any blocks, the extents describe every page, and each new page is stored once."""
    sink = KeepingSink()
    with patch.multiple(intake, **TINY_BLOCKS if tiny else USUAL_BLOCKS), MemoryFile(limit or 0) as overflow:
        spaces, counts = take_in(runs, sink, None, overflow if limit is not None else None, at_once)
    assert rebuilt(spaces, sink.chunks) == expected(runs)
    assert_taken(runs, spaces, counts)
    stored = [digest for raw in sink.chunks.values() for digest in digests_of(raw, 1)]
    assert len(stored) == len(set(stored)) == counts.new // PAGE
    assert all(0 < len(raw) <= CHUNK_PAGES * PAGE for raw in sink.chunks.values())


@slowly
@given(sent_runs(), sent_runs(), st.integers(0, 40), st.booleans())
def test_what_is_known_is_not_stored_again(
    before: list[Sent], others: list[Sent], shift: int, tiny: bool
) -> None:
    """After a dump, the next one of the same pages (moved, too) stores only those that are really new."""
    sink = KeepingSink()
    take_in(before, sink)
    moved = [Sent(run.space, run.start + shift, run.contents, run.lazy) for run in before]
    runs = moved + [
        Sent(SpaceKey(SpaceKind.PROCESS, 1000 + run.space.number), run.start, run.contents, run.lazy)
        for run in others
    ]
    later = KeepingSink()
    with patch.multiple(intake, **TINY_BLOCKS if tiny else USUAL_BLOCKS):
        spaces, counts = take_in(runs, later, KnownFrom(sink, first=1000))
    chunks = later.chunks | {1000 + number: raw for number, raw in sink.chunks.items()}
    assert rebuilt(spaces, chunks) == expected(runs)
    assert_taken(runs, spaces, counts)
    new = {number for run in others for number in run.contents} - {0}
    new -= {number for run in before for number in run.contents}
    assert counts.new == len(new) * PAGE


def test_unchanged_groups_are_found_by_one_digest() -> None:
    """Of a tree that did not change, no page is looked for by itself but those outside of whole groups."""
    run = Sent(A, 5, tuple(range(1, 301)))
    sink = KeepingSink()
    take_in([run], sink)
    known = KnownFrom(sink, first=0)
    asked: list[bytes] = []
    find = known.find
    with patch.object(known, "find", lambda digests: asked.extend(digests) or find(digests)):
        spaces, counts = take_in([run], KeepingSink(), known)
    assert counts.reused == counts.total
    assert len(asked) == 300 % GROUP_PAGES
    assert rebuilt(spaces, sink.chunks) == expected([run])


def test_runs_that_continue_one_another_make_whole_groups() -> None:
    """However CRIU cuts a mapping into runs, its groups are the same."""
    whole = Sent(A, 3, tuple(range(1, 401)))
    parts = [Sent(A, 3 + at, whole.contents[at : at + 37]) for at in range(0, 400, 37)]
    one, many = KeepingSink(), KeepingSink()
    take_in([whole], one)
    take_in(parts, many)
    assert {d for listed in many.group_digests.values() for d in listed} == {
        d for listed in one.group_digests.values() for d in listed
    }
    assert sum(map(len, one.group_digests.values())) == (400 - 13) // GROUP_PAGES


@pytest.mark.parametrize("pages", [5, 2 * GROUP_PAGES], ids=["pages", "groups"])
def test_what_is_left_of_blocks_shares_chunks(pages: int) -> None:
    """Of a tree that changed here and there all chunks but the last are full; whole groups stay whole."""
    zeros = (0,) * (BLOCK_PAGES - pages)
    runs = [
        Sent(A, at * BLOCK_PAGES, (*range(1 + at * pages, 1 + (at + 1) * pages), *zeros)) for at in range(29)
    ]
    sink = KeepingSink()
    spaces, counts = take_in(runs, sink, at_once=True)
    assert rebuilt(spaces, sink.chunks) == expected(runs)
    assert counts.new == 29 * pages * PAGE
    sizes = sorted(len(raw) // PAGE for raw in sink.chunks.values())
    assert sizes[1:] == [CHUNK_PAGES] * (29 * pages // CHUNK_PAGES)
    assert sum(map(len, sink.group_digests.values())) == 29 * pages // GROUP_PAGES * (pages >= GROUP_PAGES)


def test_a_shared_chunk_is_stored_when_all_of_it_is_there() -> None:
    """A block may be the last that has pages for a chunk, and be there before an earlier one."""
    sink, count = KeepingSink(), 5
    chunker = Chunker(sink)
    blocks = [range(1, 1 + count), range(1 + count, 1 + CHUNK_PAGES)]
    claimed = []
    for block in blocks:
        memory = b"".join(map(page, block))
        digests = dict(enumerate(digests_of(memory, 1)))
        (part,) = chunker.claim(digests, {}, [0] * len(block))
        claimed.append((part, memoryview(memory), digests))
    for part, memory, digests in reversed(claimed):
        assert not sink.chunks
        chunker.put(part, memory, digests, {}, hurry=False)
    assert sink.chunks == {0: b"".join(page(number) for block in blocks for number in block)}
    chunker.finish()
    assert len(sink.chunks) == 1


def test_nothing_is_worked_on_before_the_gate_opens() -> None:
    """While there is room, the tree's pages are only moved out of its way."""
    run = Sent(A, 0, tuple(range(1, 200)))
    sink = KeepingSink()
    with MemoryFile(1 << 30) as overflow, channel_with([run]) as channel:
        taking = Intake(None, sink, overflow)
        taking.receive(channel, A, 0, len(run.contents), lazy=True)
        taking.flush()
        time.sleep(0.05)
        assert not sink.reserved
        taking.open_gate()
        spaces, _ = taking.finish()
    assert rebuilt(spaces, sink.chunks) == expected([run])


def test_without_room_the_source_is_held_back() -> None:
    """With all blocks full the gate opens by itself, and no more pages are taken than there is memory for."""
    run = Sent(A, 0, tuple(range(1, 400)))
    go_on, holding = threading.Event(), threading.Event()

    class HoldingSink(KeepingSink):
        def reserve(self) -> int:
            holding.set()
            assert go_on.wait(10)
            return super().reserve()

    sink = HoldingSink()
    with patch.multiple(intake, **TINY_BLOCKS), channel_with([run]) as channel:
        taking = Intake(None, sink)
        receiver = threading.Thread(target=taking.receive, args=(channel, A, 0, len(run.contents), True))
        receiver.start()
        assert holding.wait(10)
        receiver.join(0.1)
        assert receiver.is_alive()
        assert taking._received <= TINY_BLOCKS["BLOCK_COUNT"] * TINY_BLOCKS["BLOCK_PAGES"]
        go_on.set()
        receiver.join(10)
        spaces, counts = taking.finish()
    assert counts.new == counts.total == len(run.contents) * PAGE
    assert rebuilt(spaces, sink.chunks) == expected([run])


def test_what_holds_the_source_back_goes_first() -> None:
    """Of a tree that does not fit, blocks are worked on before what waits in the overflow."""
    run, limit = Sent(A, 0, tuple(range(1, 400))), 5 * GROUP_PAGES
    order: list[int] = []
    classify = Classifier.classify

    def noting(self: Classifier, memory: bytearray, runs: Sequence[Run], **options: Any) -> Classified:
        order.append(runs[0].start)
        return classify(self, memory, runs, **options)

    sink = KeepingSink()
    with (
        patch.multiple(intake, **TINY_BLOCKS),
        patch.object(Classifier, "classify", noting),
        MemoryFile(limit * PAGE) as overflow,
    ):
        spaces, _ = take_in([run], sink, None, overflow)
    assert order[0] == limit
    assert rebuilt(spaces, sink.chunks) == expected([run])


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["blocks", "overflow"])
def test_early_pages_are_kept_for_the_trial(limit: int) -> None:
    """Short runs that are not lazy stay at hand; long ones, lazy ones and shared memory do not."""
    runs = [
        Sent(A, 10, (1, 2, 3), lazy=False),
        Sent(A, 20, (4, 5)),
        Sent(B, 30, tuple(range(6, 90)), lazy=False),
        Sent(SHARED, 0, (7,), lazy=False),
    ]
    sink = KeepingSink()
    with MemoryFile(limit) as overflow, channel_with(runs) as channel:
        taking = Intake(None, sink, overflow)
        for run in runs:
            taking.begin_space(run.space)
            taking.receive(channel, run.space, run.start, len(run.contents), run.lazy)
        assert taking.kept == {A: [(10, page(1) + page(2) + page(3))], B: [], SHARED: []}
        taking.finish()


@pytest.mark.parametrize("limit", [None, 1 << 30], ids=["blocks", "overflow"])
def test_a_sink_that_fails_ends_the_intake(limit: int | None) -> None:
    """What the sink raises is raised again, by the receiver that would wait for ever, or at the end."""

    class FailingSink(KeepingSink):
        def add(self, *_: object, **__: object) -> None:
            raise OSError(28, "the disk is full")

    runs = [Sent(A, 0, tuple(range(1, 400)))]
    with (
        patch.multiple(intake, **TINY_BLOCKS),
        MemoryFile(limit or 0) as overflow,
        pytest.raises(OSError, match="the disk is full"),
    ):
        take_in(runs, FailingSink(), overflow=overflow if limit else None)


def test_workers_that_get_no_memory_end_the_intake() -> None:
    """Pages that nobody had the memory to look at are never left out of what is returned."""

    def no_memory() -> bytearray:
        if threading.current_thread() is threading.main_thread():
            return bytearray(BLOCK_PAGES * PAGE)
        raise MemoryError

    class NoBlock(intake._Block):
        memory: bytearray = field(default_factory=no_memory)

    with (
        patch.object(intake, "_Block", NoBlock),
        MemoryFile(1 << 30) as overflow,
        pytest.raises(MemoryError),
    ):
        take_in([Sent(A, 0, tuple(range(1, 400)))], KeepingSink(), overflow=overflow)


def test_threads_that_cannot_be_started_are_said_to_be_missing() -> None:
    """What stood in the way of a worker is raised, and those that had begun have ended."""
    start, begun = threading.Thread.start, list[threading.Thread]()

    def start_one(thread: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    with patch.object(threading.Thread, "start", start_one), pytest.raises(RuntimeError, match="new thread"):
        Intake(None, KeepingSink())
    assert not begun[0].is_alive()


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["blocks", "overflow"])
def test_a_source_that_ends_too_early_is_noticed(limit: int) -> None:
    """A run of which only a part comes is never taken for whole."""
    with MemoryFile(limit) as overflow, channel_with([Sent(A, 0, (1, 2, 3))]) as channel:
        taking = Intake(None, KeepingSink(), overflow)
        with pytest.raises(ConnectionError):
            taking.receive(channel, A, 0, 4, lazy=True)
        taking.abandon()
        with pytest.raises(InterruptedError):
            taking.finish()


def test_the_overflow_gives_its_memory_back() -> None:
    """What was worked on no longer takes room in the overflow."""
    run = Sent(A, 0, tuple(range(1, 600)))
    with MemoryFile(1 << 30) as overflow:
        take_in([run], KeepingSink(), overflow=overflow)
        assert os.fstat(overflow.fd).st_blocks == 0


def test_neighbours_of_one_source_are_one_extent() -> None:
    """A mapping of new pages takes one extent for each chunk, zeros take one in all, whatever the runs."""
    runs = [Sent(A, at, tuple(range(at + 1, at + 33))) for at in range(0, 128, 32)]
    runs.append(Sent(A, 128, (0,) * 500))
    spaces, _ = take_in(runs, KeepingSink())
    assert [(e.start, e.pages, e.source) for e in spaces[A]] == [
        (0, 64, Source.CHUNK),
        (64, 64, Source.CHUNK),
        (128, 500, Source.ZERO),
    ]
