"""What the rounds say: medians side by side, and each as a ratio to what it is to be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.bench.ways import Figures

Rounds: TypeAlias = "dict[str, list[Figures]]"
"""For one kind and size: way -> one entry for each round that worked."""

Medians: TypeAlias = "Mapping[str, Figures]"
"""For one kind and size: way -> the figure's name -> its median."""

ROWS = {
    "frozen_ms": "frozen, killed (ms; CRIU's statistics, crcli's frozen_ms)",
    "frozen_running_ms": "frozen, left running (ms)",
    "pause_ms": "stood still, left running, by its own clock (ms)",
    "dump_s": "dump until durable (s)",
    "dump_running_s": "  left running (s)",
    "dump_cpu_s": "  CPU (s)",
    "dump_peak_mib": "  peak memory (MiB)",
    "dump_held_mib": "  pages that wait in files without a name (MiB)",
    "stored_mib": "  bytes stored (MiB)",
    "second_s": "second dump, 1 % of the pages changed (s)",
    "second_mib": "  bytes stored (MiB)",
    "second_frozen_ms": "  frozen (ms)",
    "warm_first_s": "restore, warm: first instruction (s)",
    "warm_ready_ms": "  crcli's ready_ms",
    "warm_whole_s": "  whole (s)",
    "cold_first_s": "restore, cold: first instruction (s)",
    "cold_ready_ms": "  crcli's ready_ms",
    "cold_whole_s": "  whole (s)",
    "lazy_first_s": "restore, lazy and cold: first instruction (s)",
    "lazy_ready_ms": "  crcli's ready_ms",
    "lazy_whole_s": "  whole (s)",
    "lazy_end_s": "  the command ends (s)",
    "cold_end_s": "restore, cold: the command ends (s; crcli looks again after 1 s)",
    "restore_cpu_s": "  CPU (s)",
    "restore_peak_mib": "  peak memory (MiB)",
}
"""The figures of the ways, and what they are called in the table."""

LIMITS = {
    "memory_mib": "memory of the tree (MiB)",
    "copy_ms": "one copy out of the living tree (ms)",
    "copy_fresh_ms": "  into memory that was never touched (ms)",
    "hash_1_s": "BLAKE3, one core (s)",
    "hash_2_s": "  two cores (s)",
    "zstd_1_s": "zstd -1, one core (s)",
    "zstd_2_s": "  two cores (s)",
    "write_s": "write to this disk, and fsync (s)",
    "read_s": "read from this disk, cold (s)",
    "upload_s": "boto3's upload alone (s)",
    "upload_cpu_s": "  CPU of the client (s)",
    "download_s": "boto3's download alone (s)",
}
"""The figures of the bare steps."""

S3, FOLDER, CRCLI = ("script", "crcli s3"), ("criu", "runc", "crcli file"), ("crcli file", "crcli s3")


@dataclass(frozen=True)
class Ratio:
    """A figure of each of `ways` (none named: all that have it) over one that it is measured by.

    `way` says whose figure that is (empty: its own), `unit` how many of that figure's units make one.
    """

    title: str
    figure: str
    way: str
    by: str
    ways: tuple[str, ...] = ()
    unit: float = 1.0

    def values(self, middle: Medians) -> dict[str, float]:
        """The ratio for each way whose figures were taken."""
        found = {}
        for way, figures in middle.items():
            by = middle.get(self.way or way, {}).get(self.by)
            if self.figure in figures and by and (not self.ways or way in self.ways):
                found[way] = figures[self.figure] / by / self.unit
        return found


