"""The process that is measured: so many MiB of random bytes, and a clock that notices when it stood still.

    python subject.py MEBIBYTES REPORT [WEIGHTS]

With WEIGHTS it has read that file into memory of its own, beside its random bytes. It writes REPORT (JSON: a
number that counts the reports, the hash of its memory, its longest standstill and when that ended) when it is
ready and whenever it is asked: SIGUSR1 changes one page in a hundred first, SIGUSR2 only asks. Each report
begins the search for the longest standstill anew. Nothing stays open.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import random
import signal
import sys
import time

PAGE = 4096
CHANGED_SHARE = 0.01
TICK_S = 0.001


def main(mebibytes: int, report_path: str, weights: str = "") -> None:
    """Fill the memory, then tick and answer until killed."""
    asked: list[int] = []
    for expected in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(expected, lambda received, _: asked.append(received))
    memory = mmap.mmap(-1, mebibytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(memory), 1 << 20):
        memory[at : at + (1 << 20)] = os.urandom(1 << 20)
    loaded = load(weights) if weights else b""
    longest, ended = 0.0, 0.0
    for number in itertools.count(1):
        digest = hashlib.blake2b(memory)
        digest.update(loaded)
        report = {
            "number": number,
            "hash": digest.hexdigest(),
            "still_ms": longest * 1000,
            "ran_again_at": ended,
        }
        with open(f"{report_path}.new", "w") as file:
            json.dump(report, file)
        os.rename(f"{report_path}.new", report_path)
        longest, ended = tick_until(asked)
        if asked.pop() == signal.SIGUSR1:
            change(memory)


def hash_of(*parts: mmap.mmap | bytes) -> str:
    """The hash of all of its memory."""
    digest = hashlib.blake2b()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def load(path: str) -> mmap.mmap:
    """Read a file into anonymous memory, at an alignment of its own."""
    size = os.path.getsize(path)
    loaded = mmap.mmap(-1, size + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with open(path, "rb", buffering=0) as file:
        at = 64
        while count := file.readinto(memoryview(loaded)[at : at + (1 << 30)]):
            at += count
    return loaded


def tick_until(asked: list[int]) -> tuple[float, float]:
    """Tick until a signal has come; return the longest standstill (seconds), and the time when it ended."""
    longest = ended = 0.0
    last = time.time()
    while not asked:
        time.sleep(TICK_S)
        now = time.time()
        if now - last > longest:
            longest, ended = now - last, now
        last = now
    return longest, ended


def change(memory: mmap.mmap) -> None:
    """Give one page in a hundred, anywhere, new random bytes."""
    pages = len(memory) // PAGE
    for page in random.sample(range(pages), round(pages * CHANGED_SHARE)):
        memory[page * PAGE : (page + 1) * PAGE] = os.urandom(PAGE)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
