"""The container that manifests and indexes are written in: named sections, each compressed and hashed.

Layout (little-endian; FORMAT.md has the whole of it):

    magic 8 | version u16 | kind u16 | sections u32
    sections x ( tag 4 | codec u32 | offset u64 | stored u64 | raw u64 | BLAKE3 of the raw bytes 32 )
    section bodies
    BLAKE3 of everything before it 32
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING

from blake3 import blake3

from crcli.errors import ImageDamaged, ImageTooNew
from crcli.image.codec import Codec, compress, decompress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crcli.store.base import Buffer

MAGIC = b"crcli\x00\x1a\n"
VERSION = 2
"""The newest version that this crcli reads. It writes the oldest that has what an object needs."""

_HEADER = struct.Struct("<8sHHI")
_ENTRY = struct.Struct("<4sIQQQ32s")
_SEAL = 32
_PEEK = 64 << 10
"""How much of a container is read at first when one section is wanted: enough for most heads (bytes)."""

_RAW_LIMIT = 4 << 30
"""An object whose sections say that they are larger than this together (bytes) is damaged: nothing is
allocated for it."""

_HEAD, _HEAD_LIMIT = "META", 256 << 20
"""The same for the section that is text, of which whoever reads it makes many times as much."""


class ContainerKind(IntEnum):
    """What a container holds. The numbers are part of the format."""

    MANIFEST = 1
    INDEX = 2
    WEIGHTS = 3


def pack_container(kind: ContainerKind, sections: Mapping[str, Buffer], version: int = 1) -> bytes:
    """Return the container that holds `sections` (tag of four ASCII letters -> bytes)."""
    bodies: list[Buffer] = []
    entries: list[bytes] = []
    offset = _HEADER.size + _ENTRY.size * len(sections)
    for tag, raw in sections.items():
        codec, stored = compress(raw)
        entries.append(
            _ENTRY.pack(tag.encode("ascii"), codec, offset, len(stored), len(raw), blake3(raw).digest())
        )
        bodies.append(stored)
        offset += len(stored)
    body = b"".join([_HEADER.pack(MAGIC, version, kind, len(sections)), *entries, *bodies])
    return body + blake3(body).digest()


def unpack_container(data: bytes, kind: ContainerKind, name: str) -> dict[str, bytes]:
    """Return the sections of a container after checking every hash in it.

    `name` is what messages call it. Raises ImageDamaged when anything is not as it was written, or was
    written by a newer crcli than this one can read (ImageTooNew).
    """
    if len(data) < _HEADER.size + _SEAL:
        raise ImageDamaged(f"{name} is cut short: {len(data)} bytes")
    magic, version, found, count = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ImageDamaged(f"{name} is not a crcli object")
    if version > VERSION:
        raise ImageTooNew(
            f"{name} is of format {version}; this crcli reads up to {VERSION}", hint="use a newer crcli"
        )
    if blake3(memoryview(data)[:-_SEAL]).digest() != data[-_SEAL:]:
        raise ImageDamaged(f"{name} was altered or damaged: its seal does not match")
    if found != kind:
        raise ImageDamaged(f"{name} is a container of another kind ({found})")
    sections: dict[str, bytes] = {}
    total = 0
    for number in range(count):
        place = _HEADER.size + number * _ENTRY.size
        if place + _ENTRY.size > len(data):
            raise ImageDamaged(f"{name} names more sections than it has")
        tag, codec, offset, stored, raw, digest = _ENTRY.unpack_from(data, place)
        if offset + stored > len(data) - _SEAL:
            raise ImageDamaged(f"{name}: section {number} lies outside of the object")
        if (known := _tag(tag)) in sections:
            raise ImageDamaged(f"{name} has the section {known} twice")
        total += raw
        if total > _RAW_LIMIT:
            raise ImageDamaged(f"{name} is too large: its sections are of {total} bytes and more")
        _check_head(known, raw, name)
        body = decompress(_codec(codec, name), memoryview(data)[offset : offset + stored], raw, name)
        if blake3(body).digest() != digest:
            raise ImageDamaged(f"{name}: section {number} is not what its hash says")
        sections[known] = bytes(body)
    return sections


def peek_section(
    read: Callable[[int, int], bytes], size: int, wanted: str, kind: ContainerKind, name: str
) -> bytes:
    """Return one section of a container of `size` bytes without reading the rest of it.

    `read(offset, length)` gives bytes of the object. Only this section's hash is checked, which is enough to
    show what is in it, and not enough to restore from. Raises ImageDamaged.
    """
    head = read(0, min(size, _PEEK))
    if len(head) < _HEADER.size:
        raise ImageDamaged(f"{name} is cut short: {size} bytes")
    magic, version, found, count = _HEADER.unpack_from(head)
    if magic != MAGIC or version > VERSION or found != kind:
        raise ImageDamaged(f"{name} is not an object of that kind, or of a newer format")
    for number in range(min(count, (len(head) - _HEADER.size) // _ENTRY.size)):
        tag, codec, offset, stored, raw, digest = _ENTRY.unpack_from(
            head, _HEADER.size + number * _ENTRY.size
        )
        if _tag(tag) != wanted:
            continue
        _check_head(wanted, raw, name)
        if raw > _RAW_LIMIT or offset + stored > size - _SEAL:
            raise ImageDamaged(f"{name}: section {wanted} lies outside of the object")
        inside = offset + stored <= len(head)
        body = decompress(
            _codec(codec, name), head[offset : offset + stored] if inside else read(offset, stored), raw, name
        )
        if blake3(body).digest() != digest:
            raise ImageDamaged(f"{name}: section {wanted} is not what its hash says")
        return bytes(body)
    raise ImageDamaged(f"{name} has no section {wanted}")


def _tag(tag: bytes) -> str:
    return tag.decode("ascii", "replace")


def _check_head(tag: str, raw: int, name: str) -> None:
    if tag == _HEAD and raw > _HEAD_LIMIT:
        raise ImageDamaged(f"{name} is too large: its head is of {raw} bytes")


def _codec(number: int, name: str) -> Codec:
    try:
        return Codec(number)
    except ValueError as error:
        raise ImageDamaged(f"{name} is stored in a way that this crcli does not know ({number})") from error
