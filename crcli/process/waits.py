"""For how long threads have waited in poll(2): what must come off their time limit when it begins anew."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.process.identity import read_proc
from crcli.process.tree import PID_GONE

if TYPE_CHECKING:
    from collections.abc import Iterable

_NR_POLL = b"7"  # on x86_64, the only architecture whose calls are made again
_STARTED = b"se.exec_start"


def waited_ms(pids: Iterable[int]) -> dict[int, int]:
    """Return, for each thread of these processes that waits with a limit, how long it has waited so far (ms).

    Threads whose beginning the kernel does not tell are left out.
    """
    now = _last_ran_ms("self")
    found = {}
    for pid in pids:
        for tid in _threads(pid):
            if _polls_with_limit(f"{pid}/task/{tid}") and (since := _last_ran_ms(f"{pid}/task/{tid}")):
                found[tid] = max(0, int(now - since))
    return found


def _threads(pid: int) -> list[int]:
    try:
        return [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
    except PID_GONE:
        return []


def _polls_with_limit(task: str) -> bool:
    try:
        number, *arguments = read_proc(f"/proc/{task}/syscall").split()
    except (OSError, ValueError):
        return False
    return number == _NR_POLL and 0 < int(arguments[2], 16) & 0xFFFF_FFFF < 1 << 31


def _last_ran_ms(task: str) -> float:
    """When a task was last given a processor, by the scheduler's clock; 0 where the kernel does not say."""
    try:
        lines = read_proc(f"/proc/{task}/sched").splitlines()
        return next((float(line.rpartition(b":")[2]) for line in lines if line.startswith(_STARTED)), 0.0)
    except (OSError, ValueError):
        return 0.0
