"""Pids: whether those of a tree are free here, which they are on this host, and clearing away."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from crcli.errors import GuardRefused
from crcli.findings import Finding, Severity
from crcli.pipeline.stages import PidNamespace
from crcli.process.identity import read_stat
from crcli.process.tree import child_pids, read_process

if TYPE_CHECKING:
    from collections.abc import Iterable

ZOMBIE_LIMIT_S = 2.0
"""How long pids that only zombies hold are waited for (seconds): most parents reap within that."""


def namespace_for(asked: PidNamespace, root: int, numbers: set[int]) -> PidNamespace:
    """Decide where a tree with these pids and thread ids is restored.

    A tree that is a pid namespace of its own (its root is pid 1) brings it along. Raises GuardRefused when
    the host's namespace was asked for and a pid is taken.
    """
    if root == 1:
        return PidNamespace.HOST
    if asked == PidNamespace.NEW:
        return asked
    taken = _taken(numbers)
    if not taken:
        return PidNamespace.HOST
    if asked == PidNamespace.AUTO:
        return PidNamespace.NEW
    raise GuardRefused(
        f"pid {taken[0]} of the image is in use here",
        hint="leave out --pid-namespace host: crcli then restores in a pid namespace of its own",
        findings=[
            Finding(
                name="pid-taken",
                severity=Severity.BLOCKER,
                message=f"{len(taken)} of the tree's pids are in use on this host",
                evidence={"pids": taken},
                action="nothing was started",
                remedy="--pid-namespace auto or new",
            )
        ],
    )


def _taken(numbers: set[int]) -> list[int]:
    """Which of these are in use; what only zombies hold is waited for."""
    end = time.monotonic() + ZOMBIE_LIMIT_S
    while True:
        taken = sorted(number for number in numbers if os.path.exists(f"/proc/{number}"))
        if not taken or time.monotonic() >= end or not all(map(_is_dying, taken)):
            return taken
        time.sleep(0.01)


def _is_dying(pid: int) -> bool:
    try:
        return read_stat(pid).is_zombie
    except ProcessLookupError:
        return True


def host_pids(init: int, members: Iterable[int]) -> dict[int, int]:
    """Map the tree's pids, as it sees them, to this host's; `init` is its namespace's first process, or 0."""
    if not init:
        return {pid: pid for pid in members}
    depth = namespace_depth(init)
    found: dict[int, int] = {}
    waiting = [init]
    while waiting:
        pid = waiting.pop()
        waiting += child_pids(pid)
        numbers = _nspid(pid)
        if len(numbers) >= depth:
            found[numbers[depth - 1]] = pid
    return {pid: found[pid] for pid in members if pid in found}


def namespace_depth(init: int) -> int:
    """How many pid namespaces lie around what `init` is the first process of, ours included (0: in ours)."""
    return len(_nspid(init)) if init else 1


def _nspid(pid: int) -> tuple[int, ...]:
    process = read_process(pid)
    return process.nspid if process is not None else ()


def kill_descendants() -> None:
    """Kill and reap every descendant of this process (a subreaper, so none escapes)."""
    for _ in range(1000):
        children = child_pids(os.getpid())
        if not children:
            return
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue


def host_threads(pid: int, depth: int) -> dict[int, int]:
    """Map the thread ids of a process, as its pid namespace of this depth (1: ours) sees them, to ours."""
    found = {}
    for tid in map(int, os.listdir(f"/proc/{pid}/task")):
        with open(f"/proc/{pid}/task/{tid}/status", encoding="utf-8", errors="replace") as file:
            numbers = next((line.split()[1:] for line in file if line.startswith("NSpid:")), [str(tid)])
        found[int(numbers[depth - 1])] = tid
    return found