RATIOS = (
    Ratio("frozen, killed / one copy", "frozen_ms", "limits", "copy_ms"),
    Ratio("  / one copy into fresh memory", "frozen_ms", "limits", "copy_fresh_ms"),
    Ratio("  / raw criu", "frozen_ms", "criu", "frozen_ms"),
    Ratio("stood still, left running / one copy", "pause_ms", "limits", "copy_ms"),
    Ratio("  / one copy into fresh memory", "pause_ms", "limits", "copy_fresh_ms"),
    Ratio("  / raw criu", "pause_ms", "criu", "pause_ms"),
    Ratio("durable / boto3's upload", "dump_s", "limits", "upload_s", S3),
    Ratio("  / write and fsync", "dump_s", "limits", "write_s", FOLDER),
    Ratio("  / BLAKE3, two cores", "dump_s", "limits", "hash_2_s", CRCLI),
    Ratio("  / zstd -1, two cores", "dump_s", "limits", "zstd_2_s", ("script", *CRCLI)),
    Ratio("  / the script", "dump_s", "script", "dump_s"),
    Ratio("  / raw criu", "dump_s", "criu", "dump_s"),
    Ratio("CPU of a dump / raw criu", "dump_cpu_s", "criu", "dump_cpu_s"),
    Ratio("stored / memory", "stored_mib", "limits", "memory_mib"),
    Ratio("second dump / first", "second_s", "", "dump_s"),
    Ratio("  stored / memory", "second_mib", "limits", "memory_mib"),
    Ratio("  frozen / one copy", "second_frozen_ms", "limits", "copy_ms"),
    Ratio("warm restore, first instruction / raw criu, warm", "warm_first_s", "criu", "warm_first_s"),
    Ratio("  / one copy into fresh memory", "warm_first_s", "limits", "copy_fresh_ms", unit=0.001),
    Ratio("cold restore, first instruction / raw criu, cold", "cold_first_s", "criu", "cold_first_s"),
    Ratio("  whole / boto3's download", "cold_whole_s", "limits", "download_s", S3),
    Ratio("  whole / read from disk", "cold_whole_s", "limits", "read_s", FOLDER),
    Ratio("lazy restore, first instruction / eager", "lazy_first_s", "", "cold_first_s"),
    Ratio("  whole / eager", "lazy_whole_s", "", "cold_whole_s"),
)


def medians(rounds: Rounds) -> dict[str, Figures]:
    """The median of every figure over the rounds that have it."""
    return {
        way: {name: median(one[name] for one in taken if name in one) for name in _names(taken)}
        for way, taken in rounds.items()
        if taken
    }


def ratios(middle: Medians) -> Iterator[dict[str, Any]]:
    """Each ratio that can be told: its title in the table, what it is called alone, and each way's value."""
    above = ""
    for ratio in RATIOS:
        if not ratio.title.startswith(" "):
            above = ratio.title
        if values := ratio.values(middle):
            yield {"ratio": _name(ratio.title, above), "title": ratio.title, "values": values}


def _name(title: str, above: str) -> str:
    """What an indented row is called without the one above it that it belongs to."""
    if not title.startswith(" "):
        return title
    if title.startswith("  / "):
        return above.partition(" / ")[0] + title[1:]
    return f"{above.partition(' / ')[0].partition(',')[0]}, {title.strip()}"


def as_text(title: str, middle: Medians) -> str:
    """The figures of each way, the limits, and the ratios."""
    ways = [way for way in middle if way != "limits"]
    return "\n".join([title, *_figures(middle, ways), "", *_limits(middle), "", *_ratios(middle, ways)])


def _figures(middle: Medians, ways: Sequence[str]) -> Iterator[str]:
    yield _row("", ways)
    for name, title in ROWS.items():
        if any(name in middle[way] for way in ways):
            yield _row(title, [number(middle[way].get(name)) for way in ways])


def _limits(middle: Medians) -> Iterator[str]:
    found = middle.get("limits", {})
    for name, title in LIMITS.items():
        if name in found:
            yield _row(title, [number(found[name])])


def _ratios(middle: Medians, ways: Sequence[str]) -> Iterator[str]:
    yield _row("ratios", ways)
    for found in ratios(middle):
        yield _row(found["title"], [number(found["values"].get(way)) for way in ways])


def _names(taken: Sequence[Figures]) -> dict[str, None]:
    return {name: None for figures in taken for name in figures}


def _row(title: str, cells: Sequence[str]) -> str:
    return f"{title:<66}" + "".join(f"{cell:>12}" for cell in cells)


def number(value: float | None) -> str:
    """Three digits, or as many as there are before the point; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
