"""`crcli ls`: what a store holds."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import EndpointOption, JsonOption, StoreOption
from crcli.cli.stores import opened
from crcli.errors import NotFound, UsageError


def ls(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Only images of this name.", show_default=False)
    ] = "",
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """List the images in a store, by name and then by time."""
    from crcli.image.catalog import list_entries
    from crcli.image.claims import all_claims
    from crcli.image.names import check_name
    from crcli.ui.catalog import show_entries
    from crcli.ui.progress import showing

    if "/" in name:
        raise UsageError(f"{name!r} is no name of images", hint="the store is named with --store")
    if name:
        check_name(name)
    with opened(store, endpoint_url) as found:
        try:
            with showing(as_json) as progress:
                progress.phase("listing")
                entries = list_entries(found, name)
                claims = all_claims(found, {entry.ref.name for entry in entries})
        except NotFound:
            if store:
                raise
            entries, claims = [], []  # the default store comes into being with the first dump
        show_entries(entries, {claim.name: claim for claim in claims}, found.url, as_json, name)
