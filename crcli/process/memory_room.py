"""How much memory processes may still take: by the host's account, and by each cgroup's that they are in."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

CGROUPS = "/sys/fs/cgroup"
UNLIMITED = 1 << 60
"""A limit from here on is none (bytes, or processes)."""

_RECLAIMABLE = frozenset(("active_file", "inactive_file", "slab_reclaimable"))
_V1_RECLAIMABLE = frozenset(("total_active_file", "total_inactive_file"))


class Room(NamedTuple):
    """A place whose memory is counted: the host ("") or a cgroup's folder, and what is free there (bytes)."""

    place: str
    free: int

    @property
    def label(self) -> str:
        """The place in a sentence."""
        return f"the cgroup {self.place.removeprefix(CGROUPS) or '/'}" if self.place else "this host"


def too_tight(wanted: Mapping[str, int]) -> tuple[Room, int] | None:
    """Return the first place in which the memory that is wanted does not fit, and what is wanted there.

    `wanted` are bytes by what stands in /proc/PID/cgroup of those who want them. None: there is room for all.
    """
    asked: dict[str, int] = defaultdict(int)
    asked[""] = sum(wanted.values())
    for cgroups, amount in wanted.items():
        for folder in cgroup_folders(cgroups, "memory"):
            asked[folder] += amount
    for place, amount in asked.items():
        free = _free_in(place) if place else available()
        if free is not None and amount > free:
            return Room(place, free), amount
    return None


def spare_memory() -> int:
    """Bytes that can be used here without pushing anything out, by the host's and our cgroups' account."""
    left = [free for folder in own_cgroup_folders("memory") if (free := _free_in(folder)) is not None]
    return min([available(), *left])


def available() -> int:
    """Memory that can be had on this host without swapping, by the kernel's estimate (bytes)."""
    return _numbers("/proc/meminfo").get("MemAvailable:", 0) * 1024


def own_cgroup_folders(controller: str) -> list[str]:
    """The folders of our own cgroup and those above it, as `cgroup_folders` gives them."""
    try:
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            return list(cgroup_folders(file.read(), controller))
    except OSError:
        return []


def cgroup_folders(cgroups: str, controller: str) -> Iterator[str]:
    """The cgroup by which a controller ("memory", "cpu") counts a process, and those above it.

    `cgroups` is what stands in /proc/PID/cgroup.
    """
    for line in cgroups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", controller) or controller in controllers.split(","):
            top = f"{CGROUPS}/{controller}" if controllers else CGROUPS
            folder = f"{top}{path}".rstrip("/")
            while folder.startswith(top):
                yield folder
                folder = os.path.dirname(folder)


def _free_in(folder: str) -> int | None:
    """What the cgroup's limit leaves, file cache counted as free; None where there is no limit."""
    for names, reclaimable in (
        (("memory.max", "memory.current"), _RECLAIMABLE),
        (("memory.limit_in_bytes", "memory.usage_in_bytes"), _V1_RECLAIMABLE),
    ):
        limit, used = (_number(f"{folder}/{name}") for name in names)
        if limit is not None and used is not None and limit < UNLIMITED:
            known = _numbers(f"{folder}/memory.stat")
            return max(0, limit - used + sum(known.get(name, 0) for name in reclaimable))
    return None


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            text = file.read().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _numbers(path: str) -> dict[str, int]:
    """The lines `NAME NUMBER…` of a file of the kernel's."""
    try:
        with open(path) as file:
            fields = [line.split() for line in file]
    except OSError:
        return {}
    return {one[0]: int(one[1]) for one in fields if len(one) > 1 and one[1].isdecimal()}
