"""What `crcli doctor` says of GPUs, and the processes that it wakes when all of crcli was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.crcli import ROOT, assert_goes_on, counted, wait_until
from tests.support.gpu_simulator import GpuCrcli, SimulatedHost, gpu

_PUTS_TO_SLEEP = """
import sys, time
from crcli.gpu.hand import Hand, Purpose
pid, steps = int(sys.argv[1]), sys.argv[2:]
hand = Hand(Purpose.DUMP)
hand.find([pid])
for step in steps:
    getattr(hand, step)([pid])
print(hand.pid, flush=True)
time.sleep(600)
"""
"""As much of a dump as the test wants: then it waits to be killed."""


@contextmanager
def sleeping(crcli: GpuCrcli, pid: int, *steps: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A crcli that has put a process to sleep, and the pid of its hand."""
    command = [sys.executable, "-c", _PUTS_TO_SLEEP, str(pid), *steps]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=crcli.environment, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def killed(crcli: GpuCrcli, pid: int, *steps: str) -> None:
    """Put a process to sleep as a dump does, then have crcli and its hand killed at once."""
    with sleeping(crcli, pid, *steps) as (process, hand):
        os.kill(hand, signal.SIGSTOP)  # so that it cannot see that crcli is gone
        process.kill()
        process.wait()
        os.kill(hand, signal.SIGKILL)
        wait_until(lambda: not _lives(hand), "the hand does not die")


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def doctor(crcli: GpuCrcli, *options: str) -> dict[str, Any]:
    """Return the report of `crcli doctor --json`, its checks by name."""
    with crcli.start("doctor", "--store", crcli.store, "--json", *options) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode in (0, 40), err
    report: dict[str, Any] = json.loads(out)
    report["checks"] = {one["name"]: one for one in report["checks"]}
    return report


def asleep(report: dict[str, Any], pid: int) -> dict[str, list[str]]:
    """In what state the report names a process, by whose doing. Other tests have processes here as well."""
    evidence = report["checks"]["gpu-asleep"]["evidence"]
    return {who: [one["state"] for one in evidence[who] if one["pid"] == pid] for who in ("left", "others")}


AWAKE: dict[str, list[str]] = {"left": [], "others": []}


