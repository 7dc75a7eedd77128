"""What the store has already: the indexes of earlier dumps, loaded before the freeze.

Read are the indexes that tell of what the newest images of the same name consist of, which their manifests
name; only where that is little, those of other images as well, the newest first. So it costs the same
whatever else a store holds. Pages, and groups of them, are looked up by the first 8 bytes of their BLAKE3
digest and then compared in full.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate, compress
from operator import add, not_
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

from crcli.errors import ImageDamaged, NotFound
from crcli.image.container import ContainerKind, unpack_container
from crcli.image.head import check_head
from crcli.image.lookup import SeveralDigests, TabledDigests, keys_of, read_table, sort_digests
from crcli.image.names import (
    IMAGES,
    INDEXES,
    IndexRef,
    image_at,
    is_in_an_index,
    manifest_key,
    pack_key,
    pages_key,
)
from crcli.image.newest import newest_in
from crcli.image.peek import ManifestPeek, ids_in
from crcli.image.tables import NO_PACK, ChunkTable, Groups, MixedGroups, read_groups, read_packs
from crcli.memory.blocks import DIGEST, GROUP_PAGES
from crcli.memory.extents import PAGE
from crcli.memory.places import NOWHERE, ZERO, place_in
from crcli.store.leaving import asking

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence, Set
    from concurrent.futures import Future

    from crcli.image.lookup import Digests
    from crcli.image.tables import Chunk, MixedFields
    from crcli.store.base import ObjectInfo, Store

PAGE_LIMIT = 4 << 20
"""Pages of earlier dumps that are remembered (16 GiB of memory; about 190 MB when full)."""

SAME_NAME_LIMIT = 64
"""So many indexes are read at most for what images of the same name consist of."""

OTHERS_LIMIT = 32
"""And so many for other images, where the former know less than the tree has pages."""

LINEAGES = 16
"""So many of the newest images of a name are asked what they consist of, where several trees share it."""

_AS_LARGE = 15 / 16
"""A tree that had so much of its memory at an image of its own has little that only images of others have."""

_PAGE_BITS = 16
_LAST_PAGE = (1 << _PAGE_BITS) - 1
_OFFSET_BITS = 64
"""The place of a chunk is one number: that of its pack and, in so many bits, the offset there."""

_MIXED = 1 << 63
_INDEX_BITS = 32
"""The place of a group is one number, `chunk << _PAGE_BITS | page`, or, with this bit set, says which one it
is of those whose pages come from several chunks: `index << _INDEX_BITS | number`."""

_MOST_TABLES = 3
"""So many stored tables are looked into for a page, one after another: what more indexes tell is sorted."""

Expect = Callable[[Iterable[str]], None]
"""Is told the keys of what will most likely be relied on."""

_NO_GROUPS = Groups((), (), (), b"")

_READERS = 8


class Index(NamedTuple):
    """What one index tells: its tables, and the digests of its pages in the order of its chunks."""

    ref: IndexRef
    packs: list[bytes]
    chunks: ChunkTable
    digests: bytes
    groups: Groups
    mixed: MixedGroups
    table: memoryview | None
    """By which the digests are found; few have none."""

    @property
    def used_packs(self) -> set[bytes]:
        """The packs that its chunks are in."""
        return {self.packs[number] for number in set(self.chunks.packs)}

    def of_packs(self, packs: Set[bytes]) -> Index:
        """What it tells of the chunks in these packs."""
        if self.used_packs <= packs:
            return self
        records, kept = self.chunks.of_packs({at for at, pack in enumerate(self.packs) if pack in packs})
        row = {number: at for at, number in enumerate(kept)}
        ends = list(accumulate(self.pages(), initial=0))
        digests = b"".join(self.digests[ends[at] * DIGEST : ends[at + 1] * DIGEST] for at in kept)
        groups = self.groups.of_chunks(row)
        return self._replace(
            chunks=ChunkTable(records, len(self.packs), self.ref.key),
            digests=digests,
            groups=groups,
            table=None,
        )

    def pages(self) -> list[int]:
        """How many pages each chunk has: none, where it is not memory."""
        return [
            raw // PAGE if memory else 0
            for raw, memory in zip(self.chunks.raw, self.chunks.is_memory, strict=True)
        ]


class KnownChunks:
    """The chunks of earlier dumps, and the pages in them."""

    def __init__(self) -> None:
        self.newest_image = ""
        """The id of the newest image of the name that was asked for; empty where there is none."""
        self.wanted = 0
        """How many pages whoever asked has."""
        self._indexes: list[Index] = []
        self._first_chunks: list[int] = []
        self.raw: list[int] = []
        """The sizes of the known chunks once decompressed (bytes)."""
        self._blobs: dict[bytes, int] = {}
        self._memory_chunks: list[int] = []
        self._first_pages: list[int] = []
        self._page_count = 0
        self._group_places = array("Q")
        self.chunk_at: dict[int, int] = {}
        """The known chunks by their places: see _OFFSET_BITS. Only where there are mixed groups."""
        self._pack_places: list[list[int]] = []  # of the packs of each index
        self._page_digests: list[tuple[int, bytes]] = []  # by the number of the first page
        self._group_digests = b""
        self.found_mixed: set[int] = set()
        """The places of the mixed groups that were found."""
        self.vouched_by: list[str] = []
        """The keys of the manifests that refer to the packs of which merged indexes told: who relies on that
        sees in the end that they are still there, see crcli.image.gc."""
        self._pages: Digests = sort_digests(b"")
        self._groups: Digests = self._pages
        self._group_keys = b""

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def told_by(self) -> list[str]:
        """The keys of the indexes that told of these chunks."""
        return [index.ref.key for index in self._indexes]

    @property
    def relied_on(self) -> list[str]:
        """The keys of all that must be in the store for these chunks to be there, and to stay."""
        packs = {pack for index in self._indexes for pack in index.used_packs}
        return [*self.told_by, *self.vouched_by, *map(pack_key, packs)]

    def chunks_of(self, refs: Iterable[IndexRef]) -> set[int]:
        """The chunks that some indexes told of."""
        wanted, found = set(refs), set[int]()
        for first, index in zip(self._first_chunks, self._indexes, strict=True):
            if index.ref in wanted:
                found.update(range(first, first + len(index.chunks)))
        return found

    def chunk(self, number: int) -> tuple[bytes, Chunk]:
        """The pack id and the record of one known chunk."""
        at = self._owner(number)
        chunk = self._indexes[at].chunks[number - self._first_chunks[at]]
        return self._indexes[at].packs[chunk.pack], chunk

    def index_of(self, number: int) -> IndexRef:
        """The index that told of a known chunk."""
        return self._indexes[self._owner(number)].ref

    def _owner(self, chunk: int) -> int:
        return bisect_right(self._first_chunks, chunk) - 1

    def find_blob(self, digest: bytes) -> int | None:
        """The number of the known chunk with these contents (BLAKE3), if there is one."""
        return self._blobs.get(digest)

    def add(self, index: Index) -> None:
        """Take in the index of a dump."""
        if not len(index.chunks):
            return
        first, pages = len(self), index.pages()
        self._first_chunks.append(first)
        self._indexes.append(index)
        self.raw += index.chunks.raw
        self._page_count += sum(pages)
        for number in compress(range(len(pages)), map(not_, index.chunks.is_memory)):
            self._blobs.setdefault(index.chunks[number].digest, first + number)

    @property
    def page_count(self) -> int:
        """How many pages are known."""
        return self._page_count

    def finish(self) -> None:
        """Sort: `find_pages` and `find_groups` work from now on."""
        self._sort_pages()
        self._sort_groups()
        self._indexes = [
            index._replace(digests=b"", groups=_NO_GROUPS, table=None) for index in self._indexes
        ]
        if any(len(index.mixed) for index in self._indexes):
            self._place_chunks()

    def _sort_groups(self) -> None:
        """Number the groups, and have their digests be found. Those that were noted last come first: what an
        earlier dump noted of the same group may be of pages that are known no more."""
        digests = list[bytes]()
        for at in sorted(range(len(self._indexes)), key=lambda at: self._indexes[at].ref, reverse=True):
            index, first = self._indexes[at], self._first_chunks[at]
            mixed = _MIXED | at << _INDEX_BITS
            for places, counts, some in (
                (range(mixed, mixed + len(index.mixed)), index.mixed.pages(), index.mixed.digests),
                (_places_of(index.groups, first), index.groups.counts, index.groups.digests),
            ):
                whole, digests_of = _whole(places, counts, some)
                self._group_places.extend(whole)
                digests.append(digests_of)
        groups = self._group_digests = b"".join(digests)
        self._groups, self._group_keys = sort_digests(groups), keys_of(groups)

    def _sort_pages(self) -> None:
        """Number the pages, those of the largest tables first, and have their digests be found."""
        indexes = list(zip(self._first_chunks, self._indexes, strict=True))
        indexes.sort(key=lambda one: len(one[1].digests) if one[1].table else 0, reverse=True)
        count = 0
        for first, index in indexes:
            numbers, pages = range(first, first + len(index.chunks)), index.pages()
            self._memory_chunks += compress(numbers, index.chunks.is_memory)
            self._first_pages += compress(accumulate(pages, initial=count), index.chunks.is_memory)
            count += sum(pages)
        tabled = [
            TabledDigests(index.digests, index.table) for _, index in indexes[:_MOST_TABLES] if index.table
        ]
        others = b"".join(index.digests for _, index in indexes[len(tabled) :])
        starts = accumulate((len(index.digests) // DIGEST for _, index in indexes), initial=0)
        digests = [*(index.digests for _, index in indexes[: len(tabled)]), others]
        self._page_digests = list(zip(starts, digests, strict=False))
        parts = [*tabled, sort_digests(others)] if others else tabled
        self._pages = parts[0] if len(parts) == 1 else SeveralDigests(parts, map(len, tabled))

    def _place_chunks(self) -> None:
        """Have chunks be found by where they are: one number, of the pack and the offset in it."""
        packs: dict[bytes, int] = {}
        for first, index in zip(self._first_chunks, self._indexes, strict=True):
            here = [packs.setdefault(pack, len(packs) << _OFFSET_BITS) for pack in index.packs]
            places = map(add, map(here.__getitem__, index.chunks.packs), index.chunks.offsets)
            self.chunk_at.update(zip(places, range(first, first + len(index.chunks)), strict=True))
            self._pack_places.append(here)

    def page_digests(self, chunks: Iterable[int]) -> Iterator[bytes]:
        """For each of these chunks the digests of its pages, one after another."""
        first_pages = dict(zip(self._memory_chunks, self._first_pages, strict=True))
        starts = [start for start, _ in self._page_digests]
        for chunk in chunks:
            if (first := first_pages.get(chunk)) is not None:
                start, digests = self._page_digests[bisect_right(starts, first) - 1]
                at, pages = first - start, self.raw[chunk] // PAGE
                yield digests[at * DIGEST : (at + pages) * DIGEST]

    def whole_groups(self, chunks: Container[int]) -> Iterator[tuple[int, int, bytes]]:
        """The known groups that lie in one of these chunks: which one, the first page, the digest."""
        for row, place in enumerate(self._group_places):
            if place < _MIXED and place >> _PAGE_BITS in chunks:
                yield place >> _PAGE_BITS, place & _LAST_PAGE, self._group_digest(row)

    def found_mixed_groups(
        self, refs: Container[IndexRef]
    ) -> list[tuple[Sequence[bytes], Iterable[tuple[bytes, bytes]]]]:
        """The mixed groups of some indexes that were found: see `tables.join_mixed`."""
        found: dict[int, list[tuple[bytes, bytes]]] = {}
        for row, place in enumerate(self._group_places):
            if place in self.found_mixed:
                at, number = divmod(place & ~_MIXED, 1 << _INDEX_BITS)
                if self._indexes[at].ref in refs:
                    parts = self._indexes[at].mixed.rows(number)
                    found.setdefault(at, []).append((self._group_digest(row), parts))
        return [(self._indexes[at].packs, groups) for at, groups in found.items()]

    def _group_digest(self, row: int) -> bytes:
        return self._group_digests[row * DIGEST : (row + 1) * DIGEST]

    def group_keys(self) -> bytes:
        """The first 8 bytes of the digest of each known whole group, one after another."""
        return self._group_keys

    def find_pages(self, digests: Sequence[bytes]) -> list[int | None]:
        """For each digest of a page its number among all known pages, or None."""
        return self._pages.find(digests)

    def chunk_of(self, page: int) -> tuple[int, int, int]:
        """The chunk in which a known page is, and the numbers of its first page and of the one behind it."""
        owner = bisect_right(self._first_pages, page)
        end = self._first_pages[owner] if owner < len(self._first_pages) else self._page_count
        return self._memory_chunks[owner - 1], self._first_pages[owner - 1], end

    def find_groups(self, digests: Sequence[bytes]) -> list[int | None]:
        """For each digest of a group its place, see _MIXED, or None."""
        places = self._group_places
        return [None if row is None else places[row] for row in self._groups.find(digests)]

    def mixed_group(self, place: int) -> tuple[list[int], Iterator[MixedFields]]:
        """The parts of a group whose place has _MIXED set, and what makes a place of a chunk, see `chunk_at`,
        of an offset in one of the packs that they name by number."""
        at, number = divmod(place & ~_MIXED, 1 << _INDEX_BITS)
        return self._pack_places[at], self._indexes[at].mixed.parts(number)


class KnownPagesOf:
    """Known chunks as the intake asks for them: what is found is adopted into the image's chunk table."""

    def __init__(self, known: KnownChunks, adopt: Callable[[int], int]) -> None:
        self._known = known
        self._adopt = adopt
        self._firsts = [NOWHERE] * len(known)
        """The place here of the first page of each known chunk that was adopted."""

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
                place = self._first(chunk)
            places.append(place + page - first)
        return places

    def find_groups(self, digests: Sequence[bytes]) -> list[Sequence[int] | None]:
        """See memory.classify.KnownPages."""
        found: list[Sequence[int] | None] = []
        firsts, add = self._firsts, found.append
        for place in self._known.find_groups(digests):  # thousands a second: little is called here
            if place is None:
                add(None)
            elif place & _MIXED:
                add(self._places_of(place))
            else:
                chunk, page = place >> _PAGE_BITS, place & _LAST_PAGE
                first = firsts[chunk] if firsts[chunk] != NOWHERE else self._first(chunk)
                add(range(first + page, first + page + GROUP_PAGES))
        return found

    def _places_of(self, mixed: int) -> Sequence[int] | None:
        """The places of the pages of a mixed group; None where not all of it is known here."""
        places: list[int] = []
        packs, parts = self._known.mixed_group(mixed)
        chunk_at, raw, firsts = self._known.chunk_at.get, self._known.raw, self._firsts
        for pack, offset, page, pages in parts:  # a hundred thousand a second
            if pack == NO_PACK:
                places += [ZERO] * pages
                continue
            chunk = chunk_at(packs[pack] + offset)
            if chunk is None or raw[chunk] < (page + pages) * PAGE:
                return None
            first = (firsts[chunk] if firsts[chunk] != NOWHERE else self._first(chunk)) + page
            if pages == 1:
                places.append(first)
            else:
                places += range(first, first + pages)
        self._known.found_mixed.add(mixed)
        return places

    def _first(self, chunk: int) -> int:
        """The place here of the first page of a known chunk, which is adopted."""
        if self._firsts[chunk] == NOWHERE:
            self._firsts[chunk] = place_in(self._adopt(chunk), 0)
        return self._firsts[chunk]


