"""How bytes are stored: as they are, or compressed with Zstandard where that pays."""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from crcli.errors import ImageDamaged

if TYPE_CHECKING:
    from crcli.store.base import Buffer


class Codec(IntEnum):
    """How a chunk or section is stored. The numbers are part of the format."""

    RAW = 0
    ZSTD = 1


_LEVEL, _HURRIED_LEVEL = 1, -5
_SAMPLE = 4096
_PAYS = 0.9
"""Compressed size over raw size above which bytes are stored raw: reading them back is then free."""

_contexts = threading.local()


def compress(raw: Buffer, *, hurry: bool = False) -> tuple[Codec, Buffer]:
    """Return how `raw` is best stored, and the bytes to store (`raw` itself when compressing does not pay).

    A sample of three pages decides first whether to try at all: random bytes and packed weights cost
    next to nothing.
    """
    if len(raw) > 4 * _SAMPLE and not _promising(memoryview(raw)):
        return Codec.RAW, raw
    stored = _compressor(_HURRIED_LEVEL if hurry else _LEVEL).compress(raw)
    if len(stored) > len(raw) * _PAYS:
        return Codec.RAW, raw
    return Codec.ZSTD, stored


def decompress(codec: Codec, stored: Buffer, raw_size: int, name: str) -> Buffer:
    """Return the raw bytes; raise ImageDamaged (naming `name`) when they are not `raw_size` long."""
    if codec == Codec.RAW:
        raw: Buffer = stored
    else:
        import zstandard

        try:
            if zstandard.frame_content_size(stored) != raw_size:  # before anything is allocated for it
                raise ImageDamaged(f"{name} claims to hold another number of bytes than was written")
            raw = _decompressor().decompress(stored, max_output_size=raw_size)
        except zstandard.ZstdError as error:
            raise ImageDamaged(f"{name} cannot be decompressed: {error}") from error
    if len(raw) != raw_size:
        raise ImageDamaged(f"{name}: {len(raw)} bytes where {raw_size} were written")
    return raw


def _promising(raw: memoryview) -> bool:
    middle = len(raw) // 2 & ~(_SAMPLE - 1)
    sample = b"".join((raw[:_SAMPLE], raw[middle : middle + _SAMPLE], raw[-_SAMPLE:]))
    return len(_compressor(_HURRIED_LEVEL).compress(sample)) < len(sample) * _PAYS


def _compressor(level: int) -> Any:
    """This thread's compressor for one level (making one costs more than a small chunk)."""
    made = _contexts.__dict__.get(f"level {level}")
    if made is None:
        import zstandard

        made = _contexts.__dict__[f"level {level}"] = zstandard.ZstdCompressor(
            level=level, write_checksum=False, write_content_size=True
        )
    return made


def _decompressor() -> Any:
    made = _contexts.__dict__.get("decompress")
    if made is None:
        import zstandard

        made = _contexts.__dict__["decompress"] = zstandard.ZstdDecompressor()
    return made
