"""The manifest: the last object written, whose existence is the image's existence.

It holds everything that a restore and its guards need except the bytes themselves: the memory map, the
table of chunks, where CRIU's small images and the captured files are, and the facts about the host, the
tree and the dump (`meta`, JSON).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from crcli.errors import ImageDamaged, NotFound
from crcli.image.container import ContainerKind, pack_container, unpack_container
from crcli.image.head import read_head
from crcli.image.names import IMAGES, ImageRef, image_at, manifest_key
from crcli.image.newest import newest_in
from crcli.image.tables import (
    Chunk,
    read_chunks,
    read_packs,
    read_references,
    read_spaces,
    write_chunks,
    write_packs,
    write_references,
    write_spaces,
)
from crcli.memory.extents import SpaceKind
from crcli.records import Struct, asdict, field

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from crcli.memory.extents import Extent, SpaceKey
    from crcli.memory.weights.references import Reference
    from crcli.store.base import ObjectInfo, Store


class StoredFile(Struct, frozen=True):
    """A file that travels in the image: its name, attributes, and the chunks that hold its bytes."""

    name: str
    size: int
    chunks: tuple[int, ...]
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    role: str = ""
    """Why it travels: see FORMAT.md, `files`."""
    same_as: str = ""
    """The name of the `link` of which this is another name."""

    def as_json(self) -> dict[str, Any]:
        """The file as it stands in the manifest's JSON."""
        fields: dict[str, Any] = {
            "name": self.name,
            "size": self.size,
            "chunks": list(self.chunks),
            "mode": self.mode,
            "uid": self.uid,
            "gid": self.gid,
            "mtime_ns": self.mtime_ns,
            "role": self.role,
        }
        return fields | {"same_as": self.same_as} if self.same_as else fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StoredFile:
        """Read one back; fields of later versions are ignored."""
        return cls(
            name=str(data["name"]),
            size=int(data["size"]),
            chunks=tuple(int(number) for number in data["chunks"]),
            mode=int(data["mode"]),
            uid=int(data["uid"]),
            gid=int(data["gid"]),
            mtime_ns=int(data["mtime_ns"]),
            role=str(data["role"]),
            same_as=str(data.get("same_as", "")),
        )


class Weights(Struct, frozen=True):
    """A file of weights that an image refers to: where it was, and what proves that another is the same.

    `digest` is the BLAKE3 of the whole file, in hexadecimal; a reference has a digest of its own.
    """

    path: str
    size: int
    mtime_ns: int
    digest: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Weights:
        """Read one back; fields of later versions are ignored."""
        return cls(str(data["path"]), int(data["size"]), int(data["mtime_ns"]), str(data["digest"]))


class Manifest(Struct, frozen=True):
    """One image, described."""

    name: str
    id: str
    packs: list[bytes]
    chunks: list[Chunk]
    spaces: dict[SpaceKey, list[Extent]]
    skeleton: list[StoredFile]
    """CRIU's own images, all but the memory."""
    files: list[StoredFile]
    """Files of the tree that travel along."""
    meta: dict[str, Any] = field(default_factory=dict)
    weights: Sequence[Weights] = ()
    references: Sequence[Reference] = ()
    """Pages that are found in the files of `weights`."""

    def encode(self) -> bytes:
        """Return the manifest object. Raises ImageDamaged where its head is none that could be read again."""
        head = {
            "name": self.name,
            "id": self.id,
            "skeleton": [file.as_json() for file in self.skeleton],
            "files": [file.as_json() for file in self.files],
            **self.meta,
        }
        sections: dict[str, bytes] = {}
        if self.references:
            head["weights"] = [asdict(file) for file in self.weights]
            sections["WREF"], sections["WPCE"] = write_references(self.references)
        meta = json.dumps(head, separators=(",", ":")).encode()
        read_head(meta, f"{self.name}@{self.id}")
        table, extents = write_spaces(self.spaces)
        return pack_container(
            ContainerKind.MANIFEST,
            {
                "META": meta,
                "PACK": write_packs(self.packs),
                "CHNK": write_chunks(self.chunks),
                "SPCE": table,
                "EXTN": extents,
                **sections,
            },
            version=2 if self.references else 1,
        )

    @classmethod
    def decode(cls, data: bytes, name: str) -> Manifest:
        """Read a manifest; raise ImageDamaged (naming `name`) when any part of it is not whole."""
        sections = unpack_container(data, ContainerKind.MANIFEST, name)
        try:
            head = read_head(sections["META"], name)
            packs = read_packs(sections["PACK"], name)
            chunks = read_chunks(sections["CHNK"], len(packs), name)
            weights = [Weights.from_json(file) for file in head.pop("weights", ())]
            references = read_references(
                sections.get("WREF", b""), sections.get("WPCE", b""), len(weights), name
            )
            spaces = read_spaces(sections["SPCE"], sections["EXTN"], chunks, references, name)
            skeleton = [StoredFile.from_json(file) for file in head.pop("skeleton")]
            files = [StoredFile.from_json(file) for file in head.pop("files")]
            manifest = cls(
                head.pop("name"),
                head.pop("id"),
                packs,
                chunks,
                spaces,
                skeleton,
                files,
                head,
                weights,
                references,
            )
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ImageDamaged(f"{name} lacks a part that every image has: {error!r}") from error
        _check_spaces(spaces, head, name)
        _check_files(skeleton + files, chunks, name)
        if wrong := [file.name for file in skeleton if not _is_plain(file.name)]:
            raise ImageDamaged(f"{name}: {wrong[0]!r} is no name of an image of CRIU's")
        if len({file.name for file in skeleton}) < len(skeleton):
            raise ImageDamaged(f"{name} has an image of CRIU's twice")
        if wrong := [file.name for file in files if not file.name.startswith("/") or "\0" in file.name]:
            raise ImageDamaged(f"{name}: {wrong[0]!r} is no full path of a file")
        return manifest


