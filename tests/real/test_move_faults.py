"""Whatever fails between two machines: the tree runs where it was, or its image brings it back elsewhere.

The store is behind a proxy on the network, so that a machine can be killed, or cut off, at a known moment:
when a certain request comes in.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.support.crcli import counter, wait_until
from tests.support.faulty_proxy import Exchange, FaultyProxy, answer, lose_answer, pass_on, reset_midway
from tests.support.nodes.base import Job, numbers_in
from tests.support.nodes.moves import dumped, restored
from tests.support.nodes.namespaces import OUTSIDE, Lan, NamespaceNode, lan, why_not
from tests.support.s3servers import S3Server, start_moto

LARGE_KIB = 56 << 10
"""Enough random memory for an upload of several parts."""

MOST_ON_DEMAND = 5 << 19
ROUNDS = int(os.environ.get("CRCLI_FAULT_ROUNDS", "3"))
SEED = int(os.environ.get("CRCLI_FAULT_SEED") or random.randrange(1 << 32))

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.timeout(600 + 60 * ROUNDS),
]
FOR_EVER = float("inf")


@dataclass
class Site:
    """Machines, a store, and what stands between them."""

    lan: Lan
    proxy: FaultyProxy
    store: str
    environment: dict[str, str]

    def node(self, name: str, **environment: str) -> NamespaceNode:
        """A new machine, which reaches the store by way of the proxy, and keeps nothing of it."""
        node = self.lan.node(name)
        node.environment |= self.environment | {"CRCLI_CACHE_SIZE": "0"} | environment
        return node

    def names(self, node: NamespaceNode) -> list[str]:
        """The images in the store."""
        return [image["image"] for image in node.crcli("ls", "--store", self.store)["images"]]


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Lan, S3Server]]:
    """A network with a store in it."""
    with lan() as network, start_moto(address=OUTSIDE) as server:
        yield network, server


@pytest.fixture
def site(place: tuple[Lan, S3Server], request: pytest.FixtureRequest) -> Iterator[Site]:
    """That network with a proxy, and a folder of the store's, for one test."""
    network, server = place
    url = server.url(f"{abs(hash(request.node.name)):x}")
    with network.only_for_now(), FaultyProxy(server, OUTSIDE) as proxy:
        yield Site(network, proxy, url, server.env | {"AWS_ENDPOINT_URL": proxy.endpoint_url})


def then(act: Callable[[], object]) -> Callable[[Exchange], None]:
    """A fault: this happens when the request is there, and the answer may or may not arrive."""

    def fault(exchange: Exchange) -> None:
        body = exchange.read_body()
        act()
        exchange.answer(*exchange.forward(body))

    return fault


def cut_for(node: NamespaceNode, seconds: float) -> Callable[[], None]:
    """What cuts a machine off, and gives it its network back after a while."""

    def act() -> None:
        node.cut()
        threading.Timer(seconds, node.mend).start()

    return act


def test_a_machine_that_dies_half_way_through_the_upload(site: Site) -> None:
    """Its image does not exist; the one before brings the tree back elsewhere; gc frees what was sent."""
    one = site.node("one")
    job = one.launch("counter", counter(kilobytes=LARGE_KIB))
    job.assert_goes_on()
    before = job.counted()[-1]
    dumped(job, site.store, "--leave-running")
    job.assert_goes_on()
    second = one.launch("second", counter(seed=2, kilobytes=LARGE_KIB))
    site.proxy.inject(then(one.kill), method="PUT", containing="partNumber=2")
    words = ("dump", str(second.pid), "--store", site.store, "--name", second.name)
    dumping = one.start(one.python("crcli", *words))
    dumping.communicate(timeout=60)
    assert dumping.returncode != 0
    other = site.node("other")
    assert [image.partition("@")[0] for image in site.names(other)] == ["counter"]
    assert restored(second, other, site.store, code=31)["error"]
    restored(job, other, site.store)
    job.on(other).assert_goes_on()
    assert job.on(other).counted()[-1] >= before
    other.crcli("gc", "--store", site.store, "--grace", "0")
    assert other.crcli("verify", "counter", "--store", site.store)["damage"] == []


def test_a_network_that_is_away_for_a_moment_during_a_dump(site: Site) -> None:
    """The dump waits for it and succeeds; the image is whole."""
    one = site.node("one")
    job = one.launch("counter", counter(kilobytes=LARGE_KIB))
    site.proxy.inject(then(cut_for(one, 3)), method="PUT", containing="partNumber=2")
    assert dumped(job, site.store)["outcome"] == "killed"
    one.kill()
    other = site.node("other")
    restored(job, other, site.store)
    job.on(other).assert_goes_on()


def test_a_network_that_stays_away_during_a_dump(site: Site) -> None:
    """At its deadline the dump ends with the tree running and no image; with the network back it works."""
    one = site.node("one")
    job = one.launch("counter", counter(kilobytes=LARGE_KIB))
    site.proxy.inject(then(one.cut), method="PUT", containing="partNumber=2")
    error = dumped(job, site.store, "--deadline", "8", code=11)["error"]
    assert error["state"] == "running"
    job.assert_goes_on()
    one.mend()
    assert site.names(one) == []
    dumped(job, site.store)
    other = site.node("other")
    restored(job, other, site.store)
    job.on(other).assert_goes_on()


