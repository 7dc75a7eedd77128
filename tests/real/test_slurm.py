"""A real scheduler: jobs that Slurm preempts, requeues, and starts again on another node."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import slurm
from tests.support.slurm import Slurm

ROOT = Path(__file__).parents[2]
HOOK = ROOT / "scripts" / "hooks" / "slurm" / "job.sbatch"

pytestmark = pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())

TOLD = """#!/bin/bash
# A job that saves nothing: it says what happens to it, and has itself put back.
echo "start $SLURMD_NODENAME ${SLURM_RESTART_COUNT:-0}"
trap 'echo told; scontrol requeue "$SLURM_JOB_ID"; sleep 60 & wait' USR1
[[ -n $SLURM_RESTART_COUNT ]] || { sleep 60 & wait; wait; }
echo end
"""

AGENT = """
import hashlib, os, subprocess, time
memory = bytearray(4 << 20)
state, steps = b"begin", STEPS
for step in range(steps):
    state = hashlib.sha256(state + bytes([step])).digest()
    memory[step * 4096 : step * 4096 + 32] = state
    if step % 10 == 5:  # a step with a child of its own
        subprocess.run(["true"], check=True)
    with open("steps", "a") as file:
        file.write(f"{step}\\n")
    while not os.path.exists("go") and step == steps // 2:
        time.sleep(0.05)
    time.sleep(0.02)
print("result", hashlib.sha256(memory).hexdigest())
"""
"""A job of many steps that waits in the middle until it may go on."""

OCCUPY = "#!/bin/bash\nsleep 600\n"


def result_of(steps: int) -> str:
    """What AGENT ends with when nothing befalls it."""
    memory, state = bytearray(4 << 20), b"begin"
    for step in range(steps):
        state = hashlib.sha256(state + bytes([step])).digest()
        memory[step * 4096 : step * 4096 + 32] = state
    return f"result {hashlib.sha256(memory).hexdigest()}"


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[Slurm]:
    """A cluster for all tests here."""
    with slurm.cluster() as running:
        yield running


@pytest.fixture
def cluster(one_cluster: Slurm) -> Iterator[Slurm]:
    """The cluster, with nothing to do."""
    yield one_cluster
    one_cluster.clear()


def script(folder: Path, name: str, text: str) -> Path:
    """A file with this text."""
    path = folder / name
    path.write_text(text)
    return path


def preempt(cluster: Slurm, folder: Path, node: str) -> str:
    """Have a job of a higher priority want this node; return its id."""
    return cluster.submit(script(folder, "occupy.sh", OCCUPY), "--partition=high", f"--nodelist={node}")


def test_a_preempted_job_is_told_and_put_back(cluster: Slurm, tmp_path: Path) -> None:
    """The cluster does what we rely on: USR1 at once to the batch script, requeue, the other node."""
    options = ("--partition=low", "--signal=B:USR1@15", "--requeue", f"--output={tmp_path}/out")
    job = cluster.submit(script(tmp_path, "told.sh", TOLD), *options, "--open-mode=append")
    node = cluster.wait_for(job, "RUNNING")["NodeList"]
    cluster.wait_until(lambda: "start" in _text(tmp_path / "out"), "the job writes")
    preempt(cluster, tmp_path, node)
    facts = cluster.wait_for(job, "COMPLETED")
    other = facts["NodeList"]
    assert other != node and facts["Restarts"] == "1"
    told = [line for line in (tmp_path / "out").read_text().splitlines() if not line.startswith("slurmstepd")]
    assert told == [f"start {node} 0", "told", f"start {other} 1", "end"]


def test_a_job_under_run_goes_on_on_the_other_node(cluster: Slurm, tmp_path: Path) -> None:
    """The snippet of scripts/hooks: preempted, dumped within the grace time, requeued, restored on the other
    node; the result is that of a run that nobody interrupted, and no step was done twice."""
    steps = 80
    script(tmp_path, "agent.py", AGENT.replace("STEPS", str(steps)))
    job = cluster.submit(HOOK, "--partition=low", f"--chdir={tmp_path}", env=installed(tmp_path))
    node = cluster.wait_for(job, "RUNNING")["NodeList"]
    cluster.wait_until(lambda: f"{steps // 2}\n" in _text(tmp_path / "steps"), "the job is half done")
    higher = preempt(cluster, tmp_path, node)
    cluster.wait_for(higher, "RUNNING")
    (tmp_path / "go").touch()
    facts = cluster.wait_for(job, "COMPLETED")
    said = _text(tmp_path / f"agent-{job}.log")
    assert facts["NodeList"] != node and facts["ExitCode"] == "0:0" and facts["Restarts"] == "1"
    assert f"crcli: started agent-{job}" in said and f"crcli: restored agent-{job}@" in said
    assert said.splitlines().count(result_of(steps)) == 1
    assert _text(tmp_path / "steps").split() == [str(step) for step in range(steps)]


def installed(folder: Path) -> dict[str, str]:
    """An environment in which `crcli` and `python3` are this checkout's, with a store in the folder."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "python3").symlink_to(sys.executable)
    script(programs, "crcli", f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m crcli "$@"\n').chmod(
        0o755
    )
    places = {name: f"{folder}/{name}" for name in ("CRCLI_STATE_DIR", "CRCLI_LOG_DIR", "CRCLI_RATES")}
    path = f"{programs}:{os.environ['PATH']}:/usr/sbin:/sbin"
    return os.environ | places | {"PATH": path, "CRCLI_STORE": f"file://{folder}/store"}


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
