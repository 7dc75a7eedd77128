"""`crcli restore`: parse, have it done."""

from __future__ import annotations

import os
import re
import signal
from typing import Annotated

import typer

from crcli.cli.options import (
    EndpointOption,
    GpuMapOption,
    ImageArgument,
    JsonOption,
    StoreOption,
    WeightsMapOption,
    parse_pairs,
)
from crcli.cli.restoring import bring_back, options_of
from crcli.errors import UsageError
from crcli.guard.names import BLOCKERS
from crcli.pipeline.stages import ChangedFiles, PidNamespace, Stdio, TcpPolicy

_MAPPING = re.compile(r"(\d{1,5})=(\d{1,5})", re.ASCII)
_UNHANDLED = (signal.SIGKILL, signal.SIGSTOP)


def _ports(texts: list[str]) -> dict[int, int]:
    """Parse every OLD=NEW of --port."""
    ports: dict[int, int] = {}
    for text in texts:
        parsed = _MAPPING.fullmatch(text)
        old, new = (int(parsed[1]), int(parsed[2])) if parsed else (0, 0)
        if not 0 < old < 1 << 16 or not 0 < new < 1 << 16:
            raise UsageError(
                f"--port {text} is not OLD=NEW", hint="two ports from 1 to 65535, as in 8080=9090"
            )
        if old == new:
            raise UsageError(f"--port {text} changes nothing")
        if old in ports or new in ports.values():
            raise UsageError(f"--port {text}: one of its ports was given before")
        ports[old] = new
    return ports


def _signal(text: str) -> int:
    """Parse the name or number of a signal that a program can handle."""
    name = text.upper() if text.upper().startswith("SIG") else f"SIG{text.upper()}"
    known = signal.Signals.__members__.get(name)
    is_number = text.isascii() and text.isdecimal() and len(text) <= 3
    number = int(text) if is_number else int(known or 0)
    if not 0 < number < signal.NSIG:
        raise UsageError(
            f"--signal {text}: there is no such signal", hint="a name or number, as in USR1 or 10"
        )
    if number in _UNHANDLED:
        raise UsageError(f"--signal {text}: no program can take that for a message", hint="USR1, for example")
    return number


def restore(
    image: ImageArgument,
    store: StoreOption = None,
    lazy: Annotated[
        bool,
        typer.Option(
            "--lazy", help="Let the tree run at once, and fetch its memory meanwhile: what it touches first."
        ),
    ] = False,
    eager: Annotated[
        bool, typer.Option("--eager", help="Fill all memory before the tree runs (the default).")
    ] = False,
    pid_namespace: Annotated[
        PidNamespace,
        typer.Option(help="auto: a namespace of its own when its pids are taken here.", case_sensitive=False),
    ] = PidNamespace.AUTO,
    tcp: Annotated[
        TcpPolicy,
        typer.Option(help="auto: connections inside the tree live on, those to outside are closed."),
    ] = TcpPolicy.AUTO,
    stdio: Annotated[
        Stdio, typer.Option(help="Where a lost terminal, and pipes to processes not here, lead.")
    ] = Stdio.LOG,
    files: Annotated[
        ChangedFiles,
        typer.Option(
            help="Files of the image that differ here: refuse, take the image's, or keep the host's."
        ),
    ] = ChangedFiles.REFUSE,
    weights_map: WeightsMapOption = None,
    gpu_map: GpuMapOption = None,
    port: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="Listen on port NEW instead of OLD, TCP and UDP; may be repeated.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Give the tree this folder as its root: all of its paths are looked for below it.",
            show_default=False,
        ),
    ] = None,
    send: Annotated[
        str | None,
        typer.Option(
            "--signal",
            metavar="NAME|NUMBER",
            help="A signal for the tree's root, sent once it has run for a second.",
            show_default=False,
        ),
    ] = None,
    force_guard: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FINDING", help="Go on in spite of this finding of `crcli check IMAGE`; repeatable."
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Stay, pass signals on, and end with the tree's exit code.")
    ] = False,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> int:
    """Bring the process tree of IMAGE back, detached from this command.

    Nothing of an image is used before its hash was checked. When anything fails, nothing is left running.
    """
    if lazy and eager:
        raise UsageError("--lazy and --eager exclude each other")
    if stdio is Stdio.INHERIT and not wait:
        raise UsageError(
            "--stdio inherit needs --wait", hint="nobody would be here to pass input and output on"
        )
    if root is not None and not os.path.isdir(root):
        raise UsageError(f"--root {root}: there is no such folder")
    if root is not None and pid_namespace is PidNamespace.HOST:
        raise UsageError("--root needs a pid namespace", hint="leave out --pid-namespace host")
    forced = tuple(force_guard or ())
    if unknown := sorted(set(forced) - set(BLOCKERS)):
        raise UsageError(
            f"--force-guard: no finding called {', '.join(unknown)} can stop a restore",
            hint=f"those that can are {', '.join(BLOCKERS)}",
        )
    options = options_of(
        image,
        store,
        endpoint_url,
        pid_namespace=pid_namespace,
        tcp=tcp,
        stdio=stdio,
        changed_files=files,
        weights_map=parse_pairs(weights_map, "--weights-map"),
        ports=_ports(port or []),
        root=os.path.realpath(root).rstrip("/") if root is not None else "",
        signal=0 if send is None else _signal(send),
        forced=forced,
        lazy=lazy,
        gpu_map=parse_pairs(gpu_map, "--gpu-map"),
    )
    return bring_back(options, wait=wait, as_json=as_json)
