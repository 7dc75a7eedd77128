"""What the rounds say: medians, side by side, and how they stand to the targets."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from tests.bench.ways import WAYS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.ways import Figures

Rounds: TypeAlias = dict[str, list["Figures"]]
"""For one size of subject: way -> one entry for each round."""

ROWS = {
    "frozen_ms": "frozen, killed (ms; CRIU's statistics, crcli's frozen_ms)",
    "frozen_running_ms": "frozen, left running (ms)",
    "pause_ms": "stood still, left running, by its own clock (ms)",
    "dump_s": "dump until durable (s)",
    "dump_cpu_s": "  CPU (s)",
    "transfer_s": "  the transfer alone (s)",
    "stored_mib": "  bytes stored (MiB)",
    "second_s": "second dump, 1 % of the pages changed (s)",
    "second_mib": "  bytes stored (MiB)",
    "second_frozen_ms": "  frozen (ms)",
    "ready_ms": "restore until it runs (ms; crcli's ready_ms, wall for criu)",
    "ran_again_s": "  by its own clock (s)",
    "restore_s": "  until the command ends (s; crcli looks again after 1 s)",
    "restore_cpu_s": "  CPU (s)",
    "dump_peak_mib": "peak memory of a dump (MiB)",
    "restore_peak_mib": "peak memory of a restore (MiB)",
}
"""The figures, and what they are called in the table."""


@dataclass(frozen=True)
class Target:
    """What issue 2 asks for, at one size: `value` of the medians must not exceed `most`."""

    mebibytes: int
    name: str
    most: float
    value: Callable[[dict[str, Figures]], float]


TARGETS = (
    Target(1024, "frozen, killed: crcli file / criu", 1.0,
           lambda m: m["crcli file"]["frozen_ms"] / m["criu"]["frozen_ms"]),
    Target(1024, "frozen, killed: crcli s3 / criu", 1.0,
           lambda m: m["crcli s3"]["frozen_ms"] / m["criu"]["frozen_ms"]),
    Target(1024, "frozen, left running, by its own clock: crcli file / criu", 1.0,
           lambda m: m["crcli file"]["pause_ms"] / m["criu"]["pause_ms"]),
    Target(1024, "dump to s3: crcli / script", 1 / 1.5,
           lambda m: m["crcli s3"]["dump_s"] / m["script"]["dump_s"]),
    Target(1024, "dump to s3: crcli / boto3's upload alone", 1.4,
           lambda m: m["crcli s3"]["dump_s"] / m["boto3"]["transfer_s"]),
    Target(1024, "second dump: stored / memory (%)", 2.0,
           lambda m: 100 * m["crcli s3"]["second_mib"] / 1024),
    Target(1024, "second dump to s3: time / first", 0.25,
           lambda m: m["crcli s3"]["second_s"] / m["crcli s3"]["dump_s"]),
    Target(64, "restore: crcli file ready_ms - criu (ms)", 150.0,
           lambda m: m["crcli file"]["ready_ms"] - m["criu"]["ready_ms"]),
    Target(64, "restore, by its own clock: crcli file - criu (ms)", 150.0,
           lambda m: 1000 * (m["crcli file"]["ran_again_s"] - m["criu"]["ran_again_s"])),
    Target(1024, "peak memory of crcli (MiB)", 512.0,
           lambda m: max(m[way][figure] for way in m if way.startswith("crcli")
                         for figure in ("dump_peak_mib", "restore_peak_mib"))),
)  # fmt: skip


def medians(rounds: Rounds) -> dict[str, Figures]:
    """The median of every figure over the rounds."""
    return {
        way: {name: median(figures[name] for figures in taken) for name in taken[0]}
        for way, taken in rounds.items()
        if taken
    }


def judged(mebibytes: int, rounds: Rounds) -> Iterator[dict[str, Any]]:
    """Each target for this size whose figures were taken: its value, its bound, and whether it is met."""
    middle = medians(rounds)
    for target in TARGETS:
        if target.mebibytes != mebibytes:
            continue
        try:
            value = target.value(middle)
        except (KeyError, ValueError):
            continue  # a way was left out
        yield {"target": target.name, "value": value, "most": target.most, "ok": value <= target.most}


def as_text(results: dict[int, Rounds]) -> str:
    """The table, and the targets below it."""
    lines: list[str] = []
    for mebibytes, rounds in results.items():
        middle = medians(rounds)
        count = max(map(len, rounds.values()))
        lines += [f"{mebibytes} MiB of random bytes, medians of {count}", _row("", list(middle))]
        for name, title in ROWS.items():
            if any(name in figures for figures in middle.values()):
                lines.append(_row(title, [_number(figures.get(name)) for figures in middle.values()]))
        lines.append("")
    for mebibytes, rounds in results.items():
        for found in judged(mebibytes, rounds):
            verdict = "ok" if found["ok"] else "MISS"
            title = f"{mebibytes} MiB  {found['target']}"
            lines.append(f"{title:<72}{found['value']:>9.2f}  at most {found['most']:<8.4g}{verdict}")
    return "\n".join(lines)


def _row(title: str, cells: list[str]) -> str:
    return f"{title:<62}" + "".join(f"{cell:>12}" for cell in cells)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


__all__ = ["TARGETS", "WAYS", "as_text", "judged", "medians"]
