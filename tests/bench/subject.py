"""The process that is measured: memory of one kind, and a clock that notices when it stood still.

    python -m tests.bench.subject KIND MEBIBYTES REPORT [WEIGHTS]

With WEIGHTS it has read that file into memory of its own, beside the rest. It writes REPORT (JSON) when it is
ready and whenever it is asked: SIGUSR1 changes one page in a hundred first, SIGUSR2 only asks. It says:

- `hash` is that of its memory (of all threads and processes);
- `still_ms` is its longest standstill since the last report, `ran_again_at` when that ended (seconds since
  1970, as all times);
- `whole_at` is when it had read all of its memory after that: it begins to as soon as it notices that it
  stood still for long, as after every restore.

Nothing stays open.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
from dataclasses import dataclass

from blake3 import blake3

from tests.bench.kinds import MAKERS, PROCESSES, Memory, Processes, random_bytes, share_of_process

TICK_S = 0.001
CHILD_TICK_S = 0.05
"""Fifty children that look at the clock as often as the root does would keep a processor busy."""

NOTICED_S = 0.1
"""A standstill of this length has all memory read."""


@dataclass
class Still:
    """The longest standstill: its seconds, when it ended, and when all memory had been read after it."""

    longest: float = 0.0
    ended: float = 0.0
    whole: float = 0.0


def main(kind: str, mebibytes: int, report_path: str, weights: str = "") -> None:
    """Fill the memory, then tick and answer until killed."""
    size = mebibytes << 20
    if kind == "processes":
        memory: Memory = Processes(PROCESSES, report_path, lambda path: child(share_of_process(size), path))
    else:
        memory = MAKERS[kind](size)
    serve(memory, report_path, TICK_S, load(weights) if weights else b"")


def child(size: int, report_path: str) -> None:
    """Be one of many processes; does not return."""
    try:
        serve(random_bytes(size), report_path, CHILD_TICK_S)
    finally:
        os._exit(1)


def serve(memory: Memory, report_path: str, tick_s: float, loaded: mmap.mmap | bytes = b"") -> None:
    """Report, then tick until asked, for ever."""
    asked: list[int] = []
    for expected in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(expected, lambda received, _: asked.append(received))
    still = Still()
    while True:
        digest = blake3(memory.digest()).update(loaded).hexdigest()
        write(report_path, report_of(digest, still, memory))
        still = tick_until(asked, memory, tick_s)
        if asked.pop() == signal.SIGUSR1:
            memory.change()


def report_of(digest: str, still: Still, memory: Memory) -> dict[str, object]:
    """What is reported; the tree is whole when the last of its processes is."""
    children = memory.reports if isinstance(memory, Processes) else []
    return {
        "hash": digest,
        "still_ms": still.longest * 1000,
        "ran_again_at": still.ended,
        "whole_at": max([still.whole, *(report["whole_at"] for report in children)]),
    }


def write(path: str, report: dict[str, object]) -> None:
    """Replace the report in one step."""
    with open(f"{path}.new", "w") as file:
        json.dump(report, file)
    os.rename(f"{path}.new", path)


def load(path: str) -> mmap.mmap:
    """Read a file into anonymous memory, at an alignment of its own."""
    size = os.path.getsize(path)
    loaded = mmap.mmap(-1, size + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with open(path, "rb", buffering=0) as file:
        at = 64
        while count := file.readinto(memoryview(loaded)[at : at + (1 << 30)]):
            at += count
    return loaded


def tick_until(asked: list[int], memory: Memory, tick_s: float) -> Still:
    """Tick until a signal has come; return the longest standstill meanwhile."""
    still = Still()
    last = time.time()
    while not asked:
        time.sleep(tick_s)
        now = time.time()
        if now - last > still.longest:
            still = Still(now - last, now, now)
            if still.longest > NOTICED_S:
                memory.read()
                now = still.whole = time.time()
        last = now
    return still


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
