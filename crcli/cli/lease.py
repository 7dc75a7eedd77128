"""`crcli lease`: who holds which name in a store."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import Commands, EndpointOption, JsonOption, StoreOption
from crcli.cli.stores import opened
from crcli.errors import NotFound

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Say who holds which name, or take a name from a holder that is surely dead.",
)


@app.command("ls")
def ls(store: StoreOption = None, as_json: JsonOption = False, endpoint_url: EndpointOption = None) -> None:
    """Say which names are claimed, by whom, and when each holder was last heard of.

    Left out are names that were given up, and holders that have ended on this host.
    """
    from crcli.image.claims import all_claims
    from crcli.ui.leases import show_claims

    with opened(store, endpoint_url) as found:
        try:
            claims = all_claims(found)
        except NotFound:
            if store:
                raise
            claims = []  # the default store comes into being with the first dump
        show_claims(claims, found.url, as_json)


@app.command("break")
def break_(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name to give free.", show_default=False)],
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Give a name free whose holder is surely dead, without waiting for its lease to run out.

    A holder that lives after all learns of it within seconds, and ends its job; until then two may run. It is
    refused (exit 23) for a holder, or a job, that lives on this host.
    """
    from crcli.image.lease import break_lease
    from crcli.image.names import check_name
    from crcli.ui.leases import show_broken

    with opened(store, endpoint_url) as found:
        show_broken(break_lease(found, check_name(name), "crcli lease break"), found.url, as_json)
