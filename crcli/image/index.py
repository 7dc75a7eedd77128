"""What the store has already: the indexes of earlier dumps, loaded before the freeze.

Read are the indexes that tell of what the newest images of the same name consist of, which their manifests
name; only where that is little, those of other images as well, the newest first. So it costs the same
whatever else a store holds. Pages, and groups of them, are looked up by the first 8 bytes of their BLAKE3
digest and then compared in full.
"""

from __future__ import annotations

import json
import time
from array import array
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from blake3 import blake3

from crcli.errors import ImageDamaged, NotFound
from crcli.image.container import ContainerKind, peek_section, unpack_container
from crcli.image.names import IMAGES, INDEXES, image_at, index_key, is_id, manifest_key, pack_key, pages_key
from crcli.image.tables import Chunk, Group, MixedGroup, read_chunks, read_groups, read_mixed, read_packs
from crcli.memory.classify import DIGEST, GROUP_PAGES, NOWHERE, ZERO, place_in
from crcli.memory.extents import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.store.base import ObjectInfo, Store

PAGE_LIMIT = 4 << 20
"""Pages of earlier dumps that are remembered (16 GiB of memory; about 190 MB when full)."""

SAME_NAME_LIMIT = 64
"""So many indexes are read at most for what images of the same name consist of."""

OTHERS_LIMIT = 32
"""And so many for other images, where the former know less than the tree has pages."""

LINEAGES = 16
"""So many of the newest images of a name are asked what they consist of, where several trees share it."""

_FEW_DIGESTS = 1 << 19
"""Up to so many pages (2 GiB of memory) are looked up without numpy, whose import takes 0.1 s."""

_MIXED = 1 << 63
"""Set in the place of a group whose pages come from several chunks."""

_READERS = 8
_LISTED_AT_ONCE = 1000


class Stretch(NamedTuple):
    """Pages of a known chunk that follow one another; a chunk of None stands for zero pages."""

    chunk: int | None
    page: int
    pages: int


