"""Names: of images as users write them, and of objects as the store has them."""

from __future__ import annotations

import os
import re
import time
from calendar import timegm
from typing import NamedTuple

from crcli.errors import UsageError
from crcli.records import Struct
from crcli.store.address import split_name

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\Z")
_ID_PATTERN = r"\d{8}T\d{6}\d{3}-[0-9a-f]{6}"
_ID = re.compile(rf"{_ID_PATTERN}\Z")

IMAGES, INDEXES, PACKS, SESSIONS = "images/", "indexes/", "packs/", "sessions/"
WEIGHTS, PINS = "weights/", "pins/"
LEASES, COLLECTIONS = "leases/", "collections/"

_IN_AN_INDEX = re.compile(rf"{INDEXES}{_ID_PATTERN}\.(index|pages|merged)\Z")
_PACK = re.compile(rf"{PACKS}([0-9a-f]{{2}})/\1[0-9a-f]{{30}}\Z")
_WEIGHTS = re.compile(rf"{WEIGHTS}[0-9a-f]{{64}}\Z")
_ANNOUNCEMENT = re.compile(
    rf"({SESSIONS}{_ID_PATTERN}(-(copy|lazy)-[0-9a-f]{{8}})?|{COLLECTIONS}[0-9a-f]{{16}})\Z"
)


class IndexRef(NamedTuple):
    """What tells of chunks in the store: the index of what a dump brought in, or what that dump merged of
    earlier indexes."""

    id: str
    is_merged: bool = False

    @property
    def key(self) -> str:
        """Where it is."""
        return merged_key(self.id) if self.is_merged else index_key(self.id)


class ImageRef(Struct, frozen=True):
    """An image as a user names it: `id` is empty for "the newest of that name"."""

    name: str
    id: str = ""

    def __str__(self) -> str:
        return f"{self.name}@{self.id}" if self.id else self.name


def new_image_id(after: str = "") -> str:
    """Return an id that sorts by time (UTC, milliseconds), after the id `after`, and does not collide.

    What is newer is decided by ids: where the clock is behind that of whoever made `after`, the new one says
    a millisecond after that.
    """
    now_ms = int(time.time() * 1000)
    if after and after[:18] >= _stamp(now_ms):
        now_ms = _milliseconds(after) + 1
    return f"{_stamp(now_ms)}-{os.urandom(3).hex()}"


def _stamp(now_ms: int) -> str:
    """The time part of an id, from milliseconds since the epoch."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now_ms // 1000))}{now_ms % 1000:03d}"


def _milliseconds(image_id: str) -> int:
    """The reverse of `_stamp`."""
    return timegm(time.strptime(image_id[:15], "%Y%m%dT%H%M%S")) * 1000 + int(image_id[15:18])


def parse_image(text: str) -> tuple[str | None, ImageRef]:
    """Split `NAME[@ID]` or `STORE-URL/NAME[@ID][?OPTIONS]` into the store (None: the default) and the rest.

    Raises UsageError when it is none of these.
    """
    url: str | None = None
    rest = text
    if "://" in text or text.startswith("/"):
        url, rest = split_name(text)
        place, mark, query = (url, "", "") if url.startswith("/") else url.partition("?")
        url = place.removesuffix("/images") + mark + query  # the address of the object itself works as well
    name, at, image_id = rest.partition("@")
    if url is not None and (not url or url.endswith(":/")):  # /NAME, or the URL of no more than a bucket
        raise UsageError(
            f"{text!r} names no image in a store",
            hint="is a variable with the store's URL not set? It looks like s3://bucket/prefix/NAME",
        )
    if not name:
        raise UsageError(
            f"{text!r} names no image", hint="write NAME or NAME@ID, alone or behind the URL of its store"
        )
    check_name(name)
    if at and not image_id:  # not the newest: it may be another than was meant, and `rm` removes it
        raise UsageError(
            f"{text!r} has no id after its @",
            hint=f"is it a variable that is not set? {name} alone is the newest of that name",
        )
    if image_id and not _ID.match(image_id):
        raise UsageError(f"{image_id!r} is not an image id", hint="ids look like 20260131T235959123-0a1b2c")
    return url or None, ImageRef(name, image_id)


def check_name(name: str) -> str:
    """Return `name` if it may name an image; raise UsageError if not."""
    if not _NAME.match(name):
        raise UsageError(
            f"{name!r} cannot name an image",
            hint="use at most 128 letters, digits, '.', '_', '+' and '-', beginning with a letter or digit",
        )
    return name


def is_id(text: str) -> bool:
    """Whether this is the id of an image."""
    return _ID.match(text) is not None


# A store may be a bucket or folder that others use as well: what is not called as below is theirs.


def is_in_an_index(key: str) -> bool:
    """Whether this is the key of an index, or of something that belongs to one."""
    return _IN_AN_INDEX.match(key) is not None


def is_pack(key: str) -> bool:
    """Whether this is the key of a pack."""
    return _PACK.match(key) is not None


def is_weights(key: str) -> bool:
    """Whether this is the key of a file of weights."""
    return _WEIGHTS.match(key) is not None


def is_announcement(key: str) -> bool:
    """Whether this is the key by which somebody says that he is at work."""
    return _ANNOUNCEMENT.match(key) is not None


def is_written_in_parts(key: str) -> bool:
    """Whether this is the key of an object that may be large."""
    return is_pack(key) or is_in_an_index(key) or is_weights(key) or image_at(key) is not None


def suggested_name(comm: str) -> str:
    """A name made from a command's name."""
    cleaned = re.sub(r"[^A-Za-z0-9._+-]+", "-", comm).strip("-._+")
    return cleaned or "image"


def manifest_key(name: str, image_id: str) -> str:
    """Where the manifest of an image is."""
    return f"{IMAGES}{name}/{image_id}"


def image_at(key: str) -> ImageRef | None:
    """The image whose manifest has this key; None for what somebody else has put beside them."""
    name, _, image_id = key.removeprefix(IMAGES).partition("/")
    return ImageRef(name, image_id) if _NAME.match(name) and _ID.match(image_id) else None


def pin_key(name: str, image_id: str) -> str:
    """Where it stands that an image is to stay."""
    return f"{PINS}{name}/{image_id}"


def index_key(image_id: str) -> str:
    """Where the index of the chunks that a dump stored is."""
    return f"{INDEXES}{image_id}.index"


def pages_key(image_id: str) -> str:
    """Where the page digests that belong to an index are."""
    return f"{INDEXES}{image_id}.pages"


def merged_key(image_id: str) -> str:
    """Where it is what a dump merged of earlier indexes."""
    return f"{INDEXES}{image_id}.merged"


def pack_key(pack: bytes) -> str:
    """Where a pack is."""
    text = pack.hex()
    return f"{PACKS}{text[:2]}/{text}"


def weights_key(digest: str) -> str:
    """Where it stands which chunks a file of weights consists of, by the BLAKE3 of the file (hexadecimal)."""
    return f"{WEIGHTS}{digest}"


def lease_key(name: str, number: int) -> str:
    """Where the lease of that number on a name is; keys sort as their numbers do."""
    return f"{LEASES}{name}/{number:012d}"
