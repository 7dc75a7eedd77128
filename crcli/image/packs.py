"""Chunks on their way into the store, and back.

Writing: `PackWriter` gathers chunks from several threads into packs, objects of a size that suits object
storage, and keeps the table of what is where. Reading: `ChunkReader` fetches runs of neighbouring chunks
in one ranged read and gives out nothing whose hash was not checked.
"""

from __future__ import annotations

import os
import threading
from array import array
from collections import Counter
from typing import TYPE_CHECKING

from blake3 import blake3

from crcli.errors import ImageDamaged, NotFound, StoreError
from crcli.image.codec import Codec, compress, decompress
from crcli.image.container import ContainerKind, pack_container
from crcli.image.lookup import TableMaker
from crcli.image.merging import MOST_SEPARATE, choose, is_hardly_used, merge
from crcli.image.names import IndexRef, index_key, merged_key, pack_key, pages_key
from crcli.image.tables import (
    NO_PACK,
    PACK_ID,
    Chunk,
    MixedFields,
    pack_group,
    write_chunks,
    write_mixed,
    write_packs,
)
from crcli.memory.blocks import GROUP_PAGES
from crcli.memory.extents import PAGE, Source
from crcli.memory.places import ZERO, Location, stretches
from crcli.store.leaving import asking

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from concurrent.futures import Future

    from crcli.image.index import KnownChunks
    from crcli.memory.extents import Extent
    from crcli.memory.weights.references import Reference
    from crcli.store.base import Buffer, ObjectWriter, Store

PACK_BYTES = 64 << 20
"""A pack is closed when it has grown past this size (bytes)."""

FIRST_PACK_BYTES, FIRST_PACKS = 7 << 20, 4
"""The same for the first ones of a dump, so many. Mostly they hold all that has changed since the last dump,
and are on their way while the rest of the memory is still being looked at. Even with the chunk that ends it
such a pack is one part to S3: that takes one request, and a client that need not be waited for."""

PACK_MAGIC = b"crclipk\x01"

_FAMILY = 4
"""So many bytes of a pack's id are the same for all images of a name: one listing tells of their packs."""

BLOB_BYTES = 1 << 20
"""Files are cut into chunks of this size (bytes)."""

READ_BYTES = 8 << 20
"""Neighbouring chunks are fetched together up to this size (bytes): a request costs S3's client 1.2 ms of
processor time whatever it brings."""

SOON_BYTES = 4 << 20
"""The same where somebody waits for one of them."""

NEAR_BYTES = 1 << 20
"""The same where this host has them, but not in memory: so much stays in a processor's cache while it is
checked and passed on, and the allocator uses the same memory for it again and again, rather than have the
kernel clear some anew. What is in memory is mapped instead, all of a read at once: threads that map and unmap
small pieces wait for each other."""

_GAP = 256 << 10
"""Unwanted bytes between two wanted chunks up to which one read is cheaper than two."""


_FEW_INDEXES, _MOST_INDEXES = 16, 64
_NEGLIGIBLE = 1 / 64
"""Beyond a few indexes this share of an image's bytes may be unknown to the next dump, which then stores it
again; and whatever it takes more than the most for."""

_STATS_AT_ONCE = 16

_RESERVED = Chunk(0, 0, 0, 0, Codec.RAW, False, b"")