class KnownChunks:
    """The chunks of earlier dumps, and the pages in them."""

    def __init__(self) -> None:
        self.newest_image = ""
        """The id of the newest image of the name that was asked for; empty where there is none."""
        self._chunks: list[tuple[bytes, Chunk]] = []
        self._first_chunks: list[int] = []
        self._indexes: list[str] = []
        self._blobs: dict[bytes, int] = {}
        self._memory_chunks: list[int] = []
        self._first_pages: list[int] = []
        self._page_digests: list[bytes] = []
        self._page_count = 0
        self._group_places = array("Q")  # chunk << 16 | page, or _MIXED | number in _mixed
        self._mixed: list[tuple[list[bytes], MixedGroup]] = []
        self._chunk_at: dict[tuple[bytes, int], int] = {}
        self._group_digests: list[bytes] = []
        self._pages: _Digests | None = None
        self._groups: _Digests | None = None
        self._group_keys = b""

    def __len__(self) -> int:
        return len(self._chunks)

    @property
    def indexes(self) -> list[str]:
        """The ids of the dumps whose indexes told of these chunks."""
        return self._indexes

    def chunk(self, number: int) -> tuple[bytes, Chunk]:
        """The pack id and the record of one known chunk."""
        return self._chunks[number]

    def index_of(self, number: int) -> str:
        """The id of the dump whose index told of a known chunk."""
        return self._indexes[bisect_right(self._first_chunks, number) - 1]

    def find_blob(self, digest: bytes) -> int | None:
        """The number of the known chunk with these contents (BLAKE3), if there is one."""
        return self._blobs.get(digest)

    def add(
        self,
        index: str,
        packs: list[bytes],
        chunks: list[Chunk],
        digests: bytes,
        groups: Sequence[Group] = (),
        mixed: Sequence[MixedGroup] = (),
    ) -> None:
        """Take in the index of a dump: its tables, and its pages' digests in the order of its chunks.

        Raises ImageDamaged, with nothing taken in, when they do not fit together.
        """
        pages = [chunk.raw // PAGE if chunk.is_memory else 0 for chunk in chunks]
        if sum(pages) * DIGEST != len(digests):
            raise ImageDamaged("an index and its page digests do not fit together")
        first = len(self._chunks)
        if chunks:
            self._first_chunks.append(first)
            self._indexes.append(index)
        for number, (chunk, count) in enumerate(zip(chunks, pages, strict=True), start=first):
            self._chunks.append((packs[chunk.pack], chunk))
            if chunk.is_memory:
                self._memory_chunks.append(number)
                self._first_pages.append(self._page_count)
                self._page_count += count
            else:
                self._blobs.setdefault(chunk.digest, number)
        self._page_digests.append(digests)
        for group in groups:
            if group.pages == GROUP_PAGES:
                self._group_places.append(first + group.chunk << 16 | group.page)
                self._group_digests.append(group.digest)
        for several in mixed:
            if several.pages == GROUP_PAGES:
                self._group_places.append(_MIXED | len(self._mixed))
                self._group_digests.append(several.digest)
                self._mixed.append((packs, several))

    @property
    def page_count(self) -> int:
        """How many pages are known."""
        return self._page_count

    def finish(self) -> None:
        """Sort: `find_pages` and `find_groups` work from now on."""
        self._pages = _digests(self._page_digests)
        self._groups = _digests(self._group_digests)
        self._group_keys = b"".join(digest[:8] for digest in self._group_digests)
        self._page_digests, self._group_digests = [], []
        if self._mixed:
            self._chunk_at = {
                (pack, chunk.offset): number for number, (pack, chunk) in enumerate(self._chunks)
            }

    def group_keys(self) -> bytes:
        """The first 8 bytes of the digest of each known whole group, one after another."""
        return self._group_keys

    def find_pages(self, digests: Sequence[bytes]) -> list[int | None]:
        """For each digest of a page its number among all known pages, or None."""
        return self._rows(self._pages, digests)

    def chunk_of(self, page: int) -> tuple[int, int, int]:
        """The chunk in which a known page is, and the numbers of its first page and of the one behind it."""
        owner = bisect_right(self._first_pages, page)
        end = self._first_pages[owner] if owner < len(self._first_pages) else self._page_count
        return self._memory_chunks[owner - 1], self._first_pages[owner - 1], end

    def find_groups(self, digests: Sequence[bytes]) -> list[tuple[int, int] | list[Stretch] | None]:
        """For each digest of a group where it is, or None: the known chunk and the page at which it begins,
        or all the chunks that it consists of."""
        places = self._group_places
        rows = self._rows(self._groups, digests)
        return [
            None
            if row is None
            else self._mixed_group(place & ~_MIXED)
            if (place := places[row]) & _MIXED
            else (place >> 16, place & 0xFFFF)
            for row in rows
        ]

    def _mixed_group(self, number: int) -> list[Stretch] | None:
        packs, group = self._mixed[number]
        found: list[Stretch] = []
        for pack, offset, page, pages in group.parts:
            chunk = None if pack is None else self._chunk_at.get((packs[pack], offset), -1)
            if chunk is not None and (chunk < 0 or self._chunks[chunk][1].raw < (page + pages) * PAGE):
                return None  # of an index that is not known here
            found.append(Stretch(chunk, page, pages))
        return found

    def _rows(self, table: _Digests | None, digests: Sequence[bytes]) -> list[int | None]:
        return table.find(digests) if table is not None else [None] * len(digests)


class KnownPagesOf:
    """Known chunks as the intake asks for them: what is found is adopted into the image's chunk table."""

    def __init__(self, known: KnownChunks, adopt: Callable[[int], int]) -> None:
        self._known = known
        self._adopt = adopt
        self._numbers: dict[int, int] = {}

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """See memory.classify.KnownPages."""
        places: list[int] = []
        first, end, place = 0, 0, 0
        for page in self._known.find_pages(digests):
            if page is None:
                places.append(NOWHERE)
                continue
            if not first <= page < end:  # most pages are of the chunk of the one before
                chunk, first, end = self._known.chunk_of(page)
                place = self._place(chunk, 0)
            places.append(place + page - first)
        return places

    def find_groups(self, digests: Sequence[bytes]) -> list[Sequence[int] | None]:
        """See memory.classify.KnownPages."""
        found: list[Sequence[int] | None] = []
        for where in self._known.find_groups(digests):
            if where is None:
                found.append(None)
            elif isinstance(where, tuple):
                first = self._place(*where)
                found.append(range(first, first + GROUP_PAGES))
            else:
                found.append([place for part in where for place in self._places_in(*part)])
        return found

    def _places_in(self, chunk: int | None, page: int, pages: int) -> Sequence[int]:
        if chunk is None:
            return [ZERO] * pages
        first = self._place(chunk, page)
        return range(first, first + pages)

    def _place(self, known: int, page: int) -> int:
        number = self._numbers.get(known)
        if number is None:
            number = self._numbers[known] = self._adopt(known)
        return place_in(number, page)


class _Digests(Protocol):
    """Digests that can be looked up."""

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """For each digest the row in which it stands, or None."""
        ...


def _digests(parts: list[bytes]) -> _Digests:
    joined = b"".join(parts)
    return (_FewDigests if len(joined) <= _FEW_DIGESTS * DIGEST else _ManyDigests)(joined)


class _FewDigests:
    """Digests in a dictionary: 100 bytes for each, which is less trouble than to import numpy."""

    def __init__(self, joined: bytes) -> None:
        self._joined = joined
        keys = _keys(joined)
        self._rows = dict(
            zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True)
        )  # the first one wins

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """See _Digests."""
        joined = self._joined
        rows = map(self._rows.get, _keys(b"".join(digests)))
        return [
            row if row is not None and joined.startswith(digest, row * DIGEST) else None
            for row, digest in zip(rows, digests, strict=True)
        ]


