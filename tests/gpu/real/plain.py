"""The plain sequence that crcli is compared with: lock, checkpoint, criu dump; criu restore, restore, unlock.

    python -m tests.gpu.real.plain dump FOLDER PID [--no-cuda] [--log-level N] [--leave-running]
    python -m tests.gpu.real.plain restore FOLDER [--no-cuda] [--log-level N]

It is what a careful user's script would do: one process makes all CUDA calls (cuInit once), all processes are
locked before any is checkpointed, and when something fails, what was done is undone. It prints one JSON
object {"ok", "error", "phases" (seconds), "cuda" (pids), "calls", "criu" (what CRIU's log says of a failure),
"bytes" (of the image)}, and ends with 1 when it failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crcli.criu.binary import criu_command
from tests.gpu.real.commands import Failed
from tests.gpu.real.cuda_calls import Calls

_STATE = "cuda.json"
_SAME_FOR_BOTH = (
    "--tcp-established", "--file-locks", "--link-remap", "--manage-cgroups=ignore", "--ghost-limit=1G",
)  # fmt: skip


class Sequence:
    """One run of the sequence over one folder of images: its phases and its calls, noted as they end."""

    def __init__(self, folder: Path, log_level: int, calls: Calls | None) -> None:
        self.folder = folder
        self.log_level = log_level
        self.calls = calls
        self.said: dict[str, Any] = {"ok": False, "phases": {}, "cuda": []}

    def dump(self, pid: int, leave_running: bool) -> None:
        """The tree's image is in the folder, durable; the tree is dead, or runs on."""
        self.folder.mkdir(parents=True)
        pids = self._of_cuda([pid, *_descendants(pid)])
        (self.folder / _STATE).write_text(json.dumps(pids))
        with self._undone_on_failure(pids):
            self._each("lock", pids)
            self._each("checkpoint", pids)
            options = ["--tree", str(pid), *(["--leave-running"] if leave_running else [])]
            self._criu("dump", *options)
        if leave_running:
            self._each("restore", pids)
            self._each("unlock", pids)
        with self._phase("sync"):
            files = [path for path in self.folder.iterdir() if path.is_file()]
            subprocess.run(["sync", *map(str, files)], check=True)
        self.said["bytes"] = sum(path.stat().st_size for path in files if path.suffix == ".img")

    def restore(self) -> None:
        """The tree runs, as it did."""
        pids = json.loads((self.folder / _STATE).read_text())
        self.said["cuda"] = pids
        self._criu("restore", "--restore-detached")
        if pids:
            self._init()
        self._each("restore", pids)
        self._each("unlock", pids)

    def _of_cuda(self, pids: list[int]) -> list[int]:
        if self.calls is None:
            return []
        self._init()
        with self._phase("find"):
            self.said["cuda"] = self.calls.cuda_processes(pids)
        if not self.said["cuda"]:
            raise Failed("the driver knows none of these processes")
        return list(self.said["cuda"])

    def _init(self) -> None:
        assert self.calls is not None
        with self._phase("init"):
            self.calls.init()

    def _each(self, what: str, pids: list[int]) -> None:
        with self._phase(what):
            for pid in pids:
                getattr(self.calls, what)(pid)

    @contextmanager
    def _undone_on_failure(self, pids: list[int]) -> Iterator[None]:
        try:
            yield
        except Failed:
            assert self.calls is not None or not pids
            for pid in reversed(pids):
                self._undo(pid)
            raise

    def _undo(self, pid: int) -> None:
        """Whatever was done to this process is undone, as far as the driver lets us."""
        assert self.calls is not None
        for state, step in (("CHECKPOINTED", "Restore"), ("LOCKED", "Unlock")):
            if self.calls.state(pid) == state:
                self.calls.tried(f"cuCheckpointProcess{step}", None, pid=pid)
        self.said.setdefault("undone", {})[pid] = self.calls.state(pid)

    def _criu(self, verb: str, *options: str) -> None:
        log = self.folder / f"{verb}.log"
        with self._phase("criu"):
            done = subprocess.run(
                [
                    *criu_command(), verb, "--images-dir", str(self.folder), "--log-file", log.name,
                    f"-v{self.log_level}", *_SAME_FOR_BOTH, *options,
                ],
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
        if done.returncode:
            text = log.read_text(errors="replace") if log.exists() else ""
            self.said["criu"] = telling_lines(text) + done.stderr[-2000:]
            raise Failed(f"criu {verb}: exit {done.returncode}")

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.said["phases"][name] = round(time.monotonic() - began, 4)


def telling_lines(log: str, around: int = 3, last: int = 30) -> str:
    """The lines of CRIU's log that say Error or Warn, each with a few before it, and the end of the log."""
    lines = log.splitlines()
    telling = [number for number, line in enumerate(lines) if "Error" in line or "Warn" in line]
    wanted = {at for number in telling for at in range(max(0, number - around), number + 1)}
    wanted |= set(range(max(0, len(lines) - last), len(lines)))
    return "\n".join(lines[number] for number in sorted(wanted)) + "\n"


def _descendants(pid: int) -> list[int]:
    import psutil

    return [one.pid for one in psutil.Process(pid).children(recursive=True)]


def main() -> int:
    """Do one half of the sequence; what came of it is printed in any case."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.real.plain", description=__doc__)
    parser.add_argument("half", choices=("dump", "restore"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("pid", type=int, nargs="?")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--leave-running", action="store_true")
    parser.add_argument("--log-level", type=int, default=2)
    options = parser.parse_args()
    calls = None if options.no_cuda else Calls()
    sequence = Sequence(options.folder, options.log_level, calls)
    half: Callable[[], None] = (
        sequence.restore
        if options.half == "restore"
        else lambda: sequence.dump(options.pid, options.leave_running)
    )
    try:
        half()
        sequence.said["ok"] = True
    except (Failed, OSError, subprocess.SubprocessError) as error:
        sequence.said["error"] = str(error)
    if calls is not None:
        sequence.said["calls"] = calls.noted
    print(json.dumps(sequence.said))
    return 0 if sequence.said["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
