"""An image read back whole: every chunk fetched, decompressed and compared with its hash."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from crcli.errors import ImageDamaged, NotFound
from crcli.findings import Finding, Severity
from crcli.image.manifest import load
from crcli.image.names import pack_key
from crcli.image.packs import ChunkReader
from crcli.image.weights import MemoryReader
from crcli.memory.extents import PAGE, Source, SpaceKind
from crcli.records import Struct, asdict, field
from crcli.store.leaving import asking

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.image.manifest import Manifest
    from crcli.image.names import ImageRef
    from crcli.store.base import Store

_READERS = 4
_NAMED_USERS = 20


class VerifyReport(Struct):
    """What was read of an image, and what is wrong with it; sizes in bytes."""

    image: str
    store: str
    packs: int = 0
    chunks: int = 0
    stored_bytes: int = 0
    """As they lie in the packs."""
    memory_bytes: int = 0
    file_bytes: int = 0
    weights_bytes: int = 0
    """Memory that stands in files of weights, and was compared with them, here or in the store."""
    weights_missing: list[str] = field(default_factory=list)
    """Files of weights that are neither here nor in the store: what they hold could not be compared."""
    total_ms: float = 0.0
    damage: list[Finding] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The object that `crcli verify --json` prints."""
        return {**asdict(self), "damage": [finding.as_json() for finding in self.damage]}


def verify(store: Store, ref: ImageRef, on_bytes: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read all of an image back; return what was found. Damage is listed in the report, not raised.

    `on_bytes(done, total)` is told of progress. Raises NotFound when there is no such image, ImageDamaged
    when its manifest itself is not whole, StoreError when the store cannot be read.
    """
    began = time.monotonic()
    manifest = load(store, ref)
    report = VerifyReport(
        image=f"{manifest.name}@{manifest.id}",
        store=store.url,
        packs=len(manifest.packs),
        chunks=len(manifest.chunks),
        memory_bytes=sum(e.pages for extents in manifest.spaces.values() for e in extents) * PAGE,
        file_bytes=sum(file.size for file in manifest.files),
    )
    _Verification(store, manifest, report, on_bytes or (lambda done, total: None)).run()
    report.total_ms = round((time.monotonic() - began) * 1000, 2)
    return report


class _Verification:
    def __init__(
        self, store: Store, manifest: Manifest, report: VerifyReport, on_bytes: Callable[[int, int], None]
    ) -> None:
        self._store = store
        self._manifest = manifest
        self._report = report
        self._on_bytes = on_bytes
        self._reader = ChunkReader(store, manifest.packs, manifest.chunks)

    def run(self) -> None:
        self._compare_file_sizes()
        readable = self._chunks_within_packs()
        total = sum(self._manifest.chunks[number].stored for number in readable)
        bad: dict[int, str] = {}
        with asking(_READERS, "verify", self._store) as readers:
            for read_bytes, damage in readers.map(self._read_group, self._reader.plan(readable)):
                self._report.stored_bytes += read_bytes
                self._on_bytes(self._report.stored_bytes, total)
                bad.update(damage)
        self._report_chunks(bad)
        self._compare_weights()

    def _compare_weights(self) -> None:
        """Read what the image refers to in files of weights, where they can be found."""
        memory = MemoryReader(self._store, self._manifest, self._reader)
        try:
            self._report.weights_missing = [file.path for file in memory.missing()]
            for number, reference in enumerate(self._manifest.references):
                try:
                    self._report.weights_bytes += reference.raw if memory.check(number) else 0
                except ImageDamaged as error:
                    path = self._manifest.weights[reference.pieces[0].file].path
                    self._report.damage.append(_damage("weights-changed", error.message, {"path": path}))
        finally:
            memory.close()

    def _compare_file_sizes(self) -> None:
        for file in (*self._manifest.skeleton, *self._manifest.files):
            if sum(self._manifest.chunks[number].raw for number in file.chunks) != file.size:
                message = f"the chunks of {file.name} do not add up to its size"
                self._report.damage.append(_damage("file-size", message, {"path": file.name}))

    def _chunks_within_packs(self) -> list[int]:
        """Report packs that are missing or cut short; return the chunks that lie in what is there."""
        by_pack: dict[int, list[int]] = defaultdict(list)
        for number, chunk in enumerate(self._manifest.chunks):
            by_pack[chunk.pack].append(number)
        with asking(_READERS, "verify", self._store) as askers:
            sizes = dict(zip(by_pack, askers.map(self._size_of, by_pack), strict=True))
        readable: list[int] = []
        for pack, numbers in by_pack.items():
            there = [number for number in numbers if self._end_of(number) <= sizes[pack]]
            readable += there
            if len(there) < len(numbers):
                self._report_pack(pack, sizes[pack], set(numbers).difference(there))
        return readable

    def _size_of(self, pack: int) -> int:
        try:
            return self._store.stat(pack_key(self._manifest.packs[pack])).size
        except NotFound:
            return -1

    def _end_of(self, number: int) -> int:
        return self._manifest.chunks[number].offset + self._manifest.chunks[number].stored

    def _report_pack(self, pack: int, size: int, lost: set[int]) -> None:
        key = pack_key(self._manifest.packs[pack])
        message = f"{key} is missing" if size < 0 else f"{key} is cut short at {size} bytes"
        self._report.damage.append(
            _damage(
                "pack-missing" if size < 0 else "pack-short",
                message,
                {"pack": key, "chunks": len(lost), "used_by": self._users(lost)},
            )
        )

    def _read_group(self, group: list[int]) -> tuple[int, dict[int, str]]:
        """Read one group; when that fails, each chunk by itself, to find which are bad."""
        try:
            return sum(self._manifest.chunks[n].stored for n, _ in self._reader.read(group)), {}
        except ImageDamaged:
            pass
        bad: dict[int, str] = {}
        for number in group:
            try:
                for _ in self._reader.read([number]):
                    pass
            except ImageDamaged as error:
                bad[number] = error.message
        return sum(self._manifest.chunks[n].stored for n in group), bad

    def _report_chunks(self, bad: dict[int, str]) -> None:
        for number, message in sorted(bad.items()):
            chunk = self._manifest.chunks[number]
            evidence = {
                "chunk": number,
                "pack": pack_key(self._manifest.packs[chunk.pack]),
                "offset": chunk.offset,
                "bytes": chunk.raw,
                "used_by": self._users({number}),
            }
            self._report.damage.append(_damage("chunk-damaged", message, evidence))

    def _users(self, numbers: set[int]) -> list[str]:
        """What of the tree the chunks hold: files by name, processes by pid."""
        users = [file.name for file in self._manifest.files if numbers.intersection(file.chunks)]
        users += [
            f"CRIU's {file.name}" for file in self._manifest.skeleton if numbers.intersection(file.chunks)
        ]
        users += [
            f"memory of process {space.number}" if space.kind == SpaceKind.PROCESS else "shared memory"
            for space, extents in self._manifest.spaces.items()
            if any(e.source == Source.CHUNK and e.chunk in numbers for e in extents)
        ]
        return users[:_NAMED_USERS]


def _damage(name: str, message: str, evidence: dict[str, Any]) -> Finding:
    return Finding(
        name, Severity.BLOCKER, message, evidence, remedy="use an older image, or a copy elsewhere"
    )
