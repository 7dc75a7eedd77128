"""Several trees dumped with one command: each as if alone, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.support.crcli import (
    COMMAND_LIMIT_SECONDS,
    ROOT,
    Crcli,
    assert_goes_on,
    counted,
    counter,
    end,
    reap,
    tree_of,
    wait_until,
)
from tests.support.programs import Program, spawn_python, then_wait

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

REFUSED = then_wait("import os; semaphore = os.eventfd(0, os.EFD_SEMAPHORE)")

SLOW = textwrap.dedent(f"""
    import os, sys, threading, time
    sys.path.insert(0, {str(ROOT)!r})
    from crcli import notify

    def wait():
        os.write(1, b"told\\n")
        time.sleep(60)

    notify.on_checkpoint(wait)
    os.write(1, b"ready\\n")
    while True:
        os.write(1, b"tick\\n")
        time.sleep(0.05)
    """)
"""A program for which a dump waits for as long as it may: the dump is under way, and the tree not frozen."""


def counters(held: ExitStack, count: int) -> list[Program]:
    """Start so many counters, each with memory of its own."""
    return [held.enter_context(spawn_python(counter(seed))) for seed in range(count)]


def pids_of(programs: list[Program]) -> list[str]:
    """Their pids, as arguments."""
    return [str(program.pid) for program in programs]


def ticks_on(program: Program) -> None:
    """Assert that a slow program is running."""
    before = len(program.output)
    wait_until(lambda: len(program.output) > before, "it stands still")


def untouched(crcli: Crcli, *arguments: str) -> str:
    """Run a dump that is refused as wrong usage before anything is done; return what it says."""
    done = crcli.run("dump", *arguments, "--store", crcli.store, "--json", code=2)
    assert not (crcli.folder / "store").exists()
    return str(done.json["error"]["message"])


# --- what is done ------------------------------------------------------------------------------------------


def test_each_tree_left_running_has_an_image_of_its_own(crcli: Crcli) -> None:
    """One call takes all; each is named after its command and pid, goes on, and comes back from its image."""
    with ExitStack() as held:
        programs = counters(held, 3)
        report = crcli.run(
            "dump", *pids_of(programs), "--leave-running", "--store", crcli.store, "--json"
        ).json
        assert [one["pid"] for one in report["dumps"]] == [program.pid for program in programs]
        assert [one["name"] for one in report["dumps"]] == [f"python-{program.pid}" for program in programs]
        assert (report["trees"], report["done"]) == (3, 3)
        assert report["stored_bytes"] == sum(one["stored_bytes"] for one in report["dumps"])
        assert report["frozen_ms_most"] == max(one["frozen_ms"] for one in report["dumps"])
        for program, one in zip(programs, report["dumps"], strict=True):
            assert_goes_on(program)
            end(tree_of(program.pid))
            last = counted(program)[-1]
            crcli.restore(one["name"])
            wait_until(lambda program=program, last=last: counted(program).count(last) == 2, "no way back")


def test_each_tree_killed_comes_back(crcli: Crcli) -> None:
    """Without --leave-running all are killed, and restored they count on; --name is put before the pid."""
    with ExitStack() as held:
        programs = counters(held, 4)
        trees = [one for program in programs for one in tree_of(program.pid)]
        done = crcli.run("dump", *pids_of(programs), "--name", "agent", "--store", crcli.store)
        reap(trees)
        lines = done.out.splitlines()
        assert len(lines) == 5 and lines[-1].startswith("4 of 4 trees dumped in ")
        for program, line in zip(programs, lines, strict=False):
            image = line.partition(":")[0]
            assert image.startswith(f"agent-{program.pid}@") and "1 process dumped and killed" in line
            crcli.restore(image)
            assert_goes_on(program)


def test_a_second_round_stores_what_changed(crcli: Crcli) -> None:
    """The images of one tree share what is the same, although others lie in between."""
    with ExitStack() as held:
        programs = counters(held, 3)
        command = ("dump", *pids_of(programs), "--leave-running", "--store", crcli.store, "--json")
        first, second = crcli.run(*command).json, crcli.run(*command).json
        assert second["stored_bytes"] < first["stored_bytes"] / 4
        assert second["reused_bytes"] > first["memory_bytes"] / 2


def test_a_dry_run_of_several_touches_nothing(crcli: Crcli) -> None:
    """It says of each what would be done, with a forecast, and makes no store."""
    with ExitStack() as held:
        programs = counters(held, 2)
        report = crcli.run("dump", *pids_of(programs), "--dry-run", "--store", crcli.store, "--json").json
        assert all(one["forecast"]["stored_bytes"] > 0 for one in report["dumps"])
        assert not (crcli.folder / "store").exists()


# --- what is refused ---------------------------------------------------------------------------------------


def test_one_that_is_refused_hinders_no_other(crcli: Crcli) -> None:
    """A blocker and a pid that is gone are errors of their own, in their places; the rest is done."""
    with ExitStack() as held:
        gone = held.enter_context(spawn_python(then_wait()))
        end(tree_of(gone.pid))
        refused = held.enter_context(spawn_python(REFUSED))
        programs = counters(held, 2)
        pids = [programs[0].pid, refused.pid, gone.pid, programs[1].pid]
        command = ("dump", *map(str, pids), "--leave-running", "--store", crcli.store)
        report = crcli.run(*command, "--json", code=10).json
        assert [one["pid"] for one in report["dumps"]] == pids
        codes = [one.get("error", {}).get("code", "") for one in report["dumps"]]
        assert codes == ["", "preflight-refused", "preflight-refused", ""]
        assert "eventfd-semaphore" in [found["name"] for found in report["dumps"][1]["error"]["findings"]]
        assert (report["trees"], report["done"]) == (4, 2)
        for program in programs:
            assert_goes_on(program)
        lines = crcli.run(*command, code=10).out.splitlines()
        assert lines[1].startswith(f"{refused.pid}: not dumped: ") and "was not touched" in lines[1]
        assert lines[-1].startswith("2 of 4 trees dumped in ")


def test_the_shell_that_crcli_was_started_from_is_refused_alone(crcli: Crcli) -> None:
    """One of crcli's own parents among the pids is an error of its own: crcli would freeze itself."""
    with spawn_python(counter()) as program:
        line = (
            f'"{sys.executable}" -m crcli dump $$ {program.pid} --leave-running --store "$0" --json; exit $?'
        )
        command = ["sh", "-c", line, crcli.store]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=crcli.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_SECONDS,
        )
        assert done.returncode == 10, done.stderr
        ours, other = json.loads(done.stdout)["dumps"]
        assert "would freeze itself" in ours["error"]["message"]
        assert other["outcome"] == "running"


