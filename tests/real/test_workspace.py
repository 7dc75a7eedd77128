"""crcli's private memory: where pages wait until they are worked on."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from crcli.criu.workspace import OverflowFile, Workspace, spare_memory

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """A folder that nothing leads to."""
    with Workspace.create() as found:
        yield found


def test_no_more_may_be_held_than_half_of_what_is_free(workspace: Workspace) -> None:
    """Half is left to those who work here; several dumps at once share the other half."""
    alone, shared = OverflowFile(workspace), OverflowFile(workspace, sharers=4)
    assert 0 < shared.limit < alone.limit / 3 <= spare_memory() / 6 * 1.1
    alone.close()
    shared.close()


def test_no_name_leads_to_it(workspace: Workspace) -> None:
    """What is in it goes with its descriptor, whatever becomes of us."""
    overflow = OverflowFile(workspace)
    assert os.fstat(overflow.fd).st_nlink == 0 and workspace.names() == []
    overflow.close()