def _check_spaces(spaces: Iterable[SpaceKey], head: Mapping[str, Any], name: str) -> None:
    """Raise ImageDamaged when there is memory of a process that is not in the tree."""
    pids = {member["pid"] for member in head.get("members", ())}
    strangers = [space.number for space in spaces if space.kind == SpaceKind.PROCESS]
    if pids and not pids.issuperset(strangers):
        raise ImageDamaged(f"{name} has memory of a process that is not in its tree")


def _check_files(files: Iterable[StoredFile], chunks: Sequence[Chunk], name: str) -> None:
    """Raise ImageDamaged when a file refers to a chunk that is not there, or they do not make up its size."""
    for file in files:
        if not all(0 <= number < len(chunks) for number in file.chunks):
            raise ImageDamaged(f"{name}: a file refers to a chunk that is not there")
        if sum(chunks[number].raw for number in file.chunks) != file.size:
            raise ImageDamaged(f"{name}: the chunks of {file.name!r} do not make up its size")


def _is_plain(file: str) -> bool:
    """Whether it names a file in the folder in which it is looked for, and nothing elsewhere."""
    return file not in ("", ".", "..") and not {"/", "\0"}.intersection(file)


def publish(store: Store, manifest: Manifest, encoded: bytes = b"") -> int:
    """Make the image exist: write its manifest, which must not be there yet. Return its size in bytes.

    `encoded` is what `manifest.encode()` returned, where that was called before.
    """
    data = encoded or manifest.encode()
    store.put(manifest_key(manifest.name, manifest.id), data, if_absent=True)
    return len(data)


def resolve(store: Store, ref: ImageRef) -> ImageRef:
    """Return the image that `ref` names, with its id; raise NotFound when there is none."""
    if ref.id:
        return ref
    for info in newest_in(store, f"{IMAGES}{ref.name}/", 1, image_at):
        return ImageRef(ref.name, info.key.rpartition("/")[2])
    raise NotFound(
        f"the store {store.url} has no image named {ref.name}", hint="`crcli ls` shows what it holds"
    )


def load(store: Store, ref: ImageRef) -> Manifest:
    """Fetch, check and decode the manifest of an image (the newest of its name when `ref` has no id)."""
    full = resolve(store, ref)
    try:
        data = store.get(manifest_key(full.name, full.id))
    except NotFound as error:
        raise NotFound(
            f"the store {store.url} has no image {full}", hint="`crcli ls` shows what it holds"
        ) from error
    return decode_as(full, data)


def decode_as(ref: ImageRef, data: bytes) -> Manifest:
    """Read the manifest that is stored as that of `ref`. Raises ImageDamaged, also when it is another's."""
    manifest = Manifest.decode(data, str(ref))
    if (manifest.name, manifest.id) != (ref.name, ref.id):
        raise ImageDamaged(f"what is stored as {ref} says that it is {manifest.name}@{manifest.id}")
    return manifest


def list_images(store: Store, name: str = "") -> list[tuple[ImageRef, ObjectInfo]]:
    """Every image in the store (of that name), by name and then by time."""
    listed = ((image_at(info.key), info) for info in store.list(f"{IMAGES}{name}/" if name else IMAGES))
    return [(image, info) for image, info in listed if image is not None]
