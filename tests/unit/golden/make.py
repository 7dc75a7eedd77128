"""Wrote the golden images of each format version: `python -m tests.unit.golden.make VERSION FOLDER`.

What it wrote once is checked in (`v1/`, a directory store, and `v1.json`, what it describes; `v2/` likewise)
and stays as it is for ever: a later crcli must read it as the first one did. Run this for a new version only.

The same crcli and the same zstd write the same bytes: ids come from a counter, pages from a seed. Between
them, the two images have one of everything: a raw and a compressed chunk, zero pages, pages that are not
lazy, a page of two processes, shared memory, a process without pages, a file of two chunks and an empty
one, a chunk of the first image in the second, each kind of link, and text that is not ASCII, or not even
UTF-8. The image of version 2 has references into two files of weights, one of which is in the store: whole
pages of one piece, a page of two, and each view.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from blake3 import blake3

from crcli.image.index import KnownPagesOf, load_known
from crcli.image.manifest import Manifest, StoredFile, Weights, publish
from crcli.image.packs import PackWriter
from crcli.image.weights import push
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey, SpaceKind
from crcli.memory.places import NOWHERE, Location
from crcli.memory.weights.references import Piece, Reference
from crcli.memory.weights.views import View, apply
from crcli.records import asdict
from crcli.store.file import FileStore

FIRST, SECOND = "20260131T235959123-00000a", "20260201T000000456-00000b"
PARENT, CHILD, IDLE = (SpaceKey(SpaceKind.PROCESS, pid) for pid in (4711, 4712, 4713))
SHARED = SpaceKey(SpaceKind.SHARED, 0xFFFF_FFF2)
HEAP, STACK, VDSO = 0x55555_5555, 0x7FFFF_FFF0, 0x7FFFF_FFFE

META: dict[str, Any] = {
    "crcli": "0.1.0",
    "created": 1769903999.25,
    "host": {
        "hostname": "node-1",
        "kernel": "6.12.0",
        "machine": "x86_64",
        "python": "3.11.2",
        "page_size": 4096,
        "cpu_model": "A CPU",
        "cpu_flags": ["avx2", "fpu"],
    },
    "tree": [
        {
            "pid": 4711,
            "comm": "agent",
            "argv": ["agent", "--name", "Grüße", "not-UTF-8-\udcff"],
            "exe": "/usr/bin/agent",
            "cwd": "/srv",
            "uid": 1000,
            "threads": 2,
            "cpus": "0-3,8",
        },
    ],
    "members": [
        {"pid": 4711, "ppid": 0, "comm": "agent", "alive": True},
        {"pid": 4712, "ppid": 4711, "comm": "worker", "alive": True},
        {"pid": 4713, "ppid": 4711, "comm": "done", "alive": False},
    ],
    "plan": {"shell_job": True, "manage_cgroups": False},
    "links": [
        {
            "kind": "terminal",
            "key": "tty[8803:18]",
            "external": True,
            "path": "/dev/pts/3",
            "type": "",
            "waits": True,
            "reads": True,
            "writes": True,
            "descriptors": [[4711, 0], [4711, 1]],
        },
        {
            "kind": "pipe",
            "key": "pipe:[31337]",
            "external": False,
            "path": "",
            "type": "",
            "waits": True,
            "reads": False,
            "writes": True,
            "descriptors": [[4711, 2]],
        },
        {
            "kind": "unix",
            "key": "unix[31338]",
            "external": True,
            "path": "@bus",
            "type": "stream",
            "waits": False,
            "reads": True,
            "writes": True,
            "descriptors": [[4712, 5]],
        },
    ],
    "run_id": "0b5d7f3c-7d2e-4c58-9d0a-3a8d5a0c9b11",
    "counts": {"total": 0, "zero": 0, "reused": 0, "new": 0},
    "frozen_ms": 12.5,
    "phases": {"look": 1.25, "take": 10.0},
    "opened": [
        {"path": "/usr/bin/agent", "size": 14488, "mode": 0o100755, "build_id": "8c3cbf7c" * 5},
        {"path": "/var/log/agent.log", "size": 13, "mode": 0o100644, "build_id": ""},
    ],
}


@dataclass
class Counter:
    """Stands in for os.urandom: pack ids in the order in which they are asked for."""

    made: int = 0

    def __call__(self, size: int) -> bytes:
        """The next id."""
        self.made += 1
        return self.made.to_bytes(size, "big")


def text_page(number: int) -> bytes:
    """A page that compresses well, another for each number."""
    return (f"page {number} ".encode() * PAGE)[:PAGE]


def random_page(seed: int) -> bytes:
    """A page that does not compress."""
    return random.Random(seed).randbytes(PAGE)


@dataclass
class Image:
    """One image under way."""

    store: FileStore
    image_id: str
    writer: PackWriter = field(init=False)

    def __post_init__(self) -> None:
        self.known = load_known(self.store, "golden")
        self.writer = PackWriter(self.store, self.image_id, self.known)

    def add(self, pages: list[bytes]) -> int:
        """Store one chunk of memory; return its number."""
        number = self.writer.reserve()
        self.writer.add(number, [b"".join(pages)], [blake3(page).digest() for page in pages])
        return number

    def find(self, page: bytes) -> tuple[int, int]:
        """The chunk, and the page in it, that an earlier image has; adopted into this one."""
        place = KnownPagesOf(self.known, self.writer.adopt).find([blake3(page).digest()])[0]
        assert place != NOWHERE
        return Location.of(place)

    def file(self, name: str, *pieces: bytes, role: str = "", mtime_ns: int = 0) -> StoredFile:
        """Store a file, one chunk for each piece."""
        size = sum(map(len, pieces))
        chunks = tuple(self.writer.add_blob(piece) for piece in pieces)
        if not role:
            return StoredFile(name, size, chunks)
        return StoredFile(name, size, chunks, 0o644, 1000, 100, mtime_ns, role)

    def publish(
        self,
        spaces: dict[SpaceKey, list[Extent]],
        files: list[StoredFile],
        weights: Sequence[Weights] = (),
    ) -> None:
        """Finish: packs, page digests, index, manifest."""
        skeleton = [self.file("inventory.img", b"CRIU's inventory"), self.file("pstree.img", b"CRIU's tree")]
        self.writer.seal()
        self.writer.close()
        pages = [extent for extents in spaces.values() for extent in extents]
        zero = sum(extent.pages for extent in pages if extent.source == Source.ZERO)
        counts = {"total": sum(extent.pages for extent in pages) * PAGE, "zero": zero * PAGE}
        meta = META | {"counts": META["counts"] | counts}
        packs, chunks, references = self.writer.packs, self.writer.chunks, self.writer.references
        publish(
            self.store,
            Manifest(
                "golden", self.image_id, packs, chunks, spaces, skeleton, files, meta, weights, references
            ),
        )


def make_first(store: FileStore) -> None:
    """An image on its own."""
    image = Image(store, FIRST)
    text = image.add([text_page(number) for number in range(4)])
    noise = image.add([random_page(1)])
    image.publish(
        {
            PARENT: [
                Extent(HEAP, 4, Source.CHUNK, text, 0),
                Extent(HEAP + 4, 1000, Source.ZERO),
                Extent(STACK, 1, Source.CHUNK, noise, 0),
                Extent(VDSO, 2, Source.CHUNK, text, 1, lazy=False),
            ],
            CHILD: [
                Extent(HEAP, 2, Source.CHUNK, text, 0),
                Extent(HEAP + 2, 2, Source.ZERO, lazy=False),
            ],
            SHARED: [Extent(0, 1, Source.CHUNK, text, 3, lazy=False)],
            IDLE: [],
        },
        [
            image.file("/var/log/agent.log", b"first\n", b"second\n", role="written", mtime_ns=10**18 + 1),
            image.file("/dev/shm/empty", role="memory"),
            image.file("/srv/Grüße.txt", b"hello\n", role="include"),
        ],
    )


def make_second(store: FileStore) -> None:
    """An image that refers to chunks of the first."""
    image = Image(store, SECOND)
    old, at = image.find(text_page(2))
    new = image.add([text_page(9), text_page(10)])
    image.publish(
        {PARENT: [Extent(HEAP, 2, Source.CHUNK, old, at), Extent(HEAP + 2, 2, Source.CHUNK, new, 0)]},
        [image.file("/var/log/agent.log", b"first\n", b"third\n", role="written", mtime_ns=10**18 + 2)],
    )


WEIGHTS = {
    "model.bin": random.Random(2).randbytes(5 * PAGE),
    "adapter.bin": random.Random(3).randbytes(3 * PAGE),
}
"""The files of weights; the second one is in the store."""


def make_third(store: FileStore) -> None:
    """An image that refers to files of weights (version 2)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.bin"
        path.write_bytes(WEIGHTS["adapter.bin"])
        with patch("crcli.image.weights.new_image_id", lambda: SECOND):
            push(store, str(path))
    image = Image(store, FIRST)
    model, adapter = 0, 1
    references = [
        [Piece(model, View.BYTES, 3, 2 * PAGE)],
        [Piece(adapter, View.BYTES, PAGE, 100), Piece(model, View.BYTES, 9000, PAGE - 100)],
        [Piece(model, View.F32_TO_BF16, 8, PAGE)],
        [Piece(model, View.F32_TO_F16, 8, PAGE)],
        [Piece(adapter, View.BF16_TO_F32, 2, PAGE)],
        [Piece(adapter, View.F16_TO_F32, 2, PAGE)],
        [Piece(model, View.F64_TO_F32, 16, PAGE)],
    ]
    numbers = []
    for pieces in references:
        raw = b"".join(made(piece) for piece in pieces)
        numbers.append(image.writer.refer(Reference(tuple(pieces), len(raw), blake3(raw).digest())))
    text = image.add([text_page(1)])
    extents = [Extent(HEAP + 2 * at, 1, Source.WEIGHTS, number) for at, number in enumerate(numbers)]
    image.publish(
        {
            PARENT: [
                Extent(1, 1, Source.WEIGHTS, numbers[0], 1, lazy=False),
                Extent(9, 1, Source.CHUNK, text),
                *extents,
            ]
        },
        [],
        [
            Weights(f"/models/{name}", len(data), 10**18, blake3(data).hexdigest())
            for name, data in WEIGHTS.items()
        ],
    )


