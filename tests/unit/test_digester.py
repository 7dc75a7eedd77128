"""The process that hashes beside the workers: what it says is true, and nothing depends on it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from blake3 import blake3

from crcli.memory import intake
from crcli.memory.classify import GROUP_PAGES, ZERO_GROUP_DIGEST
from crcli.memory.digester import MOST_GROUPS, Digester
from crcli.memory.extents import PAGE, SpaceKey, SpaceKind
from crcli.memory.intake import Intake
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
def digester(overflow: MemoryFile) -> Iterator[Digester]:
    with Digester(overflow.fd, overflow.limit) as process:
        yield process


def wait_for(digester: Digester, blocks: int) -> None:
    """Have it begin; return when so many blocks are done."""
    digester.begin()
    end = time.monotonic() + 10
    while _done(digester) < blocks:
        assert time.monotonic() < end
        select.select([digester._answers], [], [], 0.01)


def _done(digester: Digester) -> int:
    with digester._lock:
        digester._hear()
        return len(digester._done)


def pages_for(blocks: int) -> Sent:
    """A run of so many whole blocks, other pages everywhere but for one group of zeros in each."""
    contents: list[int] = []
    for block in range(blocks):
        numbers = list(range(block * 10_000 + 1, block * 10_000 + 1 + intake.BLOCK_PAGES))
        numbers[GROUP_PAGES : 2 * GROUP_PAGES] = [0] * GROUP_PAGES
        contents += numbers
    return Sent(A, 0, tuple(contents))


def received(
    overflow: MemoryFile, sent: Sent, sink: KeepingSink, digester: Digester, **known: object
) -> Intake:
    """An intake that has taken all pages of a run aside, and whose workers have not begun."""
    taking = Intake(known.get("known"), sink, overflow, digester=digester)  # type: ignore[arg-type]
    with channel_with([sent]) as channel:
        taking.receive(channel, sent.space, sent.start, len(sent.contents), lazy=True)
    taking.flush()
    return taking


def test_it_says_what_blake3_says(overflow: MemoryFile, digester: Digester) -> None:
    """Groups anywhere in a block have the digests of their bytes, zeros theirs."""
    raw = os.urandom(3 * GROUP_BYTES) + bytes(GROUP_BYTES)
    os.pwrite(overflow.fd, raw, 5 * PAGE)
    number = digester.ask(5 * PAGE, [0, 7, 3 * GROUP_PAGES])
    wait_for(digester, 1)
    assert digester.next() == (
        number,
        [blake3(raw[at : at + GROUP_BYTES]).digest() for at in (0, 7 * PAGE, 3 * GROUP_BYTES)],
    )
    assert blake3(bytes(GROUP_BYTES)).digest() == ZERO_GROUP_DIGEST


def test_each_block_is_given_out_once(overflow: MemoryFile, digester: Digester) -> None:
    """What is done comes first; before that the last ones, which are not worked on any more."""
    os.pwrite(overflow.fd, bytes(3 * GROUP_BYTES), 0)
    first, second, third = (digester.ask(number * GROUP_BYTES, [0]) for number in range(3))
    assert digester.next() == (third, [])
    wait_for(digester, 2)
    assert [digester.next(), digester.next()] == [(first, [ZERO_GROUP_DIGEST]), (second, [ZERO_GROUP_DIGEST])]
    time.sleep(0.05)
    assert _done(digester) == 0


def test_more_is_not_asked_of_it_than_it_has_room_for(digester: Digester) -> None:
    """Blocks without groups, of too many, beyond what the file may hold, or too late are the workers'."""
    assert digester.ask(0, []) is None
    assert digester.ask(0, range(MOST_GROUPS + 1)) is None
    answers = [digester.ask(0, [0]) for _ in range(LIMIT // GROUP_BYTES)]
    assert answers.count(None) > len(answers) // 2
    digester.begin()
    assert digester.ask(0, [0]) is None


def test_it_ends_with_its_block(overflow: MemoryFile) -> None:
    """Nothing of it is left, whatever it was doing."""
    with Digester(overflow.fd, overflow.limit) as digester:
        pid = digester.pid
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_intake_hashes_no_group_again(overflow: MemoryFile, digester: Digester) -> None:
    """Of a tree that did not change, no page is read again that was hashed while it was received."""
    sent, before = pages_for(blocks=3), KeepingSink()
    with MemoryFile(LIMIT) as other, Digester(other.fd, LIMIT) as first:
        taking = received(other, sent, before, first)
        taking.finish()
    taking = received(overflow, sent, KeepingSink(), digester, known=KnownFrom(before, first=0))
    wait_for(digester, 3)
    read: list[int] = []
    preadv = os.preadv
    with patch.object(os, "preadv", lambda fd, views, at: read.append(at) or preadv(fd, views, at)):
        spaces, counts = taking.finish()
    assert not read
    assert counts.new == 0 and counts.zero == 3 * GROUP_BYTES
    assert rebuilt(spaces, before.chunks) == expected([sent])


def test_of_a_group_that_changed_only_the_changed_page_is_stored(
    overflow: MemoryFile, digester: Digester
) -> None:
    """What is read and stored of a repeat is bounded by what has changed, and the next finds all of it."""
    sent, before = pages_for(blocks=2), KeepingSink()
    with MemoryFile(LIMIT) as other, Digester(other.fd, LIMIT) as first:
        received(other, sent, before, first).finish()
    contents = list(sent.contents)
    contents[100], contents[intake.BLOCK_PAGES + 500] = 77_777, 0
    again = Sent(A, 0, tuple(contents))
    later = KeepingSink()
    taking = received(overflow, again, later, digester, known=KnownFrom(before, first=100))
    wait_for(digester, 2)
    read: list[int] = []
    preadv = os.preadv

    def reading(fd: int, views: list[memoryview], at: int) -> int:
        read.extend(len(view) for view in views)
        return preadv(fd, views, at)

    with patch.object(os, "preadv", reading):
        spaces, counts = taking.finish()
    assert sum(read) == 2 * GROUP_BYTES
    assert counts.new == PAGE and sum(map(len, later.chunks.values())) == PAGE
    assert len(later.mixed) == 2
    assert set(later.mixed) <= set(digests_of(again.bytes, GROUP_PAGES))
    chunks = later.chunks | {100 + number: raw for number, raw in before.chunks.items()}
    assert rebuilt(spaces, chunks) == expected([again])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_depends_on_it(
    overflow: MemoryFile, digester: Digester, how: signal.Signals, when: str
) -> None:
    """Killed or stopped, before or after pages came, it takes nothing with it."""
    sent, sink = pages_for(blocks=4), KeepingSink()
    if when == "before":
        os.kill(digester.pid, how)
    taking = received(overflow, sent, sink, digester)
    if when == "after":
        os.kill(digester.pid, how)
    spaces, counts = taking.finish()
    assert rebuilt(spaces, sink.chunks) == expected([sent])
    assert counts.zero == 4 * GROUP_BYTES
