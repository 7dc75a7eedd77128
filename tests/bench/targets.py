"""What is asked of crcli, as bounds for ratios and figures of one run. All must hold in the same run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.bench.table import CRCLI, number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.table import Medians


@dataclass(frozen=True)
class Target:
    """For subjects of one kind and size (MiB), `value` of the medians must not exceed `most`."""

    kind: str
    mebibytes: int
    name: str
    most: float
    value: Callable[[Medians], float]

    def judge(self, middle: Medians) -> dict[str, Any] | None:
        """Value, bound and verdict; None where a figure that it needs was not taken."""
        try:
            value = self.value(middle)
        except KeyError:
            return None
        return {"target": self.name, "value": value, "most": self.most, "met": value <= self.most}


def _over(way: str, figure: str, other: str, by: str) -> Callable[[Medians], float]:
    """A figure of one way over a figure of another."""
    return lambda middle: middle[way][figure] / middle[other][by]


def _freezes(way: str) -> Iterator[Target]:
    for title, figure in (("killed", "frozen_ms"), ("left running, by its own clock", "pause_ms")):
        name = f"{way}: frozen, {title}"
        yield Target("random", 1024, f"{name} / one copy", 1.4, _over(way, figure, "limits", "copy_ms"))
        yield Target("random", 1024, f"{name} / raw criu", 0.6, _over(way, figure, "criu", figure))


def _repeats(way: str, most: float) -> Iterator[Target]:
    yield Target("random", 1024, f"{way}: second dump / first", most, _over(way, "second_s", way, "dump_s"))
    yield Target(
        "random", 1024, f"{way}: second dump, stored / memory", 0.015,
        _over(way, "second_mib", "limits", "memory_mib"),
    )  # fmt: skip


def _soon(way: str, how: str) -> Iterator[Target]:
    """How soon 64 MiB are back: `warm`, `cold` or `lazy`."""
    name = f"{way}: {how} restore"
    yield Target("random", 64, f"{name}, since its process began (ms)", 140.0,
                 lambda middle: middle[way][f"{how}_ready_ms"])  # fmt: skip
    yield Target("random", 64, f"{name}, since the command was typed (ms)", 300.0,
                 lambda middle: 1000 * middle[way][f"{how}_first_s"])  # fmt: skip


TARGETS = (
    *(target for way in CRCLI for target in _freezes(way)),
    Target("random", 1024, "crcli s3: durable / boto3's upload", 1.25,
           _over("crcli s3", "dump_s", "limits", "upload_s")),
    Target("random", 1024, "crcli s3: durable / the script", 1 / 2,
           _over("crcli s3", "dump_s", "script", "dump_s")),
    Target("half-zero", 1024, "crcli s3: durable / the script", 1 / 4,
           _over("crcli s3", "dump_s", "script", "dump_s")),
    *_repeats("crcli s3", 1 / 8),
    *_repeats("crcli file", 1 / 2.5),
    Target("random", 1024, "crcli s3: lazy restore, first instruction (s)", 0.4,
           lambda middle: middle["crcli s3"]["lazy_first_s"]),
    Target("random", 1024, "crcli s3: lazy restore, whole / eager", 1.3,
           _over("crcli s3", "lazy_whole_s", "crcli s3", "cold_whole_s")),
    *(Target("random", 1024, f"{way}: warm restore / raw criu, warm", 1.0,
             _over(way, "warm_first_s", "criu", "warm_first_s")) for way in CRCLI),
    *(target for way in CRCLI for how in ("warm", "cold", "lazy") for target in _soon(way, how)),
)  # fmt: skip


def judged(kind: str, mebibytes: int, middle: Medians) -> Iterator[dict[str, Any]]:
    """Each target for this kind and size whose figures were taken."""
    for target in TARGETS:
        if (target.kind, target.mebibytes) == (kind, mebibytes) and (found := target.judge(middle)):
            yield found


def as_text(title: str, found: list[dict[str, Any]]) -> str:
    """One line for each target."""
    return "\n".join(
        f"{title + '  ' + one['target']:<84}{number(one['value']):>9}  at most {number(one['most']):<8}"
        f"{'met' if one['met'] else 'MISSED'}"
        for one in found
    )
