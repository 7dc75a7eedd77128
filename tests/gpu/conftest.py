"""What the tests over the simulator share. Those of tests/gpu/real take none of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.gpu_simulator import GpuCrcli, SimulatedHost, device_nodes, simulated_host, why_not_here


@pytest.fixture(scope="session")
def gpu_nodes() -> Iterator[None]:
    """NVIDIA's device nodes, for as long as tests run."""
    if reason := why_not_here():
        pytest.skip(reason)
    with device_nodes():
        yield


@pytest.fixture
def sim(tmp_path: Path, gpu_nodes: None) -> Iterator[SimulatedHost]:
    """A host with two simulated GPUs of 64 MiB each."""
    with simulated_host(tmp_path / "sim") as host:
        yield host


@pytest.fixture
def crcli(tmp_path: Path, sim: SimulatedHost) -> Iterator[GpuCrcli]:
    """The command on the simulated host, with a store of its own; what it restores ends with the test."""
    command = GpuCrcli(tmp_path, host=sim)
    try:
        yield command
    finally:
        command.clean_up()
