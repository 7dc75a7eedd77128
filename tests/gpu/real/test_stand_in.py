"""What runs on a machine with a GPU, tried without one: on simulated GPUs, and on the host's memory.

It shows that set-up, probe, scenarios, limits and record work, not that anything works on a GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.gpu.real.prepare import CRIU, MANIFEST, ROOT, WHEELS
from tests.gpu.real.probe import STEPS
from tests.gpu.real.record import RESULTS
from tests.gpu.real.setting import Setting
from tests.gpu.real.table import as_markdown, judged
from tests.gpu.real.unpack import Unusable, unpack
from tests.support.crcli import end, tree_of, wait_until
from tests.support.gpu_simulator import SimulatedHost, gpu

LONG_S = 60.0
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@contextmanager
def running(folder: Path, *options: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`python -m tests.gpu.real run`, results in `folder`/out; what it started has ended with the block."""
    places = [f"--out={folder}/out", f"--work={folder}"]
    command = [sys.executable, "-m", "tests.gpu.real", "run", *places, *options]
    environment = os.environ | environment
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        end(tree_of(process.pid))
        process.communicate()


def run_to_its_end(folder: Path, *options: str, **environment: str) -> dict[str, Any]:
    """Run it, and return its results."""
    with running(folder, *options, **environment) as process:
        process.communicate(timeout=300)
    return results_in(folder)


def results_in(folder: Path) -> dict[str, Any]:
    """What results.json says now."""
    found: dict[str, Any] = json.loads((folder / "out" / RESULTS).read_text())
    return found


def outcomes(results: Mapping[str, Any]) -> dict[str, str]:
    """How each scenario ended."""
    return {name: found["outcome"] for name, found in results["scenarios"].items()}


def test_all_that_needs_no_pytorch_passes_on_simulated_gpus(tmp_path: Path, sim: SimulatedHost) -> None:
    """The probe finds what is there; crcli and the plain sequence move programs, whose memory is compared."""
    sim.configure(gpu(1, memory_bytes=1 << 30))
    names = (
        "driver-plain",
        "driver-crcli",
        "weights-1",
        "pair",
        "left-running",
        "evicted",
        "evicted-here",
        "lazy",
        "train",
    )
    found = run_to_its_end(tmp_path, "--on", "simulator", "--only", *names, **sim.environment)
    assert outcomes(found) == dict.fromkeys(names, "passed") | {"train": "skipped"}, found["scenarios"]
    assert found["probe"].keys() == STEPS.keys()
    assert found["probe"]["cycle"]["states"][2:4] == ["checkpoint: CHECKPOINTED", "restore: LOCKED"]
    assert found["probe"]["cuda"]["devices"][0]["name"] == "Simulated H100"
    assert found["not_a_result"] and "Not a result" in as_markdown(found)
    assert {goal["rounds"] for goal in found["goals"]} == {1}
    assert set(os.listdir(tmp_path)) == {"out", "sim"}


def test_how_the_driver_refuses_is_told(tmp_path: Path, sim: SimulatedHost) -> None:
    """The call, the code and its name are in the results; the process was let go; the rest is not tried."""
    sim.inject("checkpoint", "error", 801, times=99)
    names = ("driver-plain", "counter", "counter-plain", "pair")
    found = run_to_its_end(tmp_path, "--on", "simulator", "--only", *names, **sim.environment)
    refused = "cuCheckpointProcessCheckpoint"
    assert "CUDA_ERROR_NOT_SUPPORTED (801)" in found["probe"]["cycle"]["error"]
    assert refused in found["scenarios"]["driver-plain"]["why"]
    assert outcomes(found) == dict.fromkeys(names[:3], "failed")
    assert "no CUDA process can be dumped" in found["stopped"]
    assert '"RUNNING"' in (tmp_path / "out" / "failures.txt").read_text()  # undone, by the driver's own word


def test_what_hangs_in_the_driver_is_ended(tmp_path: Path, sim: SimulatedHost) -> None:
    """A call that never returns costs its scenario's time and no more; how far it came is told."""
    from tests.gpu.real.runner import tried

    hang = sim.inject("checkpoint", "hang")
    os.environ |= sim.environment
    try:
        found = tried("driver-plain", Setting.of("simulator", str(tmp_path), sys.executable), 8.0)
    finally:
        hang.release()
        for name in sim.environment:
            del os.environ[name]
    assert (found["outcome"], found["why"]) == ("failed", "dump: killed after 8 s")
    assert found["took_s"].keys() == {"start"}
    assert "plain dump" in found["evidence"]  # the command that hung, and where
    assert not psutil.Process().children(recursive=True)


def test_a_machine_without_cuda_says_so(tmp_path: Path) -> None:
    """Without a driver every step of the probe still answers, and each scenario fails in its own words."""
    found = run_to_its_end(tmp_path, "--on", "simulator", "--only", "driver-plain")  # and none is there
    assert "cuInit" in found["probe"]["cuda"]["error"]
    assert found["probe"]["cycle"]["error"].startswith("the program has ended")
    assert found["scenarios"]["driver-plain"]["why"].startswith("start: the program has ended")