def _places_of(groups: Groups, first: int) -> list[int]:
    """The places of groups in chunks that are known by their number here and `first`."""
    return [
        first + chunk << _PAGE_BITS | page for chunk, page in zip(groups.chunks, groups.pages, strict=True)
    ]


def _whole(places: Sequence[int], counts: Sequence[int], digests: bytes) -> tuple[Sequence[int], bytes]:
    """Those of some groups that have as many pages as are looked for together: crcli's all do."""
    if counts.count(GROUP_PAGES) == len(counts):
        return places, digests
    whole = [at for at, count in enumerate(counts) if count == GROUP_PAGES]
    return [places[at] for at in whole], b"".join(digests[at * DIGEST : (at + 1) * DIGEST] for at in whole)


def load_known(
    store: Store,
    name: str,
    limit: int = PAGE_LIMIT,
    wanted: int | None = None,
    is_same: Callable[[dict[str, Any]], bool] = lambda head: False,
    others: int | None = OTHERS_LIMIT,
    *,
    expect: Expect | None = None,
) -> KnownChunks:
    """Read what the images called `name` consist of, then, while that is fewer than `wanted` pages (None:
    always), the newest `others` indexes of the store (None: all).

    `is_same` tells by an image's JSON head whether it is of the very tree: older ones then matter no more,
    nor, if the tree has hardly grown since, do those of others, though fewer pages are known than it has:
    zero ones are not, and those that come twice are once. It ends with the index that takes the number of
    pages to `limit`.

    An index whose pack is gone, or that cannot be read, is left out: it only costs chances to reuse. With
    `expect` nobody looks for packs, and whoever asked must look for all that is `relied_on`; most of that is
    told to `expect` before any index is read.
    """
    known = KnownChunks()
    known.wanted = wanted or 0
    loading = _Loading(store, known, limit, sees_packs=expect is None)
    same_name = newest_in(store, f"{IMAGES}{name}/", LINEAGES, image_at)
    known.newest_image = same_name[0].key.rpartition("/")[2] if same_name else ""
    lineages = _lineages(store, name, same_name[:LINEAGES], is_same)
    loading.vouch(lineages)
    if expect is not None:
        expect(key for image in lineages[:1] for key in image.needs)
    loading.take([ref for image in lineages for ref in image.indexes][:SAME_NAME_LIMIT])
    if wanted is not None and any(
        is_same(image.head) and image.pages >= _AS_LARGE * wanted for image in lineages
    ):
        wanted = 0
    if wanted is None or known.page_count < wanted:
        loading.take([IndexRef(info.key.rpartition("/")[2]) for info in same_name[:SAME_NAME_LIMIT]])
    if wanted is None or known.page_count < wanted:
        keys = [info.key.removeprefix(INDEXES) for info in _some_indexes(store, others)]
        loading.take([IndexRef(key[: -len(".index")]) for key in keys if key.endswith(".index")], others)
    known.finish()
    return known


