"""`crcli demo`, step by step. Each step is observed from outside: through /proc, the log, and crcli's output.

The two commands run as processes of their own, exactly as a user would call them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from crcli.demo import agent
from crcli.errors import CrcliError, TreeState
from crcli.image.names import parse_image
from crcli.image.remove import remove
from crcli.kernel import become_subreaper
from crcli.pipeline.interrupts import interruptible
from crcli.process.identity import ProcessId, identify
from crcli.process.tree import scan_tree
from crcli.records import Struct, asdict, field
from crcli.store.open import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAME = "demo"
RANDOM_MIB, TEXT_MIB, ZERO_MIB = 24, 16, 24
_PATIENCE_S = 30.0
_STEP_S = 0.01


class DemoFailed(CrcliError):
    """Something of the demo was not as it should be; the exit code is that of the command that failed."""

    code = "demo-failed"

    def __init__(self, message: str, *, hint: str = "", exit_code: int = 21) -> None:
        super().__init__(message, hint=hint, state=TreeState.DEAD)
        self._exit_code = exit_code

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # as the command that failed
        return self._exit_code


class Step(Struct, frozen=True):
    """One step that was seen to work: its name, how long it took (milliseconds), and what was seen."""

    name: str
    ms: float
    seen: str


class DemoReport(Struct):
    """What the demo saw, and what the two commands reported (their --json)."""

    steps: list[Step] = field(default_factory=list)
    dump: dict[str, Any] = field(default_factory=dict)
    restore: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The object that `crcli demo --json` prints."""
        steps = [asdict(step) for step in self.steps]
        return {"ok": True, "steps": steps, "dump": self.dump, "restore": self.restore}


def run(store: str | None, endpoint_url: str | None, on_step: Callable[[Step], None]) -> DemoReport:
    """Go through the demo; return what was seen, or raise DemoFailed at the first thing that is not right.

    Without `store` (a URL) a directory is made for it. Nothing is left behind: no agent, image or folder.
    """
    with interruptible(), ExitStack() as held:
        folder = tempfile.mkdtemp(prefix="crcli-demo-")
        held.callback(shutil.rmtree, folder, ignore_errors=True)
        return _Demo(folder, store or f"file://{folder}/store", endpoint_url, on_step, held).run()


