"""`crcli watch`: parse, call pipeline.watching, show how it ended."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from crcli.cli.keeping import (
    KEEP,
    EveryOption,
    GraceOption,
    KeepOption,
    MtbfOption,
    NoticeOption,
    ReserveOption,
    WeightsOption,
    keeping,
)
from crcli.cli.options import EndpointOption, IncludeOption, JsonOption, StoreOption, parse_paths, parse_pid
from crcli.config import choose_store
from crcli.pipeline.stages import RESERVE_S, DumpOptions, Outcome


def watch(
    pid: Annotated[
        int,
        typer.Argument(metavar="PID", help="The root of the tree.", parser=parse_pid, show_default=False),
    ],
    name: Annotated[
        str,
        typer.Option(metavar="NAME", help="The images' name. Default: the command's.", show_default=False),
    ] = "",
    store: StoreOption = None,
    every: EveryOption = "",
    keep: KeepOption = KEEP,
    mtbf: MtbfOption = "",
    notice: NoticeOption = None,
    grace: GraceOption = None,
    reserve: ReserveOption = RESERVE_S,
    leave_running: Annotated[
        bool, typer.Option("--leave-running", help="Let the tree run on once it was saved on notice.")
    ] = False,
    weights: WeightsOption = None,
    include: IncludeOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> int:
    """Keep images of a running process tree, and dump it in time when this node goes away.

    On notice the tree is killed once its image is durable (exit 75). When that cannot be in time, it runs on,
    and the exit code is that of the dump. If the tree ends by itself, it is 0.
    """
    from crcli.pipeline.watching import watch_tree
    from crcli.ui import vigils

    chosen = choose_store(store, endpoint_url)
    options = DumpOptions(
        pid=pid,
        store=chosen.url,
        name=name,
        outcome=Outcome.RUNNING if leave_running else Outcome.KILLED,
        include=parse_paths(include),
        weights=tuple(weights or ()),
        endpoint_url=chosen.endpoint_url,
    )
    wish = keeping(options, every, keep, mtbf, reserve)
    answer = partial(vigils.show_end, pid, as_json)
    return watch_tree(wish, notice or [], grace, vigils.teller(as_json), answer)
