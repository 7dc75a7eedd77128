"""Commands with a time limit: nothing here waits for longer than it was told to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import psutil

from tests.gpu.real.prepare import ROOT

_DEATH_LIMIT_S = 5.0
_MOST_THREADS = 12
_MOST_KEPT = 100_000
"""Of what a command says, so many characters of the end are kept."""


class Failed(Exception):
    """What was tried did not work; `evidence` is what a reader wants to see of it."""

    def __init__(self, message: str, evidence: str = "") -> None:
        super().__init__(message)
        self.evidence = evidence


@dataclass(frozen=True)
class Ran:
    """A command that has ended, or was ended (`code` is then None). `began` is in seconds since 1970."""

    command: Sequence[str]
    began: float
    wall_s: float
    code: int | None
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that it printed; raises Failed where there is none."""
        try:
            found: dict[str, Any] = json.loads(self.out)
        except ValueError:
            raise Failed(f"no JSON from: {self.title}", self.said) from None
        return found

    @property
    def title(self) -> str:
        """How it ended."""
        end = f"exit {self.code}" if self.code is not None else "no end"
        return f"{end} after {self.wall_s:.1f} s: {' '.join(self.command)}"

    @property
    def said(self) -> str:
        """How it ended, and all that it said."""
        return f"{self.title}\n{self.out}\n{self.err}"


def run(
    command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None, cwd: str = str(ROOT)
) -> Ran:
    """Run a command to its end, or to the limit, when it is killed with all of its process group.

    One that cannot be started ends with 127, as in a shell.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began, clock = time.time(), time.monotonic()
        try:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,
            )
        except OSError as error:
            return Ran(command, began, 0.0, 127, "", str(error))
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            _kill_group(process)
        wall = time.monotonic() - clock
        return Ran(command, began, wall, code, _end_of(out), _end_of(err))


def must_run(command: Sequence[str], limit_s: float, environment: Mapping[str, str] | None = None) -> Ran:
    """The same, and raise Failed unless it ends with 0."""
    done = run(command, limit_s, environment)
    if done.code != 0:
        raise Failed(done.title, done.said)
    return done


def doing_of_descendants() -> str:
    """What each process below us is doing, as far as the kernel tells: for one that hangs."""
    return "\n".join(_doing(one) for one in psutil.Process().children(recursive=True))


def end_descendants(spare: frozenset[int] = frozenset()) -> list[str]:
    """Kill all processes below us but these, and reap what comes to us; say which do not die.

    A process inside a driver's call that does not return can stay: it is left there.
    """
    doomed = [one for one in psutil.Process().children(recursive=True) if one.pid not in spare]
    for one in doomed:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
    _, left = psutil.wait_procs(doomed, _DEATH_LIMIT_S)
    return [f"{one.pid} {_name_of(one)}" for one in left]


def _doing(process: psutil.Process) -> str:
    said = [f"{process.pid} {_name_of(process)}"]
    try:
        said = [f"{process.pid} {' '.join(process.cmdline())} ({process.status()})"]
        for thread in sorted(os.listdir(f"/proc/{process.pid}/task"))[:_MOST_THREADS]:
            for name in ("wchan", "syscall", "stack"):
                with open(f"/proc/{process.pid}/task/{thread}/{name}") as file:
                    said.append(f"  {thread} {name}: {file.read().strip()}")
    except (OSError, psutil.Error) as error:
        said.append(f"  {error}")
    return "\n".join(said)


def _name_of(process: psutil.Process) -> str:
    try:
        return f"{process.name()} ({process.status()})"
    except psutil.NoSuchProcess:
        return "(gone)"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_DEATH_LIMIT_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass


def _end_of(file: IO[bytes]) -> str:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _MOST_KEPT))
    return file.read().decode(errors="replace")
