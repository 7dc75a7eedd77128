"""Facts that travel in a manifest, for the guard of whoever restores it."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

from crcli.guard.cpu import flags_here, read_cpuinfo

if TYPE_CHECKING:
    from crcli.process.evidence import Evidence


def describe_host(criu: str) -> dict[str, Any]:
    """This host and the version of its CRIU, as far as a restore elsewhere may have to compare."""
    name = os.uname()
    return {
        "hostname": name.nodename,
        "kernel": name.release,
        "machine": name.machine,
        "python": platform.python_version(),
        "page_size": os.sysconf("SC_PAGE_SIZE"),
        "cpu_model": read_cpuinfo(b"model name"),
        "cpu_flags": sorted(flags_here()),
        "criu": criu,
    }


def is_of(evidence: Evidence, head: dict[str, Any]) -> bool:
    """Whether an image, by its JSON head, seems to be of this tree."""
    first: dict[str, Any] = next(iter(head.get("tree") or ()), {})
    return (first.get("pid"), first.get("argv")) == (evidence.root.nspid[-1], list(evidence.root.argv))


def describe_tree(evidence: Evidence) -> list[dict[str, Any]]:
    """The tree's processes: their command lines, what they run, and what CRIU does not save of them."""
    pinned = {process.pid for process in evidence.pinned}
    settings = evidence.settings_to_keep
    return [
        {
            "pid": process.nspid[-1] if process.nspid else process.pid,
            "comm": process.comm,
            "argv": list(process.argv),
            "exe": process.exe,
            "cwd": process.cwd,
            "uid": process.uids[0] if process.uids else 0,
            "threads": process.threads,
            "cpus": process.cpus if process.pid in pinned else "",
            **({"core_filter": process.core_filter} if process.core_filter >= 0 else {}),
            "settings": {str(one.inner_tid): kept for one, kept in settings.get(process.pid, ())},
        }
        for process in evidence.tree
    ]
