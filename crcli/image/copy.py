"""An image copied from one store to another, with nothing damaged on the way.

Packs that the other store lacks come first, then the index, the manifest last: until then the copy does not
exist, and a copy that was killed goes on where it ended. Copied packs keep their ids, so that images that
share packs here share them there.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from crcli.errors import ImageDamaged, NotFound, ObjectExists, StoreError
from crcli.image.manifest import decode_as, resolve
from crcli.image.names import (
    COLLECTIONS,
    ImageRef,
    index_key,
    manifest_key,
    merged_key,
    pack_key,
    pages_key,
    weights_key,
)
from crcli.image.packs import check_chunk
from crcli.image.peek import ids_in
from crcli.image.session import STALE_AFTER_S, Session, announced
from crcli.image.weights import PushedFile
from crcli.records import Struct, asdict
from crcli.store.base import is_there
from crcli.store.leaving import asking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from crcli.image.manifest import Manifest
    from crcli.image.tables import Chunk
    from crcli.store.base import Store

_THREADS, _ASKERS = 4, 16
_PIECE = 8 << 20
"""How much of a pack is read at once (bytes)."""

_LOOK_AGAIN_S = 2.0


class CopyReport(Struct):
    """What a copy did; sizes in bytes."""

    image: str
    source: str
    target: str
    packs: int = 0
    packs_copied: int = 0
    copied_bytes: int = 0
    was_there: bool = False
    """Whether the other store had this very image already."""
    total_ms: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The object that `crcli cp --json` prints."""
        return asdict(self)


def copy(
    source: Store, ref: ImageRef, target: Store, on_bytes: Callable[[int, int], None] | None = None
) -> CopyReport:
    """Copy one image; it exists in `target` on return, whoever else copies it there at the same time.

    `on_bytes(done, total)` is told of progress. Raises NotFound when there is no such image, ImageDamaged
    when a part of it is missing or is not what its hash says, ObjectExists when another image of that name
    and id is there.
    """
    began = time.monotonic()
    full = resolve(source, ref)
    key = manifest_key(full.name, full.id)
    data = _get(source, key, full)
    manifest = decode_as(full, data)
    report = CopyReport(str(full), source.url, target.url, packs=len(manifest.packs))
    target.warm(for_writing=True)
    report.was_there = _holds(target, key, data, full)
    if not report.was_there or manifest.weights:
        with Session(target, f"{full.id}-copy-{os.urandom(4).hex()}") as session:
            _wait_for_collection(target, session)
            on_bytes = on_bytes or (lambda done, total: None)
            for file in manifest.weights:  # which may have been pushed since
                _copy_weights(source, target, file.digest, report, on_bytes, session)
            if not report.was_there:
                _Copy(source, target, manifest.packs, manifest.chunks, report, on_bytes).packs()
                report.copied_bytes += _copy_indexes(source, target, manifest)
                _publish(target, key, data, full, session)
                report.copied_bytes += len(data)
    report.total_ms = round((time.monotonic() - began) * 1000, 2)
    return report


def _get(source: Store, key: str, full: ImageRef) -> bytes:
    try:
        return source.get(key)
    except NotFound as error:
        raise NotFound(
            f"the store {source.url} has no image {full}", hint="`crcli ls` shows what it holds"
        ) from error


def _holds(target: Store, key: str, data: bytes, full: ImageRef) -> bool:
    """Whether the manifest is there; raise ObjectExists when another one is."""
    try:
        there = target.get(key)
    except NotFound:
        return False
    if there != data:
        raise ObjectExists(
            f"{target.url} has another image named {full}", hint="`crcli verify` says whether it is whole"
        )
    return True


def _wait_for_collection(target: Store, session: Session) -> None:
    """Return when no collection is at work that may not have seen our session.

    One that begins later sees it and removes nothing. Dumps need not wait: they refer to packs only that an
    index told them of, and a collection removes those first. We take packs for there that we see.
    """
    limit = time.monotonic() + STALE_AFTER_S * 2
    while announced(target, COLLECTIONS, session.store_time())[0]:
        if time.monotonic() > limit:
            raise StoreError(f"a collection of garbage does not end in {target.url}", hint="try again later")
        time.sleep(_LOOK_AGAIN_S)


def _copy_weights(
    source: Store,
    target: Store,
    digest: str,
    report: CopyReport,
    on_bytes: Callable[[int, int], None],
    session: Session,
) -> None:
    """Copy a file of weights that the image refers to, if it was pushed into the source."""
    try:
        pushed = PushedFile(source, digest)
    except NotFound:
        return
    if not is_there(target, weights_key(digest)):
        _Copy(source, target, pushed.packs, pushed.chunks, report, on_bytes).packs()
        target.put(weights_key(digest), pushed.table)
        _stand_by(target, weights_key(digest), session)
        report.copied_bytes += len(pushed.table)


