"""Pids: whether those of a tree are free here, and which they are on this host."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.criu.interrupted import calls_to_make_again
from crcli.pipeline.stages import PidNamespace
from crcli.process.here import taken_pids
from crcli.process.tree import child_pids, read_process, scan_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from crcli.criu.images import ImageFolder
    from crcli.process.identity import ProcessId


def namespace_for(asked: PidNamespace, root: int, numbers: set[int]) -> PidNamespace:
    """Decide where a tree with these pids and thread ids is restored.

    A tree that is a pid namespace of its own (its root is pid 1) brings it along. Where the host's namespace
    was asked for, the guard has seen that the pids are free; it has also waited for those of zombies.
    """
    if root == 1 or asked == PidNamespace.HOST:
        return PidNamespace.HOST
    if asked == PidNamespace.NEW:
        return asked
    return PidNamespace.NEW if taken_pids(numbers) else PidNamespace.HOST


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


def interrupted_threads(
    images: ImageFolder, root: ProcessId, waited_ms: Mapping[int, int], *, as_inside: bool
) -> list[tuple[int, Sequence[tuple[int, int]]]]:
    """Threads of a frozen tree whose call CRIU has interrupted: the id, and registers to change.

    The ids are those that CRIU knows: the tree's own where CRIU works in its pid namespace (`as_inside`).
    Threads that do not stand where the image says are left out. `waited_ms` is how long each had waited.
    """
    calls = calls_to_make_again(images)
    depth = max(1, len(_nspid(root.pid)))
    found: list[tuple[int, Sequence[tuple[int, int]]]] = []
    for member in scan_tree(root).identities if calls else ():
        for inner, tid in host_threads(member.pid, depth).items():
            if inner in calls and _instruction_pointer(tid) == calls[inner].ip:
                found.append((inner if as_inside else tid, calls[inner].after(waited_ms.get(tid, 0)).changes))
    return found


def _instruction_pointer(tid: int) -> int:
    """Where a thread that stands still goes on; 0 when it runs or is gone."""
    try:
        with open(f"/proc/{tid}/syscall", "rb") as file:
            last = file.read().split()[-1]
    except OSError:
        return 0
    return int(last, 16) if last.startswith(b"0x") else 0


def host_threads(pid: int, depth: int) -> dict[int, int]:
    """Map the thread ids of a process, as its pid namespace of this depth (1: ours) sees them, to ours."""
    tids = [int(tid) for tid in os.listdir(f"/proc/{pid}/task")]
    if depth == 1:
        return {tid: tid for tid in tids}
    found = {}
    for tid in tids:
        with open(f"/proc/{pid}/task/{tid}/status", encoding="utf-8", errors="replace") as file:
            numbers = next((line.split()[1:] for line in file if line.startswith("NSpid:")), [str(tid)])
        found[int(numbers[depth - 1])] = tid
    return found
