"""`crcli show`: one image, described."""

from __future__ import annotations

from crcli.cli.options import EndpointOption, ImageArgument, JsonOption, StoreOption
from crcli.cli.stores import opened_image


def show(
    image: ImageArgument,
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Say what an image holds and where it came from."""
    from crcli.image.claims import claimed_by
    from crcli.image.manifest import load
    from crcli.ui.catalog import show_image

    with opened_image(image, store, endpoint_url) as (found, ref):
        show_image(load(found, ref), claimed_by(found, ref.name), found.url, as_json)
