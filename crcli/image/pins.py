"""Images that are to stay: neither `rm` nor `--keep` removes one that is pinned.

A pin is an object of its own, beside the manifest, which is never written again.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from crcli.errors import ImagePinned, NotFound
from crcli.image.manifest import resolve
from crcli.image.names import PINS, ImageRef, manifest_key, pin_key

if TYPE_CHECKING:
    from crcli.store.base import Store


def pin(store: Store, ref: ImageRef) -> ImageRef:
    """Pin an image (the newest of its name when `ref` has no id); return which it is. Again is no harm.

    Raises NotFound when there is no such image.
    """
    full = resolve(store, ref)
    store.put(pin_key(full.name, full.id), json.dumps({"pinned": time.time()}).encode())
    try:
        store.stat(manifest_key(full.name, full.id))  # looked for last: whoever removes looks for pins first
    except NotFound as error:
        store.delete(pin_key(full.name, full.id))
        raise NotFound(
            f"the store {store.url} has no image {full}", hint="`crcli ls` shows what it holds"
        ) from error
    return full


def unpin(store: Store, ref: ImageRef) -> ImageRef:
    """Let an image be removed again (the newest of its name when `ref` has no id); return which it is.

    It need not have been pinned, nor exist.
    """
    full = resolve(store, ref)
    store.delete(pin_key(full.name, full.id))
    return full


def pinned_ids(store: Store, name: str) -> set[str]:
    """The ids of the images of this name that are pinned."""
    return {info.key.rpartition("/")[2] for info in store.list(f"{PINS}{name}/")}


def refuse_pinned(store: Store, ref: ImageRef) -> None:
    """Raise ImagePinned when this image (with its id) is to stay."""
    try:
        store.stat(pin_key(ref.name, ref.id))
    except NotFound:
        return
    raise ImagePinned(f"{ref} is pinned", hint=f"`crcli unpin {ref}` lets it be removed")
