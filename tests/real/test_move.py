"""The main job between two machines: dumped on one, which is destroyed, and restored on another.

The machines are namespaces (tests/support/nodes/namespaces.py): each with processes, an address and a disk of
its own. All that they share is this host's programs, and an S3 server that both reach over the network.
"""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.crcli import counter, wait_until
from tests.support.nodes.base import Job
from tests.support.nodes.moves import (
    READER_OF_WEIGHTS,
    dedent,
    digest_of,
    dumped,
    family,
    model,
    move_a_family,
    move_files,
    restored,
)
from tests.support.nodes.namespaces import OUTSIDE, Lan, NamespaceNode, lan, why_not
from tests.support.s3servers import S3Server, start_moto

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

SERVICE = "10.77.0.100"
"""An address that belongs to a service and not to a machine."""

SERVER = f"""
import socket, threading
listener = socket.create_server(("{SERVICE}", 7000))
asked = 0
def serve(peer):
    global asked
    try:
        for line in peer.makefile("rb"):
            asked += 1
            peer.sendall(b"%s %d\\n" % (line.strip(), asked))
    except OSError as error:
        print("lost", type(error).__name__)
print("ready")
while True:
    peer, _ = listener.accept()
    threading.Thread(target=serve, args=(peer,), daemon=True).start()
"""

MODEL = model(12)


@dataclass
class Site:
    """Two machines and a store that both reach."""

    lan: Lan
    server: S3Server
    store: str

    def node(self, name: str) -> NamespaceNode:
        """A new machine, which knows how to reach the store."""
        node = self.lan.node(name)
        node.environment |= self.server.env
        return node


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Lan, S3Server]]:
    """A network with a store in it."""
    with lan() as network, start_moto(address=OUTSIDE) as server:
        yield network, server


@pytest.fixture
def site(place: tuple[Lan, S3Server], request: pytest.FixtureRequest) -> Iterator[Site]:
    """That network, with a folder of the store's for one test, and without machines once the test is over."""
    network, server = place
    with network.only_for_now():
        yield Site(network, server, server.url(request.node.name))


def test_machines_have_nothing_in_common_but_the_network(site: Site) -> None:
    """Each has a name, an address, processes and files of its own; a cut one reaches nobody; dead is dead."""
    one, other = site.node("one"), site.node("other")
    assert one.run("hostname").out == "one\n" and other.run("hostname").out == "other\n"
    job = one.launch("counter", counter())
    assert job.pid in one.processes() and job.pid not in other.processes()
    assert other.run(f"test -e {job.folder}").code == 1
    reach = f'import socket; socket.create_connection(("{OUTSIDE}", {site.server.port}), 1)'
    ping = f"{shlex.quote(sys.executable)} -c {shlex.quote(reach)}"
    one.run(ping, code=0)
    one.cut()
    assert one.run(ping).code == 1
    one.mend()
    wait_until(lambda: one.run(ping).code == 0, "it stays cut off")
    one.kill()
    with pytest.raises(AssertionError):
        one.run("true", code=0)
    other.run("true", code=0)


def test_a_tree_goes_on_where_its_machine_is_no_more(site: Site) -> None:
    """Two processes with pipes count on, on another machine, with the same memory, under their pids."""
    move_a_family(site.node("one"), site.node, site.store, kilobytes=8 << 10)


def test_a_tree_moves_again_and_again(site: Site) -> None:
    """What came from one machine is dumped on the next and goes on, on a third."""
    node = site.node("first")
    job = node.launch("counter", counter(kilobytes=2048))
    stored = []
    for name in ("second", "third", "fourth"):
        stored.append(dumped(job, site.store)["stored_bytes"])
        node.kill()
        node = site.node(name)
        restored(job, node, site.store)
        job = job.on(node)
        job.assert_goes_on()
    assert max(stored[1:]) < stored[0] / 2, "memory that the store has was sent again"


def test_files_are_laid_out_on_the_other_machine(site: Site) -> None:
    """A log, a transaction in progress, a deleted file, mapped memory and a named file are there."""
    move_files(site.node("one"), site.node, site.store)


def test_pids_that_are_taken_there_are_no_obstacle(site: Site) -> None:
    """Where another process has its pid, a tree gets a pid namespace of its own."""
    one, other = site.node("one"), site.node("other")
    job = one.launch("counter", counter())
    taken = f"echo {job.pid - 2} >/proc/sys/kernel/ns_last_pid; setsid --fork sleep 1000 >/dev/null 2>&1"
    other.run(taken, code=0)
    assert job.pid in other.processes()
    dumped(job, site.store)
    one.kill()
    report = restored(job, other, site.store)
    assert report["pid_namespace"] == "new" and report["pid"] != report["host_pid"]
    job.on(other).assert_goes_on()


