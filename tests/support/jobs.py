"""Jobs under `crcli run`, for tests: started, told things, and waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.crcli import COMMAND_LIMIT_SECONDS, ROOT, Crcli, tree_of, wait_until

STEPS = """
import hashlib, os, random, subprocess, sys, time
steps, pause = int(sys.argv[1]), float(sys.argv[2])
memory = bytearray(random.Random(1).randbytes(1 << 20))
for step in range(steps):
    child = subprocess.run(['cat'], input=b'%d' % step, stdout=subprocess.PIPE)
    memory[step::997] = bytes([step % 251]) * len(memory[step::997])
    print(child.stdout.decode(), hashlib.blake2b(memory, digest_size=8).hexdigest(), flush=True)
    time.sleep(pause)
"""
"""A job of steps, each with a child and a change of its memory; each line depends on all before."""


@dataclass
class Job:
    """A `crcli run` under way, and what it has written so far."""

    process: subprocess.Popen[bytes]
    folder: Path
    processes: list[Any] = field(default_factory=list)
    port: int = 0
    """Where its HTTP hook listens, if it has one."""

    @property
    def out(self) -> str:
        """What came out of it."""
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        """What it, and crcli, said beside that."""
        return (self.folder / "err").read_text()

    @property
    def has_begun(self) -> bool:
        """Whether it was started, or brought back."""
        return any(f"crcli: {how} " in self.err for how in ("started", "restored"))

    @property
    def report(self) -> dict[str, Any]:
        """What `--report` wrote."""
        found: dict[str, Any] = json.loads((self.folder / "report").read_text())
        return found

    def wait_for(self, line: str) -> None:
        """Return once it has written this line."""
        wait_until(
            lambda: line in self.out.splitlines() or self.process.poll() is not None, f"no {line!r}", 30.0
        )
        assert line in self.out.splitlines(), f"ended without {line!r}:\n{self.out}\n{self.err}"

    def lines(self, count: int) -> None:
        """Return once it has written so many lines."""
        wait_until(
            lambda: self.out.count("\n") >= count or self.process.poll() is not None, "too few lines", 30.0
        )

    def tell(self, number: int = signal.SIGTERM) -> None:
        """Send a signal to the supervisor."""
        self.processes = tree_of(self.process.pid)[1:]
        os.kill(self.process.pid, number)

    def end(self, code: int | None = None) -> int:
        """Wait for its end; return its exit code, after comparing it with the one expected."""
        found = self.process.wait(COMMAND_LIMIT_SECONDS)
        assert code in (None, found), f"exit {found}\n{self.out}\n{self.err}"
        return found


@contextmanager
def job(crcli: Crcli, folder: Path, *arguments: str, name: str = "job", **popen: Any) -> Iterator[Job]:
    """`crcli run --name NAME`, its report and output in a folder; nothing of it is left after the block."""
    folder.mkdir(exist_ok=True, parents=True)
    command = [sys.executable, "-m", "crcli", "run", "--name", name, "--store", crcli.store]
    command += ["--report", str(folder / "report"), *arguments]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": err, "cwd": ROOT} | popen
        process = subprocess.Popen(command, env=crcli.environment, **options)
    one = Job(process, folder)
    try:
        yield one
    finally:
        one.processes += tree_of(process.pid)[1:]
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(_runs, one.processes)), f"left: {one.processes}", 15.0)


def _runs(process: Any) -> bool:
    try:
        return bool(process.is_running() and process.status() != "zombie")
    except Exception:  # gone while we looked
        return False


def python_job(code: str, *arguments: str) -> tuple[str, ...]:
    """The end of the command line of a job that is Python code."""
    return ("--", sys.executable, "-c", code, *arguments)


def steps(count: int, pause: float) -> tuple[str, ...]:
    """The command line of a job that makes so many steps, with a pause (seconds) after each."""
    return python_job(STEPS, str(count), str(pause))


def result_of_steps(count: int) -> str:
    """What that job writes when nothing interrupts it."""
    command = [sys.executable, "-c", STEPS, str(count), "0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
