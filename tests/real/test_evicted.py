"""Jobs that lose their node again and again, in every way: what they compute is what they would have anyway.

Random moments come from a seed that a failure shows (`CRCLI_FAULT_SEED` repeats it); `CRCLI_FAULT_ROUNDS`
says how often each job is evicted.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.crcli import Crcli, tree_of, wait_until
from tests.support.jobs import Job, job, python_job

EVICTIONS = int(os.environ.get("CRCLI_FAULT_ROUNDS", "3"))
SEED = int(os.environ.get("CRCLI_FAULT_SEED") or random.randrange(1 << 32))

WORK = """
import hashlib, os, random, subprocess, sys, threading, time
result, steps = sys.argv[1], int(sys.argv[2])
memory = bytearray(random.Random(7).randbytes(2 << 20))
helper = subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
total, beats = 0, []
threading.Thread(target=lambda: [beats.append(time.sleep(0.01)) for _ in iter(int, 1)], daemon=True).start()
for step in range(steps):
    helper.stdin.write(b'%d\\n' % step); helper.stdin.flush()
    total += int(helper.stdout.readline())
    memory[step % 4096 :: 4096] = bytes([step % 251]) * len(memory[step % 4096 :: 4096])
    print(step, flush=True)
    time.sleep(0.02)
with open(result + '.new', 'w') as file:
    file.write(f'{total} {hashlib.blake2b(memory, digest_size=16).hexdigest()}')
os.rename(result + '.new', result)
"""
"""A job that sums up and changes its memory with the help of a child, and writes its result at the end."""

STEPS = 100 + 50 * EVICTIONS


def sigterm(one: Job) -> None:
    """As Kubernetes, systemd and Slurm say it."""
    one.tell(signal.SIGTERM)


def a_file(one: Job) -> None:
    """A file appears, with the time that is left."""
    (one.folder / "notice").write_text("30")


def a_request(one: Job) -> None:
    """A hook is called."""
    body = json.dumps({"reason": "maintenance", "seconds": 30}).encode()
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{one.port}/", body), timeout=20).close()


def no_time(one: Job) -> None:
    """A notice that leaves no time at all: the machine is gone before anything can be saved."""
    (one.folder / "notice").write_text("0.1")
    time.sleep(0.2)
    one.tell(signal.SIGKILL)


def sigkill(one: Job) -> None:
    """No notice: the machine is gone."""
    one.tell(signal.SIGKILL)


def sigkill_in_a_dump(one: Job) -> None:
    """Gone in the middle of what the notice has begun."""
    one.tell(signal.SIGTERM)
    time.sleep(random.Random(SEED + one.port).uniform(0, 0.6))
    one.tell(signal.SIGKILL)


def dumper_killed(one: Job) -> None:
    """Notice, and the process that dumps is killed meanwhile: it is tried again."""
    one.tell(signal.SIGTERM)
    time.sleep(random.Random(SEED + one.port).uniform(0, 0.4))
    for process in tree_of(one.process.pid):
        with suppress(psutil.Error):
            if "crcli.pipeline.dumper" in " ".join(process.cmdline()):
                process.kill()


EVICTED_BY: dict[str, Callable[[Job], None]] = {
    one.__name__: one
    for one in (sigterm, a_file, a_request, no_time, sigkill, sigkill_in_a_dump, dumper_killed)
}


@pytest.mark.timeout(120 + 60 * EVICTIONS)
@pytest.mark.parametrize("by", ["no_time", "sigkill", "sigkill_in_a_dump", "dumper_killed", "anything"])
def test_an_evicted_job_has_the_result_of_an_undisturbed_one(by: str, crcli: Crcli, tmp_path: Path) -> None:
    """At random moments, several times over; whatever was lost is done again, and nothing twice."""
    source = random.Random(f"{SEED}-{by}")
    result = tmp_path / "result"
    command = python_job(WORK, str(result), str(STEPS))
    evictions, is_saved = 0, False
    for number in range(20 * EVICTIONS):
        kind = source.choice(list(EVICTED_BY)) if by == "anything" else by
        folder = tmp_path / str(number)
        with job(crcli, folder, *notices(folder, number), "--every", "1", *command) as one:
            if evictions < EVICTIONS:
                one.port = port(number)
                _work_a_while(one, source.uniform(0.3, 1.5))
                if one.process.poll() is None:
                    EVICTED_BY[kind](one)
                    evictions += 1
            code = one.end()
        assert not (is_saved and "crcli: started " in one.err), f"seed {SEED}, {kind}: begun again\n{one.err}"
        is_saved = is_saved or "is durable" in one.err
        assert code in (0, 75, -signal.SIGKILL), f"seed {SEED}, {kind}: exit {code}\n{one.err}"
        if code == 0:
            break
    assert result.exists(), f"seed {SEED}: the job has not come to its end"
    assert result.read_text() == undisturbed(tmp_path)


def _work_a_while(one: Job, seconds: float) -> None:
    """Let it run for a while from when it has begun, or to its end."""
    wait_until(
        lambda: "started" in one.err or "restored" in one.err or one.process.poll() is not None,
        "not begun",
        60,
    )
    end = time.monotonic() + seconds
    while one.process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def port(number: int) -> int:
    """A port for the hook of this start."""
    return 20000 + (os.getpid() * 37 + number) % 20000


def notices(folder: Path, number: int) -> tuple[str, ...]:
    """Every way in which the job may be told."""
    sources = ("sigterm", f"file:{folder}/notice", f"http:127.0.0.1:{port(number)}")
    return tuple(word for source in sources for word in ("--notice", source))


def undisturbed(folder: Path) -> str:
    """The result of the same work, done at once."""

    path = folder / "undisturbed"
    quick = WORK.replace("time.sleep(0.02)", "pass")
    subprocess.run(
        [sys.executable, "-c", quick, str(path), str(STEPS)], check=True, stdout=subprocess.DEVNULL
    )
    return path.read_text()
