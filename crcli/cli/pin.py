"""`crcli pin` and `crcli unpin`: images that are to stay."""

from __future__ import annotations

from crcli.cli.options import EndpointOption, ImageArgument, JsonOption, StoreOption
from crcli.cli.stores import opened_image


def pin(
    image: ImageArgument,
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Have an image stay: `rm` refuses to remove it, and `--keep` does not count it."""
    _set(image, store, as_json, endpoint_url, is_pinned=True)


def unpin(
    image: ImageArgument,
    store: StoreOption = None,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> None:
    """Let an image that was pinned be removed again."""
    _set(image, store, as_json, endpoint_url, is_pinned=False)


def _set(image: str, store: str | None, as_json: bool, endpoint_url: str | None, *, is_pinned: bool) -> None:
    from crcli.image import pins
    from crcli.ui.reports import show_json
    from crcli.ui.text import printable

    with opened_image(image, store, endpoint_url) as (found, ref):
        done = (pins.pin if is_pinned else pins.unpin)(found, ref)
        if as_json:
            show_json({"image": str(done), "store": found.url, "pinned": is_pinned})
        else:
            print(printable(f"{done} {'is pinned' if is_pinned else 'is not pinned any more'}"))
