"""`crcli weights`: files of weights prepared, put into a store, and looked at."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from crcli.cli.options import Commands, EndpointOption, JsonOption, StoreOption
from crcli.cli.stores import opened

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Prepare files of weights, put them into a store, say what an image has left out.",
)

_PATTERN = set("*?[")

Paths = Annotated[
    list[str], typer.Argument(metavar="PATH...", help="Files, folders or patterns.", show_default=False)
]


@app.command("index")
def index(paths: Paths, as_json: JsonOption = False) -> None:
    """Prepare the sample index of files of weights, so that the next dump need not.

    The index is kept by the identity of the file; one that was changed is indexed again.
    """
    from crcli.pipeline.weights import index_files
    from crcli.ui.progress import showing
    from crcli.ui.weights import show_indexed

    with showing(as_json) as progress:
        progress.phase("indexing")
        done = index_files(paths, progress.amount)
    show_indexed(done, as_json)


@app.command("push")
def push(
    paths: Paths,
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Put files of weights into the store once, so that a node without them restores all the same.

    All images that refer to a file share what is pushed; what the store has is not sent again.
    """
    from crcli.pipeline.weights import push_files
    from crcli.ui.progress import showing
    from crcli.ui.weights import show_pushed

    with opened(store, endpoint_url) as found, showing(as_json) as progress:
        progress.phase("pushing")
        done = push_files(found, paths, progress.amount)
        show_pushed(done, found.url, as_json)


@app.command("ls")
def ls(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE|PATH",
            help="An image: what it left out. A path: what is known of the files there. "
            "Nothing: what was pushed into the store.",
            show_default=False,
        ),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Say what an image has left out, what is known of files, or what the store holds of weights."""
    from crcli.cli.stores import opened_image
    from crcli.pipeline.weights import files_known, image_weights
    from crcli.ui import weights as ui

    if target is None:
        from crcli.image.weights import list_pushed

        with opened(store, endpoint_url) as found:
            ui.show_in_store(list_pushed(found), found.url, as_json)
    elif _is_path(target):
        ui.show_files(files_known([target]), as_json)
    else:
        with opened_image(target, store, endpoint_url) as (found, ref):
            ui.show_left_out(*image_weights(found, ref), as_json)


def _is_path(target: str) -> bool:
    """Whether this means files here: there is one, it is a pattern, or a path, and not that of an image in
    the folder of a store."""
    if os.path.exists(target) or ("://" not in target and not _PATTERN.isdisjoint(target)):
        return True
    above = os.path.dirname(target)
    return bool(above) and "://" not in target and not os.path.isdir(f"{above}/images")


@app.command("rm")
def rm(
    digest: Annotated[
        str, typer.Argument(metavar="BLAKE3", help="As `weights ls` shows it, or its beginning.")
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Remove a file of weights from the store; `gc` frees its space.

    Images that refer to it can then be restored only where the file is.
    """
    from crcli.image.weights import remove_pushed
    from crcli.ui.weights import show_removed

    with opened(store, endpoint_url) as found:
        show_removed(remove_pushed(found, digest), found.url, as_json)