def test_a_network_that_is_away_for_a_moment_during_a_restore(site: Site) -> None:
    """The restore waits for it, and the tree goes on."""
    one, other = site.node("one"), site.node("other")
    job = one.launch("counter", counter(kilobytes=LARGE_KIB))
    dumped(job, site.store)
    site.proxy.inject(then(cut_for(other, 3)), method="GET", containing="/packs/")
    restored(job, other, site.store, "--eager")
    job.on(other).assert_goes_on()


def test_a_network_that_stays_away_during_a_restore(site: Site) -> None:
    """Nothing is left running and no file is left; the same machine can do it once the network is back."""
    one, other = site.node("one"), site.node("other", AWS_MAX_ATTEMPTS="1")
    job = one.launch("counter", counter(kilobytes=LARGE_KIB))
    dumped(job, site.store)
    site.proxy.inject(then(other.cut), method="GET", containing="/packs/")
    assert restored(job, other, site.store, "--eager", code=30)["error"]["state"] != "running"
    assert not any("counter.py" in command for command in other.processes().values())
    assert other.run(f"ls {job.folder}/output").code != 0
    other.mend()
    restored(job, other, site.store)
    job.on(other).assert_goes_on()


def test_a_network_that_is_away_during_a_lazy_restore(site: Site) -> None:
    """The tree runs on what it has; who touches what is missing waits until the network is back."""
    one, other = site.node("one"), site.node("other")
    job = one.launch("counter", counter(kilobytes=LARGE_KIB))
    dumped(job, site.store)
    one.kill()
    through = threading.Event()

    def hold_back(exchange: Exchange) -> None:
        begin, _, end = (
            exchange.handler.headers.get("Range", "bytes=0-0").removeprefix("bytes=").partition("-")
        )
        if int(end) - int(begin) >= MOST_ON_DEMAND:
            through.wait(60)
        pass_on(exchange)

    site.proxy.inject(hold_back, method="GET", containing="/packs/", times=FOR_EVER)
    assert restored(job, other, site.store, "--lazy")["missing_bytes"] > 0
    other.cut()
    through.set()
    assert any("counter.py" in command for command in other.processes().values())
    before = job.on(other).counted()[-1]
    other.mend()
    job = job.on(other)
    job.wait_for(lambda text: numbers_in(text)[-1] > before + 5, 60)
    job.assert_goes_on()
    wait_until(lambda: "crcli-pager" not in other.run("cat /proc/[0-9]*/comm").out, "it never is whole", 60)


def test_a_store_that_answers_with_errors(site: Site) -> None:
    """503, broken connections and lost answers, in the middle of everything: the move only takes longer."""
    one, other = site.node("one"), site.node("other")
    job = one.launch("counter", counter(kilobytes=LARGE_KIB))
    for method in ("PUT", "POST", "GET"):
        for fault in (answer(503, "SlowDown"), reset_midway, lose_answer, answer(500, "InternalError")):
            site.proxy.inject(fault, method=method, times=1)
    dumped(job, site.store)
    for fault in (answer(503, "SlowDown"), reset_midway, lose_answer):
        site.proxy.inject(fault, method="GET", times=1)
    restored(job, other, site.store)
    job.on(other).assert_goes_on()


FAULTS: dict[str, Callable[[Site, NamespaceNode], Callable[[Exchange], None]]] = {
    "the machine dies": lambda site, node: then(node.kill),
    "the network is away": lambda site, node: then(cut_for(node, 2)),
    "503": lambda site, node: answer(503, "SlowDown"),
    "reset": lambda site, node: reset_midway,
    "the answer is lost": lambda site, node: lose_answer,
}


def test_moves_under_random_faults(site: Site) -> None:
    """One tree, move after move, each with a fault at some request: never lost, and never twice.

    When a machine dies the newest image brings the tree back; otherwise not one number of it is left out.
    CRCLI_FAULT_ROUNDS=100 for a hundred moves; CRCLI_FAULT_SEED repeats a failure.
    """
    random_ = random.Random(SEED)
    node = site.node("node-0")
    job = node.launch("counter", counter(kilobytes=4096))
    dumped(job, site.store, "--leave-running")
    seen: list[str] = []
    for number in range(1, ROUNDS + 1):
        name = random_.choice(list(FAULTS))
        at = random_.randrange(10)
        seen.append(f"{name} at {at}")
        try:
            node, job = moved_under(site, node, job, f"node-{number}", name, at)
        except AssertionError as error:
            raise AssertionError(f"CRCLI_FAULT_SEED={SEED}, round {number}: {seen[-1]}\n{error}") from error


def moved_under(
    site: Site, node: NamespaceNode, job: Job, name: str, fault: str, at: int
) -> tuple[NamespaceNode, Job]:
    """Move a counter to a new machine, with a fault at one request; return where it runs then."""
    before = job.counted()[-1]
    for _ in range(at):
        site.proxy.inject(pass_on)
    site.proxy.inject(FAULTS[fault](site, node))
    words = ("dump", str(job.pid), "--name", job.name, "--store", site.store)
    dumping = node.start(node.python("crcli", *words))
    out, _ = dumping.communicate(timeout=120)
    site.proxy.forgive()
    if not node.is_alive():
        before = -1
    elif dumping.returncode == 0:
        assert not any("counter.py" in command for command in node.processes().values()), "still there"
    else:
        assert dumping.returncode in (11, 30), out
        job.assert_goes_on()
        return node, job
    node.kill()
    other = site.node(name)
    site.proxy.inject(FAULTS[fault](site, other) if fault != "the machine dies" else pass_on)
    job = job.on(other, restored(job, other, site.store)["host_pid"])
    job.assert_goes_on()
    assert job.counted()[-1] >= before
    return other, job
