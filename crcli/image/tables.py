"""The binary records of the format: one table per record drives both reading and writing.

All numbers are little-endian. FORMAT.md describes the same records for other readers.
"""

from __future__ import annotations

import struct
from array import array
from itertools import accumulate, pairwise
from operator import add, le
from typing import TYPE_CHECKING, NamedTuple

from crcli.errors import ImageDamaged
from crcli.image.codec import Codec
from crcli.memory.extents import Extent, Source, SpaceKey, SpaceKind
from crcli.memory.weights.references import Piece, Reference
from crcli.memory.weights.views import View

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

PACK_ID = 16

NO_PACK = 0xFFFF_FFFF
"""What a table has for the pack of zero pages."""

LARGEST_CHUNK = (1 << 16) * 4096
"""So many bytes, in pages, an extent can name the first of; a reader makes room for a whole chunk."""

_CHUNK = struct.Struct("<IIQIHH32s")
_SPACE = struct.Struct("<IQI")
_EXTENT = struct.Struct("<QIIHBB")
_GROUP = struct.Struct("<IHH32s")
_MIXED = struct.Struct("<I32s")
_MIXED_PART = struct.Struct("<IQHH")
_REFERENCE = struct.Struct("<II32s")
_PIECE = struct.Struct("<IHHQI")
_FLAG_LAZY = 1
_DIGEST = 32


class Chunk(NamedTuple):
    """Where a chunk is stored, and what proves it.

    `pack` indexes the pack table beside this table; `offset` and `stored` are bytes in that pack; `raw` is
    its size once decompressed; `digest` is the BLAKE3 of the raw bytes.
    """

    pack: int
    raw: int
    offset: int
    stored: int
    codec: Codec
    is_memory: bool
    digest: bytes


class Groups(NamedTuple):
    """Pages of a chunk that one digest finds, as columns: of so many groups the chunk, the first page in it,
    how many there are, and the digests of all, one after another."""

    chunks: Sequence[int]
    pages: Sequence[int]
    counts: Sequence[int]
    digests: bytes

    def of_chunks(self, rows: Mapping[int, int]) -> Groups:
        """Those in some chunks, which get other numbers."""
        kept = [at for at, chunk in enumerate(self.chunks) if chunk in rows]
        return Groups(
            [rows[self.chunks[at]] for at in kept],
            [self.pages[at] for at in kept],
            [self.counts[at] for at in kept],
            b"".join(self.digests[at * _DIGEST : (at + 1) * _DIGEST] for at in kept),
        )


MixedFields = tuple[int, int, int, int]
"""Pages of a mixed group: the number of a pack, the offset in it of a chunk, the first page, how many there
are. NO_PACK stands for the pack of zero pages."""


def write_chunks(chunks: Iterable[Chunk]) -> bytes:
    """Encode a chunk table."""
    return b"".join(
        _CHUNK.pack(c.pack, c.raw, c.offset, c.stored, c.codec, c.is_memory, c.digest) for c in chunks
    )


def read_chunks(data: bytes, packs: int, name: str) -> list[Chunk]:
    """Decode a chunk table; raise ImageDamaged when it names a pack that is not among the `packs`."""
    _check_size(data, _CHUNK, name)
    try:
        chunks = [
            Chunk(pack, raw, offset, stored, Codec(codec), bool(memory), digest)
            for pack, raw, offset, stored, codec, memory, digest in _CHUNK.iter_unpack(data)
        ]
    except ValueError as error:
        raise ImageDamaged(f"{name}: {error}") from error
    if any(chunk.pack >= packs for chunk in chunks):
        raise ImageDamaged(f"{name} names a pack that it does not list")
    if max((chunk.raw for chunk in chunks), default=0) > LARGEST_CHUNK:
        raise ImageDamaged(f"{name} has a chunk that is larger than an extent can name")
    return chunks


