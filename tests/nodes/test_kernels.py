"""Moves between virtual machines with kernels, and a processor, that this host does not have.

Machines are booted one after the other: Linux 6.12, 6.18, 6.1, and 6.12 again. Each kernel dumps a tree, and
each machine restores what those before it have dumped. On the way they run tests of tests/real that this
host's kernel cannot.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from crcli.guard.baseline import Host, common_to, environment_for
from tests.support.crcli import wait_until
from tests.support.nodes.base import Job
from tests.support.nodes.kernels import kernel_like
from tests.support.nodes.moves import dedent, dumped, family, restored
from tests.support.nodes.namespaces import OUTSIDE, Lan, NamespaceNode, lan
from tests.support.nodes.vm import ROOT, Machine, booted, why_not
from tests.support.s3servers import S3Server, start_moto

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=f"{why_not()}: ./scripts/test nodes installs what it takes"),
    pytest.mark.timeout(1800),
    pytest.mark.alone,  # a machine under emulation takes a core, and as much memory as there may be
]

PRE_COPY = "tests/real/test_pre_copy.py"
TRACKED = re.findall(r"^@tracking\n(?:@.*\n)*def (test_\w+)", (ROOT / PRE_COPY).read_text(), re.MULTILINE)

AN_HOUR = 3600.0

USER_OF_THE_CPU = """
    import hashlib, itertools, json, time
    import numpy as np
    matrix = np.random.default_rng(1).standard_normal((96, 96))
    text = json.dumps(matrix.tolist()).encode()
    print("ready")
    for number in itertools.count():
        digest = hashlib.sha256((matrix @ matrix).tobytes())
        digest.update(np.exp(np.sqrt(np.abs(matrix.astype(np.float32)))).tobytes())
        digest.update(text.replace(b"9", b"8").upper()[::-1])
        digest.update(bytes(bytearray(text)).rpartition(b"1.")[2])
        print(number, digest.hexdigest()[:16])
        time.sleep(0.01)
    """
"""Counts, with what chooses its code by the CPU: OpenBLAS, NumPy, OpenSSL, and glibc."""


@dataclass
class Site:
    """A network, a store, and what was dumped there so far."""

    lan: Lan
    server: S3Server
    shelf: list[tuple[str, Job]] = field(default_factory=list)

    @property
    def store(self) -> str:
        """The store of all machines."""
        return self.server.url("kernels")


@dataclass
class Visit:
    """A machine while it is up."""

    release: str
    machine: Machine
    ahead_s: float


VISITS = {"6.12": 0.0, "6.18": 0.0, "6.1": 0.0, "6.12 again, an hour behind": -AN_HOUR}


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """The network and the store."""
    with lan() as network, start_moto(address=OUTSIDE) as server:
        yield Site(network, server)


@pytest.fixture(scope="module")
def visit(site: Site, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """Each machine in turn: all tests of one run before the next is booted (conftest.py)."""
    release, ahead_s = request.param.split()[0], VISITS[request.param]
    kernel = kernel_like(release)
    if kernel is None:
        pytest.skip(f"no Linux {release} for a guest: scripts/fetch-kernel unpacks it")
    with booted(kernel, name=f"linux-{release.replace('.', '-')}", ahead_s=ahead_s) as machine:
        machine.environment |= site.server.env | {"CRCLI_CACHE_SIZE": "0"}
        yield Visit(release, machine, ahead_s)


def at(*names: str) -> pytest.MarkDecorator:
    """Run a test on these machines."""
    return pytest.mark.parametrize("visit", names or list(VISITS), indirect=True)


@at("6.12", "6.18", "6.1")
def test_a_machine_has_its_own_kernel(visit: Visit) -> None:
    """What runs inside runs on that kernel, on this host's files, which it cannot change."""
    machine = visit.machine
    assert machine.run("uname -r").out.startswith(f"{visit.release}.")
    assert machine.run(f"test -e {shlex.quote(str(ROOT / PRE_COPY))}").code == 0
    assert machine.run(f"touch {shlex.quote(str(ROOT / 'x'))}").code != 0
    assert machine.run("exit 7").code == 7


@at("6.12")
def test_a_machine_can_be_cut_off(visit: Visit, site: Site) -> None:
    """It reaches the store, not while its network is cut, and again afterwards."""
    reach = f'import socket; socket.create_connection(("{OUTSIDE}", {site.server.port}), 5)'
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(reach)}"
    visit.machine.run(command, code=0)
    visit.machine.cut()
    assert visit.machine.run(command).code == 1
    visit.machine.mend()
    wait_until(lambda: visit.machine.run(command).code == 0, "it stays cut off", 60)


@at()
def test_what_all_kernels_so_far_dumped_goes_on_here(visit: Visit, site: Site) -> None:
    """A tree dumped on an older, a newer or the same kernel counts on, its memory unchanged.

    That a kernel is older, or a clock behind that of the dump, is said.
    """
    for release, job in site.shelf:
        report = restored(job, visit.machine, site.store)
        is_from_the_future = visit.ahead_s < 0
        assert ("clock-backwards" in names_of(report)) == is_from_the_future
        assert ("kernel-older" in names_of(report)) == (number_of(release) > number_of(visit.release))
        here = job.on(visit.machine, report["host_pid"])
        here.assert_goes_on()
        visit.machine.run(f"kill -KILL {here.pid}", code=0)
        print(f"{release} -> {visit.release}")
    if visit.release not in dict(site.shelf):
        own = visit.machine.launch(f"from-{visit.release}", family(kilobytes=1024))
        own.assert_goes_on()
        dumped(own, site.store)
        site.shelf.append((visit.release, own))


