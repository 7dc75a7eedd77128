"""One name, two nodes, real supervisors: the job runs once at any time, and its result is right."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from crcli import kernel
from crcli.image.lease import Lease
from crcli.store import open_store
from tests.support.crcli import ROOT, Crcli, counted, counter, tree_of, wait_until
from tests.support.programs import spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

TTL_S = 3.0
ELSEWHERE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
"""A node whose processes the others do not see, as on another host."""

ALONE = """
import fcntl, hashlib, os, sys, time
folder, steps, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
state = b""
for step in range(steps):
    with open(f"{folder}/alone", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with open(f"{folder}/overlap", "a") as overlap:
                overlap.write(f"step {step}, lease {open(os.environ['CRCLI_LEASE_FILE']).read()}")
        with open(os.environ["CRCLI_LEASE_FILE"]) as number, open(f"{folder}/numbers", "a") as numbers:
            numbers.write(number.read())
        time.sleep(pause)
    state = hashlib.sha256(state + bytes([step % 251])).digest()
with open(f"{folder}/result.new", "w") as file:
    file.write(state.hex())
os.rename(f"{folder}/result.new", f"{folder}/result")
"""
"""A job of which a second copy is seen by the first, and the other way round."""


def result(steps: int) -> str:
    """What ALONE ends with."""
    import hashlib

    state = b""
    for step in range(steps):
        state = hashlib.sha256(state + bytes([step % 251])).digest()
    return state.hex()


@pytest.fixture
def crcli(tmp_path: Path) -> Iterator[Crcli]:
    """The command, with a store that all nodes share."""
    yield Crcli(tmp_path)


@dataclass
class Supervisor:
    """A `crcli run` of the job on a node of its own."""

    process: subprocess.Popen[bytes]
    log: Path

    def pid(self) -> int:
        """The supervisor's own pid here; ProcessLookupError once it has ended."""
        wait_until(lambda: bool(tree_of(self.process.pid)[1:]) or self.has_ended(), "no supervisor")
        for process in tree_of(self.process.pid)[1:]:
            return int(process.pid)
        raise ProcessLookupError

    def has_ended(self) -> bool:
        """Whether it is gone."""
        return self.process.poll() is not None

    def end(self) -> int:
        """Wait for its end; return its exit code."""
        return self.process.wait(120)

    def kill(self) -> None:
        """The node is gone."""
        self.process.kill()
        self.process.wait()


@contextmanager
def supervisor(
    crcli: Crcli, number: int, steps: int, pause: float, *options: str, elsewhere: bool = True
) -> Iterator[Supervisor]:
    """Start a supervisor; it and its job are gone after the block."""
    command = [*(ELSEWHERE if elsewhere else ()), sys.executable, "-m", "tests.support.short_leases"]
    command += [str(TTL_S), "run", "--name", "job", "--store", crcli.store, "--on-failure", "retry", *options]
    command += ["--", sys.executable, "-c", ALONE, str(crcli.folder), str(steps), str(pause)]
    log = crcli.folder / f"log.{number}"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=crcli.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
        )
    one = Supervisor(process, log)
    try:
        yield one
    finally:
        one.kill()


def assert_never_two(folder: Path) -> None:
    """No copy has met another."""
    overlap = folder / "overlap"
    assert not overlap.exists(), overlap.read_text()


def numbers(folder: Path) -> list[int]:
    """The lease's number at each step so far."""
    path = folder / "numbers"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_of_two_that_start_at_once_one_runs(crcli: Crcli) -> None:
    """Each time one runs the job to its end, and the other ends with 23 and starts nothing."""
    for turn in range(4):
        with (
            supervisor(crcli, 2 * turn, 40, 0.02, "--claim-wait", "0") as one,
            supervisor(crcli, 2 * turn + 1, 40, 0.02, "--claim-wait", "0") as other,
        ):
            codes = sorted((one.end(), other.end()))
        assert codes == [0, 23], (one.log.read_text(), other.log.read_text())
        assert (crcli.folder / "result").read_text() == result(40)
        (crcli.folder / "result").unlink()
    assert_never_two(crcli.folder)


