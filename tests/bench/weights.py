"""What leaving weights out saves: a process with a file of weights in memory, dumped with and without.

    python -m tests.bench.weights [--sizes 256 1024] [--rounds 5] [--out]

The process has read the file into anonymous memory and has 64 MiB of random state beside it. Each round takes
three ways in turn: without, with the file's index to be made, and with the index there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from crcli import kernel
from tests.bench.__main__ import RESULTS
from tests.bench.commands import Ran, Subject, run

STATE_MIB = 64
WAYS = ("without", "index to be made", "index there")
ROWS = {
    "frozen_ms": "frozen (ms)",
    "dump_s": "dump until durable (s)",
    "stored_mib": "bytes stored (MiB)",
    "ready_ms": "restore until it runs (ms)",
    "peak_mib": "peak memory of a dump (MiB)",
}


def main() -> int:
    """Measure, print the table, write it down if asked."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.weights", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024], help="MiB (default: 256 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are of so many (default: 5)")
    parser.add_argument("--folder", help="where everything is (default: TMPDIR)")
    parser.add_argument("--out", action="store_true", help=f"write all figures into {RESULTS}")
    options = parser.parse_args()
    kernel.become_subreaper()
    results = {size: _measure(size, options.rounds, options.folder) for size in options.sizes}
    for size, medians in results.items():
        print(f"\n{size} MiB of weights, {STATE_MIB} MiB of other state, medians of {options.rounds}")
        print(f"{'':<34}" + "".join(f"{way:>20}" for way in WAYS))
        for name, title in ROWS.items():
            print(f"{title:<34}" + "".join(f"{medians[way][name]:>20.4g}" for way in WAYS))
    if options.out:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"weights-{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
        path.write_text(json.dumps({str(size): found for size, found in results.items()}, indent=1) + "\n")
        print(f"\nwritten to {path}")
    return 0


def _measure(mebibytes: int, rounds: int, folder: str | None) -> dict[str, dict[str, float]]:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="crcli-bench-", dir=folder) as name:
        here = Path(name)
        weights = here / "weights.bin"
        with weights.open("wb") as file:
            for _ in range(mebibytes):
                file.write(os.urandom(1 << 20))
        os.sync()
        for number in range(rounds):
            for way in WAYS:
                found[way].append(_take(way, here / f"{number}-{way.replace(' ', '-')}", weights))
                print(f"{mebibytes} MiB, round {number + 1}: {way}", file=sys.stderr, flush=True)
    return {way: {name: median(one[name] for one in taken) for name in ROWS} for way, taken in found.items()}


def _take(way: str, folder: Path, weights: Path) -> dict[str, float]:
    cache = folder.parent / "cache"
    if way == "index to be made":
        shutil.rmtree(cache, ignore_errors=True)
    options = [] if way == "without" else ["--weights", str(weights)]
    with Subject(STATE_MIB, folder / "subject", weights) as subject:
        done = _crcli(subject, folder, cache, "dump", str(subject.pid), "--name", "subject", *options)
        subject.died()
        back = _crcli(subject, folder, cache, "restore", "subject")
        subject.came_back(back.json["host_pid"])
        subject.ask()
    shutil.rmtree(folder)
    return {
        "frozen_ms": done.json["frozen_ms"],
        "dump_s": done.wall_s,
        "stored_mib": done.json["stored_bytes"] / 2**20,
        "ready_ms": back.json["ready_ms"],
        "peak_mib": done.peak_mib,
    }


def _crcli(subject: Subject, folder: Path, cache: Path, *arguments: str) -> Ran:
    command = [sys.executable, "-m", "crcli", *arguments, "--store", f"file://{folder}/store", "--json"]
    return run(
        command, subject.limit_s, {"CRCLI_LOG_DIR": str(folder / "logs"), "CRCLI_CACHE_DIR": str(cache)}
    )


if __name__ == "__main__":
    sys.exit(main())
