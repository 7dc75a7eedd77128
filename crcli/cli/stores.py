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
def opened(store: str | None, endpoint_url: str | None) -> Iterator[Store]:
    """Give the store that the options and settings name; close it afterwards."""
    chosen = choose_store(store, endpoint_url)
    found = open_store(chosen.url, endpoint_url=chosen.endpoint_url)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def opened_image(image: str, store: str | None, endpoint_url: str | None) -> Iterator[tuple[Store, ImageRef]]:
    """Give the store that an image is in, and its name there; a store in the image's URL wins."""
    url, ref = parse_image(image)
    with opened(url or store, endpoint_url) as found:
        yield found, ref
