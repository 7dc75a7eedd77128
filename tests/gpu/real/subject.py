"""A program that is dumped and restored: started, watched by its lines of progress, and never left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.gpu.real.commands import Failed
from tests.gpu.real.setting import Setting

PROGRAMS = Path(__file__).with_name("programs")
ASKING = signal.SIGRTMIN + 1
"""The signal that asks a program for a digest (see programs/progress.py)."""

_DEATH_LIMIT_S = 15.0


@dataclass(frozen=True)
class Step:
    """One step of a program: its number, what it gave, and when it was written (seconds since 1970)."""

    number: int
    value: str
    time: float


class Subject:
    """A program in a session of its own, its output in files. Everything of it ends with the block."""

    def __init__(
        self,
        setting: Setting,
        folder: Path,
        program: str,
        *arguments: str,
        library: str = "",
        under: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.setting = setting
        self.folder = folder
        self.progress = folder / "progress"
        self._command = [*under, setting.python, str(PROGRAMS / f"{program}.py"), *arguments]
        self._command += ["--progress", str(self.progress), "--device", setting.device]
        if library:
            self._command += ["--with", library]
        self._environment = {**setting.programs_environment(library or "torch"), **(environment or {})}
        if under:
            self._environment = dict(setting.crcli_environment())
        self._doomed: list[psutil.Process] = []
        self.pid = 0

    def __enter__(self) -> Subject:
        self.folder.mkdir(parents=True)
        self.start()
        return self

    def start(self) -> None:
        """Run its command line; also a second time, once it is gone."""
        with (self.folder / "output").open("ab") as output:
            process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._process = process
        self.pid = process.pid
        self._doomed.append(psutil.Process(self.pid))

    def __exit__(self, *_: object) -> None:
        for process in self._tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(self._tree(), _DEATH_LIMIT_S)

    def wait_ready(self, limit_s: float) -> int:
        """Return once all its memory is allocated, with the bytes of GPU memory in use by its account."""
        line = self._wait(lambda: self._last("ready"), limit_s, "it is not ready")
        return int(line.split()[1])

    def wait_steps(self, count: int, limit_s: float) -> None:
        """Return once there are so many steps."""
        self._wait(
            lambda: "enough" if len(self.steps()) >= count else "", limit_s, f"it has not made {count} steps"
        )

    def wait_more(self, count: int, limit_s: float) -> None:
        """Return once there are so many steps more than now."""
        self.wait_steps(len(self.steps()) + count, limit_s)

    def wait_done(self, limit_s: float) -> None:
        """Return once it has made its last step."""
        self._wait(lambda: self._last("done"), limit_s, "it does not come to its end")

    def digest(self, limit_s: float) -> str:
        """Ask it for the digest of all its GPU memory."""
        before = len(self._lines("digest"))
        os.kill(self.pid, ASKING)
        self._wait(
            lambda: "said" if len(self._lines("digest")) > before else "", limit_s, "it says no digest"
        )
        return self._last("digest").split()[1]

    def steps(self, suffix: str = "") -> list[Step]:
        """All steps so far; of its child, with the suffix `.child`."""
        found = [line.split() for line in self._lines("step", suffix)]
        return [Step(int(number), value, float(at)) for _, number, value, at in found]

    def remember(self) -> None:
        """Know all of its processes, so that `died` can reap those whose parent dies before them, too."""
        self._tree()

    def told_to_go(self, limit_s: float) -> int:
        """The exit code of its command, which gets SIGTERM; raise Failed if it does not end by then."""
        self.remember()
        self._process.terminate()
        try:
            return self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise Failed(f"told to end, it has not ended within {limit_s:.0f} s", self.said) from None

    def died(self) -> None:
        """Return once all of its tree is gone, reaped by whoever is its parent; raise Failed if it stays."""
        _, left = psutil.wait_procs(self._tree(), _DEATH_LIMIT_S)
        if left:
            raise Failed(f"still there after the dump: {left}")

    def came_back(self, host_pid: int) -> None:
        """It goes on as this process."""
        self.pid = host_pid
        self._doomed.append(psutil.Process(host_pid))

    def first_step_since(self, began: float, after: int, limit_s: float) -> float:
        """Seconds from `began` to the time of the first step behind the first `after` ones."""
        self.wait_steps(after + 1, limit_s)
        return self.steps()[after].time - began

    def tree(self) -> list[int]:
        """The pids of its processes, the root first."""
        return [
            one.pid for one in (psutil.Process(self.pid), *psutil.Process(self.pid).children(recursive=True))
        ]

    @property
    def said(self) -> str:
        """The end of what it wrote, to its output and as progress."""
        output = (self.folder / "output").read_text(errors="replace")[-4000:]
        return "\n".join([output, *self._lines()[-10:]])

    def _tree(self) -> list[psutil.Process]:
        """Every process of it that we have known, and what is below those that live."""
        for process in list(self._doomed):
            try:
                self._doomed += [one for one in process.children(recursive=True) if one not in self._doomed]
            except psutil.NoSuchProcess:
                pass
        return self._doomed

    def _lines(self, kind: str = "", suffix: str = "") -> list[str]:
        try:
            text = Path(f"{self.progress}{suffix}").read_text()
        except FileNotFoundError:
            return []
        return [line for line in text.splitlines() if line.startswith(kind)]

    def _last(self, kind: str) -> str:
        return (self._lines(kind) or [""])[-1]

    def _wait(self, found: Callable[[], str], limit_s: float, otherwise: str) -> str:
        end = time.monotonic() + limit_s
        while not (line := found()):
            if not self._lives():
                raise Failed(f"the program has ended: {otherwise}", self.said)
            if time.monotonic() > end:
                raise Failed(f"{otherwise} within {limit_s:.0f} s", self.said)
            time.sleep(0.01)
        return line

    def _lives(self) -> bool:
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
