"""The bytes of one request."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crcli.store.base import Buffer

SEND_AT_ONCE = 128 << 10
"""What one call sends, which has the patience for one silence to do so: a slow line has to carry eight of
them in that time."""

CRUMB = 16 << 10
"""Smaller pieces are gathered in a buffer of ours: a copy costs less than sending each by itself."""


class Body:
    """Bytes to be sent, read from the caller's buffers without copying them (crumbs apart).

    It is what botocore takes for a file: it can be sized, read and rewound. `read` returns views of the
    buffers, up to `SEND_AT_ONCE` bytes even when asked for less, because http.client asks for 16 KiB and
    sends whatever it gets.
    """

    def __init__(self) -> None:
        self._pieces: list[memoryview | bytearray] = []
        self._size = self._index = self._offset = 0

    @classmethod
    def of(cls, data: Buffer) -> Body:
        """A body that holds `data`."""
        body = cls()
        body.append(memoryview(data).cast("B"))
        return body

    def append(self, piece: memoryview) -> None:
        """Take one more buffer of bytes, which must not change from now on. Not while the body is read."""
        self._size += len(piece)
        if len(piece) >= CRUMB:
            self._pieces.append(piece)
        elif self._pieces and isinstance(self._pieces[-1], bytearray):
            self._pieces[-1] += piece
        elif piece:  # to whoever reads, nothing means the end
            self._pieces.append(bytearray(piece))

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return b"".join(self._pieces)

    def read(self, size: int = -1) -> memoryview | bytes:
        """Return the next bytes, or nothing at the end."""
        if self._index == len(self._pieces):
            return b""
        piece = memoryview(self._pieces[self._index])
        part = piece[self._offset : self._offset + SEND_AT_ONCE]
        self._offset += len(part)
        if self._offset == len(piece):
            self._index, self._offset = self._index + 1, 0
        return part

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go back to the beginning, for another attempt."""
        if offset or whence:
            raise ValueError("a body is rewound, never positioned")
        self._index = self._offset = 0
        return 0

    def tell(self) -> int:
        """Where reading stands."""
        return sum(map(len, self._pieces[: self._index])) + self._offset

    def crc32(self) -> str:
        """The checksum as S3 wants it in a header."""
        checksum = 0
        for piece in self._pieces:
            checksum = zlib.crc32(piece, checksum)
        return base64.b64encode(checksum.to_bytes(4, "big")).decode()

    def md5(self) -> str:
        """The older checksum, for stores that know no other."""
        import hashlib

        digest = hashlib.md5(usedforsecurity=False)
        for piece in self._pieces:
            digest.update(piece)
        return base64.b64encode(digest.digest()).decode()