def test_a_host_with_gpus_is_described(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Names, driver, CUDA's version, whether the checkpoint and custom storage work, and persistence."""
    sim.configure(gpu(1, persistence=True), gpu(2, mig=True), driver="580.159.04", api=13000)
    checks = doctor(crcli)["checks"]
    assert checks["gpu"]["status"] == "note" and "MIG" in checks["gpu"]["remedy"]
    assert "2" not in checks["gpu-persistence"]["evidence"]["gpus"]
    assert checks["gpu-persistence"]["evidence"]["gpus"] == [gpu(2).uuid]
    assert "Simulated H100" in checks["gpu"]["message"] and "CUDA 13.0" in checks["gpu"]["message"]
    assert checks["gpu"]["evidence"]["driver"] == "580.159.04"
    assert [one["uuid"] for one in checks["gpu"]["evidence"]["gpus"]] == [gpu(1).uuid, gpu(2).uuid]
    assert checks["gpu-custom-storage"]["evidence"] == {"available": False}
    assert checks["gpu-asleep"]["evidence"]["left"] == []
    huge = checks["gpu-huge-pages"]
    assert ("[always]" in huge["evidence"]["transparent_hugepage"]) == (huge["status"] == "ok")


def test_a_host_without_nvml_is_told_what_is_not_noticed(
    sim: SimulatedHost, crcli: GpuCrcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update of a crcli that did not need nvidia-ml-py; nothing is said to be off."""
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "pynvml.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "absent"))
    checks = doctor(crcli)["checks"]
    assert checks["gpu"]["status"] == "ok" and "nvidia-ml-py" in checks["gpu-nvml"]["remedy"]
    assert "gpu-persistence" not in checks


def test_the_names_of_the_host_stay(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """What a fleet compares is found where it was."""
    host = doctor(crcli)["host"]
    assert set(host["gpus"]) >= {"/dev/nvidia0", "/dev/nvidia1"} and host["gpu_driver"] == ""


@pytest.mark.parametrize(("driver", "api"), [("550.54.15", 12040), ("", 0)])
def test_a_driver_that_cannot_is_a_note(driver: str, api: int, sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Processes that use a GPU cannot be dumped then; all others can, so nothing is lacking for those."""
    if driver:
        sim.configure(gpu(1), driver=driver, api=api)
    else:
        (sim.folder / "host").unlink()
    check = doctor(crcli)["checks"]["gpu"]
    assert check["status"] == "note" and "cannot be saved" in check["message"] and check["remedy"]


@pytest.mark.parametrize("steps", [("lock",), ("lock", "checkpoint")], ids=["locked", "checkpointed"])
def test_what_a_killed_dump_left_asleep_is_found_and_woken(
    steps: tuple[str, ...], sim: SimulatedHost, crcli: GpuCrcli
) -> None:
    """Killed at once, crcli and its hand leave a process asleep: the doctor names it, and --fix wakes it."""
    with sim.start_program("--megabytes", "2") as program:
        killed(crcli, program.pid, *steps)
        state = sim.state(program.pid)
        assert state == steps[-1] + "ed"
        report = doctor(crcli)
        assert asleep(report, program.pid) == {"left": [state], "others": []}
        assert "doctor --fix" in report["checks"]["gpu-asleep"]["remedy"]
        assert sim.state(program.pid) == state
        report = doctor(crcli, "--fix")
        assert report["woken"] == [{"pid": program.pid, "state": "running", "error": ""}]
        assert asleep(report, program.pid) == AWAKE
        assert_goes_on(program)
        assert doctor(crcli, "--fix")["woken"] == []
        assert list((crcli.folder / "state" / "gpu").iterdir()) == []


def test_a_dump_under_way_is_left_alone(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """As long as its hand lives nobody else wakes the process."""
    with sim.start_program() as program, sleeping(crcli, program.pid, "lock"):
        report = doctor(crcli, "--fix")
        assert report["woken"] == [] and sim.state(program.pid) == "locked"
        assert asleep(report, program.pid) == {"left": [], "others": ["locked"]}
    wait_until(lambda: sim.state(program.pid) in ("running", "gone"), "the hand does not wake it")


def test_what_others_have_put_to_sleep_is_named_and_left_alone(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """A program that was suspended with cuda-checkpoint, to make room for another, is nobody's to wake."""
    with sim.start_program() as program:
        assert [sim.call(step, program.pid) for step in ("Lock", "Checkpoint")] == [0, 0]
        report = doctor(crcli, "--fix")
        assert report["woken"] == [] and sim.state(program.pid) == "checkpointed"
        assert asleep(report, program.pid) == {"left": [], "others": ["checkpointed"]}
        assert "cuda-checkpoint --toggle" in report["checks"]["gpu-asleep"]["remedy"]


def test_what_cannot_be_woken_is_said(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """The driver's word is told, and the note stays, so that it can be tried again."""
    with sim.start_program() as program:
        killed(crcli, program.pid, "lock", "checkpoint")
        numbers = counted(program)
        sim.inject("restore", "error", 999, times=1000)
        (woken,) = doctor(crcli, "--fix")["woken"]
        assert woken["state"] == "checkpointed" and "CUDA_ERROR_UNKNOWN" in woken["error"]
        assert counted(program) == numbers


def test_one_that_stands_still_is_not_forgotten(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Stopped by SIGSTOP it tells nobody its state: that is said, and once it goes on it is woken."""
    with sim.start_program() as program:
        killed(crcli, program.pid, "lock", "checkpoint")
        os.kill(program.pid, signal.SIGSTOP)
        report = doctor(crcli, "--fix")
        (woken,) = report["woken"]
        assert woken["state"] == "silent" and "stand still" in woken["error"]
        assert asleep(report, program.pid) == {"left": ["silent"], "others": []}
        os.kill(program.pid, signal.SIGCONT)
        (woken,) = doctor(crcli, "--fix")["woken"]
        assert (woken["state"], woken["error"]) == ("running", "")
        assert_goes_on(program)


def test_one_whose_crcli_lives_is_left_to_it(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Its hand alone was killed: crcli starts another, which is to find the process as it was."""
    with sim.start_program() as program, sleeping(crcli, program.pid, "lock") as (process, hand):
        os.kill(hand, signal.SIGKILL)
        wait_until(lambda: not _lives(hand), "the hand does not die")
        report = doctor(crcli, "--fix")
        assert report["woken"] == [] and sim.state(program.pid) == "locked"
        assert asleep(report, program.pid) == {"left": [], "others": ["locked"]}
        process.kill()
        process.wait()
        assert [one["state"] for one in doctor(crcli, "--fix")["woken"]] == ["running"]


def test_for_people(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Checks of GPUs stand below their own heading, and what was woken is said in a sentence."""
    with sim.start_program() as program:
        killed(crcli, program.pid, "lock")
        with crcli.start("doctor", "--store", crcli.store, "--fix") as process:
            out, _ = process.communicate(timeout=60)
        assert f"CUDA of gpu_counter ({program.pid}) is awake again" in out
        assert any(line.startswith("gpus ") for line in out.splitlines())
