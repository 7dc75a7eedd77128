"""crcli beside raw CRIU, beside a user's script and beside the bare S3 client, in one run.

Every round takes all ways, in an order that turns from round to round, so that whatever else the machine
does falls on all of them. The memory of every restored process is compared with what it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from crcli import kernel
from tests.bench import table
from tests.bench.commands import BenchError
from tests.bench.ways import WAYS, Place, clean_up
from tests.support.s3servers import start_moto

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Measure, print the table, write it down if asked."""
    options = _parse()
    missing = [tool for tool in ("zstd", "tar") if shutil.which(tool) is None]
    if missing or os.getuid() != 0:
        sys.exit(f"needs root, and {' and '.join(missing) or 'the tools that are here'}")
    kernel.become_subreaper()  # restored trees come to us
    results: dict[int, table.Rounds] = {}
    for mebibytes in options.sizes:
        results[mebibytes] = _measure(mebibytes, options.rounds, options.ways, options.folder)
    print(table.as_text(results))
    if options.out:
        print(f"\nwritten to {_write(results)}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 64], help="MiB (default: 1024 64)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are of so many (default: 5)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--folder", help="where CRIU's images and the directory store are (default: TMPDIR)")
    parser.add_argument("--out", action="store_true", help=f"write all figures into {RESULTS}")
    return parser.parse_args()


def _measure(mebibytes: int, rounds: int, ways: list[str], folder: str | None) -> table.Rounds:
    found: table.Rounds = {way: [] for way in ways}
    for number in range(rounds):
        turn = number % len(ways)
        for way in ways[turn:] + ways[:turn]:
            began = time.monotonic()
            found[way].append(_take(way, mebibytes, folder))
            took = time.monotonic() - began
            print(f"{mebibytes} MiB, round {number + 1}: {way} ({took:.0f} s)", file=sys.stderr, flush=True)
    return found


def _take(way: str, mebibytes: int, folder: str | None) -> dict[str, float]:
    """One way, once; a second time if it fails (a pid was taken, the machine stalled), no third."""
    for attempt in (1, 2):
        with start_moto() as server:
            place = Place(mebibytes, Path(tempfile.mkdtemp(prefix="crcli-bench-", dir=folder)), server)
            try:
                return WAYS[way](place)
            except BenchError as error:
                print(f"{way}: {error}", file=sys.stderr, flush=True)
                if attempt == 2:
                    raise
            finally:
                clean_up(place)
    raise AssertionError("unreachable")


def _write(results: dict[int, table.Rounds]) -> Path:
    now = datetime.now(UTC)
    with open("/proc/meminfo") as file:
        memory_kib = int(file.readline().split()[1])
    text = {
        "taken": now.isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "memory_mib": memory_kib >> 10, "kernel": os.uname().release},
        "sizes": {
            str(mebibytes): {
                "medians": table.medians(rounds),
                "targets": list(table.judged(mebibytes, rounds)),
                "rounds": rounds,
            }
            for mebibytes, rounds in results.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(text, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
