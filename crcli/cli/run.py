"""`crcli run`: parse, call pipeline.run, end as the job does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
from crcli.cli.options import (
    EndpointOption,
    GpuMapOption,
    IncludeOption,
    StoreOption,
    WeightsMapOption,
    parse_pairs,
    parse_paths,
    parse_seconds,
)
from crcli.config import choose_store, weights_folders
from crcli.errors import CrcliError
from crcli.pipeline.stages import (
    RESERVE_S,
    ChangedFiles,
    DumpOptions,
    OnFailure,
    OnMismatch,
    PidNamespace,
    RestoreOptions,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.pipeline.vigil import Event


def run(
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="The job's command line.", show_default=False),
    ],
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="The job's name, and that of its images and its lease.", show_default=False
        ),
    ],
    store: StoreOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start afresh, whatever images there are.")] = False,
    on_mismatch: Annotated[
        OnMismatch,
        typer.Option(help="What to do when the image is of another command, configuration or weights."),
    ] = OnMismatch.REFUSE,
    on_failure: Annotated[
        OnFailure,
        typer.Option(
            help="What to do when the image cannot be restored here: fail with the reason's exit code, start "
            "afresh (cold), or end with 75 for another node to try (retry)."
        ),
    ] = OnFailure.FAIL,
    files: Annotated[
        ChangedFiles,
        typer.Option(
            help="Files of the image that were changed here since it was taken: do not bring the job back "
            "(refuse), put the image's in their place and today's aside, or go on with the host's."
        ),
    ] = ChangedFiles.REFUSE,
    config: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A file that makes it another job when its contents change; repeatable.",
            show_default=False,
        ),
    ] = None,
    variable: Annotated[
        list[str] | None,
        typer.Option(
            "--variable",
            metavar="NAME",
            help="An environment variable that makes it another job when it changes; repeatable.",
            show_default=False,
        ),
    ] = None,
    weights_map: WeightsMapOption = None,
    gpu_map: GpuMapOption = None,
    lazy: Annotated[bool, typer.Option("--lazy", help="Let it run before all its memory is here.")] = False,
    every: EveryOption = "",
    keep: KeepOption = KEEP,
    mtbf: MtbfOption = "",
    notice: NoticeOption = None,
    grace: GraceOption = None,
    reserve: ReserveOption = RESERVE_S,
    weights: WeightsOption = None,
    include: IncludeOption = None,
    pid_namespace: Annotated[
        PidNamespace,
        typer.Option(help="auto: one of its own where allowed, so that its pids are free everywhere."),
    ] = PidNamespace.AUTO,
    cpu_baseline: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="What a fleet's CPUs have in common (`crcli doctor --cpu-baseline`): the job is started so "
            "that it uses no more, and its images fit them all.",
            show_default=False,
        ),
    ] = "",
    claim_wait: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long to wait while another has the name. Default: until it is seen whether it lives.",
            parser=parse_seconds,
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        str,
        typer.Option(
            metavar="FILE", help="Write what was done there, as one JSON object.", show_default=False
        ),
    ] = "",
    endpoint_url: EndpointOption = None,
) -> int:
    """Run COMMAND as the job NAME: start it, or bring it back if the store holds an image of it.

    When this node goes away the job is dumped in time, and crcli ends with 75: the same command line, here or
    elsewhere, goes on with it. Otherwise crcli ends as the job does, with its exit code.
    """
    from crcli.guard.baseline import read_baseline
    from crcli.pipeline import run as story
    from crcli.ui.errors import as_object
    from crcli.ui.vigils import teller

    tell = teller(as_json=False)
    try:
        chosen = choose_store(store, endpoint_url)
        dump = DumpOptions(
            pid=0,
            store=chosen.url,
            include=parse_paths(include),
            weights=tuple(weights or ()),
            endpoint_url=chosen.endpoint_url,
        )
        options = story.RunOptions(
            name=name,
            store=chosen.url,
            command=tuple(command),
            keeping=keeping(dump, every, keep, mtbf, reserve),
            restore=RestoreOptions(
                image=name,
                store=chosen.url,
                weights_map=parse_pairs(weights_map, "--weights-map"),
                weights_folders=weights_folders(),
                changed_files=files,
                lazy=lazy,
                gpu_map=parse_pairs(gpu_map, "--gpu-map"),
            ),
            endpoint_url=chosen.endpoint_url,
            fresh=fresh,
            on_mismatch=on_mismatch,
            on_failure=on_failure,
            notices=tuple(notice or ()),
            grace_s=grace,
            baseline=read_baseline(cpu_baseline) if cpu_baseline else None,
            config=tuple(config or ()),
            variables=tuple(variable or ()),
            pid_namespace=pid_namespace,
            claim_wait_s=claim_wait,
        )
        done = story.run(options, tell)
    except CrcliError as error:
        _write(report, {"error": as_object(error)}, tell)
        raise
    _write(report, done.as_json(), tell)
    return done.exit_code


def _write(path: str, done: dict[str, Any], tell: Callable[[Event], None]) -> None:
    if not path:
        return
    from crcli.ui.text import json_text

    try:
        with open(path, "w") as file:
            file.write(json_text(done))
    except OSError as error:
        from crcli.pipeline.vigil import Event

        tell(Event("report", f"the report cannot be written to {path}: {error.strerror}"))
