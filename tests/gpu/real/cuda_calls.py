"""CUDA's checkpoint calls, one by one as cuda-python gives them, each noted with its code and its time.

This is not crcli's own way to CUDA (crcli/gpu): it is what the plain sequence and the probe call, so that
what crcli does can be compared with what the driver does by itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from tests.gpu.real.commands import Failed

LOCK_LIMIT_MS = 10_000


class Calls:
    """The driver, initialised by the first call. `noted` is every call so far, also those that failed."""

    def __init__(self) -> None:
        self.noted: list[dict[str, Any]] = []
        self._ready = False

    def init(self) -> None:
        """cuInit has been called, once."""
        if not self._ready:
            self.call("cuInit", 0)
            self._ready = True

    def call(self, name: str, *args: Any, pid: int = 0) -> Any:
        """Make one call and note it; return what it gave beside its code; raise Failed for any but 0."""
        code, found = self.tried(name, *args, pid=pid)
        if code:
            noted = self.noted[-1]
            raise Failed(f"{name}({pid or ''}): {noted.get('name', '')} ({code})", repr(self.noted))
        return found

    def tried(self, name: str, *args: Any, pid: int = 0) -> tuple[int, Any]:
        """Make one call, note it, and return its code and what else it gave."""
        note: dict[str, Any] = {"call": name, **({"pid": pid} if pid else {})}
        self.noted.append(note)
        began = time.monotonic()
        try:
            from cuda.bindings import driver

            code, *found = getattr(driver, name)(*([pid] if pid else []), *args)
        except Exception as error:  # no libcuda, or a driver that lacks this function
            note |= {"code": -1, "name": repr(error)}
            return -1, None
        note |= {"ms": round(1000 * (time.monotonic() - began), 3), "code": int(code), "name": code.name}
        return int(code), found[0] if found else None

    def cuda_processes(self, pids: Iterable[int]) -> list[int]:
        """Those of these processes that the driver knows, by their restore threads."""
        self.init()
        return [pid for pid in pids if self.tried("cuCheckpointProcessGetRestoreThreadId", pid=pid)[0] == 0]

    def lock(self, pid: int) -> None:
        """The process is LOCKED."""
        from cuda.bindings import driver

        limit = driver.CUcheckpointLockArgs()
        limit.timeoutMs = LOCK_LIMIT_MS
        self.call("cuCheckpointProcessLock", limit, pid=pid)

    def checkpoint(self, pid: int) -> None:
        """A LOCKED process is CHECKPOINTED."""
        self.call("cuCheckpointProcessCheckpoint", None, pid=pid)

    def restore(self, pid: int) -> None:
        """A CHECKPOINTED process is LOCKED, on the same GPUs as before."""
        self.call("cuCheckpointProcessRestore", None, pid=pid)

    def unlock(self, pid: int) -> None:
        """A LOCKED process is RUNNING."""
        self.call("cuCheckpointProcessUnlock", None, pid=pid)

    def state(self, pid: int) -> str:
        """The state of a process, by the driver's name for it, or why it is not told."""
        code, state = self.tried("cuCheckpointProcessGetState", pid=pid)
        return str(self.noted[-1]["name"]) if code else str(state.name).removeprefix("CU_PROCESS_STATE_")