class PackWriter:
    """New chunks become packs; chunks that the store has are adopted. Safe to call from several threads.

    Nothing that it writes is an image yet: until a manifest refers to it, a pack is litter that `gc`
    removes.
    """

    def __init__(self, store: Store, image_id: str, known: KnownChunks | None = None, name: str = "") -> None:
        """`name` is that of the image, beside whose packs those of others of the name lie in the store."""
        from concurrent.futures import ThreadPoolExecutor

        self._store = store
        self._image_id = image_id
        self._family = blake3(name.encode()).digest()[:_FAMILY] if name else b""
        self._known = known
        self._lock = threading.Lock()
        self._packs: list[bytes] = []
        self._chunks: list[Chunk] = []
        self._new: list[int] = []
        self._groups = bytearray()
        self._mixed: dict[bytes, None] = {}
        self._mixed_places = array("q")
        self._references: list[Reference] = []
        self._reference_numbers: dict[Reference, int] = {}
        self._adopted: dict[int, int] = {}
        self._adopted_as: dict[Chunk, int] = {}
        self._foreign_packs: dict[bytes, int] = {}
        self._pack: ObjectWriter | None = None
        self._pack_number = 0
        self._pack_size = 0
        self._packs_begun = 0
        self._pages: ObjectWriter | None = None
        self._pages_hash = blake3()
        self._page_table = TableMaker()
        self._merging: list[IndexRef] = []
        self._in_use: Counter[int] = Counter()
        self._committer = ThreadPoolExecutor(2, "pack-commit")
        self._commits: list[Future[None]] = []
        self.stored_bytes = 0
        """Bytes handed to the store so far for packs and the index."""

    def learn(self, known: KnownChunks, image_id: str) -> None:
        """Take note of what the store has, and of what the image is called; nothing was added before."""
        self._known = known
        self._image_id = image_id
        self._page_table.expect(known.wanted)

    @property
    def packs(self) -> list[bytes]:
        """The pack table of the image: ids of its own packs and of those that it refers to."""
        return self._packs

    @property
    def chunks(self) -> list[Chunk]:
        """The chunk table of the image."""
        return self._chunks

    @property
    def references(self) -> list[Reference]:
        """The references into files of weights."""
        return self._references

    @property
    def adopted(self) -> set[int]:
        """The chunks that the store had before, by their numbers in the chunk table."""
        return set(self._adopted.values())

    def refer(self, reference: Reference) -> int:
        """Give a reference its number, the same to equal ones; see memory.chunking.ChunkSink."""
        with self._lock:
            number = self._reference_numbers.setdefault(reference, len(self._references))
            if number == len(self._references):
                self._references.append(reference)
            return number

    def own_packs(self) -> list[int]:
        """The numbers, in the pack table, of the packs that this image wrote itself."""
        return sorted(set(range(len(self._packs))).difference(self._foreign_packs.values()))

    def indexes(self, memory: Iterable[Extent]) -> dict[str, list[str]]:
        """The ids of the dumps whose indexes, and whose `merged` ones, tell of what this image consists of,
        those of most bytes first: all that a later dump reads to know it. Nothing more is added, and
        `memory` is all that the image maps.

        Left out are those of which so little is left that storing it again costs less than reading them at
        every dump to come.
        """
        bytes_of = self._bytes_of_indexes()
        if self._new and len(bytes_of) >= MOST_SEPARATE:
            for extent in memory:
                if extent.source == Source.CHUNK:
                    self._in_use[extent.chunk] += extent.pages
            self._merging = choose(*self._use_of_indexes())
        if merged := sum(map(bytes_of.pop, self._merging)):
            bytes_of[IndexRef(self._image_id, is_merged=True)] = merged
        bytes_of[IndexRef(self._image_id)] = sum(self._chunks[number].raw for number in self._new)
        left = sum(bytes_of.values()) * (1 - _NEGLIGIBLE)
        found: list[IndexRef] = []
        for ref, size in bytes_of.most_common(_MOST_INDEXES):
            if size == 0 or (left <= 0 and len(found) >= _FEW_INDEXES):
                break
            found.append(ref)
            left -= size
        merged_ids = [ref.id for ref in found if ref.is_merged]
        own = {"indexes": [ref.id for ref in found if not ref.is_merged]}
        return {**own, "merged": merged_ids} if merged_ids else own

    def _bytes_of_indexes(self) -> Counter[IndexRef]:
        """How many bytes of what was adopted each index told of."""
        bytes_of: Counter[IndexRef] = Counter()
        for known, number in self._adopted.items():
            assert self._known is not None
            bytes_of[self._known.index_of(known)] += self._chunks[number].raw
        return bytes_of

    def _use_of_indexes(self) -> tuple[Counter[IndexRef], Counter[IndexRef]]:
        """How many bytes that are mapped each index told of; and how many that are not, in chunks of which
        hardly a page is."""
        in_use: Counter[IndexRef] = Counter()
        in_vain: Counter[IndexRef] = Counter()
        for known, number in self._adopted.items():
            assert self._known is not None
            chunk, ref = self._chunks[number], self._known.index_of(known)
            mapped = min(self._in_use[number] * PAGE, chunk.raw) if chunk.is_memory else chunk.raw
            in_use[ref] += mapped
            if is_hardly_used(mapped, chunk.raw):
                in_vain[ref] += chunk.raw - mapped
        return in_use, in_vain

    def reserve(self) -> int:
        """Give a number to a chunk that is about to be added; see memory.chunking.ChunkSink."""
        with self._lock:
            self._chunks.append(_RESERVED)
            return len(self._chunks) - 1

    def add(
        self,
        number: int,
        pieces: Sequence[Buffer],
        page_digests: Sequence[bytes],
        group_digests: Sequence[bytes] = (),
        *,
        hurry: bool = False,
    ) -> None:
        """Store one chunk of memory under a reserved number; see memory.chunking.ChunkSink."""
        raw = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._append(number, raw, page_digests, group_digests, is_memory=True, hurry=hurry)

    def note_mixed(self, groups: Iterable[tuple[bytes, Sequence[int]]]) -> None:
        """Note groups whose pages come from several places; see memory.chunking.ChunkSink."""
        with self._lock:
            for digest, places in groups:
                if digest not in self._mixed:
                    self._mixed[digest] = None
                    self._mixed_places.extend(places)

    def add_blob(self, raw: Buffer) -> int:
        """Store one chunk that is not memory, unless the store has it; give its number."""
        if self._known is not None and (there := self._known.find_blob(blake3(raw).digest())) is not None:
            return self.adopt(there)
        number = self.reserve()
        self._append(number, raw, (), (), is_memory=False, hurry=False)
        return number

    def adopt(self, known: int) -> int:
        """Refer to a chunk that the store has (by its number among the known); give its number here."""
        assert self._known is not None
        with self._lock:
            if (number := self._adopted.get(known)) is None:
                pack_id, chunk = self._known.chunk(known)
                if (pack := self._foreign_packs.get(pack_id)) is None:
                    pack = self._foreign_packs[pack_id] = len(self._packs)
                    self._packs.append(pack_id)
                # Of one chunk an index may tell, and another that was merged from it.
                here = Chunk(pack, *chunk[1:])
                number = self._adopted[known] = self._adopted_as.setdefault(here, len(self._chunks))
                if number == len(self._chunks):
                    self._chunks.append(here)
            return number

    def seal(self) -> None:
        """Finish the open pack and the index. On return all that was added is durable, and the packs of
        earlier images that are referred to were seen to be there.

        The index comes last, so that no other dump is told of a chunk before it is there. Packs are looked
        for after the last of ours was written: somebody may have removed the store meanwhile, and what is
        written afterwards makes a new one. Raises NotFound then.
        """
        self.end()
        commits, self._commits = self._commits, []
        seen = self._committer.submit(self._see_packs, commits)
        written = self._written_indexes()  # while the packs are on their way
        for commit in commits:
            commit.result()
        # Threads': ours may be interrupted, which a store's client need not notice.
        for put in [self._committer.submit(self._store.put, *one) for one in written]:
            put.result()
        self.stored_bytes += sum(len(data) for _, data in written)
        seen.result()

    def end(self) -> None:
        """Nothing more is added: have all that was be made durable. Does not wait; safe to call again."""
        with self._lock:
            self._end_pack()
            pages, self._pages = self._pages, None
        if pages is not None:
            self._commits.append(self._committer.submit(pages.commit))

    def _written_indexes(self) -> list[tuple[str, bytes]]:
        """The index of what is new, where something is, and what is merged of others; with their keys."""
        written = [(index_key(self._image_id), self._index())] if self._new else []
        if self._merging:
            assert self._known is not None
            merged = merge(self._known, self._merging, self._adopted, self._chunks, self._packs, self._in_use)
            written.append((merged_key(self._image_id), merged))
        return written

    def _index(self) -> bytes:
        """The index of what is new."""
        mixed, parts = write_mixed(self._mixed_groups())
        sections: dict[str, Buffer] = {
            "PACK": write_packs(self._packs),
            "CHNK": write_chunks(self._chunks[number] for number in self._new),
            "PGHS": self._pages_hash.digest(),
            "GRPS": bytes(self._groups),
            "MGRP": mixed,
            "MPRT": parts,
        }
        if table := self._page_table.table():
            sections["PTAB"] = table
        return pack_container(ContainerKind.INDEX, sections)

    def _mixed_groups(self) -> Iterator[tuple[bytes, list[MixedFields]]]:
        """The mixed groups as others can read them: chunks are named by where they are."""
        chunks = self._chunks
        for number, digest in enumerate(self._mixed):
            places = self._mixed_places[number * GROUP_PAGES : (number + 1) * GROUP_PAGES]
            parts: list[MixedFields] = []
            for begin, end in stretches(places):
                if places[begin] == ZERO:
                    parts.append((NO_PACK, 0, 0, end - begin))
                else:
                    chunk, page = Location.of(places[begin])
                    parts.append((chunks[chunk].pack, chunks[chunk].offset, page, end - begin))
            yield digest, parts

    def _see_packs(self, commits: Iterable[Future[None]]) -> None:
        """Make sure that all packs of the image are in the store, once these of ours are written."""
        for commit in commits:
            commit.result()
        for key in self._store.missing(map(pack_key, self._packs)):
            self._store.stat(key)  # which says best what is wrong

    def close(self) -> None:
        """Give up what was not sealed, and free the threads. Never raises."""
        for writer in (self._pack, self._pages):
            if writer is not None:
                writer.abort()
        self._pack = self._pages = None
        self._committer.shutdown(wait=True, cancel_futures=True)

    def _append(
        self,
        number: int,
        raw: Buffer,
        page_digests: Sequence[bytes],
        group_digests: Sequence[bytes],
        *,
        is_memory: bool,
        hurry: bool,
    ) -> None:
        digest = blake3(raw).digest()
        codec, stored = compress(raw, hurry=hurry)
        with self._lock:
            pack = self._open_pack()
            pack.write(stored)
            self._chunks[number] = Chunk(
                self._pack_number, len(raw), self._pack_size, len(stored), codec, is_memory, digest
            )
            for place, group in enumerate(group_digests):
                self._groups += pack_group(len(self._new), place * GROUP_PAGES, GROUP_PAGES, group)
            self._new.append(number)
            self._pack_size += len(stored)
            self.stored_bytes += len(stored)
            if page_digests:
                self._note_pages(b"".join(page_digests))
            if self._pack_size >= (PACK_BYTES if self._packs_begun > FIRST_PACKS else FIRST_PACK_BYTES):
                self._end_pack()

    def _open_pack(self) -> ObjectWriter:
        if self._pack is None:
            self._raise_failed_commits()
            pack_id = self._family + os.urandom(PACK_ID - len(self._family))
            self._pack = self._store.writer(pack_key(pack_id))
            self._pack_number = len(self._packs)
            self._packs.append(pack_id)
            self._packs_begun += 1
            self._pack.write(PACK_MAGIC)
            self._pack_size = len(PACK_MAGIC)
        return self._pack

    def _end_pack(self) -> None:
        if self._pack is not None:
            self._commits.append(self._committer.submit(self._pack.commit))
            self._pack = None

    def _note_pages(self, digests: bytes) -> None:
        if self._pages is None:
            self._pages = self._store.writer(pages_key(self._image_id))
        self._pages.write(digests)
        self._pages_hash.update(digests)
        self._page_table.add(digests)
        self.stored_bytes += len(digests)

    def _raise_failed_commits(self) -> None:
        for commit in self._commits:
            if commit.done():
                commit.result()


