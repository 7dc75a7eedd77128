"""`crcli rm`: an image removed."""

from __future__ import annotations

from crcli.cli.options import EndpointOption, ImageArgument, JsonOption, StoreOption
from crcli.cli.stores import opened_image


def rm(
    image: ImageArgument,
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Remove an image; NAME alone means the newest of that name. `crcli gc` frees its space."""
    from crcli.criu.netlock import remove_for
    from crcli.errors import ImageDamaged
    from crcli.image.manifest import load
    from crcli.image.remove import remove
    from crcli.ui.reports import show_json
    from crcli.ui.text import printable

    with opened_image(image, store, endpoint_url, cached=True) as (found, ref):
        try:
            run_id = str(load(found, ref).meta.get("run_id", ""))
        except ImageDamaged:
            run_id = ""
        removed = remove(found, ref)
        remove_for(run_id)  # its connections will not be kept by anybody any more
        if as_json:
            show_json({"image": str(removed), "store": found.url, "removed": True})
        else:
            print(printable(f"{removed} removed from {found.url}; `crcli gc` frees its space"))
