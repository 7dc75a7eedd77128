"""`crcli dump`: what can be asked for."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.dumping import options_of, take
from crcli.cli.options import (
    EndpointOption,
    IncludeOption,
    JsonOption,
    StoreOption,
    parse_paths,
    parse_pid,
    parse_seconds,
)
from crcli.errors import UsageError
from crcli.pipeline.stages import NOTIFY_WAIT_S, PRE_COPY_AUTO


def dump(
    pids: Annotated[
        list[int],
        typer.Argument(
            metavar="PID...",
            help="The root of the tree, or of each tree.",
            parser=parse_pid,
            show_default=False,
        ),
    ],
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="The image's name. Default: the command's. With several trees each is NAME-PID.",
            show_default=False,
        ),
    ] = "",
    store: StoreOption = None,
    leave_running: Annotated[
        bool, typer.Option("--leave-running", help="Let the tree run on once it was taken.")
    ] = False,
    leave_stopped: Annotated[
        bool, typer.Option("--leave-stopped", help="Leave the tree stopped (SIGSTOP) instead of killing it.")
    ] = False,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH|auto",
            help="Files of model weights (or folders, patterns) whose bytes need not be stored; may be "
            "repeated. auto: those that the tree has open, names, or finds in its model cache.",
            show_default=False,
        ),
    ] = None,
    include: IncludeOption = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="When this node goes away, from now.",
            parser=parse_seconds,
            show_default=False,
        ),
    ] = None,
    notify_wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long programs that use crcli.notify may get ready; 0: not told.",
            parser=parse_seconds,
        ),
    ] = NOTIFY_WAIT_S,
    pre_copy: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="Copy memory in N rounds (1-9) while the tree runs, and freeze it for the rest. auto: as "
            "many as pay, where the kernel tracks writes.",
            show_default=False,
        ),
    ] = "",
    no_trial: Annotated[
        bool, typer.Option("--no-trial", help="Skip the trial restore that proves the image before the kill.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and what it would take; touch nothing.")
    ] = False,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> int:
    """Freeze the process tree of PID, ship it to the store, and let it go.

    The tree is killed only when its image is durable and was proven by a trial restore; whatever fails
    before, it runs on as if nothing had happened.

    With several PIDs each tree is dumped as if alone, whatever becomes of the others. The exit code is 0 when
    all are done, else that of the worst: 12 before 1, 2, 40, 31, 30, 11 and 10.
    """
    if leave_running and leave_stopped:
        raise UsageError("--leave-running and --leave-stopped exclude each other")
    options = options_of(
        pids[0],
        store,
        endpoint_url,
        leave_running=leave_running,
        leave_stopped=leave_stopped,
        name=name,
        include=parse_paths(include),
        trial=not no_trial,
        dry_run=dry_run,
        deadline_s=deadline,
        weights=tuple(weights or ()),
        notify_wait_s=notify_wait,
        pre_copy=_rounds(pre_copy),
    )
    return take(pids, options, as_json=as_json)


def _rounds(text: str) -> int:
    """What --pre-copy asks for."""
    if text in ("", "auto"):
        return PRE_COPY_AUTO if text else 0
    if len(text) == 1 and text.isdecimal() and int(text):
        return int(text)
    raise UsageError(f"--pre-copy takes a number from 1 to 9, or auto, not {text!r}")
