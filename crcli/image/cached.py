"""Images that this host has at hand, because it stored or fetched them lately.

A remote store is opened with a cache in front of it. What the cache holds of an image is described by the
manifest that it keeps too; a restore needs no store at all where both are there.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

from crcli.config import choose_cache
from crcli.errors import ImageDamaged, NotFound, StoreUnreachable
from crcli.image.manifest import Manifest, decode_as, load, resolve
from crcli.image.names import IMAGES, INDEXES, PACKS, WEIGHTS, ImageRef, manifest_key
from crcli.image.packs import plan_reads, span
from crcli.records import Struct, asdict
from crcli.store.address import StoreAddress
from crcli.store.cache import Cache
from crcli.store.caching import CachingStore, Kinds, plain_name, recall
from crcli.store.open import open_store

if TYPE_CHECKING:
    from crcli.store.base import Store

KINDS = Kinds(in_pieces=PACKS, lasting=INDEXES, named=(IMAGES, WEIGHTS))

IMPATIENT_S = 1.0
"""How long a store is tried that is only asked whether an image still exists, all of which is here."""


def open_cache() -> Cache | None:
    """This host's cache, as settings have it; None where nothing is to be kept."""
    chosen = choose_cache()
    return Cache(chosen.folder, chosen.limit) if chosen.limit != 0 else None


def open_cached(url: str, *, endpoint_url: str | None = None) -> Store:
    """Return the store at `url`, with this host's cache in front of it, unless it is a directory."""
    address = StoreAddress.parse(url)
    store = open_store(url, endpoint_url=endpoint_url)
    if address.scheme == "file" or (cache := open_cache()) is None:
        return store
    place = f"{address.scheme}://{address.place} {_endpoint(address, endpoint_url)}"
    impatient = partial(open_store, url, endpoint_url=endpoint_url, patience_s=IMPATIENT_S)
    return CachingStore(store, impatient, cache, KINDS, place)


def _endpoint(address: StoreAddress, endpoint_url: str | None) -> str:
    """Which of the servers that have buckets of that name it is."""
    return (
        endpoint_url
        or dict(address.options).get("endpoint_url")
        or os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or ""
    ).rstrip("/")


def load_near(store: Store, ref: ImageRef) -> Manifest:
    """Fetch the manifest of an image, as `image.manifest.load` does; when no answer comes from the store,
    take the cache's, if `ref` has an id and this host has all of the image.

    The newest image of a name is the store's to say: without its answer StoreUnreachable names the newest
    that is here, in its hint.
    """
    if not isinstance(store, CachingStore):
        return load(store, ref)
    if not ref.id:
        try:
            return load(store, resolve(store, ref))
        except StoreUnreachable as error:
            hint = _hint(store, ref.name) or error.hint
            raise StoreUnreachable(error.message, hint=hint) from error
    key = manifest_key(ref.name, ref.id)
    kept = store.recall(key)
    if kept is None or (manifest := _whole(store.cache, kept, ref)) is None:
        manifest = load(store, ref)
        if store.unreachable is not None:
            raise store.unreachable
        return manifest
    with store.impatience():
        return manifest if _is_still(store, key, kept) else load(store, ref)


def _is_still(store: CachingStore, key: str, kept: bytes) -> bool:
    """Whether the store, if it answers, has this object as it was."""
    try:
        return store.get(key) == kept
    except NotFound:
        return False


def _hint(store: CachingStore, name: str) -> str:
    beginning = f"{store.name_of(IMAGES)}{name}~"
    for kept in sorted(store.cache.names(), reverse=True):
        if kept.startswith(beginning):
            ref = ImageRef(name, kept.removeprefix(beginning))
            data = store.recall(manifest_key(ref.name, ref.id))
            if data is not None and _whole(store.cache, data, ref) is not None:
                return f"all of {ref} is on this host: `crcli restore {ref}`, if that is the one you want"
    return ""


def _whole(cache: Cache, data: bytes, ref: ImageRef) -> Manifest | None:
    """The manifest of an image, if a cache has all that it describes, as far as can be told unread."""
    try:
        manifest = decode_as(ref, data)
    except ImageDamaged:
        return None
    return manifest if _holds(cache, manifest) else None


def _holds(cache: Cache, manifest: Manifest) -> bool:
    """Whether a cache has all chunks of an image."""
    packs, chunks = manifest.packs, manifest.chunks
    spans = (span(packs, chunks, group) for group in plan_reads(chunks, range(len(chunks))))
    return all(cache.holds(plain_name(key), offset, length) for key, offset, length in spans)


# --- for people --------------------------------------------------------------------------------------------


class KeptImage(Struct, frozen=True):
    """An image whose manifest is here: the store that it is in, its memory in bytes, whether all is here."""

    image: str
    store: str
    memory_bytes: int
    whole: bool


class CacheReport(Struct, frozen=True):
    """What a cache holds; sizes in bytes. `limit_bytes` is 0 where nothing is to be kept."""

    folder: str
    limit_bytes: int
    bytes: int
    packs: int
    images: list[KeptImage]
    trouble: str
    """Why it holds nothing and takes nothing; empty where it works."""

    def as_json(self) -> dict[str, Any]:
        """The object that `crcli cache ls --json` prints."""
        return {**asdict(self), "images": [asdict(image) for image in self.images]}


def describe_cache(cache: Cache) -> CacheReport:
    """Say what a cache holds."""
    contents = cache.contents()
    found = (_described(cache, name) for name in sorted(contents.files))
    return CacheReport(
        folder=cache.folder,
        limit_bytes=contents.limit,
        bytes=contents.bytes,
        packs=sum(name.startswith(plain_name(PACKS)) for name in contents.files),
        images=sorted(filter(None, found), key=lambda kept: (kept.image, kept.store)),
        trouble=contents.trouble,
    )


def _described(cache: Cache, name: str) -> KeptImage | None:
    """The image whose manifest has this name in the cache, if it is one."""
    _, _, rest = name.partition("~")
    if not rest.startswith(plain_name(IMAGES)) or (kept := recall(cache, name)) is None:
        return None
    try:
        manifest = Manifest.decode(kept[1], rest)
    except ImageDamaged:
        return None
    memory_bytes = manifest.meta.get("counts", {}).get("total", 0)
    return KeptImage(f"{manifest.name}@{manifest.id}", kept[0], memory_bytes, _holds(cache, manifest))
