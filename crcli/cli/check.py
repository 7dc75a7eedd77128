"""`crcli check`: what a dump of a process, or a restore of an image here, would meet."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import EndpointOption, JsonOption, StoreOption, parse_pid
from crcli.config import choose_store, weights_folders
from crcli.errors import GuardRefused, PreflightRefused


def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="PID|IMAGE", help="A process to dump, or an image to restore here.", show_default=False
        ),
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> int:
    """Say what stands in the way, what will be different afterwards, and what you can do about it.

    Of a process also: for how long a dump would freeze it, how much the store would get, and how long all of
    it would take. Nothing is touched. Exit 10 when the process cannot be dumped as it is, or the store takes
    no image, 20 when the image cannot be restored here.
    """
    from crcli.pipeline.check import check_image, check_process
    from crcli.ui.progress import showing
    from crcli.ui.reports import show_check

    chosen = choose_store(store, endpoint_url)
    with showing(as_json) as progress:
        progress.phase("looking")
        if target.isdecimal():
            report = check_process(parse_pid(target), chosen.url, chosen.endpoint_url)
            refused = PreflightRefused.exit_code
        else:
            report = check_image(target, chosen.url, chosen.endpoint_url, weights_folders())
            refused = GuardRefused.exit_code
    show_check(report, as_json)
    return refused if report.is_refused else 0
