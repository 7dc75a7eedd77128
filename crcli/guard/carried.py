"""Files that travel in an image, compared with what stands in their place: by hashes, nothing is fetched."""

from __future__ import annotations

import os
import stat
from enum import StrEnum
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.image.manifest import StoredFile
    from crcli.image.tables import Chunk


class Standing(StrEnum):
    """How the file at a path compares with the one in the image."""

    MISSING = "missing"
    SAME = "same"
    GROWN = "grown"
    CHANGED = "changed"


def compare(file: StoredFile, chunks: Sequence[Chunk]) -> Standing:
    """How the file at this path stands to the image's; `chunks` is the image's table."""
    try:
        fd = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return Standing.MISSING
    except OSError:
        return Standing.CHANGED
    try:
        status = os.fstat(fd)
        size = status.st_size
        if size < file.size or not stat.S_ISREG(status.st_mode):
            return Standing.CHANGED
        at = 0
        for chunk in (chunks[number] for number in file.chunks):
            if blake3(os.pread(fd, chunk.raw, at)).digest() != chunk.digest:
                return Standing.CHANGED
            at += chunk.raw
        return Standing.SAME if size == file.size else Standing.GROWN
    except OSError:
        return Standing.CHANGED
    finally:
        os.close(fd)
