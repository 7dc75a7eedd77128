"""Commands and subjects, started, measured, and never left behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from tests.support.crcli import ROOT, end, our_child_above, reap, tree_of

if TYPE_CHECKING:
    import resource
    from collections.abc import Mapping, Sequence

LIMIT_S = 30.0
LIMIT_S_PER_MIB = 0.2
"""How long one command may take: so much, and so much more for each MiB of the subject."""

_LOOK_EVERY_S = 0.02


class BenchError(Exception):
    """A command failed, took too long, or brought back something else."""


@dataclass(frozen=True)
class Ran:
    """What a command cost: seconds on the wall and of CPU (its children's too), memory (MiB), output.

    `peak_mib` is the most that its first process had; `held_mib` the most that files held which it had open
    and which have no name: crcli's overflow is one, memory that is no process's own.
    """

    began: float
    wall_s: float
    cpu_s: float
    peak_mib: float
    held_mib: float
    out: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that it printed."""
        found: dict[str, Any] = json.loads(self.out)
        return found


def run(
    command: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None, *, silent: bool = False
) -> Ran:
    """Run a command to its end; raise BenchError, with what it said, when it fails or takes too long.

    A silent one has no file of ours open.
    """
    environment = {**os.environ, **(env or {})}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # users have compiled modules
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.time()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if silent else out,
            stderr=subprocess.DEVNULL if silent else err,
            process_group=0,
        )
        with _Watch(process.pid) as watch:
            usage = _end_of(process, limit_s)
        wall = time.time() - began
        out.seek(0)
        err.seek(0)
        said = out.read().decode(errors="replace")
        if process.returncode:
            raise BenchError(
                f"exit {process.returncode} after {wall:.1f} s: {' '.join(command)}\n"
                f"{said[-2000:]}\n{err.read().decode(errors='replace')[-2000:]}"
            )
    return Ran(began, wall, usage.ru_utime + usage.ru_stime, watch.peak_mib, watch.held_mib, said)


def reap_orphans() -> None:
    """Reap what was left to us and has ended: crcli's pagers end after the trees that they served."""
    for child in psutil.Process().children():
        if child.status() == psutil.STATUS_ZOMBIE:
            os.waitpid(child.pid, 0)


def _end_of(process: subprocess.Popen[bytes], limit_s: float) -> resource.struct_rusage:
    """Wait for a command, and return what it used; it is killed when its time is over, or ours."""
    timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage


class _Watch:
    """Looks, within a block, at what memory a process has, and at what its files without a name hold.

    The kernel's own account (ru_maxrss) begins with the memory of whoever started the process.
    """

    peak_mib = held_mib = 0.0

    def __init__(self, pid: int) -> None:
        self._proc = f"/proc/{pid}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_EVERY_S):
            try:
                self.peak_mib = max(self.peak_mib, self._peak())
                self.held_mib = max(self.held_mib, self._held())
            except OSError:  # it has ended, or has closed a file meanwhile
                pass

    def _peak(self) -> float:
        with open(f"{self._proc}/status") as file:
            return next((int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM:")), 0.0)

    def _held(self) -> float:
        folder = f"{self._proc}/fd"
        return sum(_size_without_name(f"{folder}/{fd}") for fd in os.listdir(folder)) / 2**20


def _size_without_name(path: str) -> int:
    """The memory or disk that an open file has (bytes), if it has no name any more."""
    found = os.stat(path)
    return found.st_blocks * 512 if stat.S_ISREG(found.st_mode) and not found.st_nlink else 0


@dataclass
class Subject:
    """A running subject (see subject.py); a context manager: what it has become ends with the block."""

    mebibytes: int
    folder: Path
    weights: Path | None = None
    kind: str = "random"
    pid: int = 0
    hash: str = ""
    _anchor: int = field(default=0, repr=False)
    _tree: list[psutil.Process] = field(default_factory=list, repr=False)

    @property
    def limit_s(self) -> float:
        """The time limit of a command that handles it."""
        weights = self.weights.stat().st_size >> 20 if self.weights is not None else 0
        return LIMIT_S + LIMIT_S_PER_MIB * (self.mebibytes + weights)

    @property
    def report_path(self) -> Path:
        """Where it reports."""
        return self.folder / "report.json"

    @property
    def command(self) -> list[str]:
        """What starts it."""
        module = [sys.executable, "-m", "tests.bench.subject", self.kind]
        return [*module, *map(str, [self.mebibytes, self.report_path, *filter(None, [self.weights])])]

    def __enter__(self) -> Subject:
        self.folder.mkdir(parents=True)
        try:
            self.came_back(self.start())
            self.hash = self._report()["hash"]
            self._tree = tree_of(self._anchor)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def start(self) -> int:
        """Start it, and return its pid."""
        process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        process.returncode = 0  # it is reaped here, by its pid
        return process.pid

    def end(self) -> None:
        """Kill it and all of its processes, if it lives."""
        if self._anchor:
            end(tree_of(self._anchor))
        self._anchor = 0

    def ask(self) -> dict[str, Any]:
        """Have it report; raise BenchError when its memory is not what it was."""
        report = self._told(signal.SIGUSR2)
        if report["hash"] != self.hash:
            raise BenchError(f"the memory of {self.pid} is not what it was")
        return report

    def change(self) -> None:
        """Have it change one page in a hundred."""
        self.hash = self._told(signal.SIGUSR1)["hash"]

    def pids(self) -> list[int]:
        """All of its processes."""
        return [process.pid for process in self._tree]

    def died(self) -> None:
        """Note that a dump has killed all of it; its processes are reaped, so that no pid stays taken."""
        reap(self._tree)
        self._anchor = 0

    def came_back(self, pid: int) -> None:
        """Note that it runs, as this process of the host."""
        self.pid = pid
        self._anchor = our_child_above(pid)
        self._tree = tree_of(self._anchor)

    def _told(self, how: signal.Signals) -> dict[str, Any]:
        """Send it a signal, and return what it reports."""
        self.report_path.unlink(missing_ok=True)
        os.kill(self.pid, how)
        return self._report()

    def _report(self) -> dict[str, Any]:
        """What it reports next."""
        end = time.monotonic() + self.limit_s
        while time.monotonic() < end and os.path.exists(f"/proc/{self.pid}"):
            try:
                report: dict[str, Any] = json.loads(self.report_path.read_text())
                return report
            except FileNotFoundError:
                time.sleep(0.01)
        raise BenchError(f"no report from {self.pid}")