class ChunkTable:
    """A chunk table as it was stored: a record is made a Chunk of when it is asked for.

    Thousands of records that hardly anybody asks for cost 10 ms as objects.
    """

    def __init__(self, data: bytes, packs: int, name: str) -> None:
        """Raises ImageDamaged when a record is none, or names a pack that is not among the `packs`."""
        _check_size(data, _CHUNK, name)
        self._data = data
        self.packs: Sequence[int] = _column(data, _CHUNK, 0, "I").tolist()
        """The packs that the chunks are in, by number."""
        self.raw: Sequence[int] = _column(data, _CHUNK, 4, "I").tolist()
        """Their sizes once decompressed."""
        self.offsets: Sequence[int] = _column(data, _CHUNK, 8, "Q").tolist()
        self.is_memory: Sequence[int] = _column(data, _CHUNK, 22, "H").tolist()
        """Not 0 for those that are memory."""
        unknown = set(_column(data, _CHUNK, 20, "H").tolist()).difference(Codec)
        if unknown:
            raise ImageDamaged(f"{name}: no codec has the number {min(unknown)}")
        if max(self.raw, default=0) > LARGEST_CHUNK:
            raise ImageDamaged(f"{name} has a chunk that is larger than an extent can name")
        if max(self.packs, default=-1) >= packs:
            raise ImageDamaged(f"{name} names a pack that it does not list")

    def __len__(self) -> int:
        return len(self.raw)

    def of_packs(self, packs: Container[int]) -> tuple[bytes, list[int]]:
        """The records of the chunks that are in these packs, and their numbers."""
        size = _CHUNK.size
        kept = [number for number, pack in enumerate(self.packs) if pack in packs]
        return b"".join(self._data[number * size : (number + 1) * size] for number in kept), kept

    def __getitem__(self, number: int) -> Chunk:
        pack, raw, offset, stored, codec, memory, digest = _CHUNK.unpack_from(
            self._data, number * _CHUNK.size
        )
        return Chunk(pack, raw, offset, stored, Codec(codec), bool(memory), digest)


def pack_group(chunk: int, page: int, pages: int, digest: bytes) -> bytes:
    """A record of a table of groups: see `Groups`."""
    return _GROUP.pack(chunk, page, pages, digest)


