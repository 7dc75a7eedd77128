"""How many processors crcli may use: by its affinity, and by the quotas of the cgroups that it is in."""

from __future__ import annotations

import os

from crcli.process.memory_room import own_cgroup_folders


def usable_processors() -> int:
    """Processors that our threads can keep busy at once, at least 1."""
    return max(1, min([len(os.sched_getaffinity(0)), *map(_quota, own_cgroup_folders("cpu"))]))


def _quota(folder: str) -> int:
    """How many a cgroup allows; as many as there can be, where it has no quota."""
    for read in (_quota_v2, _quota_v1):
        try:
            quota, period = read(folder)
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            return max(1, round(quota / period))
    return 1 << 16


def _quota_v2(folder: str) -> tuple[int, int]:
    with open(f"{folder}/cpu.max") as file:
        quota, period = file.read().split()
    return int(quota), int(period)  # "max": ValueError


def _quota_v1(folder: str) -> tuple[int, int]:
    with open(f"{folder}/cpu.cfs_quota_us") as quota, open(f"{folder}/cpu.cfs_period_us") as period:
        return int(quota.read()), int(period.read())
