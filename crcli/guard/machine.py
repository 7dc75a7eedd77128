"""The machine: its CPU, kernel, CRIU, memory, clock and name."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

from crcli.findings import change, note
from crcli.guard import cpu
from crcli.guard.wording import blocker
from crcli.memory.extents import distinct_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.findings import Finding
    from crcli.guard.here import Here
    from crcli.guard.needs import Needs
    from crcli.guard.wording import Check

_OLDEST_KERNEL = (5, 2)
"""No crcli has ever run below this: it needs a tmpfs that is mounted nowhere."""

_MAJOR_VERSIONS_APART = 1
"""An image may come from a kernel of the next major version, and from no later one."""

_CLOCK_SLACK_S = 1.0


def architecture(needs: Needs, here: Here) -> Iterator[Finding]:
    """Code of another architecture cannot run at all."""
    then, now = needs.host.get("machine"), here.machine
    if then and then != now:
        yield blocker(
            "architecture",
            f"the image is of a {then} process, this host is {now}",
            {"image": then, "here": now},
            f"restore on a {then} host",
        )


def page_size(needs: Needs, here: Here) -> Iterator[Finding]:
    """The memory map is made of the kernel's pages."""
    then, now = needs.host.get("page_size"), here.page_size
    if then and then != now:
        yield blocker(
            "page-size",
            f"the image has pages of {then} bytes, this kernel uses {now}",
            {"image": then, "here": now},
            "restore on a kernel with the same page size",
        )


def cpu_features(needs: Needs, here: Here) -> Iterator[Finding]:
    """Programs have chosen their code by what the CPU could do: what is missing ends them by SIGILL."""
    if needs.host.get("machine", here.machine) != here.machine:
        return
    then = cpu.used_by_programs(set(needs.host.get("cpu_flags", [])), here.machine)
    missing = then - here.cpu_flags | cpu.missing_words(needs.cpu_words, here.cpu_words)
    promise = needs.cpu_promise
    if promise is not None:
        beyond, missing = missing - promise, missing & promise - here.cpu_flags
        if beyond:
            yield _beyond_the_baseline(beyond, promise)
    if missing:
        named = sorted(missing)
        yield blocker(
            "cpu-features",
            f"this CPU lacks what the programs may use: {', '.join(named)}",
            {
                "missing": named,
                "image": needs.host.get("cpu_model", ""),
                "here": cpu.read_cpuinfo(b"model name"),
            },
            "restore on a host whose CPU has them; or dump on the oldest CPU of your fleet",
        )


def _beyond_the_baseline(flags: set[str], baseline: frozenset[str]) -> Finding:
    return note(
        "cpu-baseline",
        f"the CPU of the dump had more than this one: {', '.join(sorted(flags))}",
        {"missing": sorted(flags), "baseline": sorted(baseline)},
        "restores: the job was started to use only what its fleet has in common (--cpu-baseline)",
        "code that chooses by itself dies of SIGILL here: crcli doctor --cpu-baseline names what that is",
    )


def kernel(needs: Needs, here: Here) -> Iterator[Finding]:
    """An older kernel may lack calls that programs have found at their start; far apart, it surely does."""
    told = str(needs.host.get("kernel", ""))
    then, now = _numbers(told), _numbers(here.kernel)
    evidence = {"image": told, "here": here.kernel}
    if not told or then == now:
        return
    if then < _OLDEST_KERNEL or then[0] > now[0] + _MAJOR_VERSIONS_APART:
        yield blocker(
            "kernel",
            f"the image says that it was made on Linux {told}, which "
            + ("crcli never ran on" if then < _OLDEST_KERNEL else f"is too far from this {here.kernel}"),
            evidence,
            "restore on a host with a kernel like that of the dump",
        )
    elif then > now:
        yield change(
            "kernel-older",
            f"the dump was made on Linux {told}, this is the older {here.kernel}",
            evidence,
            "restores; a program that found a newer system call at its start will miss it",
            "prefer hosts whose kernel is as new as that of the dump",
        )


def _numbers(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def criu(needs: Needs, here: Here) -> Iterator[Finding]:
    """CRIU reads the images of older versions; those of newer ones may hold what it does not know."""
    told = str(needs.host.get("criu", ""))
    if told and here.criu_version and _numbers(told) > _numbers(here.criu_version):
        yield change(
            "criu-older",
            f"the dump was made with CRIU {told}, here is the older {here.criu_version}",
            {"image": told, "here": here.criu_version},
            "restores, if CRIU can read all of it; nothing is left running otherwise",
            "install the CRIU of the dump here: scripts/install-criu",
        )


def memory(needs: Needs, here: Here) -> Iterator[Finding]:
    """All pages that are not zero must fit; what processes have alike at one address they may share."""
    _, needed = distinct_bytes(needs.manifest.spaces)
    if needed > here.spare_memory:
        yield blocker(
            "memory",
            f"the tree needs {needed >> 20} MiB of memory and {here.spare_memory >> 20} MiB are free",
            {"needed": needed, "free": here.spare_memory},
            "free memory, or restore on a larger host",
        )


def clock(needs: Needs, here: Here) -> Iterator[Finding]:
    """A wall clock that has gone backwards: files look newer than now, tokens are not valid yet."""
    created = needs.meta.get("created")
    if isinstance(created, int | float) and here.now < created - _CLOCK_SLACK_S:
        yield change(
            "clock-backwards",
            f"this host's clock ({_date(here.now)}) is behind the moment of the dump ({_date(created)})",
            {"image": created, "here": here.now},
            "restores: timers go on where they were, but the time of day jumps back",
            "set this host's clock (NTP)",
        )


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def host_name(needs: Needs, here: Here) -> Iterator[Finding]:
    """A program may have asked for the host's name before."""
    then, now = needs.host.get("hostname"), here.hostname
    if then and then != now and "uts" not in needs.own_namespaces:
        yield note(
            "host-name",
            f"the host of the dump was called {then}, this one is {now}",
            {"image": then, "here": now},
            "changes nothing: a program that remembers the name keeps the old one",
        )


MACHINE: tuple[Check, ...] = (
    architecture,
    page_size,
    cpu_features,
    kernel,
    criu,
    memory,
    clock,
    host_name,
)
