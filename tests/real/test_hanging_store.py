"""A store that takes requests and never comes to the end of an answer: commands that are told to end do so.

No patience of a client ends by itself here: a byte comes now and then. So a command that waited for the store
would wait for ever.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from crcli.memory.userfault import is_available
from tests.support.faults import Attempt, Victim, victim
from tests.support.faulty_proxy import FaultyProxy, Trickle
from tests.support.s3servers import S3Server

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

MEGABYTES = 56


@dataclass
class Behind:
    """The command, with a store that can be made to hang."""

    folder: Path
    server: S3Server
    proxy: FaultyProxy

    def url(self, prefix: str = "agents") -> str:
        """A store."""
        return self.server.url(prefix)

    def begin(self, *arguments: str) -> Attempt:
        """Start a command that works with that store."""
        endpoint = {"AWS_ENDPOINT_URL": self.proxy.endpoint_url, "CRCLI_CACHE_SIZE": "0"}
        return Attempt(self.folder, (*arguments, "--store", self.url()), self.server.env | endpoint)

    def done(self, *arguments: str) -> None:
        """Have a command do its work."""
        attempt = self.begin(*arguments)
        attempt.end()
        assert attempt.code == 0, attempt.describe()

    def hang(self, method: str, containing: str, but: int = 0) -> Trickle:
        """From now on such requests hang, all but the first ones."""
        trickle = Trickle(but)
        self.proxy.inject(trickle, method=method, containing=containing, times=float("inf"))
        return trickle

    def ended(self, trickle: Trickle, number: int, *arguments: str) -> Attempt:
        """Have a command run until the store hangs, send it a signal, if any, and see it end all the same."""
        attempt = self.begin(*arguments)
        assert attempt.wait_for(trickle.begun.is_set), attempt.describe()
        if number:
            attempt.send(number)
        attempt.end()
        return attempt


@pytest.fixture
def behind(tmp_path: Path, moto: S3Server) -> Iterator[Behind]:
    """An empty bucket, and a proxy before it that does no harm yet."""
    with FaultyProxy(moto) as proxy:
        yield Behind(tmp_path, moto, proxy)


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Victim]:
    """A tree in which everything moves, and that is large enough for packs that are sent in parts."""
    with victim(tmp_path / "victim", MEGABYTES) as found:
        yield found


RESTORES = {
    "names": ("GET", "list-type", 0, "--eager"),
    "manifest": ("GET", "/images/", 0, "--eager"),
    "CRIU's images": ("GET", "/packs/", 0, "--eager"),
    "memory": ("GET", "/packs/", 2, "--eager"),
    "what the pager looks for": ("HEAD", "/packs/", 0, "--lazy"),
}


@pytest.mark.parametrize("where", RESTORES)
def test_a_restore(behind: Behind, tree: Victim, where: str) -> None:
    """It ends with nothing left running, and the image brings the tree back once the store answers."""
    method, containing, but, mode = RESTORES[where]
    if mode == "--lazy" and not is_available():
        pytest.skip("no userfaultfd")
    behind.done("dump", str(tree.pid), "--name", "agent")
    tree.reap()
    trickle = behind.hang(method, containing, but)
    attempt = behind.ended(trickle, signal.SIGTERM, "restore", "agent", mode)
    assert attempt.code in (21, -signal.SIGTERM), attempt.describe()  # it asks while it still imports
    attempt.assert_nothing_left(locked=True)
    behind.proxy.forgive()
    back = behind.begin("restore", "agent")
    back.end(but=tree)
    assert back.code == 0, back.describe()
    tree.pid = back.json["host_pid"]
    tree.assert_goes_on()


DUMPS = {
    "announcing": ("PUT", "/sessions/", 0),
    "names": ("GET", "list-type", 0),
    "what the store has": ("GET", "/indexes/", 0),
    "an upload": ("POST", "/packs/", 0),
    "parts": ("PUT", "/packs/", 1),
    "the index": ("PUT", "/indexes/", 0),
    "the manifest": ("PUT", "/images/", 0),
}


@pytest.mark.parametrize("where", DUMPS)
def test_a_dump(behind: Behind, tree: Victim, where: str) -> None:
    """It ends, and the tree runs on."""
    if where == "what the store has":
        behind.done("dump", str(tree.pid), "--name", "agent", "--leave-running")
    before = tree.look()
    trickle = behind.hang(*DUMPS[where])
    attempt = behind.ended(trickle, signal.SIGTERM, "dump", str(tree.pid), "--name", "agent")
    assert attempt.code in (11, 30, 143), attempt.describe()
    if where == "the manifest":  # it may be written all the same
        assert "crcli ls" in attempt.json["error"]["hint"], attempt.describe()
    tree.assert_runs_as(before)
    attempt.assert_nothing_left(locked=True)  # tests beside this one lock, too


def test_a_dump_that_has_only_to_clear_away(behind: Behind, tree: Victim) -> None:
    """Its image is there, the tree dead: it says so without being told to, though the store then hangs."""
    trickle = behind.hang("DELETE", "/sessions/")
    attempt = behind.ended(trickle, 0, "dump", str(tree.pid), "--name", "agent")
    assert attempt.code == 0 and attempt.json["outcome"] == "killed", attempt.describe()
    behind.proxy.forgive()
    behind.done("verify", "agent")


def test_a_deadline(behind: Behind, tree: Victim) -> None:
    """It ends a dump whose store hangs, and the tree runs on."""
    before = tree.look()
    trickle = behind.hang("PUT", "/packs/", 1)
    attempt = behind.ended(trickle, 0, "dump", str(tree.pid), "--name", "agent", "--deadline", "8")
    assert attempt.code == 11 and "deadline" in attempt.json["error"]["message"], attempt.describe()
    tree.assert_runs_as(before)
    attempt.assert_nothing_left(locked=True)  # tests beside this one lock, too


ASKING: dict[str, tuple[tuple[str, str, int], Callable[[Behind], tuple[str, ...]]]] = {
    "verify": (("GET", "/packs/", 1), lambda behind: ("verify", "agent")),
    "verify: packs": (("HEAD", "/packs/", 0), lambda behind: ("verify", "agent")),
    "cp: from": (("GET", "/agents/packs/", 0), lambda behind: ("cp", "agent", behind.url("to"))),
    "cp: to": (("", "/to/packs/", 0), lambda behind: ("cp", "agent", behind.url("to"))),
    "gc": (("GET", "/images/", 0), lambda behind: ("gc",)),
    "ls": (("GET", "/images/", 0), lambda behind: ("ls",)),
    "rm": (("DELETE", "/images/", 0), lambda behind: ("rm", "agent")),
}


@pytest.mark.parametrize("what", ASKING)
def test_ctrl_c(behind: Behind, tree: Victim, what: str) -> None:
    """Ctrl-C ends a command with 130, once is enough."""
    behind.done("dump", str(tree.pid), "--name", "agent", "--leave-running")
    fault, arguments = ASKING[what]
    attempt = behind.ended(behind.hang(*fault), signal.SIGINT, *arguments(behind))
    assert attempt.code == 130, attempt.describe()


LOST: dict[str, tuple[tuple[str, str, int], int, tuple[str, ...], tuple[int, ...]]] = {
    "dump": (DUMPS["names"], signal.SIGTERM, ("dump", "PID", "--name", "agent"), (11, 143)),
    "restore": (RESTORES["manifest"][:3], signal.SIGTERM, ("restore", "agent", "--eager"), (21, -15)),
    "gc": (("GET", "/images/", 0), signal.SIGINT, ("gc",), (130,)),
}


@pytest.mark.parametrize("command", LOST)
def test_a_signal_that_another_thread_got(behind: Behind, tree: Victim, command: str) -> None:
    """The kernel may give it to one that is just being started: it ends the command all the same."""
    behind.done("dump", str(tree.pid), "--name", "agent", "--leave-running")
    fault, number, arguments, codes = LOST[command]
    trickle = behind.hang(*fault)
    attempt = behind.begin(*(str(tree.pid) if one == "PID" else one for one in arguments))
    assert attempt.wait_for(trickle.begun.is_set), attempt.describe()
    time.sleep(0.5)  # then the main thread has nothing left to do but wait
    attempt.send_to_another_thread(number)
    attempt.end()
    assert attempt.code in codes, attempt.describe()


@pytest.mark.parametrize("where", ["/leases/", "images%2Fjob"], ids=["its lease", "its images"])
def test_a_job_that_is_not_begun_yet(behind: Behind, where: str) -> None:
    """Notice ends `crcli run` with 75: nothing was begun, and another node may begin it."""
    trickle = behind.hang("", where)
    begun = behind.folder / "begun"
    command = ("--notice", "sigterm", "--", "sh", "-c", f"touch {begun}; sleep 60")
    environment = {"AWS_ENDPOINT_URL": behind.proxy.endpoint_url}
    attempt = Attempt(
        behind.folder,
        ("run", "--name", "job", "--store", behind.url(), *command),
        behind.server.env | environment,
    )
    assert attempt.wait_for(trickle.begun.is_set), attempt.describe()
    attempt.send(signal.SIGTERM)
    attempt.end()
    assert attempt.code == 75, attempt.describe()
    assert not begun.exists()
    attempt.assert_nothing_left(locked=True)
