"""What the store has already: the indexes of earlier dumps, loaded before the freeze.

The newest indexes are read, those of the same name first, up to a bound on memory. Pages, and groups of
them, are looked up by the first 8 bytes of their BLAKE3 digest in one sorted array and then compared in
full, so that a lookup of a whole block is a few vectorised operations.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from crcli.errors import ImageDamaged, NotFound
from crcli.image.container import ContainerKind, unpack_container
from crcli.image.names import IMAGES, INDEXES, PACKS, pages_key
from crcli.image.tables import Chunk, Group, read_chunks, read_groups, read_packs
from crcli.memory.classify import DIGEST, GROUP_PAGES, Location
from crcli.memory.extents import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.store.base import Store

PAGE_LIMIT = 4 << 20
"""Pages of earlier dumps that are remembered (16 GiB of memory; about 190 MB when full)."""


class KnownChunks:
    """The chunks of earlier dumps, and the pages in them."""

    def __init__(self) -> None:
        self._chunks: list[tuple[bytes, Chunk]] = []
        self._blobs: dict[bytes, int] = {}
        self._memory_chunks: list[int] = []
        self._first_pages: list[int] = []
        self._page_digests: list[bytes] = []
        self._page_count = 0
        self._group_places = array("Q")  # chunk << 16 | page
        self._group_digests: list[bytes] = []
        self._pages: _Digests | None = None
        self._groups: _Digests | None = None

    def __len__(self) -> int:
        return len(self._chunks)

    def chunk(self, number: int) -> tuple[bytes, Chunk]:
        """The pack id and the record of one known chunk."""
        return self._chunks[number]

    def find_blob(self, digest: bytes) -> int | None:
        """The number of the known chunk with these contents (BLAKE3), if there is one."""
        return self._blobs.get(digest)

    def add(
        self, packs: list[bytes], chunks: list[Chunk], digests: bytes, groups: Sequence[Group] = ()
    ) -> None:
        """Take in one index: its tables, and its pages' digests in the order of its chunks.

        Raises ImageDamaged, with nothing taken in, when they do not fit together.
        """
        pages = [chunk.raw // PAGE if chunk.is_memory else 0 for chunk in chunks]
        if sum(pages) * DIGEST != len(digests):
            raise ImageDamaged("an index and its page digests do not fit together")
        first = len(self._chunks)
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

    @property
    def page_count(self) -> int:
        """How many pages are known."""
        return self._page_count

    def finish(self) -> None:
        """Sort: `find_pages` and `find_groups` work from now on."""
        self._pages = _Digests(self._page_digests)
        self._groups = _Digests(self._group_digests)
        self._page_digests, self._group_digests = [], []

    def find_pages(self, digests: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """For each digest of a page the known chunk and the page in it, or None."""
        return [None if row is None else self._page_place(row) for row in self._rows(self._pages, digests)]

    def find_groups(self, digests: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """For each digest of a group the known chunk and the group's first page in it, or None."""
        found = self._rows(self._groups, digests)
        return [None if row is None else divmod(self._group_places[row], 1 << 16) for row in found]

    def _page_place(self, row: int) -> tuple[int, int]:
        owner = bisect_right(self._first_pages, row) - 1
        return self._memory_chunks[owner], row - self._first_pages[owner]

    def _rows(self, table: _Digests | None, digests: Sequence[bytes]) -> list[int | None]:
        return table.find(digests) if table is not None else [None] * len(digests)


class KnownPagesOf:
    """Known chunks as the intake asks for them: what is found is adopted into the image's chunk table."""

    def __init__(self, known: KnownChunks, adopt: Callable[[int], int]) -> None:
        self._known = known
        self._adopt = adopt

    def find(self, digests: Sequence[bytes]) -> list[Location | None]:
        """See memory.classify.KnownPages."""
        return self._adopted(self._known.find_pages(digests))

    def find_groups(self, digests: Sequence[bytes]) -> list[Location | None]:
        """See memory.classify.KnownPages."""
        return self._adopted(self._known.find_groups(digests))

    def _adopted(self, places: list[tuple[int, int] | None]) -> list[Location | None]:
        return [None if place is None else Location(self._adopt(place[0]), place[1]) for place in places]


class _Digests:
    """Digests in an array, sorted by their first 8 bytes."""

    def __init__(self, parts: list[bytes]) -> None:
        joined = b"".join(parts)
        self._count = len(joined) // DIGEST
        if not self._count:
            return
        import numpy as np

        self._np: Any = np
        self._rows: Any = np.frombuffer(joined, dtype="<u8").reshape(-1, DIGEST // 8)
        order = np.argsort(self._rows[:, 0], kind="stable")
        self._order: Any = order.astype(np.uint32)
        self._keys: Any = self._rows[order, 0]

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """For each digest the row in which it stands, or None."""
        if not self._count or not digests:
            return [None] * len(digests)
        np = self._np
        asked = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, DIGEST // 8)
        at = np.searchsorted(self._keys, asked[:, 0])
        at[at == self._count] = 0
        rows = self._order[at]
        same = (self._rows[rows] == asked).all(axis=1)
        return [row if here else None for row, here in zip(rows.tolist(), same.tolist(), strict=True)]


def load_known(store: Store, name: str, limit: int = PAGE_LIMIT) -> KnownChunks:
    """Read the indexes that are in the store, newest first, those of images called `name` before all.

    It ends with the index that takes the number of pages to `limit`. An index whose pack is gone, or that
    cannot be read, is left out: it only costs chances to reuse.
    """
    known = KnownChunks()
    ids = [info.key.removeprefix(INDEXES).removesuffix(".index")
           for info in store.list(INDEXES) if info.key.endswith(".index")]  # fmt: skip
    prefix = f"{IMAGES}{name}/"
    prefer = {info.key.removeprefix(prefix) for info in store.list(prefix)} if ids else set()
    ids.sort(key=lambda image_id: (image_id in prefer, image_id), reverse=True)
    there = {info.key.rpartition("/")[2] for info in store.list(PACKS)} if ids else set()
    for image_id in ids:
        if known.page_count >= limit:
            break
        try:
            _load_index(store, image_id, there, known)
        except (ImageDamaged, NotFound):
            continue
    known.finish()
    return known


def _load_index(store: Store, image_id: str, there: set[str], known: KnownChunks) -> None:
    name = f"{INDEXES}{image_id}.index"
    sections = unpack_container(store.get(name), ContainerKind.INDEX, name)
    packs = read_packs(sections["PACK"], name)
    chunks = read_chunks(sections["CHNK"], len(packs), name)
    if any(packs[number].hex() not in there for number in {chunk.pack for chunk in chunks}):
        return
    digests = store.get(pages_key(image_id)) if any(chunk.is_memory for chunk in chunks) else b""
    if blake3(digests).digest() != sections["PGHS"]:
        raise ImageDamaged(f"{pages_key(image_id)} is not what {name} says")
    known.add(packs, chunks, digests, read_groups(sections.get("GRPS", b""), chunks, name))
