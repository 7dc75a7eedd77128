"""crcli's private memory: where pages wait until they are worked on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from crcli.criu.workspace import Workspace
from crcli.memory.overflow import Overflow
from crcli.process.memory_room import spare_memory

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """A folder that nothing leads to."""
    with Workspace.create() as found:
        yield found


def _await(condition: Callable[[], bool]) -> None:
    """Return once it holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_no_more_may_be_held_than_half_of_what_is_free(workspace: Workspace) -> None:
    """Half is left to those who work here; several dumps at once share the other half."""
    alone, shared = Overflow(workspace), Overflow(workspace, sharers=4)
    assert 0 < shared.limit < alone.limit / 3 <= spare_memory() / 6 * 1.1
    alone.close()
    shared.close()


def test_no_name_leads_to_it(workspace: Workspace) -> None:
    """What is in it goes with its descriptor, whatever becomes of us."""
    overflow = Overflow(workspace)
    assert os.fstat(overflow.fd).st_nlink == 0 and workspace.names() == []
    overflow.close()


def test_memory_is_there_before_it_is_filled(workspace: Workspace) -> None:
    """What was reserved has memory behind it, and reads as zeros."""
    overflow = Overflow(workspace)
    overflow.reserve(9 << 20)
    _await(lambda: overflow.reserved >= 9 << 20)
    overflow.settle(wait=True)
    assert overflow.reserved >= 9 << 20
    assert os.fstat(overflow.fd).st_blocks * 512 >= 9 << 20
    assert os.pread(overflow.fd, 9 << 20, 0) == bytes(9 << 20)
    overflow.close()


def test_nobody_waits_for_memory_whose_time_is_over(workspace: Workspace) -> None:
    """A dump with a deadline stops getting memory and goes on with what it has."""
    overflow = Overflow(workspace)
    overflow.reserve(overflow.limit)
    overflow.settle(wait=False)
    assert overflow.reserved < overflow.limit
    overflow.close()


def test_a_small_tree_needs_no_memory_ahead(workspace: Workspace) -> None:
    """Less than one huge page is not worth a thread."""
    overflow = Overflow(workspace)
    overflow.reserve(1 << 20)
    overflow.settle(wait=True)
    assert overflow.reserved == 0
    overflow.close()


def test_no_more_is_reserved_than_may_be_held(workspace: Workspace) -> None:
    """A tree larger than the room gets the room."""
    overflow = Overflow(workspace)
    overflow.limit = 4 << 20
    overflow.reserve(1 << 40)
    _await(lambda: overflow.reserved >= 4 << 20)
    overflow.settle(wait=True)
    assert overflow.reserved == 4 << 20
    overflow.close()


def test_what_nobody_reads_any_more_is_given_back(workspace: Workspace) -> None:
    """In the background, and only that part; what is left of it at the end goes with the rest."""
    overflow = Overflow(workspace)
    os.pwrite(overflow.fd, b"x" * (8 << 20), 0)
    overflow.give_back(4 << 20, 2 << 20)
    overflow.give_back(0, 2 << 20)
    _await(lambda: os.fstat(overflow.fd).st_blocks * 512 <= 4 << 20)
    assert os.pread(overflow.fd, 8 << 20, 0) == (bytes(2 << 20) + b"x" * (2 << 20)) * 2
    for _ in range(1000):
        overflow.give_back(2 << 20, 2 << 20)
    overflow.close()


def test_what_others_take_meanwhile_is_theirs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the freeze no more may be filled than what was got, and half of what is free then, beside what a
    dump needs."""
    overflow = Overflow(workspace)
    overflow.reserve(4 << 20)
    _await(lambda: overflow.reserved >= 4 << 20)
    overflow.settle(wait=True)
    monkeypatch.setattr("crcli.memory.overflow.spare_memory", lambda: 130 << 20)
    overflow.measure_again()
    assert overflow.limit == 5 << 20
    monkeypatch.setattr("crcli.memory.overflow.spare_memory", lambda: 2 << 20)
    overflow.measure_again()
    assert overflow.limit == 4 << 20
    overflow.close()
