"""What this host is, in facts that a fleet can compare: the `host` of `crcli doctor --json`."""

from __future__ import annotations

import os
import platform
import re
from typing import TYPE_CHECKING, Any

import crcli
from crcli.guard.doctor.check import read
from crcli.guard.doctor.gpus import gpu_driver, gpus
from crcli.guard.doctor.machine import container_signs, meminfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.guard.doctor.check import Check


def describe(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the facts; `checks` are what was found out already."""
    name, known = os.uname(), meminfo()
    criu = next((check.evidence.get("version", "") for check in checks if check.name == "criu"), "")
    return {
        "hostname": name.nodename,
        "kernel": name.release,
        "machine": name.machine,
        "page_size": os.sysconf("SC_PAGE_SIZE"),
        **cpu(read("/proc/cpuinfo")),
        "memory_bytes": known.get("MemTotal", 0),
        "swap_bytes": known.get("SwapTotal", 0),
        "container": bool(container_signs()),
        "crcli": crcli.__version__,
        "criu": criu,
        "python": platform.python_version(),
        "gpus": gpus(),
        "gpu_driver": gpu_driver(),
    }


def cpu(cpuinfo: str) -> dict[str, Any]:
    """The processors by /proc/cpuinfo: their number, vendor, model and flags (sorted).

    The flags are those that every processor has: a program may run on any of them.
    """
    flags = [
        set(found.split()) for found in re.findall(r"^(?:flags|Features)\s*: (.*)$", cpuinfo, re.MULTILINE)
    ]
    return {
        "cpus": len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)),
        "cpu_vendor": _first(r"vendor_id|CPU implementer", cpuinfo),
        "cpu_model": _first(r"model name|CPU part", cpuinfo),
        "cpu_flags": sorted(set.intersection(*flags)) if flags else [],
    }


def _first(names: str, cpuinfo: str) -> str:
    found = re.search(rf"^(?:{names})\s*: (.*)$", cpuinfo, re.MULTILINE)
    return found[1].strip() if found else ""