def test_gvisor_is_told_and_left(tmp_path: Path) -> None:
    """Where the kernel's log says gVisor, nothing is dumped: the reason is told, and the time is saved."""
    log = tmp_path / "dmesg"
    log.write_text("#!/bin/sh\necho '[    0.000000] Starting gVisor...'\n")
    log.chmod(0o755)
    found = run_to_its_end(tmp_path, "--on", "host", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert "gVisor" in found["stopped"] and not found["scenarios"]
    assert {"host", "rights"} <= found["probe"].keys()
    assert "criu" not in found["probe"]


def test_time_is_not_overdrawn(tmp_path: Path) -> None:
    """What there is no time for is not begun, and is named."""
    found = run_to_its_end(tmp_path, "--on", "host", "--no-probe", "--budget", "20")
    assert outcomes(found)["weights-3"] == "not run"
    assert found["ended"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_loses_nothing_that_was_found(tmp_path: Path, number: signal.Signals) -> None:
    """The results are whole at any moment: what was done before a kill is in them."""
    names = ("cpu-plain", "counter", "weights-1")
    with running(tmp_path, "--on", "host", "--no-probe", "--only", *names) as process:
        wait_until(lambda: _has_scenario(tmp_path), "no scenario ends", LONG_S)
        started = tree_of(process.pid)
        process.send_signal(number)
        if number == signal.SIGKILL:
            end(started)
        process.communicate(timeout=LONG_S)
    found = results_in(tmp_path)
    assert outcomes(found)["cpu-plain"] == "passed"
    assert "weights-1" not in found["scenarios"]
    assert ("SIGTERM" in found["stopped"]) is (number == signal.SIGTERM)


def _has_scenario(folder: Path) -> bool:
    return (folder / "out" / RESULTS).exists() and bool(results_in(folder)["scenarios"])


def test_a_carried_folder_is_laid_out(tmp_path: Path) -> None:
    """Wheels lie where an installer would put them, pycriu and CRIU beside them."""
    carried = _carried(tmp_path / "carried")
    environment = unpack(carried, tmp_path / "work")
    site, root = environment["PYTHONPATH"].split(":")
    assert root == str(ROOT)
    assert {"plain.py", "moved.py", "pycriu"} <= set(os.listdir(site))
    assert "script" not in os.listdir(site)
    assert os.path.exists(f"{site}/pycriu/__init__.py")
    assert os.path.exists(f"{environment['CRCLI_CRIU_PREFIX']}/usr/sbin/criu")


@pytest.mark.parametrize(
    ("python", "damage", "said"), [("2.7", b"", "Python 2.7"), (HERE, b"x", "damaged"), ("", b"", "not made")]
)
def test_a_carried_folder_that_is_not_whole_is_refused(
    tmp_path: Path, python: str, damage: bytes, said: str
) -> None:
    """Another Python's, a damaged and an unfinished one are refused before anything is laid out."""
    carried = _carried(tmp_path / "carried", python)
    with (carried / CRIU).open("ab") as file:
        file.write(damage)
    with pytest.raises(Unusable, match=said):
        unpack(carried, tmp_path / "work")
    assert not (tmp_path / "work").exists()


def _carried(folder: Path, python: str = HERE) -> Path:
    """A folder as `prepare` makes it, with little in it; without a manifest where no Python is named."""
    import tarfile

    (folder / WHEELS).mkdir(parents=True)
    with zipfile.ZipFile(folder / WHEELS / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("plain.py", "")
        wheel.writestr("thing-1.data/purelib/moved.py", "")
        wheel.writestr("thing-1.data/scripts/script", "")
    prefix = folder / "criu"
    for name in ("usr/sbin/criu", "usr/lib/python3/dist-packages/pycriu/__init__.py"):
        (prefix / name).parent.mkdir(parents=True)
        (prefix / name).touch()
    with tarfile.open(folder / CRIU, "w:gz") as archive:
        archive.add(prefix, "criu")
    files = [folder / CRIU, *(folder / WHEELS).iterdir()]
    digests = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if python:
        (folder / MANIFEST).write_text(json.dumps({"python": python, "files": digests}))
    return folder


def test_goals_are_judged_by_the_medians_of_whole_rounds() -> None:
    """A round that failed does not count; GPU memory is crcli's figure, or else the program's."""
    results = {
        "sizes": {"weights_bytes": 8 << 30, "cache_bytes": 4 << 30},
        "scenarios": {
            "weights-1": _round(restore=4.0, image=800.0, told=10_000),
            "weights-2": _round(restore=2.0, image=1200.0, told=None),
            "weights-3": _round(restore=0.1, image=1.0, told=1) | {"outcome": "failed"},
        },
    }
    found = {goal["goal"]: (goal["value"], goal["met"], goal["rounds"]) for goal in judged(results)}
    assert found == {
        "restore: plain sequence / crcli (warm)": (3.0, True, 2),
        "image: plain sequence / crcli (warm)": (12.0, True, 2),
        "image / GPU memory in use (warm)": (0.07, True, 2),
        "dump: plain sequence / crcli (warm)": (0.5, False, 2),
    }
    assert "| image, of the GPU memory in use | – | 7 % | – |" in as_markdown(results)


def _round(restore: float, image: float, told: int | None) -> dict[str, Any]:
    return {
        "outcome": "passed",
        "figures": {
            "gpu_bytes": 20_000,
            "crcli_dump": {"dump_s": 8.0, "image_bytes": image, "gpu": told and {"memory_bytes": told}},
            "plain_dump": {"durable_s": 4.0, "image_bytes": 12_000.0},
            "crcli_restore": {"first_step_s": restore},
            "plain_restore": {"first_step_s": 9.0},
        },
    }