def _some_indexes(store: Store, others: int | None) -> list[ObjectInfo]:
    """The newest indexes, with all that belongs to each: so many, beside those of one name; None: all."""
    if others is None:
        return list(store.list(INDEXES))[::-1]
    return newest_in(store, INDEXES, 3 * (others + SAME_NAME_LIMIT), is_in_an_index)


class _Lineage(NamedTuple):
    """What the image at `key` says of what it consists of: its JSON head, and the packs that it refers to, if
    it is the newest or names merged indexes; both empty where it cannot be read."""

    key: str
    head: dict[str, Any]
    packs: Sequence[bytes]

    @property
    def indexes(self) -> list[IndexRef]:
        """The indexes that tell of it, those of most first; of an image that does not say so, its own."""
        return [
            *(IndexRef(one) for one in ids_in(self.head.get("indexes", [self.head.get("id")]))),
            *(IndexRef(one, is_merged=True) for one in ids_in(self.head.get("merged"))),
        ]

    @property
    def vouches(self) -> bool:
        """Whether its word counts for packs: that of one which names merged indexes does."""
        return "merged" in self.head and bool(self.packs)

    @property
    def needs(self) -> list[str]:
        """The keys of what a dump will rely on that refers to all of it."""
        vouching = [self.key] if self.vouches else []
        return [*vouching, *(ref.key for ref in self.indexes[:SAME_NAME_LIMIT]), *map(pack_key, self.packs)]

    @property
    def pages(self) -> int:
        """How many pages it maps, zero ones among them; 0 where it does not say so."""
        counts = self.head.get("counts")
        total = counts.get("total") if isinstance(counts, dict) else None
        return total // PAGE if isinstance(total, int) else 0


