"""A program of the suite, started, asked to end, and judged as CRIU's own runner does it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil

from tests.support.crcli import tree_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.zdtm.suite import Case

HOOK_LIMIT_S = 60.0
GONE_WITHIN_S = 10.0
_USER = {"ZDTM_UID": "18943", "ZDTM_GID": "58467", "ZDTM_GROUPS": "27495 48244"}
"""Whom a program becomes that need not be root: CRIU's own runner has the same numbers."""


class CannotStart(Exception):
    """The program failed before anything was done to it."""


class Failed(Exception):
    """Something that had to work did not."""


class Program:
    """A case under way. This process is the one that orphans come to."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.pid = 0
        self._folder = folder
        self._log = folder / "said"

    def start(self) -> None:
        """Start it and wait until it is ready; raise CannotStart when it never is."""
        self.clean()
        with self._log.open("ab") as log:
            make = subprocess.Popen(
                ["make", "--no-print-directory", "-C", str(self.case.folder), f"{self.case.name}.pid"],
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self.hook("--post-start")
            if make.wait(self.case.limit_s):
                raise CannotStart(self._last_words())
            self.pid = int(self._path("pid").read_text())
            os.kill(self.pid, 0)
        except (Failed, subprocess.TimeoutExpired, OSError, ValueError) as error:
            raise CannotStart(f"{error} ({self._last_words()})") from None

    def hook(self, step: str) -> None:
        """Run what the case wants to be run at this step; raise Failed when that fails."""
        script = self.case.script("hook")
        if not script:
            return
        images = self._folder / "none"  # hooks compare the images of several dumps: there is one only
        images.mkdir(exist_ok=True)
        command = [f"{script.relative_to(self.case.tests)}", step]
        told = {"ZDTM_TEST_PID": str(self.pid), "ZDTM_IMG_DIR": str(images)}
        try:
            with self._log.open("ab") as log:
                subprocess.run(
                    command,
                    cwd=self.case.tests,
                    env=_outer_environment() | told,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=HOOK_LIMIT_S,
                    check=True,
                )
        except subprocess.SubprocessError as error:
            raise Failed(f"hook {step}: {error} ({_tail(self._log)})") from None

    def went(self, tree: list[psutil.Process]) -> None:
        """Assert that a dump has killed the tree; its pids are free then."""
        _reap(tree, GONE_WITHIN_S, "the dump left processes")
        self._path("pid").unlink(missing_ok=True)
        self.pid = 0

    def came_back(self, pid: int) -> None:
        """Note that it was restored, as this process of the host."""
        self.pid = pid
        self._path("pid").write_text(f"{pid}\n")

    def stop(self) -> None:
        """Ask it to end, and raise Failed unless it says that all is well."""
        try:
            root = psutil.Process(self.pid)
            root.terminate()
        except psutil.NoSuchProcess:
            raise Failed(f"it was gone before it was asked to end: {self._last_words()}") from None
        _reap([root], self.case.limit_s, "it does not end")
        if "PASS" not in _last_line(self._path("out")).split():
            raise Failed(self._last_words())

    def clean(self) -> None:
        """Remove every file that it writes."""
        name = self.case.name
        patterns = (f"{name}.pid*", f"{name}.out*", f"*{name}.test*", f"{name}.*.test", f"{name}*.state")
        for path in {path for pattern in patterns for path in self.case.folder.glob(pattern)}:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _environment(self) -> dict[str, str]:
        environment = _outer_environment() | {"ZDTM_THREAD_BOMB": "5"}
        if "pre-dump-notify" in self.case.flags:
            environment |= {"ZDTM_NOTIFY_FDIN": "100", "ZDTM_NOTIFY_FDOUT": "101"}
        if "suid" not in self.case.flags:
            environment |= _USER
            self.case.folder.chmod(self.case.folder.stat().st_mode | 0o222)
        return environment

    def _path(self, kind: str) -> Path:
        return self.case.folder / f"{self.case.name}.{kind}"

    def _last_words(self) -> str:
        """What it wrote about itself, however far it came."""
        for path in (self._path("out"), self._path("out.inprogress"), self._log):
            if words := _tail(path):
                return words
        return "it said nothing"


def _outer_environment() -> dict[str, str]:
    """This process's environment, with its Python (and that one's pycriu) as `python3`."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    environment = os.environ | {"PATH": path, "TMPDIR": os.environ.get("TMPDIR", "/tmp")}
    environment.pop("PYTHONPATH", None)  # a relative one would show hooks the pycriu of the source, not built
    return environment


def _reap(processes: list[psutil.Process], seconds: float, otherwise: str) -> None:
    """Return once none of these processes exists; whatever ends below us meanwhile is reaped."""
    end = time.monotonic() + seconds
    while left := [process for process in processes if process.is_running()]:
        reap_ended()
        if time.monotonic() > end:
            raise Failed(f"{otherwise}: {', '.join(map(str, left))}")
        time.sleep(0.005)


def reap_ended() -> None:
    """Reap every child of ours that has ended. No `Popen` may be under way."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def end_all() -> None:
    """Kill and reap everything below this process."""
    end = time.monotonic() + GONE_WITHIN_S
    while (below := tree_of(os.getpid())[1:]) and time.monotonic() < end:
        for process in below:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                pass
        reap_ended()
        time.sleep(0.005)


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1] if lines else ""


def _tail(path: Path, lines: int = 6) -> str:
    text = path.read_text(errors="replace") if path.exists() else ""
    return " | ".join(line.strip() for line in text.splitlines()[-lines:])
