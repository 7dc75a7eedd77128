"""Which processes, let go a moment ago, died of what they ran into."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.process.identity import read_proc

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crcli.process.identity import ProcessId

_CRASH_S = 0.05
"""How long after it was let go a process has died of what it ran into (seconds)."""

_CRASHES = (signal.SIGTRAP, signal.SIGSEGV, signal.SIGILL, signal.SIGBUS)


class Fates:
    """What becomes of these processes, to be made before they are let go: the kernel (from Linux 6.15 on)
    tells of one that its parent has reaped, as a shell does at once, by a pidfd that was open before."""

    def __init__(self, processes: Iterable[ProcessId]) -> None:
        self._pidfds: dict[ProcessId, int | None] = dict.fromkeys(processes)
        with suppress(OSError):  # more than we may have open: as on older kernels
            for one in self._pidfds:
                with suppress(ProcessLookupError):
                    self._pidfds[one] = os.pidfd_open(one.pid)

    def crashed(self) -> list[ProcessId]:
        """Those that died of what they ran into, or are gone without a word; asked once, after a moment."""
        time.sleep(_CRASH_S)
        found = [one for one, pidfd in self._pidfds.items() if not one.alive() and _has_crashed(one, pidfd)]
        for pidfd in self._pidfds.values():
            if pidfd is not None:
                os.close(pidfd)
        return found


def _has_crashed(one: ProcessId, pidfd: int | None) -> bool:
    """Whether a process that lives no more was ended by a crash, as far as anybody knows."""
    try:
        status: int | None = int(read_proc(f"/proc/{one.pid}/stat").split()[-1])
    except (FileNotFoundError, ProcessLookupError):
        status = kernel.status_of_reaped(pidfd) if pidfd is not None else None
    return status is None or status & 0x7F in _CRASHES
