"""Trees that use GPUs, dumped and restored whole: real CRIU, a simulated GPU host (tests/gpu/sim)."""

from __future__ import annotations

from tests.support.crcli import assert_goes_on
from tests.support.gpu_simulator import GpuCrcli, SimulatedHost


def test_a_process_is_dumped_killed_and_restored(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """What lay on its GPU travels in the image; restored, it counts on from there."""
    with sim.start_program("--megabytes", "4") as program:
        report = crcli.dump(program.pid)
        restored = crcli.restore(report["image"])
        assert_goes_on(program)
        assert sim.state(restored["host_pid"]) == "running"


def test_a_process_that_is_left_running_has_its_gpu_back(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """The driver says RUNNING, and it counts on."""
    with sim.start_program("--megabytes", "4") as program:
        report = crcli.dump(program.pid, "--leave-running")
        assert sim.state(program.pid) == "running"
        assert_goes_on(program)
        assert report["gpu"]["states"] == [{"pid": program.pid, "state": "running"}]