def test_a_server_is_reached_at_the_address_that_moved_with_it(site: Site) -> None:
    """Without the address the restore is refused; with it, a client that lost the server connects again."""
    one, other = site.node("one"), site.node("other")
    one.take_address(SERVICE)
    job = one.launch("server", SERVER)
    client = socket.create_connection((SERVICE, 7000), timeout=5)
    with client:
        assert asked(client, b"a") == b"a 1\n"
        dumped(job, site.store)
        one.kill()
        refused = restored(job, other, site.store, code=20)["error"]
        assert refused["findings"][0]["name"] == "address-missing" and SERVICE in refused["message"]
        other.take_address(SERVICE)
        restored(job, other, site.store)
        with pytest.raises(OSError):
            asked(client, b"b")
    with socket.create_connection((SERVICE, 7000), timeout=5) as again:
        assert asked(again, b"c") == b"c 2\n"


def test_a_client_of_udp_sends_from_where_it_is(site: Site) -> None:
    """A socket that the kernel had chosen an address for (a resolver's) is no reason not to move."""
    code = f"""
import itertools, socket, time
client = socket.socket(type=socket.SOCK_DGRAM)
client.connect(("{OUTSIDE}", {{port}}))
print("ready")
for number in itertools.count():
    client.send(b"%d" % number)
    time.sleep(0.05)
"""
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.settimeout(10)
        server.bind((OUTSIDE, 0))
        one, other = site.node("one"), site.node("other")
        job = one.launch("client", code.replace("{port}", str(server.getsockname()[1])))
        first, there = server.recvfrom(100)
        dumped(job, site.store)
        one.kill()
        restored(job, other, site.store)
        while (last := server.recvfrom(100))[1][0] == there[0]:
            pass
        assert int(last[0]) > int(first)


def asked(client: socket.socket, word: bytes) -> bytes:
    """Send the server a line, and return its answer; raise OSError when there is none."""
    client.sendall(word + b"\n")
    answer = client.recv(100)
    if not answer:
        raise ConnectionResetError("closed")
    return answer


def with_weights(site: Site) -> Job:
    """A job on a new machine that has read weights, of which its image stores nothing."""
    node = site.node("one")
    node.run("mkdir -p /models", code=0)
    (node.root / "models/model.bin").write_bytes(MODEL)
    return node.launch("reader", dedent(READER_OF_WEIGHTS), {"MODEL": "/models/model.bin"})


def dumped_without_weights(job: Job, store: str) -> None:
    """Dump it; the weights are left out."""
    report = dumped(job, store, "--weights", "/models")
    assert report["weights_bytes"] > len(MODEL) * 0.9 and report["stored_bytes"] < len(MODEL) / 2


def assert_whole(job: Job, node: NamespaceNode) -> None:
    """Assert that it goes on there, and that its memory is what the weights say."""
    job.on(node).assert_goes_on()
    assert f" {digest_of(MODEL)}\n" in job.on(node).output


def test_weights_are_found_under_another_path(site: Site) -> None:
    """Where the other machine has the file elsewhere, --weights-map says so, and no byte is fetched."""
    job = with_weights(site)
    dumped_without_weights(job, site.store)
    other = site.node("other")
    refused = restored(job, other, site.store, code=20)["error"]
    assert refused["findings"][0]["name"] == "weights-missing"
    other.run("mkdir -p /mnt/llm", code=0)
    (other.root / "mnt/llm/model.bin").write_bytes(MODEL)
    restored(job, other, site.store, "--weights-map", "/models=/mnt/llm")
    assert_whole(job, other)


def test_weights_that_a_machine_lacks_come_from_the_store(site: Site) -> None:
    """Weights pushed once serve machines that have none of their own."""
    job = with_weights(site)
    job.node.crcli("weights", "push", "/models", "--store", site.store)
    dumped_without_weights(job, site.store)
    job.node.kill()
    other = site.node("other")
    restored(job, other, site.store)
    assert_whole(job, other)


def test_other_weights_of_the_same_name_are_refused(site: Site) -> None:
    """A file there that differs in one byte is found out, and nothing is started."""
    job = with_weights(site)
    dumped_without_weights(job, site.store)
    other = site.node("other")
    other.run("mkdir -p /models", code=0)
    (other.root / "models/model.bin").write_bytes(MODEL[:-5000] + b"!" + MODEL[-4999:])
    restored(job, other, site.store, code=22)
    assert not any("reader.py" in command for command in other.processes().values())


def test_both_machines_restore_the_same_image_at_once(site: Site) -> None:
    """Images are only read: each machine gets a whole copy. (That only one may run is for `crcli run`.)"""
    one, other = site.node("one"), site.node("other")
    job = one.launch("family", family(kilobytes=4096))
    dumped(job, site.store)
    both = site.node("third"), other
    waiting = [node.start(node.python("crcli", *restore_words(job, site))) for node in both]
    for process in waiting:
        out, _ = process.communicate(timeout=90)
        assert process.returncode == 0, out
    for node in both:
        job.on(node).assert_goes_on()


def restore_words(job: Job, site: Site) -> tuple[str, ...]:
    """The command that restores a job."""
    return ("restore", job.name, "--store", site.store)
