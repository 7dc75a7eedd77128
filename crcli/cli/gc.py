"""`crcli gc`: what no image refers to goes."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import EndpointOption, JsonOption, StoreOption, parse_seconds
from crcli.cli.stores import opened


def gc(
    store: StoreOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed; remove nothing.")
    ] = False,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", parser=parse_seconds, help="Keep whatever is younger than this."),
    ] = 3600.0,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Free what no image in the store refers to; nothing that a dump in progress may need is touched."""
    from crcli.image.gc import collect_garbage
    from crcli.ui.catalog import show_collected
    from crcli.ui.progress import showing

    with opened(store, endpoint_url) as found, showing(as_json) as progress:
        progress.phase("collecting")
        report = collect_garbage(found, dry_run=dry_run, grace_s=grace)
    show_collected(report, as_json)
