"""A process that calls CUDA's driver for a test, through the real cuda-python: one JSON line each way.

    with calling(sim) as driver:
        assert driver.lock(pid, 500) == "CUDA_SUCCESS"

Asked `{"call": "lock", "pid": 7, "arguments": [500]}` it answers `{"result": "CUDA_SUCCESS"}`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.support.gpu_simulator import SimulatedHost


@dataclass
class Caller:
    """The test's end. A call may be sent (`ask`) and its result received later (`answer`)."""

    process: subprocess.Popen[str]

    def ask(self, call: str, pid: int = 0, *arguments: Any) -> None:
        """Have it begin a call."""
        assert self.process.stdin
        asked = {"call": call, "pid": pid, "arguments": arguments}
        print(json.dumps(asked), file=self.process.stdin, flush=True)

    def answer(self) -> str:
        """Return the name of the result of the call that was begun."""
        assert self.process.stdout
        result: str = json.loads(self.process.stdout.readline())["result"]
        return result

    def _do(self, call: str, pid: int, *arguments: Any) -> str:
        self.ask(call, pid, *arguments)
        return self.answer()

    def init(self) -> str:
        """Call cuInit."""
        return self._do("init", 0)

    def lock(self, pid: int, timeout_ms: int = 10_000) -> str:
        """Call cuCheckpointProcessLock; 0 is without a timeout."""
        return self._do("lock", pid, timeout_ms)

    def checkpoint(self, pid: int) -> str:
        """Call cuCheckpointProcessCheckpoint."""
        return self._do("checkpoint", pid)

    def restore(self, pid: int, mapping: Mapping[str, str] | None = None) -> str:
        """Call cuCheckpointProcessRestore, with GPU pairs if there is a mapping ("GPU-…" to "GPU-…")."""
        return self._do("restore", pid, dict(mapping or {}))

    def unlock(self, pid: int) -> str:
        """Call cuCheckpointProcessUnlock."""
        return self._do("unlock", pid)

    def state(self, pid: int) -> str:
        """Return the state that cuCheckpointProcessGetState tells, or the error."""
        return self._do("state", pid)

    def tid(self, pid: int) -> str:
        """Return the restore thread's id as text, or the error."""
        return self._do("tid", pid)


@contextmanager
def calling(sim: SimulatedHost, init: bool = True) -> Iterator[Caller]:
    """A caller on this host, after cuInit unless told otherwise; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, __file__],
        env=os.environ | sim.environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        caller = Caller(process)
        if init:
            assert caller.init() == "CUDA_SUCCESS"
        yield caller
    finally:
        process.kill()
        process.communicate()


def _uuid(driver: Any, text: str, kept: list[Any]) -> Any:
    import ctypes

    kept.append(ctypes.create_string_buffer(bytes.fromhex(text.removeprefix("GPU-").replace("-", "")), 16))
    return driver.CUuuid(ctypes.addressof(kept[-1]))


def _perform(driver: Any, call: str, pid: int, arguments: list[Any]) -> str:
    kept: list[Any] = []
    args: Any = None
    if call == "init":
        return str(driver.cuInit(0)[0].name)
    if call == "lock":
        args = driver.CUcheckpointLockArgs()
        args.timeoutMs = arguments[0]
    if call == "restore" and arguments[0]:
        args = driver.CUcheckpointRestoreArgs()
        pairs = []
        for old, new in arguments[0].items():
            pair = driver.CUcheckpointGpuPair()
            pair.oldUuid, pair.newUuid = _uuid(driver, old, kept), _uuid(driver, new, kept)
            pairs.append(pair)
        args.gpuPairs, args.gpuPairsCount = pairs, len(pairs)
    if call in ("state", "tid"):
        name = "GetState" if call == "state" else "GetRestoreThreadId"
        error, found = getattr(driver, f"cuCheckpointProcess{name}")(pid)
        if error:
            return str(error.name)
        return str(found) if call == "tid" else found.name.removeprefix("CU_PROCESS_STATE_").lower()
    return str(getattr(driver, f"cuCheckpointProcess{call.capitalize()}")(pid, args)[0].name)


def _serve() -> None:
    from cuda.bindings import driver  # type: ignore[import-untyped, unused-ignore]

    for line in sys.stdin:
        asked = json.loads(line)
        result = _perform(driver, asked["call"], asked["pid"], asked["arguments"])
        print(json.dumps({"result": result}), flush=True)


if __name__ == "__main__":
    _serve()