def _lineages(
    store: Store, name: str, images: Sequence[ObjectInfo], is_same: Callable[[dict[str, Any]], bool]
) -> list[_Lineage]:
    """What these images consist of.

    The newest is most often of the same tree, and then all that is needed.
    """
    newest = [_lineage(store, name, info, reads_packs=True) for info in images[:1]]
    if any(is_same(one.head) for one in newest):
        return newest
    with asking(_READERS, "lineage", store) as threads:
        all_ = newest + list(threads.map(lambda info: _lineage(store, name, info), images[1:]))
    same = [one for one in all_ if is_same(one.head)][:1]
    return same + all_


def _lineage(store: Store, name: str, image: ObjectInfo, *, reads_packs: bool = False) -> _Lineage:
    image_id = image.key.rpartition("/")[2]
    key = manifest_key(name, image_id)
    try:
        peek = ManifestPeek(store, key, image.size)
        check_head(peek.head, key)
        return _Lineage(key, peek.head, peek.packs() if reads_packs or "merged" in peek.head else ())
    except (ImageDamaged, NotFound):
        return _Lineage(key, {}, ())


class _Loading:
    """Indexes on their way into what is known, each once."""

    def __init__(self, store: Store, known: KnownChunks, limit: int, *, sees_packs: bool) -> None:
        self._store = store
        self._known = known
        self._limit = limit
        self._sees_packs = sees_packs
        self._seen: set[IndexRef] = set()
        self._vouched: set[bytes] = set()

    def vouch(self, images: Iterable[_Lineage]) -> None:
        """Take the word of images for the packs that they need, of which merged indexes tell."""
        for image in images:
            if image.vouches and image.key not in self._known.vouched_by:
                self._known.vouched_by.append(image.key)
                self._vouched.update(image.packs)

    def take(self, refs: Sequence[IndexRef], most: int | None = None) -> None:
        """Read these indexes in this order, `most` of them, until enough pages are known."""
        new = [one for one in dict.fromkeys(refs) if one not in self._seen][:most]
        self._seen.update(new)
        with asking(2 * _READERS, "indexes", self._store) as threads:
            for at in range(0, len(new), _READERS):
                if self._known.page_count >= self._limit:
                    return
                some = new[at : at + _READERS]
                pages = [
                    None if one.is_merged else threads.submit(self._store.get, pages_key(one.id))
                    for one in some
                ]
                self._take(threads.map(self._read, some, pages))

    def _take(self, read: Iterable[Index | None]) -> None:
        # Merged ones outlive some of the packs that they tell of: these are not asked for.
        found = [
            index.of_packs(self._vouched) if index.ref.is_merged else index
            for index in read
            if index is not None
        ]
        packs = {pack for index in found for pack in index.used_packs}
        missing = self._missing(packs) if self._sees_packs else set()
        for index in found:
            if index.ref.is_merged:
                index = index.of_packs(index.used_packs - missing)
            if self._known.page_count < self._limit and not index.used_packs & missing:
                self._known.add(index)

    def _read(self, ref: IndexRef, pages: Future[bytes] | None) -> Index | None:
        try:
            return _read_index(self._store, ref, pages)
        except (ImageDamaged, NotFound, KeyError, ValueError):  # also one that lacks a section
            return None

    def _missing(self, packs: set[bytes]) -> set[bytes]:
        """Those of the packs that the store does not have."""
        keys = {pack_key(pack): pack for pack in packs}
        return {keys[key] for key in self._store.missing(keys)}


def _read_index(store: Store, ref: IndexRef, pages: Future[bytes] | None) -> Index:
    """Read one index. Its page digests, the largest part, are on their way: some indexes have none, and in
    those that were merged they stand beside the rest."""
    name = ref.key
    sections = unpack_container(store.get(name), ContainerKind.INDEX, name)
    packs = read_packs(sections["PACK"], name)
    chunks = ChunkTable(sections["CHNK"], len(packs), name)
    groups = read_groups(sections.get("GRPS", b""), chunks, name)
    mixed = MixedGroups(sections.get("MGRP", b""), sections.get("MPRT", b""), len(packs), name)
    table = read_table(sections["PTAB"], name) if "PTAB" in sections else None
    if pages is None:
        digests = sections["PGDS"]
    else:
        digests = pages.result() if any(chunks.is_memory) else b""
        if blake3(digests).digest() != sections["PGHS"]:
            raise ImageDamaged(f"{pages_key(ref.id)} is not what {name} says")
    index = Index(ref, packs, chunks, digests, groups, mixed, table)
    if sum(index.pages()) * DIGEST != len(digests):
        raise ImageDamaged(f"{name} and its page digests do not fit together")
    return index
