"""The process that stands ready to dump: it serves, and nothing is lost with it, nor without its parent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from crcli.errors import DumpFailed, NotFound, PreflightRefused, StoreError, TreeState, UsageError
from crcli.findings import Finding
from crcli.image.manifest import load
from crcli.image.names import ImageRef
from crcli.pipeline.dumper import Dumper, error_as_json, error_from_json
from crcli.pipeline.stages import DumpOptions, Outcome
from crcli.store.open import open_store
from tests.support.crcli import ROOT, Crcli, assert_goes_on, counter, end, reap, tree_of, wait_until
from tests.support.programs import Program, spawn_python, then_wait

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

SLOW = textwrap.dedent(f"""
    import os, sys, time
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


@pytest.fixture
def dumper(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dumper]:
    """A dumper for the test's store."""
    for name, value in crcli.environment.items():
        monkeypatch.setenv(name, value)
    with Dumper(crcli.store) as found:
        yield found


def options(crcli: Crcli, program: Program, **more: object) -> DumpOptions:
    """Leave this program running, in an image called `job`."""
    chosen = {"name": "job", "outcome": Outcome.RUNNING} | more
    return DumpOptions(pid=program.pid, store=crcli.store, **chosen)  # type: ignore[arg-type]


def ticks_on(program: Program) -> None:
    """Assert that a slow program is running."""
    before = len(program.output)
    wait_until(lambda: len(program.output) > before, "it stands still")


class Told:
    """A Progress that notes what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.findings: list[Finding] = []

    def phase(self, name: str) -> None:
        """See Progress."""
        self.phases.append(name)

    def amount(self, done: int, total: int) -> None:
        """See Progress."""

    def finding(self, finding: Finding) -> None:
        """See Progress."""
        self.findings.append(finding)


# --- what it does ------------------------------------------------------------------------------------------


def test_it_dumps_again_and_again(crcli: Crcli, dumper: Dumper) -> None:
    """One process dumps a tree several times, stores what changed, and the last image, of the killed tree,
    goes on from where it was."""
    with spawn_python(counter()) as program:
        pid, told = dumper.pid, Told()
        first = dumper.dump(options(crcli, program), told)
        second = dumper.dump(options(crcli, program))
        assert second["stored_bytes"] < first["stored_bytes"] / 4
        assert first["outcome"] == "running" and {"look", "trial"} <= set(told.phases)
        assert_goes_on(program)
        tree = tree_of(program.pid)
        last = dumper.dump(options(crcli, program, outcome=Outcome.KILLED))
        assert dumper.pid == pid
        reap(tree)
        crcli.restore(last["image"])
        assert_goes_on(program)


def test_the_job_stands_in_the_image(crcli: Crcli, dumper: Dumper) -> None:
    """What `crcli run` notes of a job is in the image's head; without it there is nothing."""
    job = {"identity": "ab12", "argv": ["python", "agent.py"], "started": 1.5, "lease": 7}
    with spawn_python(counter()) as program:
        for said in (job, None):
            image = dumper.dump(options(crcli, program, job=said))
            store = open_store(crcli.store)
            assert load(store, ImageRef("job", image["id"])).meta.get("job") == said


def test_errors_are_raised_as_if_here(crcli: Crcli, dumper: Dumper) -> None:
    """A tree that cannot be dumped, one that is not there, and a store that cannot be: each is the
    error of `crcli dump`, with its findings and exit code."""
    with spawn_python(then_wait("import os; semaphore = os.eventfd(0, os.EFD_SEMAPHORE)")) as program:
        with pytest.raises(PreflightRefused) as refused:
            dumper.dump(options(crcli, program))
        assert refused.value.exit_code == 10
        assert "eventfd-semaphore" in [finding.name for finding in refused.value.findings]
        with pytest.raises(UsageError):
            dumper.dump(DumpOptions(pid=program.pid, store=crcli.store, name="no/name"))
    with spawn_python(counter()) as program, Dumper("file:///proc/nowhere") as lost:
        with pytest.raises(StoreError) as failed:
            lost.dump(DumpOptions(pid=program.pid, store=lost.store, name="job"))
        assert failed.value.exit_code == 30
        assert_goes_on(program)


@pytest.mark.parametrize("kind", [DumpFailed, NotFound, PreflightRefused])
def test_an_error_comes_back_whole(kind: type[DumpFailed]) -> None:
    """Class, exit code, hint and state survive the way between the processes."""
    error = kind("it failed", hint="do this", state=TreeState.STOPPED)
    again = error_from_json(json.loads(json.dumps(error_as_json(error))))
    assert type(again) is kind
    assert (again.message, again.hint, again.state, again.exit_code) == (
        "it failed", "do this", TreeState.STOPPED, error.exit_code
    )  # fmt: skip


# --- stopped, told, killed ---------------------------------------------------------------------------------


