"""The bytes of one request."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.store.base import Buffer

SEND_AT_ONCE = 1 << 20
MANY_PIECES = 64
"""Beyond this the pieces are joined into one buffer: a copy costs less than sending crumbs."""


class Body:
    """Bytes to be sent, read from the caller's buffers without copying them.

    It is what botocore takes for a file: it can be sized, read and rewound. `read` returns views of the
    buffers, up to `SEND_AT_ONCE` bytes even when asked for less, because http.client asks for 16 KiB and
    sends whatever it gets.
    """

    def __init__(self) -> None:
        self._pieces: list[memoryview] = []
        self._size = self._index = self._offset = 0

    @classmethod
    def of(cls, data: Buffer) -> Body:
        """A body that holds `data`."""
        body = cls()
        body.append(memoryview(data).cast("B"))
        return body

    def append(self, piece: memoryview) -> None:
        """Take one more buffer of bytes, which must not change from now on."""
        if not piece:
            return  # to whoever reads, nothing means the end
        self._size += len(piece)
        self._pieces.append(piece)
        if len(self._pieces) > MANY_PIECES:
            self._pieces = [memoryview(b"".join(self._pieces))]

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._pieces)

    def read(self, size: int = -1) -> memoryview | bytes:
        """Return the next bytes, or nothing at the end."""
        if self._index == len(self._pieces):
            return b""
        piece = self._pieces[self._index][self._offset :]
        piece = piece[:SEND_AT_ONCE]
        self._offset += len(piece)
        if self._offset == len(self._pieces[self._index]):
            self._index, self._offset = self._index + 1, 0
        return piece

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
