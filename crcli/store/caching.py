"""A store with a cache in front of it.

What never changes under its key (packs, indexes) is read from the cache where it holds it. What says that
something exists (manifests, tables of pushed weights) is asked of the store, whose word counts; only when no
answer comes from it is the copy taken that this host saw last.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from blake3 import blake3

from crcli.errors import NotFound, StoreUnreachable
from crcli.records import Struct
from crcli.store.base import is_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from crcli.store.base import Buffer, ObjectInfo, ObjectWriter, Store
    from crcli.store.cache import Cache, WholeWriter


class Kinds(Struct, frozen=True):
    """Which objects are kept, and how, by what their keys begin with.

    `in_pieces` never change under a key, in whatever store, and who reads them compares them with hashes.
    `lasting` never change in one store, and nobody compares them: what another store says is not to be
    believed of this one. `named` objects exist in one store, until they are removed.
    """

    in_pieces: str
    lasting: str
    named: tuple[str, ...]


class CachingStore:
    """`origin`, with `cache` in front of it. `place` says which store it is, whatever client asks for it."""

    def __init__(
        self, origin: Store, impatient: Callable[[], Store], cache: Cache, kinds: Kinds, place: str
    ) -> None:
        self.origin = origin
        self.cache = cache
        self.unreachable: StoreUnreachable | None = None
        """Set once no answer came for something that was then taken from the cache: it is not asked again."""
        self._impatient = impatient
        self._asked = origin
        self._kinds = kinds
        self._place = place
        self._scope = blake3(place.encode()).hexdigest()[:16]

    @property
    def url(self) -> str:
        """The origin's."""
        return self.origin.url

    @property
    def creates_atomically(self) -> bool:
        """See the origin's."""
        return self.origin.creates_atomically

    def name_of(self, key: str) -> str:
        """What the cache calls an object."""
        name = plain_name(key)
        return name if key.startswith(self._kinds.in_pieces) else f"{self._scope}~{name}"

    @contextmanager
    def impatience(self) -> Iterator[None]:
        """While it lasts, the store is not waited for as long as usual: the cache has what is asked for."""
        self._asked = self._impatient()
        try:
            yield
        finally:
            self._asked.close()
            self._asked = self.origin

    def warm(self, *, for_writing: bool = False) -> None:
        """See the origin's."""
        self._reached().warm(for_writing=for_writing)

    def room(self) -> int | None:
        """See the origin's."""
        return self._reached().room()

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """Write an object, and keep it."""
        self._reached().put(key, data, if_absent=if_absent)
        self._keep(key, data)

    def writer(self, key: str, *, if_absent: bool = False) -> ObjectWriter:
        """Begin an object; what is written is kept too."""
        inner = self._reached().writer(key, if_absent=if_absent)
        if key.startswith(self._kinds.in_pieces):
            return _KeepingWriter(inner, _PieceWriter(self.cache, self.name_of(key)))
        if key.startswith(self._kinds.lasting):
            return _KeepingWriter(inner, self.cache.writer(self.name_of(key)))
        return inner

    def get(self, key: str) -> bytes:
        """Read an object, from the cache if it never changes, otherwise if no answer comes from the store."""
        if key.startswith(self._kinds.lasting):
            if (kept := self.cache.get(self.name_of(key))) is not None:
                return kept
            data = self._reached().get(key)
            self._keep(key, data)
            return data
        if not key.startswith(self._kinds.named):
            return self._reached().get(key)
        return self._get_named(key)

    def _get_named(self, key: str) -> bytes:
        kept = self.recall(key)
        try:
            data = self._reached().get(key)
        except NotFound:
            self.cache.drop(self.name_of(key))
            raise
        except StoreUnreachable as error:
            if kept is None:
                raise
            self.unreachable = error
            return kept
        if data != kept:
            self._keep(key, data)
        return data

    def recall(self, key: str) -> bytes | None:
        """A named object as this host saw it last, if it still knows."""
        kept = recall(self.cache, self.name_of(key))
        return None if kept is None else kept[1]

    def get_range(self, key: str, offset: int, length: int) -> Buffer:
        """Read a part of an object, from the cache where it has all of it."""
        if not length or not key.startswith(self._kinds.in_pieces):
            return self._reached().get_range(key, offset, length)
        if (kept := self.cache.read(self.name_of(key), offset, length)) is not None:
            return kept
        data = self._reached().get_range(key, offset, length)
        self.cache.add(self.name_of(key), offset, data)
        return data

    def mapped(self, key: str, offset: int, length: int) -> Buffer | None:
        """What the cache has in memory."""
        return self.cache.mapped(self.name_of(key), offset, length)

    def fetch_again(self, key: str, offset: int, length: int) -> Buffer | None:
        """Read from the origin; what the cache has of the object is not to be trusted."""
        self.cache.drop(self.name_of(key))
        return self._reached().get_range(key, offset, length)

    def is_near(self, key: str, offset: int, length: int) -> bool:
        """Whether the cache has it."""
        return self.cache.holds(self.name_of(key), offset, length)

    def stat(self, key: str) -> ObjectInfo:
        """Ask the origin."""
        return self._reached().stat(key)

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Ask the origin."""
        return self._reached().missing(keys)

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """Ask the origin."""
        return self._reached().list(prefix, after)

    def delete(self, key: str) -> None:
        """Remove an object from the origin, and from the cache."""
        self.cache.drop(self.name_of(key))
        self._reached().delete(key)

    def sweep(self, before: float, is_ours: Callable[[str], bool] = is_key) -> int:
        """See the origin's."""
        return self._reached().sweep(before, is_ours)

    def give_up(self) -> None:
        """End the origin's patience."""
        self.origin.give_up()

    def reopened(self) -> CachingStore:
        """The same store, with the same cache."""
        origin, cache = self.origin.reopened(), self.cache.reopened()
        return CachingStore(origin, self._impatient, cache, self._kinds, self._place)

    def close(self) -> None:
        """Close the origin; have what is to be kept written."""
        self.origin.close()
        self.cache.close()

    def _reached(self) -> Store:
        """The store to ask. Raises StoreUnreachable when that is known to be in vain."""
        if self.unreachable is not None:
            raise self.unreachable
        return self._asked

    def _keep(self, key: str, data: Buffer) -> None:
        if key.startswith(self._kinds.named):
            self.cache.put(self.name_of(key), b"".join((self.url.encode(), b"\n", data)))
        elif key.startswith(self._kinds.lasting):
            self.cache.put(self.name_of(key), data)


