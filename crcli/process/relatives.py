"""Who outside the tree has sprung from it: daemons, which fork twice so that nobody is their parent.

They are not in the tree, so not in the image, and run on beside the copy. Each rule needs a proof of kinship,
for a neighbour that is merely alike (the rest of a shell's pipeline, a sibling worker, a second instance of
the same program) is none of the tree's business.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from crcli.process.evidence import Relative
from crcli.process.identity import Stat, read_proc

if TYPE_CHECKING:
    from crcli.process.tree import Process, Tree

ADDR_NO_RANDOMIZE = 0x0004_0000


def relatives(tree: Tree, everybody: Iterable[Stat]) -> tuple[Relative, ...]:
    """Return the processes outside (of `everybody` on this host) that began inside the tree, as far as they
    can be told.

    Those that the tree has brought forth since it was looked at are none.
    """
    everybody = sorted(everybody, key=lambda stat: stat.start_time)
    inside = set(tree.pids)
    inside.update(stat.pid for stat in everybody if stat.ppid in inside)
    kin = _Kinship(tree, {stat.pid: stat for stat in everybody})
    found = []
    for other in everybody:
        if other.pid in inside or other.is_zombie or other.is_kernel_thread:
            continue
        if reason := kin.reason(other):
            found.append(Relative(other.pid, other.comm, reason))
    return tuple(found)


class _Kinship:
    """The rules, and what of the tree they compare with."""

    def __init__(self, tree: Tree, stats: dict[int, Stat]) -> None:
        self._root = tree.root
        self._stats = stats
        self._sessions = {process.sid for process in tree if process.sid in tree}
        self._groups = {process.pgid for process in tree if process.pgid in tree}
        self._ancestors = _ancestors(tree.root.ppid, stats)
        self._layouts = _layouts(tree, stats)
        self._cgroups = _own_cgroups(tree.root)

    def reason(self, other: Stat) -> str:
        """Say what makes it a relative; empty for a stranger."""
        if other.sid in self._sessions:
            return "session"
        if other.pgid in self._groups and other.ppid != self._root.ppid:
            return "group"
        if other.start_time < self._root.start or other.ppid not in self._ancestors:
            return ""
        if self._is_fork(other):
            return "forked"
        return "cgroup" if self._shares_cgroup(other) else ""

    def _is_fork(self, other: Stat) -> bool:
        """Whether it was forked from the tree and never ran another program: then its memory lies alike.

        The kernel chooses anew, at random, where memory lies whenever a program starts. A parent that looks
        the same (a server with workers, of which this tree is one) has simply forked it itself.
        """
        parent = self._stats.get(other.ppid)
        return other.layout in self._layouts and (parent is None or parent.layout != other.layout)

    def _shares_cgroup(self, other: Stat) -> bool:
        """Whether it is in a cgroup that the tree does not share with the parents of both."""
        if not self._cgroups:
            return False
        lines, parents = _cgroup_lines(other.pid), _cgroup_lines(other.ppid)
        return bool(self._cgroups & lines - parents)


def _ancestors(pid: int, stats: dict[int, Stat]) -> frozenset[int]:
    """Return a process, its parent and so on, and the first of all: whoever adopts orphans is among them."""
    found = {1}
    while pid in stats and pid not in found:
        found.add(pid)
        pid = stats[pid].ppid
    return frozenset(found)


def _layouts(tree: Iterable[Process], stats: dict[int, Stat]) -> frozenset[tuple[int, ...]]:
    """Return where the memory of the tree's processes lies; nothing where the kernel does not shuffle it."""
    if read_proc("/proc/sys/kernel/randomize_va_space").strip() != b"2":
        return frozenset()
    return frozenset(
        stats[process.pid].layout
        for process in tree
        if process.pid in stats
        and all(stats[process.pid].layout)
        and not process.personality & ADDR_NO_RANDOMIZE
    )


def _own_cgroups(root: Process) -> frozenset[str]:
    """Return the cgroups of the root that are neither everybody's, its parent's, nor ours."""
    lines = frozenset(line for line in root.cgroups.splitlines() if not line.endswith(":/"))
    return lines - _cgroup_lines(root.ppid) - _cgroup_lines(os.getpid()) - _cgroup_lines(1)


def _cgroup_lines(pid: int) -> frozenset[str]:
    try:
        return frozenset(read_proc(f"/proc/{pid}/cgroup").decode(errors="surrogateescape").splitlines())
    except OSError:
        return frozenset()
