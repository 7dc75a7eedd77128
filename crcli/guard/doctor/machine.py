"""The machine: memory and who limits it, whether this is a container, its clock, its GPUs."""

from __future__ import annotations

import ctypes
import os
import re
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.guard.doctor.check import Check, lacks, note, passed, read
from crcli.process.memory_room import CGROUPS, UNLIMITED, own_cgroup_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_SCARCE_BYTES = 1 << 30
_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The inode number of the host's own pid namespace (PROC_PID_INIT_INO)."""

_TIME_ERROR, _UNSYNCHRONISED = 5, 0x40
_TIMEX_BYTES, _TIMEX_STATUS = 208, 40


def _memory() -> Iterator[Check]:
    """A private tmpfs, tried, and what there is for it."""
    try:
        os.close(kernel.tmpfs_fd())
    except OSError as error:
        remedy = "CAP_SYS_ADMIN and Linux 5.2 are needed; a container's seccomp filter may be in the way"
        yield lacks("private-tmpfs", f"no private tmpfs: {error.strerror}", remedy)
        return
    from crcli.process.memory_room import spare_memory

    spare, known = spare_memory(), meminfo()
    evidence = {"free": spare, "total": known.get("MemTotal", 0)}
    says = f"a private tmpfs works; {spare >> 20} MiB of memory are free"
    if spare > _SCARCE_BYTES:
        yield passed("memory", says, **evidence)
    else:
        yield note("memory", says, "large trees freeze longer when little memory is free", **evidence)
    swap = {"total": known.get("SwapTotal", 0), "free": known.get("SwapFree", 0)}
    yield passed("swap", f"{swap['free'] >> 20} of {swap['total'] >> 20} MiB are free", **swap)
    yield _huge_pages(known)


def meminfo() -> dict[str, int]:
    """/proc/meminfo, in bytes (numbers of pages as they are)."""
    found = {}
    for line in read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number, *unit = value.split()
        found[name] = int(number) * (1024 if unit else 1)
    return found


def _huge_pages(known: dict[str, int]) -> Check:
    chosen = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    evidence = {
        "total": known.get("HugePages_Total", 0),
        "free": known.get("HugePages_Free", 0),
        "size": known.get("Hugepagesize", 0),
        "transparent": chosen[1] if chosen else "",
    }
    says = f"{evidence['free']} of {evidence['total']} are free, transparent ones: {evidence['transparent']}"
    return passed("huge-pages", says, **evidence)


def _cgroup() -> Iterator[Check]:
    version = 2 if os.path.exists(f"{CGROUPS}/cgroup.controllers") else 1
    limit = _limit("memory", "memory.max", "memory.limit_in_bytes")
    processes = _limit("pids", "pids.max")
    evidence = {"version": version, "memory_limit": limit, "pids_limit": processes}
    parts = [f"{limit >> 20} MiB of memory" if limit else "", f"{processes} processes" if processes else ""]
    limits = " and ".join(filter(None, parts)) or "no limits"
    yield passed("cgroup", f"version {version}, {limits} for crcli's own", **evidence)


def _limit(controller: str, *names: str) -> int | None:
    """The least limit, in files of these names, of our own cgroup and those above it that can be seen; None
    where there is none."""
    values = [read(f"{folder}/{name}") for folder in own_cgroup_folders(controller) for name in names]
    limits = [int(value) for value in values if value.isdecimal() and int(value) < UNLIMITED]
    return min(limits, default=None)


def _container() -> Iterator[Check]:
    signs = container_signs()
    if signs:
        yield note("container", f"crcli runs in a container ({', '.join(signs)})", signs=signs)
    else:
        yield passed("container", "crcli runs on the host itself", signs=signs)


def container_signs() -> list[str]:
    """What says that we are in a container; nothing on a host."""
    signs = [path for path in ("/.dockerenv", "/run/.containerenv") if os.path.exists(path)]
    if os.readlink("/proc/self/ns/pid") != _FIRST_PID_NAMESPACE:
        signs.append("a pid namespace of its own")
    if named := re.search(r"(?:^|\0)container=([^\0]+)", read("/proc/1/environ")):
        signs.append(f"container={named[1]}")
    return signs


def _clock() -> Iterator[Check]:
    source = read("/sys/devices/system/clocksource/clocksource0/current_clocksource")
    synchronised = clock_is_synchronised()
    if synchronised is False:
        yield note(
            "clock",
            "nobody keeps the clock right, as far as the kernel knows: images are dated by it",
            "run an NTP client; on virtual machines the host may keep it without the kernel's knowledge",
            synchronised=synchronised,
            source=source,
        )
    else:
        says = "kept right" if synchronised else "cannot tell whether it is kept right"
        yield passed("clock", says, synchronised=synchronised, source=source)


def clock_is_synchronised() -> bool | None:
    """What adjtimex(2), asked and not told, says of the clock; None where it may not be asked."""
    state = ctypes.create_string_buffer(_TIMEX_BYTES)
    result = ctypes.CDLL(None, use_errno=True).adjtimex(state)
    if result < 0:
        return None
    status = int.from_bytes(state.raw[_TIMEX_STATUS : _TIMEX_STATUS + 4], "little")
    return result != _TIME_ERROR and not status & _UNSYNCHRONISED


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (_memory, _cgroup, _container, _clock)
