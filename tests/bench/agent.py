"""One of many: an interpreter, so many MiB of state, and a counter.

    python agent.py MEBIBYTES REPORT

SIGUSR1 has it work: it counts, and changes one page in a hundred. After that, when it is ready, and upon
SIGUSR2, it writes REPORT (JSON: how many reports it has made, its counter, the hash of its state).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import random
import signal
import sys

PAGE = 4096
CHANGED_SHARE = 0.01


def main(mebibytes: int, report_path: str) -> None:
    """Fill the state, then work and answer until killed."""
    signals = (signal.SIGUSR1, signal.SIGUSR2)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    state = mmap.mmap(-1, mebibytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    state[:] = os.urandom(len(state))
    pages = len(state) // PAGE
    number = counter = 0
    while True:
        number += 1
        report = {"number": number, "counter": counter, "hash": hashlib.blake2b(state).hexdigest()}
        with open(f"{report_path}.new", "w") as file:
            json.dump(report, file)
        os.replace(f"{report_path}.new", report_path)
        if signal.sigwait(signals) == signal.SIGUSR1:
            counter += 1
            for page in random.sample(range(pages), max(1, round(pages * CHANGED_SHARE))):
                state[page * PAGE : page * PAGE + 8] = os.urandom(8)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
