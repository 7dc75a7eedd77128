"""`crcli cp`: an image copied to another store."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import EndpointOption, ImageArgument, JsonOption, StoreOption
from crcli.cli.stores import opened_image


def cp(
    image: ImageArgument,
    target: Annotated[
        str,
        typer.Argument(metavar="STORE", help="The URL of the store to copy it to.", show_default=False),
    ],
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Copy an image to another store; what is there already is not copied again."""
    from crcli.image.copy import copy
    from crcli.store.open import open_store
    from crcli.ui.catalog import show_copied
    from crcli.ui.progress import showing

    to_s3 = target.startswith("s3:")
    with (
        opened_image(image, store, endpoint_url, endpoint_is_for_another=to_s3) as (found, ref),
        showing(as_json) as progress,
    ):
        other = open_store(target, endpoint_url=endpoint_url)
        try:
            progress.phase("copying")
            report = copy(found, ref, other, progress.amount)
        finally:
            other.close()
    show_copied(report, as_json)
