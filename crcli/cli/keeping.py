"""Options of what keeps images of a running tree, and dumps it in time: `watch` and `run` share them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from crcli.cli.options import parse_count, parse_seconds
from crcli.errors import UsageError
from crcli.pipeline.interrupts import LONGEST_S

if TYPE_CHECKING:
    from crcli.pipeline.stages import DumpOptions
    from crcli.pipeline.vigil import Keeping

KEEP = 3
"""How many images stay by default."""

EveryOption = Annotated[
    str,
    typer.Option(
        "--every",
        metavar="TIME|auto",
        help="Take an image so often (90s, 10m, 2h) while the tree runs and does something. auto: as often "
        "as costs least, by what images cost and nodes fail. Default: only on notice.",
        show_default=False,
    ),
]

KeepOption = Annotated[
    int,
    typer.Option(
        "--keep",
        metavar="N",
        help="How many images of this job stay, the newest, when another is taken (0: all).",
        parser=parse_count,
    ),
]

MtbfOption = Annotated[
    str,
    typer.Option(
        "--mtbf",
        metavar="TIME",
        help="How long this node runs between failures that nobody announces, for --every auto. Default: "
        "a day, corrected by the history of a job of `run`.",
        show_default=False,
    ),
]

NoticeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--notice",
        metavar="SOURCE",
        help="Who says that this node goes away: auto (those that apply here), sigterm, sigusr1…, aws, gcp, "
        "azure, slurm, kubernetes, systemd, file:PATH, http:HOST:PORT, none; may be repeated. Default: auto.",
        show_default=False,
    ),
]

GraceOption = Annotated[
    float | None,
    typer.Option(
        "--grace",
        metavar="SECONDS",
        help="How long there is after a notice that does not say. Default: $CRCLI_GRACE.",
        parser=parse_seconds,
        show_default=False,
    ),
]

ReserveOption = Annotated[
    float,
    typer.Option(
        "--reserve",
        metavar="SECONDS",
        help="By how much a dump must have ended before the deadline; a fifth of the time, if that is less.",
        parser=parse_seconds,
    ),
]

WeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="PATH|auto",
        help="Files of model weights whose bytes need not be stored, as of `dump`; may be repeated.",
        show_default=False,
    ),
]

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_time(text: str, option: str) -> float:
    """Return the seconds that `90s`, `10m`, `2h`, `1.5d` or `90` stand for; raise UsageError for others."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([smhd]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{option} takes a time such as 90s, 10m or 2h, not {text!r}")
    return min(float(found[1]) * _UNITS[found[2]], LONGEST_S)


def keeping(dump: DumpOptions, every: str, keep: int, mtbf: str, reserve: float) -> Keeping:
    """What these options ask for. Raises UsageError where they make no sense."""
    from crcli.pipeline.vigil import Keeping

    if mtbf and every != "auto":
        raise UsageError("--mtbf goes with --every auto")
    return Keeping(
        dump,
        every_s=parse_time(every, "--every") if every not in ("", "auto") else None,
        auto=every == "auto",
        keep=keep,
        reserve_s=reserve,
        failure_rate_per_h=3600 / parse_time(mtbf, "--mtbf") if mtbf else None,
    )