@at("6.12")
def test_a_cpu_that_lacks_something_is_refused(visit: Visit, site: Site) -> None:
    """The guard names what is missing before CRIU starts; without it the tree would die of SIGILL."""
    node = machine_here(site, "this-host")
    lacking = host_of(node).flags - host_of(visit.machine).flags
    if not any(flag.startswith("avx") for flag in lacking):
        pytest.skip("the emulated CPU has all that this host has")
    job = node.launch("user-of-the-cpu", dedent(USER_OF_THE_CPU))
    dumped(job, site.store)
    error = restored(job, visit.machine, site.store, code=20)["error"]
    (finding,) = (one for one in error["findings"] if one["severity"] == "blocker")
    assert finding["name"] == "cpu-features" and error["state"] == "untouched"
    missing = {flag for flag in lacking if flag.startswith("avx")}
    assert missing <= set(finding["evidence"]["missing"]) and all(
        flag in error["message"] for flag in missing
    )
    assert error["criu"] == "" and error["log"] == ""


@at("6.12")
def test_a_job_started_for_the_fleets_baseline_fits(visit: Visit, site: Site) -> None:
    """Started with the variables of what both CPUs have, the same job goes on, on the other."""
    node = machine_here(site, "this-host-too")
    baseline = common_to([host_of(node), host_of(visit.machine)])
    job = node.launch("careful-user", dedent(USER_OF_THE_CPU), environment_for(baseline))
    job.assert_goes_on()
    dump_as_job(job, site.store, {"cpu_baseline": sorted(baseline.flags)})
    report = restored(job, visit.machine, site.store)
    assert "cpu-baseline" in names_of(report)
    job.on(visit.machine).assert_goes_on()


SLOW = (
    "test_the_last_round_carries_little",
    "test_whatever_memory_does_between_rounds_it_is_what_it_was",
    "test_criu_killed_in_a_round",
)
"""Tests that take two, five and six minutes under emulation."""


def rounds() -> Iterator[Any]:
    """Each test of rounds, on one of the kernels, all of which track writes."""
    every = bool(os.environ.get("CRCLI_NODES_ALL"))
    for release, name in zip(itertools.cycle(("6.12", "6.18", "6.1")), TRACKED, strict=False):
        marks = (
            () if every or name not in SLOW else pytest.mark.skip("takes minutes: CRCLI_NODES_ALL=1 runs it")
        )
        yield pytest.param(release, name, marks=marks)


@pytest.mark.parametrize(("visit", "name"), list(rounds()), indirect=["visit"], scope="module")
def test_pre_copy(visit: Visit, name: str) -> None:
    """A test of rounds passes on a kernel that tracks writes, and is not skipped there."""
    assert_passes(visit, f"{PRE_COPY}::{name}")


@at("6.12", "6.1")
@pytest.mark.parametrize(
    "name", ["criu_sends_next_to_nothing", "odd_memory_is_what_it_was_and_as_lazy_as_criu_has_it"]
)
def test_left_pages(visit: Visit, name: str) -> None:
    """CRIU leaves pages in a tree also where the kernel tracks writes: none is dirty once it stands still."""
    assert_passes(visit, f"tests/real/test_left_pages.py::test_{name}")


def assert_passes(visit: Visit, name: str) -> None:
    """A test passes on this machine, and is not skipped there."""
    python = shlex.quote(sys.executable)
    command = f"{python} -m pytest -p no:cacheprovider -rs {name}"
    done = visit.machine.run(f"cd {shlex.quote(str(ROOT))} && CRCLI_TEST_SLOWNESS=5 {command}", limit_s=200)
    assert done.code == 0, done.out
    assert "passed" in done.out and "skipped" not in done.out, done.out


def names_of(report: dict[str, Any]) -> set[str]:
    """The names of a report's findings."""
    return {finding["name"] for finding in report["findings"]}


def number_of(release: str) -> tuple[int, ...]:
    """A kernel's version as a number."""
    return tuple(map(int, release.split(".")))


def machine_here(site: Site, name: str) -> NamespaceNode:
    """A machine with this host's kernel and CPU."""
    node = site.lan.node(name)
    node.environment |= site.server.env
    return node


def host_of(node: NamespaceNode | Machine) -> Host:
    """What the doctor says there."""
    return Host.parse(node.run(f"{node.python('crcli', 'doctor', '--json')} 2>/dev/null").json)


def dump_as_job(job: Job, store: str, facts: dict[str, Any]) -> None:
    """Dump a job as `crcli run` does: with these facts about it in the image."""
    code = (
        "from crcli.pipeline.dump import dump; from crcli.pipeline.stages import DumpOptions; "
        f"dump(DumpOptions({job.pid}, {store!r}, {job.name!r}, job={facts!r}))"
    )
    job.node.run(f"cd {shlex.quote(str(ROOT))} && {shlex.join([sys.executable, '-c', code])}", 90, code=0)
