"""What a store is: named objects, written whole, read in ranges.

Every store behaves the same to the rest of crcli; `tests/store/` runs one suite over all of them. Keys are
relative, '/'-separated, and made of `[A-Za-z0-9._@+-]` only. An object does not exist until its writing is
complete, and is durable when the call that writes it returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class ObjectInfo:
    """An object's key, its size in bytes, and when the store says it was last written (seconds, epoch)."""

    key: str
    size: int
    modified: float


class ObjectWriter(Protocol):
    """An object being written. Nothing is visible under its key before `commit` returns.

    Used as a context manager: leaving the block without `commit` aborts. `write` may block when the store
    is slower than the caller (that is the back-pressure), and may return before the bytes have been sent:
    the caller must not change a buffer that it has handed over.
    """

    def write(self, data: Buffer) -> None:
        """Append `data`; the writer keeps a reference, so the caller must not change it afterwards."""
        ...

    def commit(self) -> None:
        """Make the object visible and durable. Raises StoreError if any part of it could not be written."""
        ...

    def abort(self) -> None:
        """Forget the object; free what was written so far. Never raises."""
        ...

    def __enter__(self) -> ObjectWriter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """Where objects live. Methods may be called from several threads at once.

    All raise StoreError (exit 30) when the store cannot be reached or refuses, NotFound for an absent key.
    """

    @property
    def url(self) -> str:
        """The store's address as a user would write it, without credentials."""
        ...

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """Write a whole object durably; with `if_absent`, raise ObjectExists when the key is taken.

        Where the store ignores conditional writes, `if_absent` falls back to look-then-write-then-verify.
        """
        ...

    def writer(self, key: str) -> ObjectWriter:
        """Begin an object of unknown size (parallel multipart where the store has it)."""
        ...

    def get(self, key: str) -> bytes:
        """Read a whole object."""
        ...

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes at `offset`; a short object raises StoreError."""
        ...

    def stat(self, key: str) -> ObjectInfo:
        """Describe one object."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object durably; removing an absent one is not an error."""
        ...

    def close(self) -> None:
        """Give back connections and threads."""
        ...