class ChunkReader:
    """Reads chunks of one image; every byte that it gives out has been checked against its hash."""

    def __init__(self, store: Store, packs: Sequence[bytes], chunks: Sequence[Chunk]) -> None:
        self._store = store
        self._packs = packs
        self._chunks = chunks

    def plan(self, wanted: Iterable[int], most: int = READ_BYTES) -> list[list[int]]:
        """Group chunk numbers into reads: see `plan_reads`."""
        return plan_reads(self._chunks, wanted, most)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Buffer]]:
        """Fetch one group of `plan` and give out (number, raw bytes), each checked.

        Raises ImageDamaged when a pack is gone or a chunk is not what its hash says.
        """
        where = span(self._packs, self._chunks, numbers)
        if (there := self._store.mapped(*where)) is not None:
            yield from self._checked(numbers, memoryview(there))
            return
        reads = plan_reads(self._chunks, numbers, NEAR_BYTES) if self._store.is_near(*where) else [numbers]
        for some in reads:
            yield from self._checked(some, memoryview(self._fetch(some)))

    def _fetch(self, numbers: Sequence[int]) -> Buffer:
        key, offset, length = span(self._packs, self._chunks, numbers)
        try:
            return self._store.get_range(key, offset, length)
        except NotFound as error:
            raise ImageDamaged(f"{key} is missing from the store", hint="use another image") from error
        except StoreError as error:
            if self._is_cut_short(key, offset + length):
                raise ImageDamaged(f"{key} is cut short", hint="use another image") from error
            raise

    def _checked(self, numbers: Sequence[int], data: memoryview) -> Iterator[tuple[int, Buffer]]:
        """The chunks of one read."""
        offset = self._chunks[numbers[0]].offset
        for number in numbers:
            chunk = self._chunks[number]
            at = chunk.offset - offset
            yield number, self._check(number, data[at : at + chunk.stored])

    def make_sure(self, wanted: Iterable[int]) -> None:
        """See that the packs of these chunks are there, as long as they must be; else raise ImageDamaged.

        What this host has is not asked for in the store.
        """
        ends: dict[str, int] = {}
        for group in self.plan(wanted):
            key, offset, length = span(self._packs, self._chunks, group)
            if not self._store.is_near(key, offset, length):
                ends[key] = max(ends.get(key, 0), offset + length)

        def look(key: str) -> None:
            try:
                size = self._store.stat(key).size
            except NotFound as error:
                raise ImageDamaged(f"{key} is missing from the store", hint="use another image") from error
            if size < ends[key]:
                raise ImageDamaged(f"{key} is cut short", hint="use another image")

        with asking(max(1, min(_STATS_AT_ONCE, len(ends))), "packs", self._store) as threads:
            for _ in threads.map(look, ends):
                pass

    def _is_cut_short(self, key: str, end: int) -> bool:
        try:
            return self._store.stat(key).size < end
        except StoreError:
            return False

    def is_near(self, groups: Iterable[Sequence[int]]) -> bool:
        """Whether this host has all that these groups of `plan` are, as far as can be told unread."""
        return all(self._store.is_near(*span(self._packs, self._chunks, group)) for group in groups)

    def _check(self, number: int, stored: memoryview) -> Buffer:
        """The raw bytes of a chunk. What a cache has kept badly is read from the store itself."""
        chunk = self._chunks[number]
        key = pack_key(self._packs[chunk.pack])
        name = f"chunk {number} in {key}"
        try:
            return check_chunk(chunk, stored, name)
        except ImageDamaged as damage:
            try:
                again = self._store.fetch_again(key, chunk.offset, chunk.stored)
            except NotFound:
                again = None
            if again is None:
                raise damage
        return check_chunk(chunk, again, name)

    def blob(self, numbers: Sequence[int]) -> bytes:
        """The bytes of a file: the chunks `numbers`, joined."""
        found: dict[int, Buffer] = {}
        for group in self.plan(numbers):
            found.update(self.read(group))
        return b"".join(found[number] for number in numbers)


