"""`crcli watch`: parse, call pipeline.watching, show how it ended."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import EndpointOption, JsonOption, StoreOption
from crcli.config import choose_store
from crcli.errors import UsageError
from crcli.pipeline.stages import NOTIFY_WAIT_S, DumpOptions, Outcome

KEEP = 3
"""How many images `--every` keeps by default."""


def watch(
    pid: Annotated[int, typer.Argument(metavar="PID", help="The root of the tree.", show_default=False)],
    name: Annotated[
        str,
        typer.Option(metavar="NAME", help="The images' name. Default: the command's.", show_default=False),
    ] = "",
    store: StoreOption = None,
    every: Annotated[
        str,
        typer.Option(
            metavar="TIME|auto",
            help="Take an image so often (90s, 10m, 2h) while the tree runs and does something. auto: as "
            "often as costs least, by what images cost and nodes fail. Default: only on notice.",
            show_default=False,
        ),
    ] = "",
    keep: Annotated[
        int,
        typer.Option(metavar="N", help="How many images of this tree stay, the newest (0: all).", min=0),
    ] = KEEP,
    mtbf: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="How long this node runs between failures that nobody announces, for --every auto. "
            "Default: a day.",
            show_default=False,
        ),
    ] = "",
    notice: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Who says that this node goes away: auto, sigterm, sigusr1, aws, gcp, azure, slurm, "
            "kubernetes, file:PATH, http:HOST:PORT, none; may be repeated. Default: auto.",
            show_default=False,
        ),
    ] = None,
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long there is after a notice that does not say.",
            min=0,
            show_default=False,
        ),
    ] = None,
    reserve: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="By how much a dump must be done before the deadline; of a short time a fifth.",
            min=0,
        ),
    ] = 1.0,
    leave_running: Annotated[
        bool, typer.Option("--leave-running", help="Let the tree run on once it was saved on notice.")
    ] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH|auto",
            help="Files of model weights whose bytes need not be stored, as of `dump`; may be repeated.",
            show_default=False,
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="A file or folder to take along; may be repeated.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> int:
    """Keep images of a running process tree, and dump it in time when this node goes away.

    On notice the tree is killed once its image is durable (exit 75). When that cannot be in time, it runs on,
    and the exit code is 11, as of `dump`; ended by itself, it is 0.
    """
    from crcli.pipeline.vigil import Keeping
    from crcli.pipeline.watching import parse_time, watch_tree
    from crcli.ui import vigils

    chosen = choose_store(store, endpoint_url)
    if mtbf and every != "auto":
        raise UsageError("--mtbf goes with --every auto")
    options = DumpOptions(
        pid=pid,
        store=chosen.url,
        name=name,
        outcome=Outcome.RUNNING if leave_running else Outcome.KILLED,
        include=tuple(include or ()),
        weights=tuple(weights or ()),
        notify_wait_s=NOTIFY_WAIT_S,
        endpoint_url=chosen.endpoint_url,
    )
    keeping = Keeping(
        options,
        every_s=parse_time(every, "--every") if every not in ("", "auto") else None,
        auto=every == "auto",
        keep=keep,
        reserve_s=reserve,
        failure_rate_per_h=3600 / parse_time(mtbf, "--mtbf") if mtbf else None,
    )
    end = watch_tree(keeping, notice or [], grace, vigils.teller(as_json))
    return vigils.show_end(pid, end, as_json)
