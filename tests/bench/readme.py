"""The table of README, from a file of results: `python -m tests.bench.readme RESULT.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

WAYS = {
    "criu": "`criu`",
    "runc": "runc",
    "script": "script",
    "crcli file": "crcli, folder",
    "crcli s3": "crcli, S3",
}
SIZES = (64, 1024, 4096)
ROWS = {
    "frozen_ms": "frozen, to be killed (ms)",
    "pause_ms": "stood still, left running (ms)",
    "dump_s": "dump until durable (s)",
    "second_s": "again, 1 % changed (s)",
    "warm_first_s": "restore until it runs, warm (s)",
    "cold_first_s": "cold (s)",
    "lazy_first_s": "lazy and cold (s)",
    "lazy_whole_s": "until it is whole (s)",
}
LIMITS = {
    "copy_ms": "{:.0f} ms for one copy of the memory",
    "copy_fresh_ms": "{:.0f} ms into memory never touched",
    "write_s": "{:.2g} s to write and fsync it",
    "upload_s": "{:.2g} s for boto3's upload",
    "download_s": "{:.2g} s for its download",
}


def lines(results: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The table: random bytes of a few sizes; what was not taken is a dash. Below it, the limits."""
    medians = {found["mebibytes"]: found["medians"] for found in results if found["kind"] == "random"}
    yield f"| Random bytes, medians | {' | '.join(WAYS.values())} |"
    yield "|---|" + "---:|" * len(WAYS)
    for size in filter(medians.get, SIZES):
        for name, title in ROWS.items():
            cells = [_cell(medians.get(size, {}).get(way, {}).get(name)) for way in WAYS]
            yield f"| {size} MiB: {title} | {' | '.join(cells)} |"
    for size in SIZES:
        limits = medians.get(size, {}).get("limits")
        if limits is not None:
            yield ""
            said = [text.format(limits[name]) for name, text in LIMITS.items()]
            yield f"Limits of {size} MiB: {', '.join(said)}."


def _cell(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


if __name__ == "__main__":
    print("\n".join(lines(json.loads(Path(sys.argv[1]).read_text())["results"])))