def test_a_supervisor_that_is_stopped_does_not_let_its_job_run_on(crcli: Crcli) -> None:
    """Only `crcli run` is stopped: its job stands still before the other node has the name, and ends when it
    wakes."""
    with supervisor(crcli, 1, 4000, 0.02) as first:
        wait_until(lambda: bool(numbers(crcli.folder)), "the job does not run", 30)
        pid = first.pid()
        os.kill(pid, signal.SIGSTOP)
        job = [one for one in tree_of(pid) if "CRCLI_JOB" in one.environ()]
        wait_until(lambda: all(one.status() == "stopped" for one in job), "it runs on", 30)
        (crcli.folder / "alone").unlink()  # which it may hold
        had = numbers(crcli.folder)
        with supervisor(crcli, 2, 300, 0.02, "--fresh", "--claim-wait", "60") as second:
            wait_until(lambda: numbers(crcli.folder)[-1] > had[-1], "not taken over", 60)
            os.kill(pid, signal.SIGCONT)
            assert first.end() == 23, first.log.read_text()
            assert second.end() == 0, second.log.read_text()
    assert_never_two(crcli.folder)
    assert numbers(crcli.folder) == sorted(numbers(crcli.folder))
    assert (crcli.folder / "result").read_text() == result(300)


def test_a_job_that_was_dumped_while_it_stood_still_goes_on(crcli: Crcli) -> None:
    """A job that stands still because its lease has lapsed may be dumped so; who brings it back wakes it."""
    with supervisor(crcli, 1, 300, 0.02) as first:
        wait_until(lambda: bool(numbers(crcli.folder)), "the job does not run", 30)
        job = [one for one in tree_of(first.pid()) if "CRCLI_JOB" in one.environ()]
        for one in job:
            one.suspend()
        os.kill(first.pid(), signal.SIGTERM)
        assert first.end() == 75, first.log.read_text()
    with supervisor(crcli, 2, 300, 0.02) as second:
        assert second.end() == 0, second.log.read_text()
    assert "restored" in second.log.read_text()
    assert (crcli.folder / "result").read_text() == result(300)


def test_who_was_taken_over_publishes_nothing(crcli: Crcli) -> None:
    """A dump that was under way when another took the name ends without an image, and its tree runs on."""
    store = open_store(crcli.store)

    def dump(pid: int, nonce: str) -> subprocess.CompletedProcess[str]:
        words = f"pid={pid}, name='job', store={crcli.store!r}, job={{'holder': {nonce!r}}}"
        code = f"""
from crcli.pipeline.dump import dump
from crcli.pipeline.stages import DumpOptions, Outcome
dump(DumpOptions({words}, outcome=Outcome.RUNNING))
"""
        return subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=crcli.environment, capture_output=True, text=True
        )

    lease = Lease.claim(store, "job", "a test")
    with spawn_python(counter()) as program:
        done = dump(program.pid, lease.nonce)
        assert done.returncode == 0, done.stderr
        lease.release()
        Lease.claim(store, "job", "another")
        done = dump(program.pid, lease.nonce)
        assert "was taken over by another" in done.stderr
        before = counted(program)
        wait_until(lambda: counted(program)[-1] > before[-1], "it does not run on")
    assert len(list(store.list("images/"))) == 1


def test_nodes_that_go_away_at_random(crcli: Crcli) -> None:
    """Nodes are told to go, or are gone without a word; at any time one copy runs, and the result is that of
    a run that nobody interrupted."""
    chance = random.Random(7)
    turn = 0
    limit = time.monotonic() + 240
    while not (crcli.folder / "result").exists():
        assert time.monotonic() < limit, "it does not get done"
        options = ("--every", "1s", "--claim-wait", "60")
        with (
            supervisor(crcli, turn, 150, 0.02, *options) as one,
            supervisor(crcli, turn + 1, 150, 0.02, *options),
        ):
            time.sleep(chance.uniform(1.5, 5))
            if chance.random() < 0.7:
                with suppress(ProcessLookupError):  # it may have done the job, also just now
                    os.kill(one.pid(), signal.SIGTERM)
                    one.end()
        turn += 2
    assert_never_two(crcli.folder)
    assert (crcli.folder / "result").read_text() == result(150)
