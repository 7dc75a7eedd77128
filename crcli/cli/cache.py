"""`crcli cache`: what this host keeps of remote stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from crcli.cli.options import Commands, JsonOption
from crcli.errors import HostLacks

if TYPE_CHECKING:
    from crcli.store.cache import Cache

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Say what this host keeps of what it stored or fetched lately, or remove that.",
)


@app.command("ls")
def ls(as_json: JsonOption = False) -> None:
    """Say which images are here, and how much is kept.

    An image of which all is here is restored without its store (by NAME@ID).
    """
    from crcli.image.cached import describe_cache
    from crcli.ui.cache import show_cache

    show_cache(describe_cache(_cache()), as_json)


@app.command("clear")
def clear(as_json: JsonOption = False) -> None:
    """Remove all that is kept here; stores are not touched."""
    from crcli.ui.cache import show_cleared

    cache = _cache()
    removed = cache.clear()
    if removed.trouble:
        raise HostLacks(
            f"{cache.folder} cannot be cleared: {removed.trouble}", hint="look at who may change it"
        )
    show_cleared(cache.folder, removed, as_json)


def _cache() -> Cache:
    """The cache that settings name, also where it is to keep nothing."""
    from crcli.config import choose_cache
    from crcli.store.cache import Cache

    chosen = choose_cache()
    return Cache(chosen.folder, chosen.limit)