def plan_reads(chunks: Sequence[Chunk], wanted: Iterable[int], most: int = READ_BYTES) -> list[list[int]]:
    """Group chunk numbers into reads: neighbours in one pack, up to `most` bytes together."""
    ordered = sorted(set(wanted), key=lambda n: (chunks[n].pack, chunks[n].offset))
    reads: list[list[int]] = []
    begin = end = 0
    for number in ordered:
        chunk = chunks[number]
        if (
            reads
            and chunks[reads[-1][0]].pack == chunk.pack
            and chunk.offset - end <= _GAP
            and chunk.offset + chunk.stored - begin <= most
        ):
            reads[-1].append(number)
        else:
            reads.append([number])
            begin = chunk.offset
        end = chunk.offset + chunk.stored
    return reads


def span(packs: Sequence[bytes], chunks: Sequence[Chunk], group: Sequence[int]) -> tuple[str, int, int]:
    """Where one read of `plan_reads` is: the pack's key, the offset and the length."""
    first, last = chunks[group[0]], chunks[group[-1]]
    return pack_key(packs[first.pack]), first.offset, last.offset + last.stored - first.offset


def check_chunk(chunk: Chunk, stored: Buffer, name: str) -> Buffer:
    """Return the raw bytes of a chunk that was read; raise ImageDamaged when they are not what was stored."""
    raw = decompress(chunk.codec, stored, chunk.raw, name)
    if blake3(raw).digest() != chunk.digest:
        raise ImageDamaged(f"{name} is not what its hash says", hint="use another image")
    return raw