def plain_name(key: str) -> str:
    """What a cache calls an object that is the same in every store."""
    return key.replace("/", "~")


def recall(cache: Cache, name: str) -> tuple[str, bytes] | None:
    """A named object that a cache has, behind the URL of the store that it was in."""
    kept = cache.get(name)
    if kept is None:
        return None
    url, _, data = kept.partition(b"\n")
    return url.decode(errors="replace"), data


class _PieceWriter:
    """An object that is kept in pieces, from its beginning on."""

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._name = name
        self._size = 0

    def write(self, data: bytes) -> None:
        self._cache.add(self._name, self._size, data)
        self._size += len(data)

    def commit(self) -> None:
        pass  # each piece is kept by itself

    def abort(self) -> None:
        self._cache.drop(self._name)


class _KeepingWriter:
    """Writes into the store and into the cache."""

    def __init__(self, inner: ObjectWriter, kept: _PieceWriter | WholeWriter) -> None:
        self._inner = inner
        self._kept = kept
        self._is_written = False

    def write(self, data: Buffer) -> None:
        lasting = data if isinstance(data, bytes) else bytes(data)  # which spares the store a copy of its own
        self._inner.write(lasting)
        self._kept.write(lasting)

    def commit(self) -> None:
        try:
            self._inner.commit()
        except BaseException:
            self._kept.abort()
            raise
        self._kept.commit()
        self._is_written = True

    def abort(self) -> None:
        self._inner.abort()
        if not self._is_written:
            self._kept.abort()

    def __enter__(self) -> _KeepingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
