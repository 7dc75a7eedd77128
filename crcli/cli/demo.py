"""`crcli demo`: the main job in small."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import EndpointOption, JsonOption

StoreForIt = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Where the image is meanwhile; `crcli gc` frees its space. Default: a temporary directory.",
        show_default=False,
    ),
]


def demo(store: StoreForIt = None, as_json: JsonOption = False, endpoint_url: EndpointOption = None) -> None:
    """Start a small agent, dump it, see it gone, restore it, and see it go on; leave nothing behind.

    Exits with 0 only if every step was really observed.
    """
    from crcli.demo.story import run
    from crcli.ui.demo import DemoScreen

    screen = DemoScreen(as_json)
    screen.end(run(store, endpoint_url, screen.step))