def _copy_indexes(source: Store, target: Store, manifest: Manifest) -> int:
    """Copy what tells later dumps of the image's chunks, as far as it is there; return its size. Indexes of
    other dumps tell of packs that the target may lack; of merged ones only what it has is believed."""
    copied = 0
    merged = {manifest.id, *ids_in(manifest.meta.get("merged"))}
    # An index after its pages: it vouches for them.
    for key in (pages_key(manifest.id), index_key(manifest.id), *map(merged_key, sorted(merged))):
        try:
            data = source.get(key)
        except NotFound:
            continue  # of a dump without new memory there are no pages
        target.put(key, data)
        copied += len(data)
    return copied


def _publish(target: Store, key: str, data: bytes, full: ImageRef, session: Session) -> None:
    """Make the copy exist. Somebody else's copy of the same image is as good as ours."""
    try:
        target.put(key, data, if_absent=True)
    except ObjectExists:
        if _holds(target, key, data, full):
            return
        raise
    _stand_by(target, key, session)


def _stand_by(target: Store, key: str, session: Session) -> None:
    """Take back what was written last if a collection may have taken us for dead, and removed what we relied
    on."""
    if session.lapsed:
        target.delete(key)
        raise StoreError("the store did not answer for too long", hint="run the same command again")


class _Copy:
    """Packs on their way, and what is known of the chunks in them."""

    def __init__(
        self,
        source: Store,
        target: Store,
        packs: Sequence[bytes],
        chunks: Sequence[Chunk],
        report: CopyReport,
        on_bytes: Callable[[int, int], None],
    ) -> None:
        self._source = source
        self._target = target
        self._packs = packs
        self._chunks = chunks
        self._report = report
        self._on_bytes = on_bytes
        self._total = 0

    def packs(self) -> None:
        """Copy the packs that the target lacks."""
        keys = [pack_key(pack) for pack in self._packs]
        with asking(_ASKERS, "copy", self._source, self._target) as askers:
            there = askers.map(self._size_there, keys)
            sizes = list(askers.map(self._size, keys))
            missing = [n for n, size in enumerate(there) if size != sizes[n]]
        self._total = sum(sizes[n] for n in missing)
        with asking(_THREADS, "copy", self._source, self._target) as threads:
            for copied in threads.map(lambda n: self._copy_pack(n, keys[n], sizes[n]), missing):
                self._report.packs_copied += 1
                self._report.copied_bytes += copied
                self._on_bytes(self._report.copied_bytes, self._total)

    def _size(self, key: str) -> int:
        try:
            return self._source.stat(key).size
        except NotFound as error:
            raise ImageDamaged(
                f"{key} is missing from {self._source.url}", hint="use another image"
            ) from error

    def _size_there(self, key: str) -> int | None:
        """The size of what the target has of a pack. It is asked for this pack alone: a listing is as long as
        the store is large, and may still show what was removed."""
        try:
            return self._target.stat(key).size
        except NotFound:
            return None

    def _copy_pack(self, number: int, key: str, size: int) -> int:
        """Copy one pack; what of it belongs to the image is compared with its hash on the way."""
        chunks = {n: chunk for n, chunk in enumerate(self._chunks) if chunk.pack == number}
        with self._target.writer(key) as writer:
            for begin, end, inside in _pieces(chunks, size, key):
                data = self._source.get_range(key, begin, end - begin)
                for n in inside:
                    at = chunks[n].offset - begin
                    stored = memoryview(data)[at : at + chunks[n].stored]
                    check_chunk(chunks[n], stored, f"chunk {n} in {key}")
                writer.write(data)
            writer.commit()
        return size


def _pieces(chunks: Mapping[int, Chunk], size: int, key: str) -> Iterator[tuple[int, int, list[int]]]:
    """Cut a pack of `size` bytes into reads (begin, end, numbers of the chunks in it), no chunk in two."""
    begin = end = 0
    inside: list[int] = []
    for segment_end, number in _segments(chunks, size, key):
        if end > begin and segment_end - begin > _PIECE:
            yield begin, end, inside
            begin, inside = end, []
        end = segment_end
        if number is not None:
            inside.append(number)
    if end > begin:
        yield begin, end, inside


def _segments(chunks: Mapping[int, Chunk], size: int, key: str) -> Iterator[tuple[int, int | None]]:
    """The ends of the image's chunks in a pack, and of the stretches between them, which are not checked."""
    at = 0
    for number in sorted(chunks, key=lambda n: chunks[n].offset):
        chunk = chunks[number]
        end = chunk.offset + chunk.stored
        if chunk.offset < at or end > size:
            raise ImageDamaged(f"{key} is cut short, or its chunks overlap", hint="use another image")
        yield from ((min(stop + _PIECE, chunk.offset), None) for stop in range(at, chunk.offset, _PIECE))
        yield end, number
        at = end
    yield from ((min(stop + _PIECE, size), None) for stop in range(at, size, _PIECE))
