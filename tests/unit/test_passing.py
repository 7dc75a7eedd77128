"""Pages that are hashed on their way in: all of them are described, and what is known is stored no more."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcli.errors import DumpFailed
from crcli.memory import intake
from crcli.memory.classify import BLOCK_PAGES, GROUP_PAGES, KnownPages, MemoryCounts, Run
from crcli.memory.extents import PAGE, Extent, SpaceKey, SpaceKind
from crcli.memory.intake import Intake
from crcli.memory.passing import BLOCKS, Passing
from tests.support.memory import KeepingSink, KnownFrom, MemoryFile, Sent, digests_of, expected, rebuilt
from tests.unit.test_intake import TINY_BLOCKS, USUAL_BLOCKS, assert_taken, channel_with, sent_runs, slowly

A = SpaceKey(SpaceKind.PROCESS, 41)


@pytest.fixture
def passing() -> Iterator[Passing]:
    with Passing(2) as processes:
        yield processes


def take_in(
    runs: Sequence[Sent], sink: KeepingSink, passing: Passing, known: KnownPages | None = None
) -> tuple[dict[SpaceKey, list[Extent]], MemoryCounts, dict[SpaceKey, list[tuple[int, bytes]]]]:
    """Send the runs through an intake that lets them pass; return what it made of them, and what it kept."""
    with MemoryFile(1 << 30) as overflow:
        taking = Intake(known, sink, overflow, passing=passing)
        try:
            taking.let_pass()
            with channel_with(runs) as channel:
                for run in runs:
                    taking.begin_space(run.space)
                    taking.receive(channel, run.space, run.start, len(run.contents), run.lazy)
            return *taking.finish(), taking.kept
        finally:
            taking.abandon()


@slowly
@given(sent_runs(), st.booleans(), st.integers(1, 3))
def test_memory_is_what_it_was(runs: list[Sent], tiny: bool, count: int) -> None:
    """Whatever passes is described, each new page is stored once, and what the trial needs is kept."""
    sink = KeepingSink()
    with patch.multiple(intake, **TINY_BLOCKS if tiny else USUAL_BLOCKS), Passing(count) as passing:
        spaces, counts, kept = take_in(runs, sink, passing)
    assert rebuilt(spaces, sink.chunks) == expected(runs)
    assert_taken(runs, spaces, counts)
    stored = [digest for raw in sink.chunks.values() for digest in digests_of(raw, 1)]
    assert len(stored) == len(set(stored)) == counts.new // PAGE
    early = [run for run in runs if not run.lazy and run.space.kind == SpaceKind.PROCESS]
    there = {
        (space, first + at // PAGE): data[at : at + PAGE]
        for space, listed in kept.items()
        for first, data in listed
        for at in range(0, len(data), PAGE)
    }
    wanted = expected([run for run in early if len(run.contents) <= 64])
    assert there.items() >= {where: raw for where, (raw, _) in wanted.items()}.items()


def contents_of(blocks: int) -> list[int]:
    """Numbers of so many whole blocks of pages, other pages everywhere but for one group of zeros in each."""
    contents: list[int] = []
    for block in range(blocks):
        numbers = list(range(block * 10_000 + 1, block * 10_000 + 1 + BLOCK_PAGES))
        numbers[GROUP_PAGES : 2 * GROUP_PAGES] = [0] * GROUP_PAGES
        contents += numbers
    return contents


@pytest.mark.parametrize("start", [0, 5])
def test_of_a_repeat_only_what_changed_is_stored(passing: Passing, start: int) -> None:
    """Blocks are used again and again; of a group that changed, one page is stored."""
    contents, before = contents_of(3 * BLOCKS), KeepingSink()
    with Passing(1) as first:
        take_in([Sent(A, start, tuple(contents))], before, first)
    contents[100], contents[BLOCK_PAGES + 500] = 77_777, 0
    again, later = Sent(A, start, tuple(contents)), KeepingSink()
    spaces, counts, _ = take_in([again], later, passing, KnownFrom(before, first=1000))
    assert counts.new == PAGE == sum(map(len, later.chunks.values()))
    chunks = later.chunks | {1000 + number: raw for number, raw in before.chunks.items()}
    assert rebuilt(spaces, chunks) == expected([again])


def test_a_group_whose_pages_come_in_two_runs_is_found_whole(passing: Passing) -> None:
    """Runs that continue one another are one, wherever they were parted."""
    contents, before = list(range(1, 1 + 4 * GROUP_PAGES)), KeepingSink()
    with Passing(1) as first:
        take_in([Sent(A, 0, tuple(contents))], before, first)
    parted = [Sent(A, 0, tuple(contents[:20])), Sent(A, 20, tuple(contents[20:]))]
    known = KnownFrom(before, first=1000)
    asked: list[int] = []
    with patch.object(known, "find", lambda digests: asked.extend(digests) or KnownFrom.find(known, digests)):
        _, counts, _ = take_in(parted, KeepingSink(), passing, known)
    assert counts.new == 0 and not asked


def test_what_comes_when_nothing_can_be_stored_is_put_aside(passing: Passing) -> None:
    """A tree need not wait for ever for a store that does not take what is new."""
    sent, sink = Sent(A, 0, tuple(contents_of(2 * BLOCKS))), KeepingSink()
    may_store = threading.Event()
    add = sink.add
    with (
        patch.object(sink, "add", lambda *args, **kwargs: (may_store.wait(30), add(*args, **kwargs))),
        patch.multiple(intake, BLOCK_COUNT=2, _PASSING_PATIENCE_S=0.1),
        MemoryFile(1 << 30) as overflow,
    ):
        taking = Intake(None, sink, overflow, passing=passing)
        taking.let_pass()
        with channel_with([sent]) as channel:
            taking.begin_space(A)
            taking.receive(channel, A, 0, len(sent.contents), lazy=True)
        assert os.fstat(overflow.fd).st_blocks
        may_store.set()
        spaces, _ = taking.finish()
    assert rebuilt(spaces, sink.chunks) == expected([sent])


def test_what_is_new_after_all_is_put_aside(passing: Passing) -> None:
    """A tree that is not as it was need not wait until all of it was compressed."""
    runs = [
        Sent(A, at, tuple(range(at + 1, at + 1 + BLOCK_PAGES)))
        for at in range(0, 9 * BLOCK_PAGES, BLOCK_PAGES)
    ]
    sink = KeepingSink()
    with patch.multiple(intake, BLOCK_COUNT=0, _PASSING_NEW=4 << 20), MemoryFile(1 << 30) as overflow:
        taking = Intake(None, sink, overflow, passing=passing)
        taking.let_pass()
        for number, run in enumerate(runs):
            with channel_with([run]) as channel:
                taking.begin_space(A)
                taking.receive(channel, A, run.start, BLOCK_PAGES, lazy=True)
            _until(lambda done=(number + 1) * BLOCK_PAGES * PAGE: taking._counts.total == done)
            assert bool(taking._spill_end) == (number > 1)
        spaces, _ = taking.finish()
    assert rebuilt(spaces, sink.chunks) == expected(runs)


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_is_killed_fails_the_dump(passing: Passing, when: str) -> None:
    """Whoever waits for it is told, and nobody waits for ever."""
    if when == "before":
        os.kill(passing._pids[0], signal.SIGKILL)
        _wait_for_end(passing._pids[0])
        with pytest.raises(DumpFailed, match="was killed"):
            take_in([Sent(A, 0, tuple(contents_of(4)))], KeepingSink(), passing)
        return
    passing.open(0)
    run = Run(A, 0, GROUP_PAGES, True, 0)
    os.kill(passing._pids[1], signal.SIGSTOP)
    passing.put(0, run, memoryview(bytes(GROUP_PAGES * PAGE)))
    number = passing.end(0)
    threading.Timer(0.1, os.kill, (passing._pids[1], signal.SIGKILL)).start()
    with pytest.raises(DumpFailed, match="was killed"):
        passing.digests(0, number, [run])


def _wait_for_end(pid: int) -> None:
    _until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_process_that_was_stopped_holds_nobody_up_who_gives_up(passing: Passing) -> None:
    """Neither who receives nor who works waits for it once the dump was given up."""
    for pid in passing._pids:
        os.kill(pid, signal.SIGSTOP)
    sent = Sent(A, 0, tuple(contents_of(2 * BLOCKS)))
    with MemoryFile(1 << 30) as overflow:
        taking = Intake(None, KeepingSink(), overflow, passing=passing)
        taking.let_pass()
        failures: list[BaseException] = []

        def receive() -> None:
            try:
                taking.receive(channel, A, 0, len(sent.contents), lazy=True)
            except BaseException as error:
                failures.append(error)

        with channel_with([sent]) as channel:
            taking.begin_space(A)
            receiver = threading.Thread(target=receive, daemon=True)
            receiver.start()
            time.sleep(0.1)
            assert receiver.is_alive()
            taking.give_up()
            receiver.join(10)
            assert not receiver.is_alive()
        taking.abandon()
    assert failures


def test_they_end_with_the_block() -> None:
    """Nothing stays."""
    with Passing(3) as passing:
        pids = list(passing._pids)
        assert len(pids) == 3
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
