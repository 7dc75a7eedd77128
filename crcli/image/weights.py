"""Files of weights as images see them: put into a store once, and read wherever they are found.

A restore takes the bytes of a reference from whatever file claims to be the one of the dump, or from the
store, and believes none of them: each reference's bytes are compared with their hash.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from itertools import islice, product
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from crcli.errors import ImageDamaged, NotFound, ObjectExists, StoreError
from crcli.image.container import ContainerKind, pack_container, unpack_container
from crcli.image.names import WEIGHTS, is_weights, new_image_id, weights_key
from crcli.image.packs import BLOB_BYTES, ChunkReader, PackWriter
from crcli.image.tables import read_chunks, read_packs, write_chunks, write_packs
from crcli.memory.extents import Origin, Source
from crcli.memory.weights.files import WeightsFile, files_below
from crcli.memory.weights.references import found_bytes
from crcli.memory.weights.views import View, apply, source_bytes
from crcli.records import Struct
from crcli.store.base import is_there
from crcli.store.leaving import left_by_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from crcli.image.manifest import Manifest, Weights
    from crcli.memory.weights.references import Piece, Reference
    from crcli.store.base import Buffer, Store

READ_BYTES = 4 << 20
"""References whose bytes lie near each other are read together up to this size (bytes)."""


_KEPT_CHUNKS = 32
"""Chunks of a pushed file that are kept: its tensors may lie in memory in small pieces of many rows."""

_MOST_CHOICES = 64
_IN_STORE = ""

# --- in the store ------------------------------------------------------------------------------------------


class Pushed(Struct, frozen=True):
    """A file of weights in a store: its BLAKE3 (hexadecimal), size, and the bytes that had to be sent."""

    path: str
    digest: str
    size: int
    stored_bytes: int
    was_there: bool


def push(store: Store, path: str, on_bytes: Callable[[int, int], None] = lambda done, total: None) -> Pushed:
    """Put a file into the store, so that images that refer to it can be restored without it; durable on
    return.

    Raises OSError when it cannot be read, StoreError when the store fails or the file changes meanwhile.
    """
    from crcli.image.gc import may_miss
    from crcli.image.index import load_known
    from crcli.image.session import Session

    file = WeightsFile(path)
    try:
        digest = _digest(file, on_bytes)
        key = weights_key(digest)
        if is_there(store, key):
            return Pushed(file.path, digest, file.size, 0, was_there=True)
        store.warm(for_writing=True)
        name = new_image_id()
        with Session(store, name) as session:
            known = load_known(store, "weights", others=None)
            writer = PackWriter(store, name, known)
            try:
                with left_by_signals(store):
                    again, chunks = blake3(), list[int]()
                    for block in _blocks(file, on_bytes):
                        again.update(block)
                        chunks.append(writer.add_blob(block))
                    writer.seal()
                    table = pack_container(
                        ContainerKind.WEIGHTS,
                        {
                            "META": json.dumps({"name": os.path.basename(path), "size": file.size}).encode(),
                            "PACK": write_packs(writer.packs),
                            "CHNK": write_chunks(writer.chunks[number] for number in chunks),
                        },
                    )
                    if again.hexdigest() != digest:
                        raise StoreError(f"{file.path} changed while it was read", hint="push it again")
                    try:
                        store.put(key, table, if_absent=True)
                    except ObjectExists:
                        pass  # somebody else has pushed the same file
                    else:
                        if session.lapsed or (
                            known.vouched_by
                            and may_miss(store, known.vouched_by, writer.packs, session.store_time)
                        ):
                            store.delete(key)
                            raise StoreError(
                                "a collection of garbage may have removed what the store had of it",
                                hint="push it again",
                            )
                    return Pushed(
                        file.path, digest, file.size, writer.stored_bytes + len(table), was_there=False
                    )
            finally:
                writer.close()
    finally:
        file.close()


def list_pushed(store: Store) -> list[dict[str, Any]]:
    """The files of weights that a store holds: `name` (without folders), `bytes`, `blake3`, and `damage`: why
    nothing more is known of one."""
    return [_described(store, info.key) for info in store.list(WEIGHTS) if is_weights(info.key)]


def _described(store: Store, key: str) -> dict[str, Any]:
    name, size, damage = "", 0, ""
    try:
        head = json.loads(unpack_container(store.get(key), ContainerKind.WEIGHTS, key)["META"])
        name, size = str(head["name"]), int(head["size"])
    except ImageDamaged as error:
        damage = error.message
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        damage = f"{key} does not say what it is"
    return {"name": name, "bytes": size, "blake3": key.removeprefix(WEIGHTS), "damage": damage}


def remove_pushed(store: Store, digest: str) -> dict[str, Any]:
    """Remove a file of weights (by its BLAKE3, or the beginning of it); `gc` frees its space. Return which.

    Raises NotFound when no file, or more than one, is meant.
    """
    found = [file for file in list_pushed(store) if file["blake3"].startswith(digest.lower())]
    if len(found) != 1 or not digest:
        what = f"{len(found)} files" if found else "no file"
        raise NotFound(
            f"the store {store.url} has {what} of weights with the BLAKE3 {digest}…",
            hint="`crcli weights ls` lists them",
        )
    store.delete(weights_key(found[0]["blake3"]))
    return found[0]


def _digest(file: WeightsFile, on_bytes: Callable[[int, int], None]) -> str:
    digest = blake3()
    for block in _blocks(file, on_bytes):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: WeightsFile, on_bytes: Callable[[int, int], None]) -> Iterator[bytes]:
    for at in range(0, file.size, BLOB_BYTES):
        block = file.read(at, min(BLOB_BYTES, file.size - at))
        yield block
        on_bytes(at + len(block), file.size)


class PushedFile:
    """A file of weights in a store, read in ranges: its packs and chunks, and the table that names them."""

    def __init__(self, store: Store, digest: str) -> None:
        """Raises NotFound when it was not pushed."""
        key = weights_key(digest)
        self.table = store.get(key)
        sections = unpack_container(self.table, ContainerKind.WEIGHTS, key)
        try:
            self.packs = read_packs(sections["PACK"], key)
            self.chunks = read_chunks(sections["CHNK"], len(self.packs), key)
        except KeyError as error:
            raise ImageDamaged(f"{key} lacks a part that every file of weights has: {error}") from error
        self._reader = ChunkReader(store, self.packs, self.chunks)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, offset: int, length: int) -> bytes:
        """Read a range; every chunk of it is checked. The last few chunks are kept."""
        first, last = offset // BLOB_BYTES, (offset + length - 1) // BLOB_BYTES
        whole = b"".join(self._chunk(number) for number in range(first, min(last + 1, len(self.chunks))))
        begin = offset - first * BLOB_BYTES
        return whole[begin : begin + length]

    def _chunk(self, number: int) -> bytes:
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
                return self._kept[number]
        raw = self._reader.blob([number])
        with self._lock:
            self._kept[number] = raw
            while len(self._kept) > _KEPT_CHUNKS:
                self._kept.popitem(last=False)
        return raw


def only_used(
    files: Sequence[Weights], references: Sequence[Reference]
) -> tuple[list[Weights], list[Reference]]:
    """The files that references name, and the references with their numbers: an image needs no others."""
    used = sorted({piece.file for reference in references for piece in reference.pieces})
    number = {old: new for new, old in enumerate(used)}
    renumbered = [
        reference._replace(
            pieces=tuple(piece._replace(file=number[piece.file]) for piece in reference.pieces)
        )
        for reference in references
    ]
    return [files[old] for old in used], renumbered


def weights_report(files: Sequence[Weights], references: Iterable[Reference]) -> list[dict[str, Any]]:
    """For each file what of it was found, and how much of memory that leaves out (bytes)."""
    found = found_bytes(references)
    return [
        {
            "path": file.path,
            "bytes": file.size,
            "left_out_bytes": found.get(number, (0, 0))[0],
            "found_bytes": found.get(number, (0, 0))[1],
        }
        for number, file in enumerate(files)
    ]


# --- on restore --------------------------------------------------------------------------------------------


def places_of(weights: Weights, mapped: Sequence[tuple[str, str]], folders: Sequence[str]) -> list[str]:
    """Where a file may be on this host, the likeliest first; only files of its size.

    `mapped` are pairs of a path (of a file or folder) at the dump and here; `folders` are searched for files
    of its name and then for any others, which may have got another: only their bytes count.
    """
    found = [new + weights.path.removeprefix(old) for old, new in mapped if _is_below(weights.path, old)]
    found.append(weights.path)
    name = os.path.basename(weights.path)
    there = [path for folder in folders for path in files_below(folder)]
    found += sorted(there, key=lambda path: os.path.basename(path) != name)
    return [path for path in dict.fromkeys(found) if _size_of(path) == weights.size]


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class MemoryReader:
    """Reads the memory of one image: chunks from its store, references from files of weights.

    Every byte that it gives out has been checked against its hash. Called from several threads.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        chunks: ChunkReader,
        mapped: Sequence[tuple[str, str]] = (),
        folders: Sequence[str] = (),
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._chunks = chunks
        self._mapped = mapped
        self._folders = folders
        self._found: dict[int, list[str]] = {}
        self._right: dict[int, str] = {}
        """For each file where its bytes were right last."""
        self._open: dict[str, WeightsFile] = {}
        self._pushed: dict[str, PushedFile | None] = {}
        self._lock = threading.Lock()

    def missing(self) -> list[Weights]:
        """The files that are neither on this host nor in the store, nor travel in the image."""
        carried = {file.name for file in self._manifest.files}
        return [
            file
            for number, file in enumerate(self._manifest.weights)
            if file.path not in carried and not self._places(number) and self._in_store(file) is None
        ]

    def check(self, number: int) -> bool:
        """Whether a reference's bytes are here or in the store, and what they were; ImageDamaged if not."""
        reference = self._manifest.references[number]
        files = {piece.file for piece in reference.pieces}
        if any(not self._places(n) and self._in_store(self._manifest.weights[n]) is None for n in files):
            return False
        self._resolved(reference)
        return True

    def make_sure(self, wanted: Iterable[Origin]) -> None:
        """See that all packs are there that hold something of what is wanted; raise ImageDamaged if not."""
        self._chunks.make_sure(origin.number for origin in wanted if origin.source == Source.CHUNK)

    def _places(self, number: int) -> list[str]:
        """Where a file may be on this host; one that travels in the image may be laid out only later."""
        if not self._found.get(number):
            self._found[number] = places_of(self._manifest.weights[number], self._mapped, self._folders)
        return self._found[number]

    def plan(self, wanted: Iterable[Origin], most: int = READ_BYTES) -> list[list[Origin]]:
        """Group what is wanted into reads: see ChunkReader.plan."""
        origins = set(wanted)
        numbers = (origin.number for origin in origins if origin.source == Source.CHUNK)
        chunks = self._chunks.plan(numbers, most)
        groups = [[Origin(Source.CHUNK, number) for number in group] for group in chunks]
        references = sorted(
            (origin for origin in origins if origin.source == Source.WEIGHTS),
            key=lambda origin: self._manifest.references[origin.number].pieces[0],
        )
        size = most
        for origin in references:
            if size >= most:
                groups.append([])
                size = 0
            groups[-1].append(origin)
            size += self._manifest.references[origin.number].raw
        return groups

    def read(self, group: Sequence[Origin]) -> Iterator[tuple[Origin, Buffer]]:
        """Fetch one group of `plan` and give out (origin, raw bytes), each checked.

        Raises ImageDamaged, naming the file and the offset, when no place has the bytes of the dump.
        """
        if group[0].source == Source.CHUNK:
            for number, raw in self._chunks.read([origin.number for origin in group]):
                yield Origin(Source.CHUNK, number), raw
            return
        for origin in group:
            yield origin, self._resolved(self._manifest.references[origin.number])

    def _resolved(self, reference: Reference) -> Buffer:
        """The bytes of a reference, out of whatever files or store have them."""
        files = sorted({piece.file for piece in reference.pieces})
        for choice in islice(product(*map(self._choices, files)), _MOST_CHOICES):
            sources = dict(zip(files, choice, strict=True))
            raw = b"".join(self._read_piece(piece, sources[piece.file]) for piece in reference.pieces)
            if blake3(raw).digest() == reference.digest:
                self._right.update(sources)
                return raw
        spans = [
            f"{self._manifest.weights[piece.file].path}, bytes {piece.offset} to {piece.end}"
            for piece in reference.pieces
        ]
        raise ImageDamaged(
            f"a file of weights is not what it was at the dump: {'; '.join(dict.fromkeys(spans))}",
            hint="put the file of then back, or say with --weights-map OLD=NEW where it is; "
            "`crcli weights push` keeps files in the store",
        )

    def _choices(self, number: int) -> list[str]:
        """Where a file's bytes may be taken from, what was right last first; "" is the store."""
        choices = [*self._places(number), _IN_STORE]
        right = self._right.get(number)
        return sorted(choices, key=lambda one: one != right)

    def _read_piece(self, piece: Piece, place: str) -> bytes:
        source: WeightsFile | PushedFile | None
        source = self._opened(place) if place else self._in_store(self._manifest.weights[piece.file])
        length = source_bytes(piece.view, piece.length)
        raw = source.read(piece.offset, length) if source is not None else b""
        if len(raw) < length:
            return b""
        return raw if piece.view == View.BYTES else bytes(apply(piece.view, raw).tobytes())

    def _opened(self, path: str) -> WeightsFile | None:
        with self._lock:
            if path not in self._open:
                try:
                    self._open[path] = WeightsFile(path)
                except OSError:
                    return None
            return self._open[path]

    def _in_store(self, weights: Weights) -> PushedFile | None:
        with self._lock:
            if weights.digest not in self._pushed:
                try:
                    self._pushed[weights.digest] = PushedFile(self._store, weights.digest)
                except NotFound:
                    self._pushed[weights.digest] = None
            return self._pushed[weights.digest]

    def close(self) -> None:
        """Close the files."""
        for file in self._open.values():
            file.close()
        self._open.clear()
