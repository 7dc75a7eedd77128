"""crcli's private memory: where pages wait, given its memory before a tree is frozen."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from crcli.criu.workspace import OverflowFile, Workspace, spare_memory

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

MIB = 1 << 20


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """A folder that nothing leads to."""
    with Workspace.create() as found:
        yield found


def held(overflow: OverflowFile) -> int:
    """Bytes of memory that it has."""
    return os.fstat(overflow.fd).st_blocks * 512


def test_what_is_expected_has_its_memory_before_it_comes(workspace: Workspace) -> None:
    """Once waited for, the memory is there, and reads as zeros until it is written to."""
    overflow = OverflowFile(workspace)
    overflow.populate(70 * MIB)
    overflow.wait()
    assert held(overflow) == overflow.populated == 70 * MIB
    assert os.pread(overflow.fd, MIB, 40 * MIB) == bytes(MIB)
    os.pwrite(overflow.fd, b"page", 100 * MIB)
    assert held(overflow) > 70 * MIB
    overflow.close()


def test_no_more_is_held_than_half_of_what_is_free(workspace: Workspace) -> None:
    """Whatever is expected, the limit is kept."""
    overflow = OverflowFile(workspace)
    assert overflow.limit <= spare_memory()
    overflow.limit = 40 * MIB
    overflow.populate(1 << 40)
    overflow.wait()
    assert held(overflow) == 40 * MIB
    overflow.close()


def test_several_share_that_half(workspace: Workspace) -> None:
    """Dumps of one call together hold no more than one alone would."""
    alone, shared = OverflowFile(workspace), OverflowFile(workspace, 2)
    assert shared.limit < alone.limit * 0.75
    alone.close()
    shared.close()


def test_who_has_no_time_goes_on_with_what_there_is(workspace: Workspace) -> None:
    """After the time limit nothing more is begun."""
    overflow = OverflowFile(workspace)
    overflow.populate(min(overflow.limit, 2048 * MIB))
    overflow.wait(0.0)
    assert (before := held(overflow)) < 2048 * MIB
    time.sleep(0.05)
    assert held(overflow) == before
    overflow.close()
