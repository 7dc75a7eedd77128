"""crcli beside raw CRIU, runc's checkpoint, a user's script, and the bare limits of this machine, in one run.

Every round takes all ways, in an order that turns from round to round, so that whatever else the machine
does falls on all of them. The memory of every restored process is compared with what it was. A round that
fails is kept as one, and the run ends with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crcli import kernel
from tests.bench import table, targets
from tests.bench.commands import BenchError, reap_orphans
from tests.bench.kinds import KINDS
from tests.bench.ways import WAYS, Figures, Place, clean_up
from tests.support.s3servers import start_moto

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.support.s3servers import S3Server

RESULTS = Path(__file__).parent / "results"

USUAL_SIZES = {
    "random": (16, 64, 1024, 4096),
    "half-zero": (1024,),
    "heap": (64, 1024),
    "mappings": (64, 1024),
    "processes": (64,),
    "threads": (64,),
}
"""What is measured unless something else is asked for (MiB): the shape of a tree matters at any size, what is
in its memory only where there is much."""

QUICK = {"random": (16,)}
"""What `--quick` measures, once."""


@dataclass
class Taken:
    """What the rounds of one kind and size brought: figures, and what failed."""

    kind: str
    mebibytes: int
    rounds: table.Rounds = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What it is called."""
        return f"{self.kind} {self.mebibytes} MiB"

    @property
    def text(self) -> str:
        """The table, the targets, and the failures."""
        middle = table.medians(self.rounds)
        counts = " ".join(f"{way} {len(taken)}" for way, taken in self.rounds.items())
        parts = [
            table.as_text(f"{self.title}: medians of so many rounds: {counts}", middle),
            targets.as_text(self.title, list(targets.judged(self.kind, self.mebibytes, middle))),
            "\n".join(f"FAILED  {self.title}: {failure}" for failure in self.failures),
        ]
        return "\n\n".join(filter(None, parts))

    @property
    def json(self) -> dict[str, Any]:
        """Everything."""
        middle = table.medians(self.rounds)
        return {
            "kind": self.kind,
            "mebibytes": self.mebibytes,
            "medians": middle,
            "ratios": {found["ratio"]: found["values"] for found in table.ratios(middle)},
            "targets": list(targets.judged(self.kind, self.mebibytes, middle)),
            "failures": self.failures,
            "rounds": self.rounds,
        }


def main() -> int:
    """Measure, print the tables, write all figures down."""
    options = _parse()
    missing = [tool for tool in ("zstd", "tar") if shutil.which(tool) is None]
    if missing or os.getuid() != 0:
        sys.exit(f"needs root, and {' and '.join(missing) or 'the tools that are here'}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing is left behind
    kernel.become_subreaper()  # restored trees come to us
    ways = _usable(options.ways, options.folder)
    results: list[Taken] = []
    for kind, mebibytes in _subjects(options):
        taken = Taken(kind, mebibytes)
        results.append(taken)
        _measure(taken, options.rounds, ways, options.folder)
        print(f"\n{taken.text}\n", flush=True)
        if options.out:  # a long run that is cut short keeps what it has
            _write(results, options.out)
    if options.out:
        print(f"written to {options.out}")
    return int(any(taken.failures for taken in results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="what is in memory (default: all)")
    parser.add_argument(
        "--sizes", type=int, nargs="+", help=f"MiB, for every kind (default: {_usual_sizes()})"
    )
    parser.add_argument("--rounds", type=int, help="medians are of so many (default: 5)")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="16 MiB of random bytes, one round")
    parser.add_argument("--folder", help="where images and the directory store are (default: TMPDIR)")
    parser.add_argument(
        "--out",
        nargs="?",
        type=Path,
        const=RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%S}.json",
        help=f"write all figures into this file (without a name: below {RESULTS})",
    )
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def _usual_sizes() -> str:
    return "; ".join(f"{kind} {' '.join(map(str, sizes))}" for kind, sizes in USUAL_SIZES.items())


def _subjects(options: argparse.Namespace) -> Iterable[tuple[str, int]]:
    """Kinds and sizes, in the order in which they are measured."""
    usual = QUICK if options.quick else USUAL_SIZES
    for kind in options.kinds or usual:
        for mebibytes in options.sizes or usual.get(kind, QUICK["random"]):
            yield kind, mebibytes


def _usable(ways: list[str], folder: str | None) -> list[str]:
    """The ways without those whose program is not here or does not work; why is printed."""
    if "runc" not in ways:
        return ways
    why = "it is not installed"
    if shutil.which("runc"):
        try:
            with start_moto() as server:
                _take("runc", "random", 1, folder, server)
            return ways
        except BenchError as error:
            why = str(error)
    print(f"runc is left out: {why}", file=sys.stderr, flush=True)
    return [way for way in ways if way != "runc"]


def _measure(taken: Taken, rounds: int, ways: list[str], folder: str | None) -> None:
    """Fill `taken`; every round has an object store of its own."""
    taken.rounds = {way: [] for way in ways}
    for number in range(rounds):
        turn = number % len(ways)
        with start_moto() as server:
            for way in ways[turn:] + ways[:turn]:
                began = time.monotonic()
                said = ""
                try:
                    taken.rounds[way].append(_take(way, taken.kind, taken.mebibytes, folder, server))
                except BenchError as error:
                    said = f", FAILED: {error}"
                    taken.failures.append(f"{way}, round {number + 1}: {error}")
                took = f"{time.monotonic() - began:.0f} s"
                print(f"{taken.title}, round {number + 1}: {way} ({took}){said}", file=sys.stderr, flush=True)


def _take(way: str, kind: str, mebibytes: int, folder: str | None, server: S3Server) -> Figures:
    """One way, once; raise BenchError when anything does not work. Nothing of it stays."""
    place = Place(kind, mebibytes, Path(tempfile.mkdtemp(prefix="crcli-bench-", dir=folder)), server)
    try:
        return WAYS[way](place)
    except BenchError:
        raise
    except Exception as error:
        raise BenchError(repr(error)) from error
    finally:
        clean_up(place)
        reap_orphans()


def _write(results: list[Taken], path: Path) -> None:
    with open("/proc/meminfo") as file:
        memory_kib = int(file.readline().split()[1])
    text = {
        "taken": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "memory_mib": memory_kib >> 10, "kernel": os.uname().release},
        "load": os.getloadavg(),
        "results": [taken.json for taken in results],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
