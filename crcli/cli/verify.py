"""`crcli verify`: an image read back whole."""

from __future__ import annotations

from crcli.cli.options import EndpointOption, ImageArgument, JsonOption, StoreOption
from crcli.cli.stores import opened_image
from crcli.errors import ImageDamaged


def verify(
    image: ImageArgument,
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Read an image back and check every byte of it; list the damage, and exit with 22, if there is any."""
    from crcli.image.verify import verify as run
    from crcli.ui.catalog import show_verified
    from crcli.ui.progress import showing
    from crcli.ui.text import count

    with opened_image(image, store, endpoint_url) as (found, ref), showing(as_json) as progress:
        progress.phase("reading")
        report = run(found, ref, progress.amount)
    if report.damage:
        raise ImageDamaged(
            f"{report.image} is damaged in {count(len(report.damage), 'place')}",
            hint="use an older image, or a copy of this one in another store",
            findings=report.damage,
        )
    show_verified(report, as_json)