@contextmanager
def under_way(crcli: Crcli, dumper: Dumper) -> Iterator[Program]:
    """A dump that waits for its program."""
    with spawn_python(SLOW) as program:
        dumper.begin(options(crcli, program, notify_wait_s=60.0))
        program.wait_for("told")
        yield program


def ends(dumper: Dumper) -> DumpFailed:
    """Wait for the dump under way to fail."""
    with pytest.raises(DumpFailed) as failed:
        while dumper.hear() is None:
            time.sleep(0.01)
    return failed.value


def test_a_dump_can_be_stopped(crcli: Crcli, dumper: Dumper) -> None:
    """It ends as after SIGTERM, the tree runs on, and the process serves again."""
    with under_way(crcli, dumper) as program:
        assert dumper.hear() is None
        dumper.stop()
        assert ends(dumper).exit_code == 11
        ticks_on(program)
    with spawn_python(counter()) as program:
        assert dumper.dump(options(crcli, program))["outcome"] == "running"


def test_a_dump_stopped_before_it_listens_does_not_begin(crcli: Crcli, dumper: Dumper) -> None:
    """Word that comes while the process still gets ready is not lost."""
    with spawn_python(counter()) as program:
        dumper.begin(options(crcli, program))
        dumper.stop()
        assert "interrupted" in ends(dumper).message
        assert_goes_on(program)


def test_a_deadline_can_come_closer(crcli: Crcli, dumper: Dumper) -> None:
    """The dump under way ends at the newest deadline, with the tree running."""
    with under_way(crcli, dumper) as program:
        dumper.set_deadline(0.05)
        assert "deadline" in ends(dumper).message
        ticks_on(program)


def test_signals_to_everybody_do_not_end_it(crcli: Crcli, dumper: Dumper) -> None:
    """An idle dumper ignores what a terminal, systemd or Slurm may send to all processes."""
    with spawn_python(counter()) as program:
        dumper.dump(options(crcli, program))
        pid = dumper.pid
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGALRM):
            os.kill(pid, number)
        dumper.dump(options(crcli, program))
        assert dumper.pid == pid


def test_a_killed_dumper_is_an_error_and_is_replaced(crcli: Crcli, dumper: Dumper) -> None:
    """The error says that the tree runs, it does, and the next dump is another process's."""
    with under_way(crcli, dumper) as program:
        killed = dumper.pid
        os.kill(killed, signal.SIGKILL)
        assert ends(dumper).state is TreeState.RUNNING
        ticks_on(program)
    with spawn_python(counter()) as program:
        assert dumper.dump(options(crcli, program))["outcome"] == "running"
        assert dumper.pid != killed


def test_closing_stops_what_is_under_way(crcli: Crcli, dumper: Dumper) -> None:
    """On return the process is gone and the tree runs."""
    with under_way(crcli, dumper) as program:
        process = psutil.Process(dumper.pid)
        dumper.close()
        assert not process.is_running()
        ticks_on(program)


# --- without its parent ------------------------------------------------------------------------------------

SUPERVISOR = textwrap.dedent("""
    import os, sys, time
    from crcli.pipeline.dumper import Dumper
    from crcli.pipeline.stages import DumpOptions, Outcome

    store, pid = sys.argv[1], int(sys.argv[2])
    dumper = Dumper(store)
    if os.fork() == 0:
        time.sleep(600)  # holds the line open
    print(dumper.pid, flush=True)
    if pid:
        dumper.dump(DumpOptions(pid, store, "job", outcome=Outcome.RUNNING, notify_wait_s=60.0))
    time.sleep(600)
    """)


@contextmanager
def supervised(crcli: Crcli, pid: int) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A supervisor, which has a child beside its dumper, and the dumper, which dumps `pid` (0: waits)."""
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, crcli.store, str(pid)],
        cwd=ROOT, env=crcli.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert supervisor.stdout is not None
    dumper = psutil.Process(int(supervisor.stdout.readline()))
    everybody = tree_of(supervisor.pid)
    try:
        yield supervisor, dumper
    finally:
        end(everybody)
        supervisor.communicate()


def kill(supervisor: subprocess.Popen[str], dumper: psutil.Process) -> None:
    """Kill the supervisor, and see its dumper end by itself."""
    supervisor.kill()
    supervisor.wait()
    reap([dumper])


def test_an_idle_dumper_ends_with_its_parent(crcli: Crcli) -> None:
    """Also when another process still holds the line to it open."""
    with supervised(crcli, 0) as (supervisor, dumper):
        time.sleep(1.0)  # it is ready, or it is not: both end
        kill(supervisor, dumper)


def test_a_dump_is_undone_when_the_parent_is_killed(crcli: Crcli) -> None:
    """The tree runs on, nobody is left, and there is no image."""
    with spawn_python(SLOW) as program:
        with supervised(crcli, program.pid) as (supervisor, dumper):
            program.wait_for("told")
            kill(supervisor, dumper)
        ticks_on(program)
        assert not (Path(crcli.store.removeprefix("file://")) / "images").exists()