def made(piece: Piece) -> bytes:
    """The bytes of memory that a piece stands for."""
    data = list(WEIGHTS.values())[piece.file][piece.offset : piece.end]
    return bytes(apply(piece.view, data).tobytes())


def describe(manifest: Manifest) -> dict[str, Any]:
    """All that a manifest says, as JSON has it."""
    return {
        "name": manifest.name,
        "id": manifest.id,
        "packs": [pack.hex() for pack in manifest.packs],
        "chunks": [
            [c.pack, c.raw, c.offset, c.stored, int(c.codec), c.is_memory, c.digest.hex()]
            for c in manifest.chunks
        ],
        "spaces": [
            {
                "kind": int(key.kind),
                "number": key.number,
                "extents": [[e.start, e.pages, int(e.source), e.chunk, e.offset, e.lazy] for e in extents],
            }
            for key, extents in manifest.spaces.items()
        ],
        "skeleton": [file.as_json() for file in manifest.skeleton],
        "files": [file.as_json() for file in manifest.files],
        "meta": manifest.meta,
        **_describe_weights(manifest),
    }


def _describe_weights(manifest: Manifest) -> dict[str, Any]:
    """What version 2 adds; nothing for an image of version 1."""
    if not manifest.references:
        return {}
    return {
        "weights": [asdict(file) for file in manifest.weights],
        "references": [
            [[[p.file, int(p.view), p.offset, p.length] for p in one.pieces], one.raw, one.digest.hex()]
            for one in manifest.references
        ],
    }


def main(version: str, folder: Path) -> None:
    """Write the store and its description."""
    store = FileStore(str(folder / version))
    store.warm(for_writing=True)
    with patch("crcli.image.packs.os.urandom", Counter()):
        for make in {"v1": (make_first, make_second), "v2": (make_third,)}[version]:
            make(store)
    found = sorted(info.key for info in store.list("images/golden/"))
    manifests = [Manifest.decode(store.get(key), key) for key in found]
    text = json.dumps([describe(manifest) for manifest in manifests], indent=1)
    (folder / f"{version}.json").write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).absolute())