def _keys(joined: bytes) -> list[int]:
    """The first 8 bytes of each digest, as a number."""
    return memoryview(joined).cast("Q")[:: DIGEST // 8].tolist()


class _ManyDigests:
    """Digests in an array, sorted by their first 8 bytes: 12 bytes more for each."""

    def __init__(self, joined: bytes) -> None:
        import numpy as np

        self._np: Any = np
        self._rows: Any = np.frombuffer(joined, dtype="<u8").reshape(-1, DIGEST // 8)
        order = np.argsort(self._rows[:, 0], kind="stable")
        self._order: Any = order.astype(np.uint32)
        self._keys: Any = self._rows[order, 0]

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """See _Digests."""
        if not digests:
            return []
        np = self._np
        asked = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, DIGEST // 8)
        at = np.searchsorted(self._keys, asked[:, 0])
        at[at == len(self._keys)] = 0
        rows = self._order[at]
        same = (self._rows[rows] == asked).all(axis=1)
        return [row if here else None for row, here in zip(rows.tolist(), same.tolist(), strict=True)]


def load_known(
    store: Store,
    name: str,
    limit: int = PAGE_LIMIT,
    wanted: int | None = None,
    is_same: Callable[[dict[str, Any]], bool] = lambda head: False,
    others: int | None = OTHERS_LIMIT,
) -> KnownChunks:
    """Read what the images called `name` consist of, then, while that is fewer than `wanted` pages (None:
    always), the newest `others` indexes of the store (None: all).

    `is_same` tells by an image's JSON head whether it is of the very tree: older ones then matter no more.
    It ends with the index that takes the number of pages to `limit`. An index whose pack is gone, or that
    cannot be read, is left out: it only costs chances to reuse.
    """
    known = KnownChunks()
    loading = _Loading(store, known, limit)
    same_name = [info for info in _newest(store, f"{IMAGES}{name}/", LINEAGES) if image_at(info.key)]
    known.newest_image = same_name[0].key.rpartition("/")[2] if same_name else ""
    loading.take(_lineages(store, name, same_name[:LINEAGES], is_same)[:SAME_NAME_LIMIT])
    if wanted is None or known.page_count < wanted:
        loading.take([info.key.rpartition("/")[2] for info in same_name[:SAME_NAME_LIMIT]])
    if wanted is None or known.page_count < wanted:
        least = None if others is None else 2 * (others + SAME_NAME_LIMIT)  # an index and its pages
        keys = [info.key.removeprefix(INDEXES) for info in _newest(store, INDEXES, least)]
        ids = [key.removesuffix(".index") for key in keys if key.endswith(".index")]
        loading.take(ids, others)
    known.finish()
    return known


def _newest(store: Store, prefix: str, least: int | None) -> list[ObjectInfo]:
    """Objects below a prefix whose names begin with the time, the newest first: `least` of them, or all.

    A store lists the oldest first. Where there are many, those of the last minutes, hours or days are asked
    for instead.
    """
    found = list(islice(store.list(prefix), None if least is None else _LISTED_AT_ONCE + 1))
    if least is not None and len(found) > _LISTED_AT_ONCE:
        stamp = time.strftime("%Y%m%dT%H%M", time.gmtime())
        for length in (12, 11, 8, 6, 4, 0):  # ten minutes, an hour, a day, a month, a year, ever
            found = list(store.list(prefix + stamp[:length]))
            if len(found) >= least:
                break
    return sorted(found, key=lambda info: info.key, reverse=True)


def _lineages(
    store: Store, name: str, images: Sequence[ObjectInfo], is_same: Callable[[dict[str, Any]], bool]
) -> list[str]:
    """The ids of the dumps that brought in what these images consist of, by how much of them that is.

    The newest is most often of the same tree, and then all that is needed.
    """
    newest = [_head(store, name, info) for info in images[:1]]
    if any(map(is_same, newest)):
        return _indexes(newest[0])
    with ThreadPoolExecutor(_READERS, "lineage") as threads:
        heads = newest + list(threads.map(lambda info: _head(store, name, info), images[1:]))
    same = [head for head in heads if is_same(head)][:1]
    return [image_id for head in same + heads for image_id in _indexes(head)]


def _head(store: Store, name: str, image: ObjectInfo) -> dict[str, Any]:
    """An image's JSON head; empty where it cannot be read."""
    image_id = image.key.rpartition("/")[2]

    def read(offset: int, length: int) -> bytes:
        return store.get_range(manifest_key(name, image_id), offset, length)

    try:
        head = json.loads(peek_section(read, image.size, "META", ContainerKind.MANIFEST, image_id))
        return head if isinstance(head, dict) else {}
    except (ImageDamaged, NotFound, ValueError):
        return {}


def _indexes(head: dict[str, Any]) -> list[str]:
    """Which dumps' indexes tell of an image; of one that does not say so, its own."""
    found = head.get("indexes", [head.get("id")])
    return [one for one in found if isinstance(one, str) and is_id(one)] if isinstance(found, list) else []


class _Index(NamedTuple):
    """One index as it was read."""

    id: str
    packs: list[bytes]
    chunks: list[Chunk]
    digests: bytes
    groups: list[Group]
    mixed: list[MixedGroup]

    @property
    def used_packs(self) -> set[bytes]:
        """The packs that its chunks are in."""
        return {self.packs[number] for number in {chunk.pack for chunk in self.chunks}}


class _Loading:
    """Indexes on their way into what is known, each once."""

    def __init__(self, store: Store, known: KnownChunks, limit: int) -> None:
        self._store = store
        self._known = known
        self._limit = limit
        self._seen: set[str] = set()

    def take(self, ids: Sequence[str], most: int | None = None) -> None:
        """Read these indexes in this order, `most` of them, until enough pages are known."""
        new = [one for one in dict.fromkeys(ids) if one not in self._seen][:most]
        self._seen.update(new)
        with ThreadPoolExecutor(_READERS, "indexes") as threads:
            for at in range(0, len(new), _READERS):
                if self._known.page_count >= self._limit:
                    return
                found = list(filter(None, threads.map(self._read, new[at : at + _READERS])))
                missing = self._missing({pack for index in found for pack in index.used_packs})
                for index in found:
                    if self._known.page_count < self._limit and not index.used_packs & missing:
                        self._known.add(*index)

    def _read(self, image_id: str) -> _Index | None:
        try:
            return _read_index(self._store, image_id)
        except (ImageDamaged, NotFound):
            return None

    def _missing(self, packs: set[bytes]) -> set[bytes]:
        """Those of the packs that the store does not have."""
        keys = {pack_key(pack): pack for pack in packs}
        return {keys[key] for key in self._store.missing(keys)}


def _read_index(store: Store, image_id: str) -> _Index:
    name = index_key(image_id)
    sections = unpack_container(store.get(name), ContainerKind.INDEX, name)
    packs = read_packs(sections["PACK"], name)
    chunks = read_chunks(sections["CHNK"], len(packs), name)
    digests = store.get(pages_key(image_id)) if any(chunk.is_memory for chunk in chunks) else b""
    if blake3(digests).digest() != sections["PGHS"]:
        raise ImageDamaged(f"{pages_key(image_id)} is not what {name} says")
    groups = read_groups(sections.get("GRPS", b""), chunks, name)
    mixed = read_mixed(sections.get("MGRP", b""), sections.get("MPRT", b""), len(packs), name)
    return _Index(image_id, packs, chunks, digests, groups, mixed)
