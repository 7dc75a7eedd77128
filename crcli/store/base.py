"""What a store is: named objects, written whole, read in ranges.

Every store behaves the same to the rest of crcli; `tests/store/` runs one suite over all of them. An object
does not exist until its writing is complete, and is durable when the call that writes it returns.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from crcli.errors import NotFound, ObjectExists
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

Buffer = bytes | bytearray | memoryview

_SEGMENT = r"[A-Za-z0-9_@+-][A-Za-z0-9._@+-]*"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT})*")
_KEY_PREFIX = re.compile(rf"(?:{_SEGMENT}/)*(?:{_SEGMENT})?")


def is_key(name: str) -> bool:
    """Whether every store can hold an object of that name. Listings leave out what is not ours.

    Keys are relative and '/'-separated; a segment is made of `[A-Za-z0-9._@+-]` and does not begin with a
    dot: that keeps `..` out, and leaves dot names to the stores themselves. A key must not be the directory
    of another (`a` beside `a/b`): a directory store cannot hold both.
    """
    return _KEY.fullmatch(name) is not None


def check_key(key: str) -> str:
    """Return `key` if it is one, else raise ValueError: a bug of the caller's, not the user's."""
    if not is_key(key):
        raise ValueError(f"not a key for an object: {key!r}")
    return key


def check_prefix(prefix: str) -> str:
    """Return `prefix` if some key could start with it, else raise ValueError."""
    if not _KEY_PREFIX.fullmatch(prefix):
        raise ValueError(f"not the beginning of any key: {prefix!r}")
    return prefix


def taken(key: str) -> ObjectExists:
    """The error of a conditional write that came second."""
    return ObjectExists(f"{key} exists already", hint="Somebody else wrote it first; nothing was changed.")


class ObjectInfo(Struct, frozen=True):
    """An object's key, its size in bytes, and when the store says it was last written (seconds, epoch)."""

    key: str
    size: int
    modified: float


class ObjectWriter(Protocol):
    """An object being written. Nothing is visible under its key before `commit` returns.

    Used as a context manager: leaving the block without `commit` aborts. `write` may block when the store
    is slower than the caller (that is the back-pressure), and may return before the bytes have been sent. One
    thread at a time.
    """

    def write(self, data: Buffer) -> None:
        """Append `data`; the caller may use its buffer for something else at once."""
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

    All raise StoreError (exit 30) when the store cannot be reached or refuses, NotFound for an absent key
    and for a directory that is not there yet: a directory store comes into being with its first write.
    """

    @property
    def url(self) -> str:
        """The store's address as a user would write it, without credentials."""
        ...

    @property
    def creates_atomically(self) -> bool:
        """Whether of several puts of one key with `if_absent`, at one instant, exactly one works.

        False where a store is not known for it. May resolve settings and credentials.
        """
        ...

    def warm(self, *, for_writing: bool = False) -> None:
        """Pay now for what the first request would cost, and find out now if the store cannot be used.

        A dump calls this before it freezes anything: settings and credentials are resolved and the store
        has answered; with `for_writing` a directory store exists and takes files.
        """
        ...

    def room(self) -> int | None:
        """How many bytes more it can hold; None where it does not say. Nothing is written, or made.

        Raises StoreError where it can be seen that it takes none.
        """
        ...

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """Write a whole object durably; with `if_absent`, raise ObjectExists when the key is taken.

        Where the store ignores conditional writes, `if_absent` falls back to look-then-write-then-verify.
        A put whose answer was lost counts as ours if the object holds exactly `data`: whoever uses
        `if_absent` to claim a name should write something into it that nobody else would.
        """
        ...

    def writer(self, key: str, *, if_absent: bool = False) -> ObjectWriter:
        """Begin an object of unknown size (parallel multipart where the store has it).

        With `if_absent`, `commit` raises ObjectExists when the key is taken by then.
        """
        ...

    def get(self, key: str) -> bytes:
        """Read a whole object."""
        ...

    def get_range(self, key: str, offset: int, length: int) -> Buffer:
        """Read exactly `length` bytes at `offset`; a short object raises StoreError. They never change."""
        ...

    def mapped(self, key: str, offset: int, length: int) -> Buffer | None:
        """What `get_range` would give, where it lies in this host's memory: nothing is read, or copied."""
        ...

    def fetch_again(self, key: str, offset: int, length: int) -> Buffer | None:
        """Read anew what `get_range` gave and was found damaged, if that came out of a cache; else None."""
        ...

    def is_near(self, key: str, offset: int, length: int) -> bool:
        """Whether this host has these bytes, as far as can be told without reading them."""
        ...

    def stat(self, key: str) -> ObjectInfo:
        """Describe one object."""
        ...

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Those of these objects that are not there; few requests where they lie side by side, in folders
        below those at the top of the store."""
        ...

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key starts with `prefix`, and comes behind `after`, in key order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object durably; removing an absent one is not an error."""
        ...

    def sweep(self, before: float, is_ours: Callable[[str], bool] = is_key) -> int:
        """Remove what killed writers left behind and nobody touched since then (seconds since the epoch, by
        the store's clock, which need not be this host's); return how many.

        Objects whose keys are not `is_ours` are of others, who use the same place.
        """
        ...

    def give_up(self) -> None:
        """End all patience: what fails from now on is not tried again, and whoever waits for a store that
        keeps silent goes on a second later, with StoreUnreachable. What the store does of it is not known."""
        ...

    def reopened(self) -> Store:
        """The same store, open again after `close`, without what the first opening costs. No thread is
        left of the old one: a process may fork between the two."""
        ...

    def close(self) -> None:
        """Give back connections and threads; requests still waiting to be retried give up."""
        ...


def is_there(store: Store, key: str) -> bool:
    """Whether the store, asked for this object alone, has it."""
    try:
        store.stat(key)
    except NotFound:
        return False
    return True
