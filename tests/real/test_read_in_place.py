"""Trees that stand still until their image is durable, and whose pages are read where they are."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from blake3 import blake3

from crcli.process.tree import child_pids
from tests.support.crcli import Crcli, assert_goes_on, counted, counter, end, reap, tree_of, wait_until
from tests.support.faults import Attempt
from tests.support.programs import Program, spawn_python
from tests.support.s3servers import S3Server, start_moto

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

KILOBYTES = 144 << 10
"""More than what is on its way to S3 at once: the workers have the rest still to read."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with start_moto() as moto:
        for name, value in moto.env.items():
            monkeypatch.setenv(name, value)
        yield moto


def taken_out(pid: int) -> int:
    """How much of the tree lies in crcli's overflow (bytes)."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{fd}"
        if os.readlink(path).endswith("/overflow (deleted)"):
            return os.stat(path).st_blocks * 512
    return 0


def is_frozen(program: Program) -> bool:
    """Whether CRIU holds it."""
    with open(f"/proc/{program.pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] == "t"


@pytest.mark.parametrize("when", ["saved", "at once"])
def test_who_kills_a_tree_that_the_store_is_slow_to_take(crcli: Crcli, server: S3Server, when: str) -> None:
    """After a second or two that no longer matters: its image comes to be. Before that the dump fails, and
    there is no image of half of it."""
    store = server.url("images")
    with spawn_python(counter(kilobytes=KILOBYTES)) as program:
        wait_until(lambda: len(program.output.splitlines()) > 2, "it does not count")
        tree = tree_of(program.pid)
        with crcli.start("dump", str(program.pid), "--name", "agent", "--store", store, "--json") as dump:
            wait_until(lambda: is_frozen(program), "it was not frozen")
            server.process.send_signal(signal.SIGSTOP)
            try:
                if when == "saved":
                    wait_until(lambda: _has_all(dump.pid), "nothing is copied out of the tree", 60)
                program.process.kill()
            finally:
                server.process.send_signal(signal.SIGCONT)
            out, err = dump.communicate(timeout=60)
        reap(tree)
        report = json.loads(out)
        if when == "saved":
            assert dump.returncode == 0, err
            last = counted(program)[-1]
            crcli.adopt(crcli.run("restore", "agent", "--store", store, "--json").json["host_pid"])
            wait_until(lambda: counted(program)[-1] > last + 2, "the copy does not go on")
        else:
            assert (dump.returncode, report["error"]["state"]) == (12, "dead"), out
            assert not crcli.run("ls", "--store", store, "--json").json["images"]


def _has_all(pid: int) -> bool:
    """Whether crcli has taken much more out of the tree than what is not private to it, and takes no more."""
    before = taken_out(pid)
    time.sleep(1.5)
    return 8 << 20 < before == taken_out(pid)


@pytest.mark.parametrize("namespace", ["host", "new"])
def test_nothing_is_taken_out_of_a_tree_that_is_killed_soon(crcli: Crcli, namespace: str) -> None:
    """A second image of it stores what is new; the tree comes back from it, and runs on. So it does in a pid
    namespace of its own, where CRIU has other pids for it."""
    with spawn_python(counter(kilobytes=32 << 10)) as program:
        wait_until(lambda: len(program.output.splitlines()) > 2, "it does not count")
        moved = crcli.move(program.pid, "--pid-namespace", namespace)
        assert (moved["pid"] == moved["host_pid"]) == (namespace == "host")
        most = 0
        tree = tree_of(moved["host_pid"])
        with crcli.start("dump", str(moved["host_pid"]), "--store", crcli.store, "--json") as dump:
            while dump.poll() is None:
                with suppress(OSError):  # it has ended
                    most = max(most, taken_out(dump.pid))
            out, err = dump.communicate(timeout=60)
        assert dump.returncode == 0, err
        reap(tree)
        second = json.loads(out)
        assert second["reused_bytes"] > 32 << 20 and second["stored_bytes"] < 4 << 20
        assert 0 < most < 16 << 20
        family = blake3(second["name"].encode()).hexdigest()[:8]  # where one listing tells of all packs of it
        packs = [path.name for path in Path(crcli.folder, "store", "packs").glob("*/*")]
        assert packs and all(pack.startswith(family) for pack in packs)
        crcli.restore(second["image"])
        assert_goes_on(program)


def test_stopped_trees_are_read_where_they_are_too(crcli: Crcli) -> None:
    """A tree that is left stopped goes on from there, and its image is of the same moment."""
    with spawn_python(counter(kilobytes=16 << 10)) as program:
        wait_until(lambda: len(program.output.splitlines()) > 2, "it does not count")
        image = crcli.dump(program.pid, "--leave-stopped")["image"]
        last = counted(program)[-1]
        os.kill(program.pid, signal.SIGCONT)
        assert_goes_on(program)
        end(tree_of(program.pid))
        seen = len(counted(program))
        crcli.restore(image)
        wait_until(lambda: last + 1 in counted(program)[seen:], "the copy does not go on from there")


def test_a_tree_that_was_let_go_by_everybody_is_none_that_was_killed(crcli: Crcli, server: S3Server) -> None:
    """CRIU and who stands by are killed when all was read: crcli looks once more before it publishes."""
    store = server.url("images")
    with spawn_python(counter(kilobytes=8 << 10)) as program:
        wait_until(lambda: len(program.output.splitlines()) > 2, "it does not count")
        attempt = Attempt(crcli.folder, ("dump", str(program.pid), "--name", "agent", "--store", store))
        wait_until(lambda: is_frozen(program), "it was not frozen")
        server.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(2)
            criu = attempt.criu()
            for pid in child_pids(attempt.pid):
                if os.getsid(pid) == pid and pid != criu:
                    os.kill(pid, signal.SIGKILL)
            os.kill(criu, signal.SIGKILL)
            wait_until(lambda: not is_frozen(program), "it is held still")
        finally:
            server.process.send_signal(signal.SIGCONT)
        attempt.end()
        assert (attempt.code, attempt.json["error"]["state"]) == (11, "running"), attempt.describe()
        assert not crcli.run("ls", "--store", store, "--json").json["images"]
        assert_goes_on(program)
