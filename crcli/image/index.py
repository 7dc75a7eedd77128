"""What the store has already: the indexes of earlier dumps, loaded before the freeze.

The newest indexes are read, those of the same name first, up to a bound on memory. Pages are looked up by
the first 8 bytes of their BLAKE3 digest in one sorted array and then compared in full, so that a lookup
of a whole block is a few vectorised operations.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from crcli.errors import ImageDamaged, NotFound
from crcli.image.container import ContainerKind, unpack_container
from crcli.image.names import IMAGES, INDEXES, PACKS, pages_key
from crcli.image.tables import Chunk, read_chunks, read_packs
from crcli.memory.intake import DIGEST, Location

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.store.base import Store

PAGE_LIMIT = 4 << 20
"""Pages of earlier dumps that are remembered (16 GiB of memory; about 180 MB when full)."""

_PAGE_BYTES = 4096


class KnownChunks:
    """The chunks of earlier dumps, and the pages in them."""

    def __init__(self) -> None:
        self._chunks: list[tuple[bytes, Chunk]] = []
        self._blobs: dict[bytes, int] = {}
        self._digests: list[bytes] = []
        self._page_count = 0
        self._first_pages: list[int] = []
        self._memory_chunks: list[int] = []
        self._lookup: _PageLookup | None = None

    def __len__(self) -> int:
        return len(self._chunks)

    def chunk(self, number: int) -> tuple[bytes, Chunk]:
        """The pack id and the record of one known chunk."""
        return self._chunks[number]

    def find_blob(self, digest: bytes) -> int | None:
        """The number of the known chunk with these contents (BLAKE3), if there is one."""
        return self._blobs.get(digest)

    def add(self, packs: list[bytes], chunks: list[Chunk], digests: bytes) -> None:
        """Take in one index: its tables, and its pages' digests in the order of its chunks."""
        at = 0
        for chunk in chunks:
            number = len(self._chunks)
            self._chunks.append((packs[chunk.pack], chunk))
            if chunk.is_memory:
                self._first_pages.append(self._page_count + at // DIGEST)
                self._memory_chunks.append(number)
                at += chunk.raw // _PAGE_BYTES * DIGEST
            else:
                self._blobs.setdefault(chunk.digest, number)
        if at != len(digests):
            raise ImageDamaged("an index and its page digests do not fit together")
        self._digests.append(digests)
        self._page_count += at // DIGEST

    @property
    def page_count(self) -> int:
        """How many pages are known."""
        return self._page_count

    def finish(self) -> None:
        """Sort: `find_pages` works from now on."""
        if self._page_count:
            self._lookup = _PageLookup(self._digests, self._first_pages, self._memory_chunks)
        self._digests = []

    def find_pages(self, digests: Sequence[bytes]) -> list[tuple[int, int] | None]:
        """For each digest the known chunk and the page in it, or None."""
        if self._lookup is None or not digests:
            return [None] * len(digests)
        return self._lookup.find(digests)


class KnownPagesOf:
    """Known chunks as the intake asks for them: what is found is adopted into the image's chunk table."""

    def __init__(self, known: KnownChunks, adopt: Callable[[int], int]) -> None:
        self._known = known
        self._adopt = adopt

    def find(self, digests: Sequence[bytes]) -> list[Location | None]:
        """See memory.intake.KnownPages."""
        return [
            None if place is None else Location(self._adopt(place[0]), place[1])
            for place in self._known.find_pages(digests)
        ]


class _PageLookup:
    def __init__(self, digests: list[bytes], first_pages: list[int], chunks: list[int]) -> None:
        import numpy as np

        self._np: Any = np
        self._rows: Any = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, DIGEST // 8)
        order = np.argsort(self._rows[:, 0], kind="stable")
        self._order: Any = order.astype(np.uint32)
        self._keys: Any = self._rows[order, 0]
        self._first_pages: Any = np.asarray(first_pages, dtype=np.uint32)
        self._chunks = chunks
        self._lock = threading.Lock()

    def find(self, digests: Sequence[bytes]) -> list[tuple[int, int] | None]:
        np = self._np
        asked = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, DIGEST // 8)
        at = np.searchsorted(self._keys, asked[:, 0])
        at[at == len(self._keys)] = 0
        rows = self._order[at]
        same = (self._rows[rows] == asked).all(axis=1)
        owner = np.searchsorted(self._first_pages, rows, side="right") - 1
        page = rows - self._first_pages[owner]
        chunks = self._chunks
        return [
            (chunks[o], p) if s else None
            for s, o, p in zip(same.tolist(), owner.tolist(), page.tolist(), strict=True)
        ]


def load_known(store: Store, name: str) -> KnownChunks:
    """Read the indexes that are in the store, newest first, those of images called `name` before all.

    An index whose pack is gone, or that cannot be read, is left out: it only costs chances to reuse.
    """
    known = KnownChunks()
    ids = [info.key.removeprefix(INDEXES).removesuffix(".index")
           for info in store.list(INDEXES) if info.key.endswith(".index")]  # fmt: skip
    prefix = f"{IMAGES}{name}/"
    prefer = {info.key.removeprefix(prefix) for info in store.list(prefix)} if ids else set()
    ids.sort(key=lambda image_id: (image_id in prefer, image_id), reverse=True)
    there = {info.key.rpartition("/")[2] for info in store.list(PACKS)} if ids else set()
    for image_id in ids:
        if known.page_count >= PAGE_LIMIT:
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
    known.add(packs, chunks, digests)
