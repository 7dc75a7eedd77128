"""From a command line's IMAGE, --store and --endpoint-url to an open store."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.config import choose_store
from crcli.image.names import ImageRef, parse_image
from crcli.store.open import open_store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.store.base import Store


@contextmanager
def opened(
    store: str | None,
    endpoint_url: str | None,
    *,
    cached: bool = False,
    endpoint_is_for_another: bool = False,
) -> Iterator[Store]:
    """Give the store that the options and settings name, with this host's cache in front of it if wanted;
    close it afterwards."""
    from crcli.image.cached import open_cached

    chosen = choose_store(store, endpoint_url, endpoint_is_for_another=endpoint_is_for_another)
    found = (open_cached if cached else open_store)(chosen.url, endpoint_url=chosen.endpoint_url)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def opened_image(
    image: str,
    store: str | None,
    endpoint_url: str | None,
    *,
    cached: bool = False,
    endpoint_is_for_another: bool = False,
) -> Iterator[tuple[Store, ImageRef]]:
    """Give the store that an image is in, and its name there; a store in the image's URL wins."""
    url, ref = parse_image(image)
    with opened(
        url or store, endpoint_url, cached=cached, endpoint_is_for_another=endpoint_is_for_another
    ) as found:
        yield found, ref
