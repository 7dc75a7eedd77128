"""The simulator of tests/gpu/sim against what CUDA's driver is documented to do, through real cuda-python."""

from __future__ import annotations

from pathlib import Path

from tests.support.crcli import assert_goes_on, end, reap, tree_of
from tests.support.gpu_caller import calling
from tests.support.gpu_simulator import SimulatedHost
from tests.support.raw_criu import raw_dump, raw_restore


def test_a_process_goes_through_all_states_and_counts_on(sim: SimulatedHost) -> None:
    """Lock, checkpoint, restore and unlock lead from RUNNING to RUNNING, and the bytes are the same."""
    with sim.start_program("--megabytes", "2") as program, calling(sim) as driver:
        pid, states = program.pid, []
        for step in (driver.lock, driver.checkpoint, driver.restore, driver.unlock):
            assert step(pid) == "CUDA_SUCCESS"
            states.append(driver.state(pid))
        assert states == ["locked", "checkpointed", "locked", "running"]
        assert_goes_on(program)


def test_the_plain_sequence_brings_a_process_back(sim: SimulatedHost, tmp_path: Path) -> None:
    """Lock, checkpoint, criu dump, criu restore, restore, unlock: the restored process counts on."""
    folder = tmp_path / "image"
    folder.mkdir()
    with sim.start_program("--megabytes", "4") as program, calling(sim) as driver:
        assert driver.lock(program.pid) == "CUDA_SUCCESS"
        assert driver.checkpoint(program.pid) == "CUDA_SUCCESS"
        dumped = tree_of(program.pid)
        attempt = raw_dump(program.pid, folder)
        assert attempt.success, attempt.log[-2000:]
        reap(dumped)
        attempt = raw_restore(folder)
        assert attempt.success, attempt.log[-2000:]
        restored = tree_of(program.pid)
        try:
            assert driver.state(program.pid) == "checkpointed"
            assert driver.restore(program.pid) == "CUDA_SUCCESS"
            assert driver.unlock(program.pid) == "CUDA_SUCCESS"
            assert_goes_on(program)
        finally:
            end(restored)
