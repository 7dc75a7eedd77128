"""One tree, several dumps of it at the same time: each takes its image, one after the other."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from crcli.process.identity import identify
from crcli.process.tree import child_pids
from crcli.process.tree_lock import TreeLock
from tests.support.crcli import Crcli, assert_goes_on, counter, launched, reap, tree_of, wait_until
from tests.support.programs import Program

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
    pytest.mark.timeout(300),
]

FAMILY = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, '-u', '-c', "import time; print('child ready'); time.sleep(1000)"])
print(f'child={{child.pid}}')
{counter()}
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """A counter with a child."""
    with launched([sys.executable, "-u", "-c", FAMILY], tmp_path) as found:
        for line in ("ready", "child ready"):
            found.wait_for(line)
        yield found


@pytest.fixture
def crcli(tmp_path: Path) -> Iterator[Crcli]:
    """The command with a store of its own."""
    command = Crcli(tmp_path)
    try:
        yield command
    finally:
        command.clean_up()


@contextmanager
def standing_in_a_dump(crcli: Crcli, pid: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A dump that is stopped while it has the tree frozen."""
    command = ("dump", str(pid), "--store", crcli.store, "--name", "first", "--json", *options)
    with crcli.start(*command) as process:
        wait_until(lambda: psutil.Process(pid).status() == psutil.STATUS_TRACING_STOP, "it is not frozen")
        process.send_signal(signal.SIGSTOP)
        yield process


def child_of(program: Program) -> int:
    """The pid of the program's child."""
    return int(program.value_of("child"))


def locks(pid: int) -> bool:
    """Whether a process has the lock of an ancestor of a tree: it dumps the tree, or is about to."""
    return bool(re.search(rf"FLOCK +ADVISORY +READ {pid} ", Path("/proc/locks").read_text()))


def waits(process: subprocess.Popen[str]) -> bool:
    """Whether a command has begun to lock a tree and has not ended: with one standing before it, it waits."""
    return process.poll() is None and locks(process.pid)


def test_dumps_at_the_same_time_all_take_an_image(program: Program, crcli: Crcli) -> None:
    """A schedule and a hook that come at once both get what they asked for, and the tree runs on."""
    command = ("dump", str(program.pid), "--store", crcli.store, "--leave-running", "--json", "--name")
    with ExitStack() as stack:
        dumps = [stack.enter_context(crcli.start(*command, f"at-once-{number}")) for number in range(4)]
        ends = [dump.communicate(timeout=120) for dump in dumps]
    assert [dump.returncode for dump in dumps] == [0] * 4, ends
    assert_goes_on(program)


@pytest.mark.parametrize("which", ["the same", "inside", "around"])
def test_a_dump_waits_for_another(program: Program, crcli: Crcli, which: str) -> None:
    """Of the same tree, of one inside it, of one around it: it begins when that one has let the tree go."""
    pids = [program.pid, child_of(program)]
    first, second = {"the same": pids[:1] * 2, "inside": pids[::-1], "around": pids}[which]
    with (
        standing_in_a_dump(crcli, first, "--leave-running") as one,
        crcli.start("dump", str(second), "--store", crcli.store, "--leave-running", "--json") as other,
    ):
        wait_until(lambda: waits(other), "it does not wait")
        one.send_signal(signal.SIGCONT)
        ends = [process.communicate(timeout=60) for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), ends
    assert_goes_on(program)


def test_a_dump_beside_another_does_not_wait(tmp_path: Path, crcli: Crcli) -> None:
    """Trees of one parent are dumped at the same time."""
    folders = [tmp_path / name for name in ("a", "b")]
    with ExitStack() as stack:
        for folder in folders:
            folder.mkdir()
        command = [sys.executable, "-u", "-c", counter()]
        trees = [stack.enter_context(launched(command, folder)) for folder in folders]
        for tree in trees:
            tree.wait_for("ready")
        with standing_in_a_dump(crcli, trees[0].pid, "--leave-running") as one:
            crcli.dump(trees[1].pid, "--leave-running")
            one.send_signal(signal.SIGCONT)
            one.communicate(timeout=60)
        for tree in trees:
            assert_goes_on(tree)


