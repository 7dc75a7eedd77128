"""Processes that look at pages beside the workers: what they say is true, and nothing depends on them."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest
from blake3 import blake3

from crcli import kernel
from crcli.memory import lookahead as lookahead_module
from crcli.memory.blocks import BLOCK_PAGES, GROUP_PAGES, KEY, ZERO_GROUP_DIGEST, ZERO_PAGE_DIGEST, Run, Seen
from crcli.memory.classify import find_weights
from crcli.memory.extents import PAGE, Source, SpaceKey, SpaceKind
from crcli.memory.intake import Intake
from crcli.memory.lookahead import MOST_RUNS, Lookahead
from crcli.memory.weights.files import WeightsFile
from crcli.memory.weights.match import Matcher
from crcli.memory.weights.samples import Index, index_of
from tests.support.memory import KeepingSink, KnownFrom, MemoryFile, Sent, digests_of, expected, rebuilt
from tests.unit.test_intake import channel_with

A = SpaceKey(SpaceKind.PROCESS, 41)
LIMIT = 64 << 20
GROUP_BYTES = GROUP_PAGES * PAGE


@pytest.fixture
def overflow() -> Iterator[MemoryFile]:
    with MemoryFile(LIMIT) as file:
        yield file


@pytest.fixture
def lookahead(overflow: MemoryFile) -> Iterator[Lookahead]:
    with Lookahead(overflow.fd, overflow.limit) as process:
        yield process


def wait_for(lookahead: Lookahead, blocks: int) -> None:
    """Have them begin; return when so many blocks are done."""
    lookahead.begin()
    end = time.monotonic() + 10
    while _done(lookahead) < blocks:
        assert time.monotonic() < end
        select.select([lookahead._answers], [], [], 0.01)


def _done(lookahead: Lookahead) -> int:
    with lookahead._lock:
        lookahead._hear()
        return len(lookahead._done)


def random_bytes(seed: int, size: int) -> bytes:
    """The same for the same seed."""
    return Random(seed).randbytes(size)


def runs_of(pages: int, start: int = 0) -> list[Run]:
    """One run of so many pages, which begins with a group."""
    return [Run(A, start, pages, True, 0)]


def pages_for(blocks: int) -> Sent:
    """A run of so many whole blocks, other pages everywhere but for one group of zeros in each."""
    contents: list[int] = []
    for block in range(blocks):
        numbers = list(range(block * 10_000 + 1, block * 10_000 + 1 + BLOCK_PAGES))
        numbers[GROUP_PAGES : 2 * GROUP_PAGES] = [0] * GROUP_PAGES
        contents += numbers
    return Sent(A, 0, tuple(contents))


def received(
    overflow: MemoryFile, sent: Sent, sink: KeepingSink, lookahead: Lookahead, **known: object
) -> Intake:
    """An intake that has taken all pages of a run aside, and whose workers have not begun."""
    taking = Intake(known.get("known"), sink, overflow, lookahead=lookahead)  # type: ignore[arg-type]
    with channel_with([sent]) as channel:
        taking.receive(channel, sent.space, sent.start, len(sent.contents), lazy=True)
    taking.flush()
    return taking


def test_it_says_what_blake3_says(overflow: MemoryFile, lookahead: Lookahead) -> None:
    """Groups anywhere in a block have the digests of their bytes, zeros theirs."""
    raw = os.urandom(3 * GROUP_BYTES) + bytes(GROUP_BYTES)
    os.pwrite(overflow.fd, raw, 5 * PAGE)
    runs = [Run(A, 9, 8 + GROUP_PAGES, True, 0), Run(A, 320, 2 * GROUP_PAGES, False, 8 + GROUP_PAGES)]
    number = lookahead.ask(5 * PAGE, runs)
    wait_for(lookahead, 1)
    heads = (7, 8 + GROUP_PAGES, 8 + 2 * GROUP_PAGES)
    digests = {head: blake3(raw[head * PAGE :][:GROUP_BYTES]).digest() for head in heads}
    assert lookahead.next() == (number, Seen(digests, [], {}))
    assert blake3(bytes(GROUP_BYTES)).digest() == ZERO_GROUP_DIGEST


def test_pages_of_groups_that_the_store_does_not_have_are_hashed_too(
    overflow: MemoryFile, lookahead: Lookahead
) -> None:
    """Of up to sixteen such groups in a block, each page, zeros too; of none that is known or all zeros."""
    raw = bytearray(os.urandom(20 * GROUP_BYTES))
    raw[2 * GROUP_BYTES : 3 * GROUP_BYTES] = bytes(GROUP_BYTES)
    raw[5 * PAGE : 6 * PAGE] = bytes(PAGE)
    os.pwrite(overflow.fd, raw, 0)
    known = blake3(raw[GROUP_BYTES : 2 * GROUP_BYTES]).digest()
    lookahead.learn(known[:KEY] + b"anything")
    lookahead.ask(0, runs_of(20 * GROUP_PAGES))
    wait_for(lookahead, 1)
    _, seen = lookahead.next()
    heads = [0, *range(3 * GROUP_PAGES, 18 * GROUP_PAGES, GROUP_PAGES)]
    pages = [page for head in heads for page in range(head, head + GROUP_PAGES)]
    assert seen is not None
    assert seen.pages == {page: blake3(raw[page * PAGE :][:PAGE]).digest() for page in pages}
    assert seen.pages[5] == ZERO_PAGE_DIGEST
    assert len(seen.digests) == 20


def test_what_was_given_out_takes_no_memory(overflow: MemoryFile, lookahead: Lookahead) -> None:
    """What is noted of blocks is bounded by how far they are ahead of the workers, not by the tree."""
    os.pwrite(overflow.fd, os.urandom(GROUP_BYTES), 0)
    for _ in range(3):
        lookahead.ask(0, runs_of(GROUP_PAGES))
    wait_for(lookahead, 3)
    taken = [lookahead.next() for _ in range(3)]
    assert all(seen is not None for _, seen in taken)
    assert not any(lookahead._shared[: 3 * lookahead_module._RECORD])


def test_each_block_is_given_out_once(overflow: MemoryFile, lookahead: Lookahead) -> None:
    """What is done comes first; before that the last ones, which are not worked on any more."""
    os.pwrite(overflow.fd, bytes(3 * GROUP_BYTES), 0)
    zeros = Seen({0: ZERO_GROUP_DIGEST}, [], {})
    first, second, third = (lookahead.ask(at * GROUP_BYTES, runs_of(GROUP_PAGES)) for at in range(3))
    assert lookahead.next() == (third, None)
    wait_for(lookahead, 2)
    assert [lookahead.next(), lookahead.next()] == [(first, zeros), (second, zeros)]
    time.sleep(0.05)
    assert _done(lookahead) == 0
    later = lookahead.ask(0, runs_of(GROUP_PAGES))
    wait_for(lookahead, 1)
    assert lookahead.next() == (later, zeros)


def test_with_processors_to_spare_they_begin_with_the_first_block(overflow: MemoryFile) -> None:
    """Then nothing waits for the workers' beginning."""
    os.ftruncate(overflow.fd, GROUP_BYTES)
    with Lookahead(overflow.fd, LIMIT, 3, at_once=True) as lookahead:
        asked = [lookahead.ask(0, runs_of(GROUP_PAGES)) for _ in range(5)]
        end = time.monotonic() + 10
        while _done(lookahead) < len(asked):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_more_is_not_asked_of_it_than_it_has_room_for(lookahead: Lookahead) -> None:
    """Blocks without whole groups, of too many runs, or beyond what the file may hold are the workers'."""
    assert lookahead.ask(0, []) is None
    assert lookahead.ask(0, [Run(A, 1, GROUP_PAGES, True, 0)]) is None
    assert lookahead.ask(0, runs_of(GROUP_PAGES) * (MOST_RUNS + 1)) is None
    answers = [lookahead.ask(0, runs_of(GROUP_PAGES)) for _ in range(LIMIT // GROUP_BYTES)]
    assert answers.count(None) > len(answers) // 2


def test_what_a_pipe_had_no_room_for_is_handed_out_later(overflow: MemoryFile) -> None:
    """Of a tree that came faster than they look they are told in the end all the same."""
    os.ftruncate(overflow.fd, GROUP_BYTES)
    with Lookahead(overflow.fd, 8 << 30) as lookahead:
        fcntl.fcntl(lookahead._tasks, fcntl.F_SETPIPE_SZ, 4096)
        os.kill(lookahead.pids[0], signal.SIGSTOP)
        for _ in range(1500):
            assert lookahead.ask(0, runs_of(GROUP_PAGES)) is not None
        lookahead.begin()
        assert lookahead._handed == 1024
        os.kill(lookahead.pids[0], signal.SIGCONT)
        end = time.monotonic() + 20
        while _done(lookahead) < 1024:
            assert time.monotonic() < end
        assert lookahead.next()[1] is not None
        assert lookahead._handed == 1500


def test_they_end_with_the_block(overflow: MemoryFile) -> None:
    """Nothing of them is left, whatever they were doing."""
    with Lookahead(overflow.fd, overflow.limit, 3) as lookahead:
        pids = list(lookahead.pids)
        os.kill(pids[0], signal.SIGSTOP)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_where_no_process_may_be_started_the_workers_do_all(
    overflow: MemoryFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on processes is no reason for a dump to fail."""

    def refused() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(kernel, "quiet_fork", refused)
    sent, sink = pages_for(blocks=3), KeepingSink()
    with Lookahead(overflow.fd, LIMIT, 4, at_once=True) as lookahead:
        spaces, _ = received(overflow, sent, sink, lookahead).finish()
    assert rebuilt(spaces, sink.chunks) == expected([sent])


def test_weights_are_found_as_the_workers_find_them(overflow: MemoryFile, tmp_path: Path) -> None:
    """The same pieces and digests as in this process; groups that have a page of them have no digest."""
    path = tmp_path / "weights.bin"
    path.write_bytes(random_bytes(1, 40 * PAGE))
    file = WeightsFile(str(path))
    matcher = Matcher([file], Index.joined([index_of(file)[0]]))
    raw = bytearray(random_bytes(2, 64 * PAGE))
    raw[10 * PAGE : 30 * PAGE] = path.read_bytes()[5 * PAGE : 25 * PAGE]
    raw[40 * PAGE : 44 * PAGE] = path.read_bytes()[: 4 * PAGE]
    runs = runs_of(64)
    expected_ones = list(find_weights(matcher, raw, runs))
    assert [(one.at, one.pages) for one in expected_ones] == [(10, 20), (40, 4)]
    os.pwrite(overflow.fd, raw, 0)
    with Lookahead(overflow.fd, LIMIT, 1, matcher) as lookahead:
        lookahead.ask(0, runs)
        wait_for(lookahead, 1)
        _, seen = lookahead.next()
    assert seen == Seen({48: blake3(raw[48 * PAGE :]).digest()}, expected_ones, {})


def test_of_what_has_too_many_pieces_the_workers_learn_themselves(
    overflow: MemoryFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found does not fit its record: the block is given out as one that nobody looked at."""
    monkeypatch.setattr(lookahead_module, "_FOUND_ROOM", 40)
    path = tmp_path / "weights.bin"
    path.write_bytes(random_bytes(1, 16 * PAGE))
    file = WeightsFile(str(path))
    matcher = Matcher([file], Index.joined([index_of(file)[0]]))
    os.pwrite(overflow.fd, path.read_bytes() + bytes(16 * PAGE), 0)
    with Lookahead(overflow.fd, LIMIT, 1, matcher) as lookahead:
        first, second = lookahead.ask(0, runs_of(16)), lookahead.ask(16 * PAGE, runs_of(16))
        wait_for(lookahead, 1)  # the second is of zeros
        assert lookahead.next()[0] == second
        assert lookahead.next() == (first, None)


@pytest.mark.parametrize("at_once", [False, True])
def test_memory_that_is_partly_in_files_comes_back(
    overflow: MemoryFile, tmp_path: Path, at_once: bool
) -> None:
    """The rest is stored, by workers that take what comes while they work; with the file's bytes it is what
    was sent."""
    raw = random_bytes(3, 6 * BLOCK_PAGES * PAGE)
    path = tmp_path / "weights.bin"
    path.write_bytes(raw[100 * PAGE : 3000 * PAGE])
    time.sleep(0.1)  # what was written just now is not believed to stay
    file = WeightsFile(str(path))
    matcher = Matcher([file], Index.joined([index_of(file)[0]]))
    sink = KeepingSink()
    with Lookahead(overflow.fd, LIMIT, 2, matcher, at_once=at_once) as lookahead:
        taking = Intake(None, sink, overflow, matcher, 4, lookahead)
        taking.begin_space(A)
        taking.take(A, 0, raw[: len(raw) // 2], lazy=True)
        taking.open_gate()
        taking.take(A, len(raw) // 2 // PAGE, raw[len(raw) // 2 :], lazy=True)
        spaces, counts = taking.finish()
    assert counts.weights == 2900 * PAGE and counts.new + counts.weights == counts.total == len(raw)
    found = bytearray()
    for extent in spaces[A]:
        assert extent.start * PAGE == len(found)
        if extent.source == Source.WEIGHTS:
            pieces = sink.references[extent.chunk].pieces
            whole = b"".join(path.read_bytes()[one.offset : one.end] for one in pieces)
            assert blake3(whole).digest() == sink.references[extent.chunk].digest
        else:
            whole = sink.chunks[extent.chunk]
        found += whole[extent.offset * PAGE : (extent.offset + extent.pages) * PAGE]
    assert found == raw


def test_the_intake_hashes_no_group_again(overflow: MemoryFile, lookahead: Lookahead) -> None:
    """Of a tree that did not change, no page is read again that was hashed while it was received."""
    sent, before = pages_for(blocks=3), KeepingSink()
    with MemoryFile(LIMIT) as other, Lookahead(other.fd, LIMIT) as first:
        taking = received(other, sent, before, first)
        taking.finish()
    taking = received(overflow, sent, KeepingSink(), lookahead, known=KnownFrom(before, first=0))
    wait_for(lookahead, 3)
    read: list[int] = []
    preadv = os.preadv
    with patch.object(os, "preadv", lambda fd, views, at: read.append(at) or preadv(fd, views, at)):
        spaces, counts = taking.finish()
    assert not read
    assert counts.new == 0 and counts.zero == 3 * GROUP_BYTES
    assert rebuilt(spaces, before.chunks) == expected([sent])


@pytest.mark.parametrize("told", [True, False])
def test_of_a_group_that_changed_only_the_changed_page_is_stored(
    overflow: MemoryFile, lookahead: Lookahead, told: bool
) -> None:
    """What is read and stored of a repeat is bounded by what has changed, and the next finds all of it. Who
    was told what the store has reads no more than what is stored."""
    sent, before = pages_for(blocks=2), KeepingSink()
    with MemoryFile(LIMIT) as other, Lookahead(other.fd, LIMIT) as first:
        received(other, sent, before, first).finish()
    contents = list(sent.contents)
    contents[100], contents[BLOCK_PAGES + 500] = 77_777, 0
    again = Sent(A, 0, tuple(contents))
    later = KeepingSink()
    known = KnownFrom(before, first=100)
    taking = received(overflow, again, later, lookahead, known=known)
    if told:
        taking.learn(known, b"".join(digest[:KEY] for digest in digests_of(sent.bytes, GROUP_PAGES)))
    wait_for(lookahead, 2)
    read: list[int] = []
    preadv = os.preadv

    def reading(fd: int, views: list[memoryview], at: int) -> int:
        read.extend(len(view) for view in views)
        return preadv(fd, views, at)

    with patch.object(os, "preadv", reading):
        spaces, counts = taking.finish()
    assert sum(read) == (PAGE if told else 2 * GROUP_BYTES)
    assert counts.new == PAGE and sum(map(len, later.chunks.values())) == PAGE
    assert len(later.mixed) == 2
    assert set(later.mixed) <= set(digests_of(again.bytes, GROUP_PAGES))
    chunks = later.chunks | {100 + number: raw for number, raw in before.chunks.items()}
    assert rebuilt(spaces, chunks) == expected([again])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_depends_on_it(
    overflow: MemoryFile, lookahead: Lookahead, how: signal.Signals, when: str
) -> None:
    """Killed or stopped, before or after pages came, it takes nothing with it."""
    sent, sink = pages_for(blocks=4), KeepingSink()
    if when == "before":
        os.kill(lookahead.pids[0], how)
    taking = received(overflow, sent, sink, lookahead)
    if when == "after":
        os.kill(lookahead.pids[0], how)
    spaces, counts = taking.finish()
    assert rebuilt(spaces, sink.chunks) == expected([sent])
    assert counts.zero == 4 * GROUP_BYTES


def test_what_is_done_too_late_is_not_given_out_again(overflow: MemoryFile, lookahead: Lookahead) -> None:
    """A worker has that block already; the next answers are of other blocks."""
    os.pwrite(overflow.fd, bytes(2 * GROUP_BYTES), 0)
    first, second = (lookahead.ask(at * GROUP_BYTES, runs_of(GROUP_PAGES)) for at in range(2))
    lookahead.begin()
    end = time.monotonic() + 10
    while lookahead._shared.find(ZERO_GROUP_DIGEST, lookahead_module._RECORD) < 0:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.05)
    with patch.object(lookahead, "_hear"):
        assert lookahead.next() == (second, None)
    assert lookahead.next() == (first, Seen({0: ZERO_GROUP_DIGEST}, [], {}))
    assert _done(lookahead) == 0


def test_pages_beside_groups_of_zeros_are_stored(overflow: MemoryFile, lookahead: Lookahead) -> None:
    """A block is all zeros only if no page is outside of its groups."""
    sent, sink = Sent(A, 0, (0,) * GROUP_PAGES + (5,)), KeepingSink()
    taking = received(overflow, sent, sink, lookahead)
    wait_for(lookahead, 1)
    spaces, counts = taking.finish()
    assert counts.new == PAGE
    assert rebuilt(spaces, sink.chunks) == expected([sent])


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_what_was_found_in_a_file_that_changed_is_stored(
    overflow: MemoryFile, tmp_path: Path, looks_ahead: bool
) -> None:
    """Pages wait until it is certain that the file is as it was: there is no other copy of them."""
    raw = random_bytes(4, 64 * PAGE)
    path = tmp_path / "weights.bin"
    path.write_bytes(raw)
    time.sleep(0.1)  # what was written just now is not believed to stay
    file = WeightsFile(str(path))
    matcher = Matcher([file], Index.joined([index_of(file)[0]]))
    sink = KeepingSink()
    with Lookahead(overflow.fd, LIMIT, 1, matcher) as lookahead:
        taking = Intake(None, sink, overflow, matcher, lookahead=lookahead if looks_ahead else None)
        taking.begin_space(A)
        taking.take(A, 0, raw, lazy=True)
        taking.flush()
        taking.open_gate()
        end = time.monotonic() + 10
        while not sink.references:
            assert time.monotonic() < end
            time.sleep(0.01)
        with path.open("r+b") as other:
            other.write(b"others")
        spaces, counts = taking.finish()
    assert counts.new == counts.total == len(raw) and not counts.weights
    assert (
        b"".join(sink.chunks[one.chunk][one.offset * PAGE :][: one.pages * PAGE] for one in spaces[A]) == raw
    )
