"""CUDA processes that come while the others of their tree are being locked."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.support.crcli import assert_goes_on, wait_until
from tests.support.gpu_simulator import GpuCrcli, SimulatedHost
from tests.support.programs import Program, spawn_python

_PARENT = """
import os, signal, sys
program, output = {program!r}, {output!r}
def start(*_):
    global child
    if os.fork() == 0:
        os.execv(program, [program, "--gpu", "1", "--output", output])
signal.signal(signal.SIGUSR1, start)
if os.fork() == 0:
    os.execv(program, [program, "--gpu", "0", "--output", {first!r}])
print("ready")
while True:
    signal.pause()
"""


def test_a_process_that_came_meanwhile_is_taken_along(
    sim: SimulatedHost, crcli: GpuCrcli, tmp_path: Path
) -> None:
    """It is locked like the others before any is checkpointed, and all of them go on after the restore."""
    outputs = [tmp_path / "first", tmp_path / "second"]
    code = _PARENT.format(
        program=str(sim.libraries / "gpu_counter"), first=str(outputs[0]), output=str(outputs[1])
    )
    with spawn_python(code, env=os.environ | sim.environment) as parent:
        first, second = (Program(parent.process, output) for output in outputs)
        wait_until(outputs[0].exists, "the first does not start")
        first.wait_for("ready")
        hang = sim.inject("lock", "hang", after=True)
        with crcli.start("dump", str(parent.pid), "--store", crcli.store, "--json") as process:
            sim.wait_for("lock", "hang")
            os.kill(parent.pid, signal.SIGUSR1)
            wait_until(outputs[1].exists, "the second does not start")
            second.wait_for("ready")
            hang.release()
            out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        locks = [call.pid for call in sim.calls("lock") if call.what == "begin"]
        assert len(locks) == len(set(locks)) == 2
        assert sim.calls("checkpoint")[0].seconds > sim.calls("lock")[-1].seconds
    crcli.restore(crcli.run("ls", "--store", crcli.store, "--json").json["images"][0]["image"])
    for program in (first, second):
        assert_goes_on(program)