def read_groups(data: bytes, chunks: ChunkTable, name: str) -> Groups:
    """Decode a table of groups; raise ImageDamaged when one lies outside of its chunk."""
    _check_size(data, _GROUP, name)
    of, pages, counts = (
        _column(data, _GROUP, at, code).tolist() for at, code in ((0, "I"), (4, "H"), (6, "H"))
    )
    if max(of, default=-1) >= len(chunks):
        raise ImageDamaged(f"{name}: a group of pages is in no chunk")
    room = [raw // 4096 for raw in chunks.raw]
    if not all(map(le, map(add, pages, counts), map(room.__getitem__, of))):
        raise ImageDamaged(f"{name}: a group of pages lies outside of its chunk")
    return Groups(of, pages, counts, _digests(data, _GROUP, 8, "Q"))


def write_mixed(groups: Iterable[tuple[bytes, Sequence[MixedFields]]]) -> tuple[bytes, bytes]:
    """Encode mixed groups, each its digest and its parts: their table, and the parts of all in that order."""
    table, rows = bytearray(), bytearray()
    for digest, parts in groups:
        table += _MIXED.pack(len(parts), digest)
        for part in parts:
            rows += _MIXED_PART.pack(*part)
    return bytes(table), bytes(rows)


def join_mixed(
    of_indexes: Iterable[tuple[Sequence[bytes], Iterable[tuple[bytes, bytes]]]], numbers: Mapping[bytes, int]
) -> tuple[bytes, bytes]:
    """Encode mixed groups as `write_mixed` does that stand in indexes: of each index its packs, and of each
    group its digest and its parts as they are stored there. `numbers` are those of the packs from now on."""
    table, rows = bytearray(), bytearray()
    for packs, groups in of_indexes:
        own = bytearray()
        for digest, parts in groups:
            table += _MIXED.pack(len(parts) // _MIXED_PART.size, digest)
            own += parts
        new = {number: numbers[pack] for number, pack in enumerate(packs) if pack in numbers}
        new[NO_PACK] = NO_PACK
        step = _MIXED_PART.size // 4
        column = memoryview(own).cast("I")[::step]
        column[:] = memoryview(array("I", map(new.__getitem__, column.tolist())))
        rows += own
    return bytes(table), bytes(rows)


class MixedGroups:
    """Mixed groups as they were stored: the parts of one are unpacked when they are asked for."""

    def __init__(self, table: bytes, rows: bytes, packs: int, name: str) -> None:
        """Raises ImageDamaged when they are not whole, or name a pack that is not among the `packs`."""
        _check_size(table, _MIXED, name)
        _check_size(rows, _MIXED_PART, name)
        self._rows = rows
        self._ends = [0, *accumulate(_column(table, _MIXED, 0, "I").tolist())]
        self.digests = _digests(table, _MIXED, 4, "I")
        """Those of all groups, one after another."""
        named = set(_column(rows, _MIXED_PART, 0, "I").tolist())
        if max(named - {NO_PACK}, default=-1) >= packs:
            raise ImageDamaged(f"{name} names a pack that it does not list")
        if self._ends[-1] * _MIXED_PART.size != len(rows):
            raise ImageDamaged(f"{name}: the parts of mixed groups are not whole")

    def __len__(self) -> int:
        return len(self._ends) - 1

    def parts(self, number: int) -> Iterator[MixedFields]:
        """What one group consists of."""
        return _MIXED_PART.iter_unpack(self.rows(number))

    def rows(self, number: int) -> bytes:
        """The parts of one group, as they are stored."""
        size = _MIXED_PART.size
        return self._rows[self._ends[number] * size : self._ends[number + 1] * size]

    def pages(self) -> list[int]:
        """How many pages there are in each group."""
        sums = [0, *accumulate(_column(self._rows, _MIXED_PART, 14, "H").tolist())]
        return [sums[end] - sums[begin] for begin, end in pairwise(self._ends)]


def _column(data: bytes, record: struct.Struct, at: int, code: str) -> memoryview:
    """One field of all records of a table: `code` is its type (see `array`), `at` its place in a record.

    As the machine has numbers, which CRIU's are little-endian but for IBM Z: nothing here runs on that.
    """
    view = memoryview(data).cast(code)  # type: ignore[call-overload]  # of the codes it knows
    return view[at // view.itemsize :: record.size // view.itemsize]  # type: ignore[no-any-return]


def _digests(data: bytes, record: struct.Struct, at: int, code: str) -> bytes:
    """The digests that stand in all records from `at` on, one after another. They are moved in numbers of the
    type `code`, of which a record must be a multiple."""
    joined = bytearray(len(data) // record.size * _DIGEST)
    numbers = memoryview(joined).cast(code)  # type: ignore[call-overload]
    step = _DIGEST // numbers.itemsize
    for part in range(step):
        numbers[part::step] = _column(data, record, at + part * numbers.itemsize, code)
    return bytes(joined)


def write_packs(packs: Iterable[bytes]) -> bytes:
    """Encode a pack table: the packs' ids, one after another."""
    return b"".join(packs)


def read_packs(data: bytes, name: str) -> list[bytes]:
    """Decode a pack table."""
    if len(data) % PACK_ID:
        raise ImageDamaged(f"{name}: the pack table is cut short")
    return [data[at : at + PACK_ID] for at in range(0, len(data), PACK_ID)]


def write_spaces(spaces: Mapping[SpaceKey, list[Extent]]) -> tuple[bytes, bytes]:
    """Encode the memory map: the table of spaces, and the extents of all of them in that order."""
    table = b"".join(_SPACE.pack(key.kind, key.number, len(extents)) for key, extents in spaces.items())
    pack = _EXTENT.pack
    rows = b"".join(
        [  # of a tree that was dumped often there are tens of thousands: fields by name take twice as long
            pack(start, pages, chunk, offset, source, _FLAG_LAZY if lazy else 0)
            for extents in spaces.values()
            for start, pages, source, chunk, offset, lazy in extents
        ]
    )
    return table, rows


def write_references(references: Iterable[Reference]) -> tuple[bytes, bytes]:
    """Encode the references into files of weights: their table, and the pieces of all in that order."""
    table, pieces = bytearray(), bytearray()
    for reference in references:
        table += _REFERENCE.pack(len(reference.pieces), reference.raw, reference.digest)
        for piece in reference.pieces:
            pieces += _PIECE.pack(piece.file, piece.view, 0, piece.offset, piece.length)
    return bytes(table), bytes(pieces)


def read_references(table: bytes, rows: bytes, files: int, name: str) -> list[Reference]:
    """Decode the references; raise ImageDamaged when their pieces do not make whole pages of known files."""
    _check_size(table, _REFERENCE, name)
    _check_size(rows, _PIECE, name)
    unpacked = _PIECE.iter_unpack(rows)
    references: list[Reference] = []
    try:
        for count, raw, digest in _REFERENCE.iter_unpack(table):
            pieces = tuple(
                Piece(file, View(view), offset, length)
                for file, view, _, offset, length in (next(unpacked) for _ in range(count))
            )
            if not raw or raw % 4096 or sum(piece.length for piece in pieces) != raw:
                raise ImageDamaged(f"{name}: the pieces of a reference do not make whole pages")
            if raw > LARGEST_CHUNK:
                raise ImageDamaged(f"{name} has a reference that is larger than an extent can name")
            if any(piece.file >= files for piece in pieces):
                raise ImageDamaged(f"{name} refers to a file of weights that it does not list")
            references.append(Reference(pieces, raw, digest))
    except (ValueError, RuntimeError) as error:
        raise ImageDamaged(f"{name}: the references are not whole: {error}") from error
    if next(unpacked, None) is not None:
        raise ImageDamaged(f"{name} has pieces of no reference")
    return references


def read_spaces(
    table: bytes, rows: bytes, chunks: list[Chunk], references: list[Reference], name: str
) -> dict[SpaceKey, list[Extent]]:
    """Decode the memory map; raise ImageDamaged when an extent lies outside of its source or overlaps."""
    _check_size(table, _SPACE, name)
    _check_size(rows, _EXTENT, name)
    unpacked = _EXTENT.iter_unpack(rows)
    spaces: dict[SpaceKey, list[Extent]] = {}
    try:
        for kind, number, count in _SPACE.iter_unpack(table):
            extents = [
                Extent(start, pages, Source(source), chunk, offset, bool(flags & _FLAG_LAZY))
                for start, pages, chunk, offset, source, flags in (next(unpacked) for _ in range(count))
            ]
            _check_extents(extents, {Source.CHUNK: chunks, Source.WEIGHTS: references}, name)
            key = SpaceKey(SpaceKind(kind), number)
            if key in spaces:
                raise ImageDamaged(f"{name}: the memory map has an address space twice")
            spaces[key] = extents
    except (ValueError, RuntimeError) as error:  # RuntimeError: fewer extents than the table says
        raise ImageDamaged(f"{name}: the memory map is not whole: {error}") from error
    if next(unpacked, None) is not None:
        raise ImageDamaged(f"{name}: the memory map has extents of no address space")
    return spaces


def _check_extents(
    extents: list[Extent], tables: Mapping[Source, Sequence[Chunk | Reference]], name: str
) -> None:
    at = 0
    for extent in extents:
        if extent.start < at or not extent.pages:
            raise ImageDamaged(f"{name}: extents overlap at page {extent.start:#x}")
        at = extent.end
        table = tables.get(extent.source)
        if table is not None and (
            extent.chunk >= len(table) or (extent.offset + extent.pages) * 4096 > table[extent.chunk].raw
        ):
            raise ImageDamaged(f"{name}: an extent at page {extent.start:#x} lies outside of its source")


def _check_size(data: bytes, record: struct.Struct, name: str) -> None:
    if len(data) % record.size:
        raise ImageDamaged(f"{name}: a table is cut short")
