"""What every test with real processes shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.crcli import Crcli, crcli_in


@pytest.fixture
def crcli(tmp_path: Path) -> Iterator[Crcli]:
    """The command, with a store of its own; what it restores ends with the test."""
    with crcli_in(tmp_path) as command:
        yield command