def test_a_dump_of_several_trees_waits_for_another_of_one(
    program: Program, tmp_path: Path, crcli: Crcli
) -> None:
    """The tree that another dump holds is no reason to refuse it: its turn comes."""
    folder = tmp_path / "beside"
    folder.mkdir()
    with launched([sys.executable, "-u", "-c", counter()], folder) as beside:
        beside.wait_for("ready")
        with standing_in_a_dump(crcli, program.pid, "--leave-running") as one:
            pids = (str(program.pid), str(beside.pid))
            command = ("dump", *pids, "--store", crcli.store, "--leave-running", "--json")
            with crcli.start(*command) as many:
                wait_until(lambda: any(map(locks, child_pids(many.pid))), "it does not wait")
                one.send_signal(signal.SIGCONT)
                out, err = many.communicate(timeout=60)
            one.communicate(timeout=60)
        assert (one.returncode, many.returncode) == (0, 0), out + err
        for tree in (program, beside):
            assert_goes_on(tree)


def test_a_dump_that_waits_too_long_says_for_whom(program: Program, crcli: Crcli) -> None:
    """No later than its deadline it ends with 10, names the other dump, and what to do; the tree is fine."""
    with standing_in_a_dump(crcli, program.pid, "--leave-running") as one:
        error = crcli.dump(program.pid, "--leave-running", "--deadline", "1", code=10)["error"]
        assert f"({one.pid})" in error["message"]
        assert f"kill {one.pid}" in error["hint"]
        assert error["state"] == "untouched"
        one.send_signal(signal.SIGCONT)
        one.communicate(timeout=60)
    assert_goes_on(program)


def test_a_check_looks_when_the_tree_runs(program: Program, crcli: Crcli) -> None:
    """A tree that another dump holds just now is no tree with a debugger."""
    with standing_in_a_dump(crcli, program.pid, "--leave-running") as one:
        with crcli.start("check", str(program.pid), "--store", crcli.store, "--json") as check:
            wait_until(lambda: waits(check), "it does not wait")
            one.send_signal(signal.SIGCONT)
            out, err = check.communicate(timeout=60)
        one.communicate(timeout=60)
    assert (one.returncode, check.returncode) == (0, 0), out + err


def test_a_dump_that_waits_can_be_interrupted(program: Program, crcli: Crcli) -> None:
    """Ctrl-C ends the wait."""
    with standing_in_a_dump(crcli, program.pid, "--leave-running") as one:
        with crcli.start("dump", str(program.pid), "--store", crcli.store, "--leave-running") as other:
            wait_until(lambda: waits(other), "it does not wait")
            other.send_signal(signal.SIGINT)
            assert other.wait(timeout=60) == 130
        one.send_signal(signal.SIGCONT)
        one.communicate(timeout=60)
    assert_goes_on(program)


def test_a_tree_that_the_other_dump_kills(program: Program, crcli: Crcli) -> None:
    """The one that came second is told that the tree has gone into an image meanwhile (exit 10)."""
    tree = tree_of(program.pid)
    with standing_in_a_dump(crcli, program.pid) as one:
        with crcli.start("dump", str(program.pid), "--store", crcli.store, "--json") as other:
            wait_until(lambda: waits(other), "it does not wait")
            one.send_signal(signal.SIGCONT)
            out, _ = other.communicate(timeout=60)
        one.communicate(timeout=60)
    reap(tree)
    assert (one.returncode, other.returncode) == (0, 10)
    assert "ended while another dump of it was waited for" in out
    crcli.restore("first", "--files", "host")


def test_the_lock_of_a_killed_dump_is_gone_once_the_tree_runs(program: Program, crcli: Crcli) -> None:
    """A dump right after one that got SIGKILL takes its image: it waits until CRIU has let the tree go."""
    for _ in range(3):
        with standing_in_a_dump(crcli, program.pid) as one:
            one.kill()
            crcli.dump(program.pid, "--leave-running")
    assert_goes_on(program)


def test_who_may_not_trace_a_process_cannot_lock_it(program: Program) -> None:
    """Another user cannot hold up a dump; and nothing is said of a lock that nobody has."""
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            lock = TreeLock(identify(program.pid))
            os._exit(0 if lock.take() and not lock.fds else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with TreeLock(identify(program.pid)) as lock:
        assert lock.take()
        assert lock.fds
        with TreeLock(identify(child_of(program))) as inner:
            assert not inner.take()
            assert inner.holder() == os.getpid()
