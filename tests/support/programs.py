"""Small programs for tests to look at, dump and restore: each a Python text, run as a process of its own.

A program is started the way a service is: a session of its own, no terminal, nothing inherited but a file for
its output. What it starts in turn is killed with it, also what has left its tree.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_USUAL_START_S = 0.04
"""How long an interpreter takes from its start to its end where the limits of these tests were chosen."""


def _slowness() -> float:
    """How many times longer than usual things take here and now: never less than once.

    `CRCLI_TEST_SLOWNESS` says it for a machine that is known to be slow. Otherwise what tests do most,
    starting an interpreter, is compared with what is usual; tests beside this one slow it down as well.
    """
    if told := os.environ.get("CRCLI_TEST_SLOWNESS"):
        return float(told)
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    crowd = max(1.0, workers / (os.cpu_count() or 1))
    return crowd * max(1.0, min(_start_s() for _ in range(3)) / _USUAL_START_S)


def _start_s() -> float:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", ""], check=True)
    return time.monotonic() - began


SLOWNESS = _slowness()
"""How many times longer than usual things may take; every limit is multiplied by it."""

READY_WITHIN_SECONDS = 20.0 * SLOWNESS

FORMER_FOLDERS: list[Path] = []
"""The folders of programs that have ended. A restore lays out what one of them had open: in its old place."""


@dataclass(frozen=True)
class Program:
    """A running program, its process, and the file that its output goes to."""

    process: subprocess.Popen[bytes]
    output_path: Path

    @property
    def pid(self) -> int:
        """Its pid, which is its session id as well."""
        return self.process.pid

    @property
    def output(self) -> str:
        """What it has printed so far, to both streams."""
        return self.output_path.read_text(errors="replace")

    def wait_for(self, line: str, seconds: float = READY_WITHIN_SECONDS) -> None:
        """Return once the program has printed this line; fail with its output when that does not come."""
        end = time.monotonic() + seconds
        while line not in self.output.splitlines():
            if self.process.poll() is not None:
                raise AssertionError(f"ended ({self.process.returncode}) before {line!r}:\n{self.output}")
            if time.monotonic() > end:
                raise AssertionError(f"no {line!r} within {seconds} s:\n{self.output}")
            time.sleep(0.005)

    def value_of(self, name: str) -> str:
        """Return what the program printed as `NAME=VALUE`, the newest if there are several."""
        values = [line.partition("=")[2] for line in self.output.splitlines() if line.startswith(f"{name}=")]
        return values[-1]


def then_wait(code: str = "") -> str:
    """Return the code of a program that does this, says `ready`, and does nothing more."""
    return textwrap.dedent(code) + "\nprint('ready')\nimport time\nwhile True: time.sleep(60)\n"


@contextmanager
def spawn_python(
    code: str, ready_line: str = "ready", *, before: tuple[str, ...] = (), **popen: object
) -> Iterator[Program]:
    """Run Python code until the block ends; inside the block it has printed `ready_line`.

    `before` is a command to run it under (`("unshare", "--ipc")`); `popen` goes to subprocess.Popen, where
    `stdout` replaces the file. Everything that the program started is gone afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="crcli-test-") as folder:
        output_path = Path(folder) / "output"
        with output_path.open("ab") as output:
            options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output} | popen
            process = subprocess.Popen(
                [*before, sys.executable, "-u", "-c", textwrap.dedent(code)],
                start_new_session=True,
                **options,  # type: ignore[call-overload]
            )
        program = Program(process, output_path)
        try:
            if ready_line and options["stdout"] is output:
                program.wait_for(ready_line)
            yield program
        finally:
            FORMER_FOLDERS.append(Path(folder))
            kill_all(process.pid)
            process.wait()


def kill_all(pid: int) -> None:
    """Kill a process, its descendants, and whatever else is in its session; wait until they are gone.

    Parents come first: a master would start new workers in the place of those that were killed.
    """
    doomed = dict.fromkeys([*_descendants(pid), *_session(pid)])
    for one in doomed:
        try:
            os.kill(one, signal.SIGKILL)
        except ProcessLookupError:
            pass
    _wait_until_gone(doomed.keys() - {pid})


def _descendants(pid: int) -> list[int]:
    try:
        root = psutil.Process(pid)
        return [pid, *(child.pid for child in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def _session(sid: int) -> list[int]:
    found = []
    for pid in psutil.pids():
        try:
            if os.getsid(pid) == sid:
                found.append(pid)
        except ProcessLookupError:
            continue
    return found


def _wait_until_gone(pids: set[int], seconds: float = 5.0 * SLOWNESS) -> None:
    """Return when each is gone or only waits to be reaped by somebody else."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(_runs(pid) for pid in pids):
        time.sleep(0.005)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