class _Demo:
    def __init__(
        self,
        folder: str,
        store: str,
        endpoint_url: str | None,
        on_step: Callable[[Step], None],
        held: ExitStack,
    ) -> None:
        self._log = f"{folder}/agent.log"
        self._store = store
        self._endpoint_url = endpoint_url
        self._on_step = on_step
        self._held = held
        self._report = DemoReport()
        self._step_began = time.monotonic()

    def run(self) -> DemoReport:
        """Start, dump, look, restore, look."""
        become_subreaper()  # so that nobody else's leisure decides when the agent's pids are free again
        pid = self._start()
        before = self._state_of(pid)
        members = _members(identify(pid))
        self._done("agent started", f"{len(members)} processes, counter {before[0]}")

        self._report.dump = dumped = self._crcli("dump", str(pid), "--name", NAME)
        self._held.callback(self._remove_image)
        frozen = f"frozen {dumped['frozen_ms']:.0f} ms, stored {dumped['stored_bytes'] / agent.MIB:.1f} MiB"
        self._done("crcli dump", frozen)

        self._see_it_gone(members)
        last = self._last_counter()
        self._done("seen to be gone", f"no process left, counter stands at {last}")

        self._report.restore = restored = self._crcli("restore", dumped["image"])
        root = identify(restored["host_pid"])
        self._held.callback(_kill_tree, root)
        self._done("crcli restore", f"pid {restored['host_pid']}, ready after {restored['ready_ms']:.0f} ms")

        after = self._state_of(root.pid)
        alive = len(_members(root))
        self._compare(before, last, after, len(members), alive)
        self._done("seen to go on", f"counter {last} → {after[0]}, memory unchanged, {alive} processes")
        return self._report

    def _start(self) -> int:
        sizes = (str(RANDOM_MIB), str(TEXT_MIB), str(ZERO_MIB))
        with open(self._log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", os.path.abspath(agent.__file__), *sizes],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        self._agent = process
        self._held.callback(process.wait)
        self._held.callback(_kill_tree, identify(process.pid))
        self._wait(lambda: "ready" in self._lines() or process.poll() is not None, "the agent did not start")
        return process.pid

    def _state_of(self, pid: int) -> tuple[int, str]:
        """Ask the agent for its counter and the hash of its memory."""
        asked = len(self._states())
        os.kill(pid, signal.SIGUSR1)
        self._wait(lambda: len(self._states()) > asked, "the agent does not answer")
        counter, digest = self._states()[-1]
        return int(counter), digest

    def _states(self) -> list[list[str]]:
        return [line.split()[1:] for line in self._lines() if line.startswith("state ")]

    def _last_counter(self) -> int:
        return max(int(line.split()[1]) for line in self._lines() if line.startswith(("counter ", "state ")))

    def _lines(self) -> list[str]:
        with open(self._log) as log:
            return log.read().split("\n")[:-1]

    def _see_it_gone(self, members: Sequence[ProcessId]) -> None:
        self._wait(lambda: self._agent.poll() is not None, "the agent did not end")
        if left := [member.pid for member in members if member.alive()]:
            raise DemoFailed(f"after the dump, processes {left} still run", exit_code=12)
        for member in members:
            _reap(member.pid)

    def _compare(
        self, before: tuple[int, str], last: int, after: tuple[int, str], started: int, alive: int
    ) -> None:
        if after[1] != before[1]:
            raise DemoFailed("the memory of the restored agent is not what it was")
        if after[0] < last:
            raise DemoFailed(f"the counter went back from {last} to {after[0]}")
        if alive != started:
            raise DemoFailed(f"{started} processes were dumped and {alive} run")
        self._wait(lambda: self._last_counter() > after[0], "the restored agent does not go on")

    def _crcli(self, *arguments: str) -> dict[str, Any]:
        """Run one crcli command and return its JSON; raise DemoFailed with its error."""
        command = [sys.executable, "-m", "crcli", *arguments, "--store", self._store, "--json"]
        if self._endpoint_url:
            command += ["--endpoint-url", self._endpoint_url]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            raise DemoFailed(f"crcli {arguments[0]} printed no JSON: {done.stderr.strip()}") from None
        if "error" in answer:
            error = answer["error"]
            raise DemoFailed(error["message"], hint=error["hint"], exit_code=done.returncode)
        return answer

    def _wait(self, seen: Callable[[], bool], failure: str) -> None:
        end = time.monotonic() + _PATIENCE_S
        while not seen():
            if time.monotonic() > end:
                raise DemoFailed(f"{failure} within {_PATIENCE_S:.0f} s; its log: {self._lines()[-5:]}")
            time.sleep(_STEP_S)

    def _done(self, name: str, seen: str) -> None:
        now = time.monotonic()
        step = Step(name, round((now - self._step_began) * 1000, 1), seen)
        self._step_began = now
        self._report.steps.append(step)
        self._on_step(step)

    def _remove_image(self) -> None:
        store = open_store(self._store, endpoint_url=self._endpoint_url)
        try:
            remove(store, parse_image(self._report.dump["image"])[1])
        except CrcliError:
            pass  # what was to be shown was shown; `crcli ls` shows what is left
        finally:
            store.close()


def _members(root: ProcessId) -> list[ProcessId]:
    return [process.identity for process in scan_tree(root).living]


def _reap(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        pass  # reaped already


def _kill_tree(root: ProcessId) -> None:
    """Kill a process and its descendants, if they run."""
    try:
        members = _members(root) if root.alive() else []
    except CrcliError:
        return  # it ended while it was looked at
    for member in members:
        if member.send(signal.SIGKILL):
            _reap(member.pid)
