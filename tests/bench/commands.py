"""Commands and subjects, started, measured, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.crcli import ROOT, end, our_child_above, tree_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_PROGRAM = Path(__file__).parent / "subject.py"

LIMIT_S = 30.0
LIMIT_S_PER_MIB = 0.1
"""How long one command may take: so much, and so much more for each MiB of the subject."""


class BenchError(Exception):
    """A command failed, took too long, or brought back something else."""


@dataclass(frozen=True)
class Ran:
    """What a command cost: seconds on the wall and of CPU (its children's too), peak memory (MiB), output."""

    began: float
    wall_s: float
    cpu_s: float
    peak_mib: float
    out: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that it printed."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def run(command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Ran:
    """Run a command to its end; raise BenchError, with what it said, when it fails or takes too long."""
    environment = {**os.environ, **(env or {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users have compiled modules
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.time()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            process_group=0,
        )
        timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.time() - began
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        said = out.read().decode(errors="replace")
        if process.returncode:
            raise BenchError(
                f"exit {process.returncode} after {wall:.1f} s: {' '.join(command)}\n"
                f"{said[-2000:]}\n{err.read().decode(errors='replace')[-2000:]}"
            )
    return Ran(began, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, said)


@dataclass
class Subject:
    """A running subject (see subject.py); a context manager: what it has become ends with the block."""

    mebibytes: int
    folder: Path
    weights: Path | None = None
    pid: int = 0
    reported: int = 0
    hash: str = ""
    _anchor: int = field(default=0, repr=False)

    @property
    def limit_s(self) -> float:
        """The time limit of a command that handles it."""
        weights = self.weights.stat().st_size >> 20 if self.weights is not None else 0
        return LIMIT_S + LIMIT_S_PER_MIB * (self.mebibytes + weights)

    @property
    def report_path(self) -> Path:
        """Where it reports."""
        return self.folder / "report.json"

    def __enter__(self) -> Subject:
        self.folder.mkdir(parents=True)
        process = subprocess.Popen(
            [sys.executable, _PROGRAM, str(self.mebibytes), self.report_path, *filter(None, [self.weights])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        process.returncode = 0  # it is reaped here, by its pid
        self.pid = self._anchor = process.pid
        self.hash = self._next_report()["hash"]
        return self

    def __exit__(self, *_: object) -> None:
        if self._anchor:
            end(tree_of(self._anchor))

    def ask(self) -> dict[str, Any]:
        """Have it report; raise BenchError when its memory is not what it was."""
        os.kill(self.pid, signal.SIGUSR2)
        report = self._next_report()
        if report["hash"] != self.hash:
            raise BenchError(f"the memory of {self.pid} is not what it was")
        return report

    def change(self) -> None:
        """Have it change one page in a hundred."""
        os.kill(self.pid, signal.SIGUSR1)
        self.hash = self._next_report()["hash"]

    def died(self) -> None:
        """Note that a dump has killed it; reap it, or the first process of its namespace."""
        os.waitpid(self._anchor, 0)
        self._anchor = 0

    def came_back(self, pid: int) -> None:
        """Note that it was restored, as this process of the host."""
        self.pid = pid
        self._anchor = our_child_above(pid)

    def _next_report(self) -> dict[str, Any]:
        end = time.monotonic() + self.limit_s
        while time.monotonic() < end:
            try:
                report: dict[str, Any] = json.loads(self.report_path.read_text())
            except FileNotFoundError:
                report = {"number": 0}
            if report["number"] > self.reported:
                self.reported = report["number"]
                return report
            if not os.path.exists(f"/proc/{self.pid}"):
                break
            time.sleep(0.01)
        raise BenchError(f"no report from {self.pid}")
