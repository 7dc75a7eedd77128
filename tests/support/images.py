"""Images made without a process: written as a dump writes them, small, and of pages that tests choose."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from crcli.image.index import KnownPagesOf, load_known
from crcli.image.manifest import Manifest, StoredFile, load, publish
from crcli.image.names import ImageRef, new_image_id
from crcli.image.packs import PackWriter
from crcli.image.session import Session
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey, SpaceKind
from crcli.memory.places import NOWHERE, Location
from crcli.records import replace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crcli.store.base import Store


def pages(seed: int, count: int) -> list[bytes]:
    """Pages of random bytes, the same for the same seed."""
    source = random.Random(seed)
    return [source.randbytes(PAGE) for _ in range(count)]


def make_image(store: Store, name: str, memory: Sequence[bytes], file: bytes = b"a log\n") -> ImageRef:
    """Put an image into the store as a dump does: announced, what is there referred to, the manifest last."""
    image_id = new_image_id()
    with Session(store, image_id):
        known = load_known(store, name)
        writer = PackWriter(store, image_id, known, name)
        try:
            extents = add_memory(writer, KnownPagesOf(known, writer.adopt), memory)
            blob = writer.add_blob(file)
            indexes = writer.indexes(extents)
            writer.seal()
            manifest = Manifest(
                name=name,
                id=image_id,
                packs=writer.packs,
                chunks=writer.chunks,
                spaces={SpaceKey(SpaceKind.PROCESS, 4711): extents},
                skeleton=[StoredFile("core-4711.img", len(file), (blob,))],
                files=[StoredFile("/var/log/agent.log", len(file), (blob,), role="written")],
                meta={
                    "created": 1.0,
                    "host": {"hostname": "node-1", "kernel": "6.1", "machine": "x86_64"},
                    "tree": [{"pid": 4711, "comm": "agent", "argv": ["agent", "--serve"]}],
                    "members": [{"pid": 4711, "ppid": 1, "comm": "agent", "alive": True}],
                    "counts": {"total": len(memory) * PAGE, "zero": 0, "reused": 0, "new": 0},
                    **indexes,
                    "run_id": "",
                    "frozen_ms": 1.0,
                    "phases": {"take": 1.0},
                },
            )
            publish(store, manifest)
        finally:
            writer.close()
    return ImageRef(name, image_id)


def forge(
    store: Store, ref: ImageRef, meta: Mapping[str, Any], skeleton: Mapping[str, bytes] | None = None
) -> ImageRef:
    """Publish a copy of an image, whole and sealed, that claims something else.

    `meta` replaces facts of the JSON head (dictionaries are merged), `skeleton` images of CRIU's.
    """
    manifest = load(store, ref)
    image_id = new_image_id()
    writer = PackWriter(store, image_id)
    try:
        blobs = {name: (len(data), writer.add_blob(data)) for name, data in (skeleton or {}).items()}
        writer.seal()
    finally:
        writer.close()
    chunks = [*manifest.chunks, *(one._replace(pack=one.pack + len(manifest.packs)) for one in writer.chunks)]
    files = {file.name: file for file in manifest.skeleton}
    for name, (size, number) in blobs.items():
        files[name] = replace(files[name], size=size, chunks=(len(manifest.chunks) + number,))
    forged = replace(
        manifest,
        id=image_id,
        packs=[*manifest.packs, *writer.packs],
        chunks=chunks,
        skeleton=list(files.values()),
        meta={**manifest.meta, **{key: _merged(manifest.meta.get(key), new) for key, new in meta.items()}},
    )
    publish(store, forged)
    return ImageRef(ref.name, image_id)


def _merged(old: Any, new: Any) -> Any:
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def add_memory(writer: PackWriter, known: KnownPagesOf, memory: Sequence[bytes]) -> list[Extent]:
    """Store pages as a dump's intake does, each as a chunk of its own; return where they are."""
    digests = [blake3(page).digest() for page in memory]
    extents = []
    for number, place in enumerate(known.find(digests)):
        if place != NOWHERE:
            extents.append(Extent(number, 1, Source.CHUNK, *Location.of(place)))
        else:
            chunk = writer.reserve()
            writer.add(chunk, [memory[number]], [digests[number]])
            extents.append(Extent(number, 1, Source.CHUNK, chunk, 0))
    return extents