def test_a_tree_that_is_named_twice_is_wrong_usage(crcli: Crcli) -> None:
    """The same pid twice, or a process and its child: nothing is touched."""
    with spawn_python(
        "import os, time\nprint('child', os.fork())\nprint('ready')\ntime.sleep(60)"
    ) as program:
        pid = str(program.pid)
        child = str(psutil.Process(program.pid).children()[0].pid)
        assert untouched(crcli, pid, pid) == f"process {pid} is named twice"
        assert f"belongs to the tree of {pid}" in untouched(crcli, child, pid)


def test_a_name_that_cannot_be_is_wrong_usage(crcli: Crcli) -> None:
    """A name that is too long with a pid behind it is refused before anything is touched."""
    with ExitStack() as held:
        pids = pids_of(counters(held, 2))
        assert "cannot name an image" in untouched(crcli, *pids, "--name", "n" * 127)


# --- what goes wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_is_under_way_and_begins_no_more(crcli: Crcli, number: signal.Signals) -> None:
    """Dumps that have begun are undone, the others are not begun, and every tree runs on."""
    workers = os.cpu_count() or 1
    with ExitStack() as held:
        programs = [held.enter_context(spawn_python(SLOW)) for _ in range(workers + 1)]
        options = ("--notify-wait", "50", "--store", crcli.store, "--json")
        heard = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # whoever started us ignores it
        with crcli.start("dump", *pids_of(programs), *options, **heard) as command:
            begun = programs[:workers]
            wait_until(lambda: all("told" in program.output for program in begun), "not begun", 20)
            command.send_signal(number)
            out, err = command.communicate(timeout=COMMAND_LIMIT_SECONDS)
        assert command.returncode == 11, err
        errors = [one["error"] for one in json.loads(out)["dumps"]]
        assert {error["state"] for error in errors} == {"untouched"}  # none had been frozen
        assert {error["message"] for error in errors[:-1]} == {f"the dump was interrupted by {number.name}"}
        assert errors[-1]["message"].startswith("the dump was not begun")
        for program in programs:
            ticks_on(program)
        assert "told" not in programs[-1].output


