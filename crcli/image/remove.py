"""An image removed: it ceases to exist with its manifest. `gc` frees what only it needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.errors import NotFound
from crcli.image.manifest import resolve
from crcli.image.names import ImageRef, manifest_key
from crcli.image.pins import refuse_pinned

if TYPE_CHECKING:
    from crcli.store.base import Store


def remove(store: Store, ref: ImageRef) -> ImageRef:
    """Remove one image (the newest of its name when `ref` has no id); return which it was.

    The manifest need not be readable. Raises NotFound when there is no such image, ImagePinned when it is to
    stay.
    """
    full = resolve(store, ref)
    refuse_pinned(store, full)
    key = manifest_key(full.name, full.id)
    try:
        store.stat(key)
    except NotFound as error:
        raise NotFound(
            f"the store {store.url} has no image {full}", hint="`crcli ls` shows what it holds"
        ) from error
    store.delete(key)
    return full
