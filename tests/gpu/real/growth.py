"""Memory of virtual machines that begin with little and are given more as they use it.

What looks before it leaps (crcli does: `gpu-host-memory`) sees too little there until it was used once.
"""

from __future__ import annotations

import subprocess
import sys
import time

_TOUCHERS = 8
_LIMIT_S = 50.0
_TOUCH = """
import mmap, sys, time
STEP, FLOOR, PATIENCE_S = min(256 << 20, int(sys.argv[1])), 4 << 30, 2.0
def available():
    return next(int(line.split()[1]) << 10 for line in open("/proc/meminfo") if "MemAvailable" in line)
held = []
end = time.monotonic() + PATIENCE_S
while len(held) * STEP < int(sys.argv[1]) and time.monotonic() < end:
    if available() < FLOOR:
        time.sleep(0.05)
        continue
    held.append(mmap.mmap(-1, STEP, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE))
    end = time.monotonic() + PATIENCE_S
print(len(held) * STEP)
"""
"""Touches so many bytes, but never the last of what is available: then it waits a little for more."""


def told() -> dict[str, str]:
    """What the kernel says of its memory."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file if ":" in line)
    return {name: lines.get(name, "").strip() for name in ("MemTotal", "MemAvailable", "Committed_AS")}


def available_bytes() -> int:
    """How much can be used without swapping."""
    return int(told()["MemAvailable"].split()[0]) << 10


def touched(wanted: int) -> dict[str, object]:
    """So many bytes were used once, as far as there are as many, and are free again; return what changed."""
    before, began = told(), time.monotonic()
    command = [sys.executable, "-c", _TOUCH, str(wanted // _TOUCHERS)]
    parts = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(_TOUCHERS)]
    counts = [int(part.communicate(timeout=_LIMIT_S)[0].strip() or 0) for part in parts]
    return {
        "wanted_bytes": wanted,
        "touched_bytes": sum(counts),
        "seconds": round(time.monotonic() - began, 2),
        "before": before,
        "after": told(),
    }
