"""What an image needs of the host that restores it, gathered from its manifest and from CRIU's own images.

Reading it fetches no memory: of CRIU's images only the few that say something are read.
"""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING, Any

from crcli.criu.needs import InetSocket, LockedFile, OpenedFile, Rights
from crcli.errors import ImageDamaged
from crcli.records import Struct, replace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from crcli.criu.images import ImageFolder
    from crcli.image.manifest import Manifest, Weights
    from crcli.image.packs import ChunkReader

_TELLING = (
    *("core-", "cpuinfo.img", "fdinfo-", "filelocks.img", "files.img", "ids-", "mm-", "pstree.img"),
    "remap-fpath.img",
)
"""The images of CRIU's that are read, by how their names begin."""


_MOST_FILES = 64
"""Of an image of more files their folders are what only one restore at a time may have."""

NOBODYS = Rights(frozenset(), frozenset(), 0)


class Asked(Struct, frozen=True):
    """How the restore is asked for, in the words of its options; `forced` are names of blockers.

    `gpu_map` are pairs of GPUs: of the image, and here.
    """

    pid_namespace: str = "auto"
    tcp: str = "auto"
    changed_files: str = "refuse"
    forced: tuple[str, ...] = ()
    gpu_map: tuple[tuple[str, str], ...] = ()


class NeededFile(Struct, frozen=True):
    """A file that must be here: what CRIU knows of it, and the BLAKE3 hash of its content ("": not known)."""

    opened: OpenedFile
    digest: str = ""


class Needs(Struct, frozen=True):
    """One image's needs. `files` may hold two records of a path, if manifest and CRIU's images disagree."""

    manifest: Manifest
    asked: Asked = Asked()
    files: tuple[NeededFile, ...] = ()
    sockets: tuple[InetSocket, ...] = ()
    unix_names: tuple[str, ...] = ()
    watched: tuple[str, ...] = ()
    """Paths of files and folders that the tree watches."""
    locks: tuple[LockedFile, ...] = ()
    rights: Rights = NOBODYS
    cpu_words: tuple[int, ...] = ()
    own_namespaces: frozenset[str] = frozenset()
    root_pid: int = 0
    numbers: frozenset[int] = frozenset()
    """Pids and thread ids of the whole tree."""
    missing_weights: tuple[Weights, ...] = ()
    """Files of weights that were found neither here nor in the store."""

    @property
    def meta(self) -> dict[str, Any]:
        """The facts of the manifest (FORMAT.md, the JSON head)."""
        return self.manifest.meta

    @property
    def host(self) -> dict[str, Any]:
        """The facts about the host of the dump."""
        found: dict[str, Any] = self.manifest.meta.get("host", {})
        return found

    @property
    def cpu_promise(self) -> frozenset[str] | None:
        """The only features of a CPU that the job was started to use; None where nobody promised that."""
        return cpu_promise(self.manifest.meta)


def places_of(needs: Needs) -> Iterator[str]:
    """Words for the places that only one tree can have, and for who else may want them."""
    yield f"name {needs.manifest.name}"
    if needs.asked.pid_namespace != "new" and needs.root_pid != 1:
        yield f"pid {needs.root_pid}"
    if "net" not in needs.own_namespaces:
        yield from (f"{one.protocol} {one.port}" for one in needs.sockets)
    yield from (f"socket {name}" for name in needs.unix_names)
    yield from (f"file {lock.path}" for lock in needs.locks)
    files = [file.name for file in needs.manifest.files]
    if len(files) <= _MOST_FILES:
        yield from (f"file {path}" for path in files)
    else:
        yield from (f"folder {os.path.dirname(path)}" for path in files)


def cpu_promise(meta: Mapping[str, Any]) -> frozenset[str] | None:
    """What `crcli run --cpu-baseline` noted in an image's facts; None where it did not."""
    flags = (meta.get("job") or {}).get("cpu_baseline")
    return frozenset(map(str, flags)) if isinstance(flags, list) else None


class StoredImages:
    """Those of CRIU's images that say what a restore needs, fetched from the store at once and checked."""

    def __init__(self, manifest: Manifest, reader: ChunkReader) -> None:
        self._names = sorted(file.name for file in manifest.skeleton)
        self._files = {file.name: file for file in manifest.skeleton if file.name.startswith(_TELLING)}
        wanted = {number for file in self._files.values() for number in file.chunks}
        self._blobs = {n: bytes(raw) for group in reader.plan(wanted) for n, raw in reader.read(group)}

    def names(self) -> list[str]:
        """All of CRIU's images."""
        return self._names

    def read(self, name: str) -> bytes:
        """One of those that were fetched. Raises FileNotFoundError."""
        if name not in self._files:
            raise FileNotFoundError(name)
        return b"".join(self._blobs[number] for number in self._files[name].chunks)


def needs_of(manifest: Manifest, images: ImageFolder, asked: Asked) -> Needs:
    """Return what the image needs. Raises ImageDamaged when CRIU's images are not what they should be."""
    from google.protobuf.message import DecodeError

    try:
        return _needs_of(manifest, images, asked)
    except (DecodeError, FileNotFoundError, IndexError, ValueError, struct.error) as error:
        raise ImageDamaged(
            f"{manifest.name}@{manifest.id}: CRIU's images in it cannot be read: {error}"
        ) from error


def _needs_of(manifest: Manifest, images: ImageFolder, asked: Asked) -> Needs:
    from crcli.criu import inspect
    from crcli.criu.images import read_tree

    members = read_tree(images)
    return Needs(
        manifest=manifest,
        asked=asked,
        files=tuple(_files(inspect.opened_files(images), manifest.meta.get("opened", []))),
        sockets=tuple(inspect.inet_sockets(images)),
        unix_names=tuple(inspect.unix_names(images)),
        watched=tuple(inspect.watched_paths(images)),
        locks=tuple(inspect.locked_files(images)),
        rights=inspect.rights(images),
        cpu_words=inspect.cpu_words(images),
        own_namespaces=inspect.own_namespaces(images.names()),
        root_pid=members[0].pid,
        numbers=frozenset(pid for member in members for pid in (member.pid, *member.threads)),
    )


def _files(opened: list[OpenedFile], recorded: list[dict[str, Any]]) -> Iterator[NeededFile]:
    """Join CRIU's records with the manifest's, which has the hashes; where they disagree both must hold."""
    by_path = {file.path: file for file in opened}
    records = {str(record["path"]): record for record in recorded}
    for path in sorted({*by_path, *records}):
        known = [by_path[path]] if path in by_path else []
        digest = ""
        if path in records:
            digest = str(records[path].get("hash", ""))
            known.append(_recorded(records[path], known[0] if known else OpenedFile(path, None, None, "")))
        yield from (NeededFile(file, digest) for file in dict.fromkeys(known))


def _recorded(record: Mapping[str, Any], file: OpenedFile) -> OpenedFile:
    mode, size = int(record["mode"]), int(record["size"])
    return replace(
        file,
        size=size if stat.S_ISREG(mode) and (size or file.size is not None) else None,
        mode=mode or None,
        build_id=str(record["build_id"]),
    )
