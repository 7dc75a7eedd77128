"""When the next image of a running tree is due, whether it is worth taking, and which may go.

An image costs the job time, and each failure costs what was done since the last one. The interval that costs
least in all is Young's and Daly's: about the square root of twice the image's cost times the time between
failures (J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006).
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from crcli.process.identity import ProcessId, read_proc
from crcli.process.tree import PID_GONE, child_pids
from crcli.records import Struct, replace

if TYPE_CHECKING:
    from collections.abc import Mapping

LEAVE = "leave"
"""The purpose of an image that was taken because the node went away."""

FAILURES_PER_H = 1 / 24
"""How often a node fails without notice, where nobody says and nothing was seen."""

FIRST_S = 30.0
"""When `auto` takes its first image, whose cost nobody knows yet (seconds after the start)."""

SHORTEST_S, LONGEST_S = 10.0, 3600.0
"""The bounds of what `auto` chooses (seconds)."""

_BESIDE = 0.2
"""How much slower a tree is while its image is compressed and sent beside it."""

_RISKY_PER_H = 1.0
"""A node that is said to be at risk counts as one that fails at least so often."""

_AGAIN_S = 15.0
"""After an image that failed the next one is tried within this time (seconds)."""


def optimal_interval(cost_s: float, mtbf_s: float) -> float:
    """How long to work between two images that cost so much, with so long between failures (seconds)."""
    if cost_s <= 0:
        return 0.0
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


class History(Struct, frozen=True):
    """What is known of a job: how often it was lost without notice, and how long it ran (seconds)."""

    failures: int = 0
    ran_s: float = 0.0

    @classmethod
    def noted(cls, job: Mapping[str, Any] | None) -> History:
        """What `job`, the note of a job in an image, says; nothing where it says nothing."""
        noted = job or {}
        return cls(int(noted.get("failures", 0)), float(noted.get("ran_s", 0.0)))

    @classmethod
    def after(cls, image_job: Mapping[str, Any] | None) -> History:
        """That of a job which is brought back from an image that notes this of it: it was lost, unless the
        image was taken because its node went away."""
        before = cls.noted(image_job)
        was_lost = image_job is not None and image_job.get("purpose") not in (None, LEAVE)
        return replace(before, failures=before.failures + was_lost)

    def and_ran(self, seconds: float) -> History:
        """The same, so much later."""
        return replace(self, ran_s=round(self.ran_s + seconds, 1))

    @property
    def rate_per_h(self) -> float:
        """Failures an hour, if one a day is usual: a short time says little against that."""
        return (self.failures + 1) / (self.ran_s / 3600 + 1 / FAILURES_PER_H)


class Cost(Struct, frozen=True):
    """What an image costs: how long the tree stood still, and how long it took until it was durable (ms)."""

    frozen_ms: float
    total_ms: float

    @property
    def seconds(self) -> float:
        """Of the job's time."""
        beside = max(0.0, self.total_ms - self.frozen_ms)
        return (self.frozen_ms + _BESIDE * beside) / 1000

    def mixed_with(self, newer: Cost) -> Cost:
        """Both of them, the newer one half."""
        return Cost((self.frozen_ms + newer.frozen_ms) / 2, (self.total_ms + newer.total_ms) / 2)


class Schedule:
    """When images are due: every `every_s` seconds, or (`auto`) as often as costs least; never without both.

    Times are those of one clock, in seconds.
    """

    def __init__(
        self, now: float, *, every_s: float | None = None, auto: bool = False, rate_per_h: float | None = None
    ) -> None:
        """`rate_per_h` is how often this node fails, as far as that is known."""
        self._every_s = every_s
        self._auto = auto
        self._rate = FAILURES_PER_H if rate_per_h is None else rate_per_h
        self._first: Cost | None = None
        self._cost: Cost | None = None
        self._again_s = _AGAIN_S
        self.due: float | None = None
        """When the next image is due; None: never."""
        self._set(now)

    @property
    def interval_s(self) -> float | None:
        """How long there is between the beginnings of two images; None where there are none."""
        if not self._auto:
            return self._every_s
        if (cost := self._cost or self._first) is None:
            return FIRST_S
        if self._rate <= 0:
            return LONGEST_S
        best = optimal_interval(cost.seconds, 3600 / self._rate) + cost.seconds
        shortest = max(SHORTEST_S, 2 * cost.total_ms / 1000)
        return max(shortest, min(best, LONGEST_S))

    def taken(self, began: float, cost: Cost) -> None:
        """An image was taken. The first is dearer than those that follow, which store what has changed."""
        self._again_s = _AGAIN_S
        if self._first is None:
            self._first = cost
        else:
            self._cost = cost if self._cost is None else self._cost.mixed_with(cost)
        self._set(began)

    def skipped(self, now: float) -> None:
        """An image was due, and nothing had changed."""
        self._set(now)

    def failed(self, now: float) -> None:
        """An image could not be taken: soon again, and less soon each time."""
        if (interval := self.interval_s) is not None:
            self.due = now + min(interval, self._again_s)
            self._again_s = min(interval, 2 * self._again_s)  # a store may fail for days

    def at_risk(self) -> None:
        """This node is more likely to go than before."""
        self._rate = max(self._rate, _RISKY_PER_H)
        self._set(self._since)

    def _set(self, since: float) -> None:
        self._since = since
        interval = self.interval_s
        self.due = None if interval is None else since + interval


# What a tree has done since its last image.

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
IDLE_S = 0.05
"""A tree that used no more processor time than this since its last image (seconds), wrote nothing and has the
same processes, has done nothing that would be missed."""


class Activity(Struct, frozen=True):
    """What a tree has done so far: processor time used (seconds), bytes written, and who it consists of."""

    cpu_s: float
    written: int
    members: frozenset[ProcessId]

    def matters_since(self, before: Activity) -> bool:
        """Whether an image of then lacks something of now."""
        return (
            self.members != before.members
            or self.written != before.written
            or self.cpu_s - before.cpu_s > IDLE_S
        )


def activity_of(root: ProcessId) -> Activity:
    """Look at a tree: two small files of each process are read. Who ends meanwhile is left out."""
    cpu_ticks = written = 0
    members = set()
    waiting = [root.pid]
    for pid in waiting:
        try:
            stat = read_proc(f"/proc/{pid}/stat")
            io = read_proc(f"/proc/{pid}/io")
        except (*PID_GONE, PermissionError):
            continue
        rest = stat[stat.rindex(b")") + 1 :].split()
        cpu_ticks += sum(map(int, rest[11:15]))  # its own, and that of children that it has waited for
        written += int(io.split()[3])  # wchar: what write(2) was given, wherever it went
        members.add(ProcessId(pid, int(rest[19])))
        waiting += child_pids(pid)
    return Activity(cpu_ticks * _TICK_S, written, frozenset(members))
