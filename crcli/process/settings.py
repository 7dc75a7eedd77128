"""What processes and threads may use: limits, processors, priorities.

What CRIU does not save of it is read before a dump and given back after a restore. CRIU keeps limits, policy,
priority and nice value; processors, input/output priority, timer slack, and what a core dump is to hold, are
ours to keep.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

from crcli import kernel

DEFAULT_SLACK_NS = 50_000
RLIM64_INFINITY = (1 << 64) - 1


class ThreadSettings(NamedTuple):
    """One thread's settings.

    `inner_tid` is its id as its own pid namespace has it, `cpus` the list of processors that it may use,
    `policy` SCHED_…, `io_priority` as ioprio_get(2) says it (0: none of its own), `slack_ns` how late its
    timers may be (nanoseconds; 0: not known).
    """

    tid: int
    inner_tid: int
    cpus: str
    policy: int
    nice: int
    io_priority: int
    slack_ns: int

    @property
    def is_real_time(self) -> bool:
        """Whether it runs before all ordinary threads (SCHED_FIFO, SCHED_RR)."""
        return self.policy & ~os.SCHED_RESET_ON_FORK in (os.SCHED_FIFO, os.SCHED_RR)

    @property
    def has_usual_slack(self) -> bool:
        """Whether its timers are as exact as any other's; those of real-time threads have no slack at all."""
        return self.slack_ns in (0, DEFAULT_SLACK_NS)


def read_settings(tid: int, inner_tid: int, cpus: str) -> ThreadSettings | None:
    """Return a thread's settings; None when it has ended."""
    try:
        policy = os.sched_getscheduler(tid)
        nice = os.getpriority(os.PRIO_PROCESS, tid)
    except OSError:
        return None
    return ThreadSettings(tid, inner_tid, cpus, policy, nice, _io_priority(tid), _slack(tid))


def give_back(tid: int, saved: dict[str, Any]) -> None:
    """Give a thread `cpus`, `io_priority` and `slack_ns`, each where there is one and this host permits."""
    for name, give in _WAYS.items():
        if saved.get(name):
            try:
                give(tid, saved[name])
            except OSError:
                continue  # no such processor here, or not allowed: any setting is better than no process


def read_core_filter(pid: int) -> int:
    """Return what a core dump of a process holds, as bits (core(5)); -1 for a zombie, and where not told."""
    try:
        with open(f"/proc/{pid}/coredump_filter", "rb") as file:
            return int(file.read() or b"-1", 16)
    except (OSError, ValueError):
        return -1


def give_core_filter(pid: int, value: int) -> None:
    """Have a core dump of a process hold this, where the host permits."""
    if read_core_filter(pid) == value:
        return
    try:
        with open(f"/proc/{pid}/coredump_filter", "wb") as file:
            file.write(b"%#x" % value)
    except OSError:
        return


def give_oom_score(pid: int, score: str) -> None:
    """Have the kernel weigh a process so where memory runs out (oom_score_adj), where the host permits."""
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w") as file:
            file.write(score)
    except OSError:
        return


def parse_cpus(text: str) -> set[int]:
    """Return the processors of a list such as "0-3,8"."""
    found: set[int] = set()
    for span in text.split(","):
        first, _, last = span.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


def read_limits(pid: int, root: str = "") -> list[tuple[int, int]]:
    """Return a process's (soft, hard) limits from ROOT/proc/PID/limits, by number (RLIMIT_CPU is 0).

    The kernel prints one line per limit in the order of their numbers: name in 26 columns, soft, hard, unit.
    """
    with open(f"{root}/proc/{pid}/limits", encoding="ascii") as file:
        lines = file.read().splitlines()[1:]
    pairs = (line[26:].split()[:2] for line in lines)
    return [(_limit(soft), _limit(hard)) for soft, hard in pairs]


def _io_priority(tid: int) -> int:
    try:
        return kernel.io_priority(tid)
    except OSError:
        return 0


def _slack(tid: int) -> int:
    try:
        with open(f"/proc/{tid}/timerslack_ns", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _give_slack(tid: int, value: int) -> None:
    with open(f"/proc/{tid}/timerslack_ns", "wb") as file:
        file.write(b"%d" % value)


def _give_cpus(tid: int, value: str) -> None:
    os.sched_setaffinity(tid, parse_cpus(value))


_WAYS: dict[str, Callable[[int, Any], None]] = {
    "cpus": _give_cpus,
    "io_priority": kernel.set_io_priority,
    "slack_ns": _give_slack,
}


def _limit(text: str) -> int:
    return RLIM64_INFINITY if text == "unlimited" else int(text)