def test_the_deadline_is_that_of_all(crcli: Crcli) -> None:
    """What has not been begun when it passes stays untouched; nothing is begun with a deadline of its own."""
    with ExitStack() as held:
        programs = counters(held, 3)
        command = ("dump", *pids_of(programs), "--deadline", "0.001", "--store", crcli.store, "--json")
        report = crcli.run(*command, code=11).json
        assert report["done"] == 0
        assert all("deadline" in one["error"]["message"] for one in report["dumps"])
        for program in programs:
            assert_goes_on(program)


def test_a_process_of_ours_that_is_killed_costs_one_tree(crcli: Crcli) -> None:
    """Its tree runs on and is reported so; another process takes the trees that are left."""
    with ExitStack() as held:
        slow = held.enter_context(spawn_python(SLOW))
        programs = counters(held, 3)
        options = ("--leave-running", "--notify-wait", "50", "--store", crcli.store, "--json")
        with crcli.start("dump", *pids_of([slow, *programs]), *options) as command:
            wait_until(lambda: "told" in slow.output, "not begun", 20)
            last_at_work(command.pid, crcli).kill()
            out, err = command.communicate(timeout=COMMAND_LIMIT_SECONDS)
        assert command.returncode == 11, err
        lost, *others = json.loads(out)["dumps"]
        assert lost["error"]["state"] == "running" and "was killed" in lost["error"]["message"]
        assert all(one["outcome"] == "running" for one in others)
        ticks_on(slow)
        for program in programs:
            assert_goes_on(program)


def last_at_work(pid: int, crcli: Crcli) -> psutil.Process:
    """The worker that alone still has helpers, once the three other trees are done."""
    images = Path(crcli.folder, "store", "images")
    found: list[psutil.Process] = []

    def is_alone() -> bool:
        done = len(list(images.iterdir())) if images.is_dir() else 0
        found[:] = [worker for worker in psutil.Process(pid).children() if worker.children()]
        return done == 3 and len(found) == 1

    wait_until(is_alone, "the others are not done", 20)
    return found[0]


def test_when_crcli_is_killed_every_tree_runs_on(crcli: Crcli) -> None:
    """Killed outright, it leaves no process behind that would go on dumping, and all trees as they were."""
    with ExitStack() as held:
        programs = [held.enter_context(spawn_python(SLOW)) for _ in range(2)]
        options = ("--notify-wait", "50", "--store", crcli.store)
        with crcli.start("dump", *pids_of(programs), *options) as command:
            wait_until(lambda: any("told" in program.output for program in programs), "not begun", 20)
            ours = psutil.Process(command.pid).children(recursive=True)
            command.kill()
            command.wait()
            reap(ours, 20)
        for program in programs:
            ticks_on(program)
        assert not list(Path(crcli.folder, "store").glob("images/*/*"))
