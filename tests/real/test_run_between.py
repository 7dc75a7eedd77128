"""Jobs of `crcli run` between machines: whatever happens to machines and network, one copy runs, and goes on.

Machines are namespaces, so all have one clock: each line that a job prints says when, and the lines of two
machines can be put in order.
"""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.crcli import wait_until
from tests.support.nodes.base import JOBS, ROOT
from tests.support.nodes.namespaces import OUTSIDE, Lan, NamespaceNode, lan, why_not
from tests.support.programs import SLOWNESS
from tests.support.s3servers import S3Server, start_moto

ROUNDS = int(os.environ.get("CRCLI_FAULT_ROUNDS", "3"))
SEED = int(os.environ.get("CRCLI_FAULT_SEED") or random.randrange(1 << 32))

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.timeout(900 + 60 * ROUNDS),
]
LEASE_S = 10.0
"""For how long a machine that is not heard of keeps the job (half a minute, outside of tests)."""

TAKEN_OVER_S = 60.0 * SLOWNESS

FOLDER = f"{JOBS}/job"
WORK = """
import hashlib, itertools, random, time
memory = random.Random(1).randbytes(1 << 20)
for number in itertools.count():
    print(number, time.time(), hashlib.blake2b(memory, digest_size=8).hexdigest(), flush=True)
    time.sleep(0.02)
"""


@dataclass
class Site:
    """Machines and a store."""

    lan: Lan
    server: S3Server
    store: str


@dataclass(frozen=True)
class Line:
    """What the job printed: its number, and when."""

    number: int
    at: float


@dataclass
class Run:
    """`crcli run` on a machine."""

    node: NamespaceNode
    process: subprocess.Popen[str]

    @property
    def lines(self) -> list[Line]:
        """What the job has printed on this machine; fails when its memory is not what it was."""
        path = self.node.root / FOLDER.lstrip("/") / "output"
        whole = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
        words = [line.split() for line in whole]
        assert len({digest for _, _, digest in words}) <= 1, "the memory changed"
        return [Line(int(number), float(at)) for number, at, _ in words]

    def wait_for_lines(self, more: int = 10) -> None:
        """Return once the job has printed so many more lines."""
        wanted = len(self.lines) + more
        gone = self.process.poll
        wait_until(lambda: len(self.lines) >= wanted or gone() is not None, "it stands still", TAKEN_OVER_S)
        assert len(self.lines) >= wanted, f"it has ended: {self.errors}"

    @property
    def errors(self) -> str:
        """What crcli has said."""
        path = self.node.root / FOLDER.lstrip("/") / "errors"
        return path.read_text() if path.exists() else ""

    def tell(self, signal: str) -> None:
        """Send the supervisor a signal."""
        self.node.run(f"kill -{signal} $(cat {FOLDER}/pid)", code=0)

    def end(self) -> int:
        """Wait for the end; return the exit code."""
        self.process.communicate(timeout=TAKEN_OVER_S)
        return self.process.returncode


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """A network with a store in it."""
    with lan() as network, start_moto(address=OUTSIDE) as server:
        yield Site(network, server, server.url("jobs"))


def start(site: Site, name: str, *options: str) -> Run:
    """Start the job on a new machine; it is the same command on each."""
    node = site.lan.node(name)
    node.environment |= site.server.env | {"PYTHONPATH": str(ROOT), "CRCLI_CACHE_SIZE": "0"}
    node.write(f"{FOLDER}/work.py", WORK.encode())
    crcli = (sys.executable, "-m", "tests.support.short_leases", str(LEASE_S))
    words = ("run", "--name", "job", "--store", site.store, "--every", "2s", *options, "--")
    command = shlex.join([*crcli, *words, sys.executable, "work.py"])
    inside = f"cd {FOLDER}; echo $$ >pid; exec {command} >>output 2>>errors"
    return Run(node, node.start(inside))


def has_an_image(site: Site) -> bool:
    """Whether an image of the job is in the store."""
    found = site.server.client().list_objects_v2(Bucket=site.server.bucket, Prefix="jobs/images/")
    return bool(found.get("KeyCount"))


def assert_one_after_the_other(before: list[Line], run: Run) -> None:
    """Assert that the job ran on earlier machines first, and went on here from where it had been.

    What was on its way through a pipe when the image was taken is shown by both: the same number, and the
    same time to the microsecond, which no two copies would have.
    """
    here = run.lines
    own = [line for line in here if line not in before]
    assert max(line.at for line in before) < own[0].at, "two copies at once"
    assert here[0].number <= max(line.number for line in before) + 1, "numbers are missing"
    assert here[0].number > 0, "it began anew"
    assert [line.number for line in here] == list(range(here[0].number, here[0].number + len(here)))


def test_a_machine_that_is_cut_off_stands_still_before_another_goes_on(site: Site) -> None:
    """Its job is stopped when its lease may be taken, and ends when it is seen that it was."""
    one = start(site, "one")
    one.wait_for_lines()
    wait_until(lambda: has_an_image(site), f"no image\n{one.errors}", 60)
    one.wait_for_lines()
    one.node.cut()
    other = start(site, "other")
    other.wait_for_lines()
    before = one.lines
    one.node.mend()
    assert one.end() not in (0, 75), one.errors
    assert one.lines == before, "it ran on after it was succeeded"
    assert_one_after_the_other(before, other)


def test_one_of_many_machines_gets_the_job_of_one_that_died(site: Site) -> None:
    """Two begin at once: one goes on with the job, the other is told who has it (exit 23)."""
    one = start(site, "one")
    one.wait_for_lines()
    wait_until(lambda: has_an_image(site), f"no image\n{one.errors}", 60)
    one.wait_for_lines()
    before = one.lines
    one.node.kill()
    both = [start(site, "second"), start(site, "third")]
    wait_until(lambda: any(run.process.poll() is not None for run in both), "nobody gives up", TAKEN_OVER_S)
    (loser,) = (run for run in both if run.process.poll() is not None)
    (winner,) = (run for run in both if run is not loser)
    assert loser.end() == 23, loser.errors
    winner.wait_for_lines()
    assert loser.lines == []
    assert_one_after_the_other(before, winner)


def test_a_job_moves_in_every_way(site: Site) -> None:
    """Machine after machine: told to leave, killed, or cut off. Nothing is lost and no two copies run.

    CRCLI_FAULT_ROUNDS=100 for a hundred; CRCLI_FAULT_SEED repeats a failure.
    """
    random_ = random.Random(SEED)
    run, before = start(site, "node-0"), list[Line]()
    cut_off: list[Run] = []
    for number in range(1, ROUNDS + 1):
        how = random_.choice(("leave", "leave", "leave", "die", "cut"))
        run.wait_for_lines(random_.randrange(5, 100))
        wait_until(lambda: has_an_image(site), f"no image\n{run.errors}", 60)
        where = f"CRCLI_FAULT_SEED={SEED}, round {number}: {how}\n{run.errors}"
        if how == "leave":
            run.tell("TERM")
            assert run.end() == 75, where
            before += run.lines
            run.node.kill()
        elif how == "die":
            before += run.lines
            run.node.kill()
        else:
            run.node.cut()
            cut_off.append(run)
        following = start(site, f"node-{number}")
        following.wait_for_lines()
        if how == "cut":
            before += run.lines
        if how == "leave":
            assert following.lines[0].number == before[-1].number + 1, where
        assert_one_after_the_other(before, following)
        run = following
        for gone in cut_off:
            gone.node.kill()
        cut_off.clear()
