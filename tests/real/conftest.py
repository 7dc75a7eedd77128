"""What every test with real processes shares."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.crcli import Crcli, crcli_in
from tests.support.s3servers import S3Server, start_moto


@pytest.fixture
def crcli(tmp_path: Path) -> Iterator[Crcli]:
    """The command, with a store of its own; what it restores ends with the test."""
    with crcli_in(tmp_path) as command:
        yield command


@pytest.fixture(scope="session")
def running_moto() -> Iterator[S3Server]:
    """moto, from the first test on that asks for it: half a second to start."""
    with start_moto() as server:
        yield server


@pytest.fixture
def moto(running_moto: S3Server) -> Iterator[S3Server]:
    """moto with nothing in it. It is to live on: who kills it, or stops it, starts one."""
    yield running_moto
    running_moto.empty()
