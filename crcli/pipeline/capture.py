"""Files that belong to the frozen instant: taken along because CRIU leaves them out.

CRIU stores what is in memory and the names of files. What a program has open for writing, keeps on a
memory file system or in files without a name is state as much as its memory is, so it travels too.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

from crcli.criu.images import REMAP_PREFIX, link_remaps
from crcli.criu.skeleton import regular_files
from crcli.findings import Finding, Severity
from crcli.image.manifest import StoredFile
from crcli.image.packs import BLOB_BYTES
from crcli.process.evidence import MEMORY_FILE_SYSTEMS, MEMORY_LIMIT, WRITTEN_LIMIT
from crcli.process.files import leased_inodes
from crcli.process.gather import SQLITE_MAGIC, SQLITE_SIBLINGS
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from crcli.criu.workspace import Workspace
    from crcli.image.packs import PackWriter
    from crcli.process.files import Mount

_NEVER = ("/proc/", "/sys/", "/dev/pts/")


class Wanted(Struct, frozen=True):
    """A file to take along: its path as the tree sees it, and why."""

    path: str
    role: str
    same_as: str = ""
    """The `link` of which this is another name."""


def store_skeleton(images: Workspace, writer: PackWriter) -> list[StoredFile]:
    """Store CRIU's own images (not its log); return where they are."""
    stored: list[StoredFile] = []
    for name in images.names():
        if name.endswith(".img"):
            chunks = tuple(writer.add_blob(block) for block in images.blocks(name, BLOB_BYTES))
            stored.append(StoredFile(name, images.size(name), chunks))
    return stored


def capture_files(
    images: Workspace,
    root_pid: int,
    mounts: dict[int, Mount],
    include: tuple[str, ...],
    writer: PackWriter,
) -> tuple[list[StoredFile], list[Finding]]:
    """Store the files that must travel; return them, and a finding for each that cannot.

    The tree must be frozen. Paths are read as the tree's root process sees them.
    """
    root = f"/proc/{root_pid}/root"
    stored: list[StoredFile] = []
    findings: list[Finding] = []
    seen: set[str] = set()
    asked_for = {os.path.abspath(path) for path in include}
    leased = cache(leased_inodes)  # only where needed: for /proc/locks the kernel waits for every processor
    for wanted in _wanted(images, root, mounts, include, leased):
        if wanted.path in seen:
            continue
        seen.add(wanted.path)
        try:
            status = os.stat(root + wanted.path)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(wanted.path)  # and not opened: nobody may write into a named pipe
            if status.st_ino in leased():
                continue  # opening it would break the lease, which the tree can see
            file = _store(root, wanted, writer)
        except (FileNotFoundError, NotADirectoryError):
            if wanted.path in asked_for:
                findings.append(_not_there(wanted.path))
            continue
        if file is not None:
            stored.append(file)
        else:
            findings.append(_too_large(wanted, os.stat(root + wanted.path).st_size))
    return stored, findings


def folders_of(root_pid: int, files: Iterable[StoredFile]) -> list[dict[str, Any]]:
    """The folders above these files, by path: their permissions, and whose they are."""
    root = f"/proc/{root_pid}/root"
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        path = os.path.dirname(file.name)
        while path != "/" and path not in found:
            with suppress(FileNotFoundError, NotADirectoryError):  # others may remove it meanwhile
                status = os.stat(root + path)
                mode = stat.S_IMODE(status.st_mode)
                found[path] = {"path": path, "mode": mode, "uid": status.st_uid, "gid": status.st_gid}
            path = os.path.dirname(path)
    return [found[path] for path in sorted(found)]


def _wanted(
    images: Workspace,
    root: str,
    mounts: dict[int, Mount],
    include: tuple[str, ...],
    leased: Callable[[], Collection[int]],
) -> Iterator[Wanted]:
    remaps = link_remaps(images)
    for path in remaps:
        yield Wanted(path, "link")
        yield from (Wanted(name, "name", path) for name in _other_names(root, path, mounts))
    for path in include:
        yield from _included(root, os.path.abspath(path))
    for path, flags, mode, _ in regular_files(images):
        if path in remaps or path.startswith(_NEVER) or (mode and not stat.S_ISREG(mode)):
            continue
        if _on_memory_file_system(root + path, mounts):
            yield Wanted(path, "memory")
        elif flags & os.O_ACCMODE:
            yield Wanted(path, "written")
            yield from _database_siblings(root, path, leased)


def _other_names(root: str, path: str, mounts: dict[int, Mount]) -> Iterator[str]:
    """The names by which programs find a file that CRIU has given this one: those of semaphores above all."""
    if not _on_memory_file_system(root + path, mounts):
        return
    folder = os.path.dirname(path)
    with suppress(OSError):
        file = os.stat(root + path)
        with os.scandir(root + folder) as entries:
            for entry in entries:
                if entry.inode() != file.st_ino or entry.name.startswith(REMAP_PREFIX):
                    continue
                if os.path.samestat(file, entry.stat(follow_symlinks=False)):
                    yield os.path.join(folder, entry.name)


def _included(root: str, path: str) -> Iterator[Wanted]:
    if not os.path.isdir(root + path):
        yield Wanted(path, "include")
        return
    for folder, _, names in os.walk(root + path):
        for name in names:
            found = os.path.join(folder, name)
            if os.path.isfile(found) and not os.path.islink(found):
                yield Wanted(found.removeprefix(root), "include")


def _database_siblings(root: str, path: str, leased: Callable[[], Collection[int]]) -> Iterator[Wanted]:
    try:
        if os.stat(root + path).st_ino in leased():
            return
        with open(root + path, "rb") as file:
            is_database = file.read(len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return
    if is_database:
        yield from (
            Wanted(path + suffix, "database")
            for suffix in SQLITE_SIBLINGS
            if os.path.exists(root + path + suffix)
        )


def _on_memory_file_system(path: str, mounts: dict[int, Mount]) -> bool:
    try:
        mount = mounts.get(os.stat(path).st_dev)
    except OSError:
        return False
    return mount is not None and mount.fstype in MEMORY_FILE_SYSTEMS


def _store(root: str, wanted: Wanted, writer: PackWriter) -> StoredFile | None:
    """Store one file; None when it is larger than its kind may be."""
    limit = WRITTEN_LIMIT if wanted.role in ("written", "database") else MEMORY_LIMIT
    with open(root + wanted.path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if status.st_size > limit and wanted.role not in ("link", "include"):
            return None
        chunks = []
        left = status.st_size
        while left and (block := file.read(min(BLOB_BYTES, left))):
            chunks.append(writer.add_blob(block))
            left -= len(block)
        return StoredFile(
            name=wanted.path,
            size=status.st_size - left,
            chunks=tuple(chunks),
            mode=status.st_mode & 0o7777,
            uid=status.st_uid,
            gid=status.st_gid,
            mtime_ns=status.st_mtime_ns,
            role=wanted.role,
            same_as=wanted.same_as,
        )


def missing_includes(root_pid: int, include: tuple[str, ...]) -> list[Finding]:
    """What was asked to travel, and could not if the tree were dumped now."""
    paths = [os.path.abspath(path) for path in include]
    return [_not_there(path) for path in paths if not _is_there(f"/proc/{root_pid}/root{path}")]


def _is_there(path: str) -> bool:
    return os.path.isdir(path) or os.path.isfile(path)


def _not_there(path: str) -> Finding:
    return Finding(
        name="include-missing",
        severity=Severity.CHANGE,
        message=f"{path} was to travel in the image, and is no file that the tree can see",
        evidence={"path": path},
        action="goes on without it",
        remedy="--include takes files and folders, as the tree's root process sees them",
    )


def _too_large(wanted: Wanted, size: int) -> Finding:
    return Finding(
        name="file-not-carried",
        severity=Severity.CHANGE,
        message=f"{wanted.path} ({size >> 20} MiB) is open for writing and too large to travel in the image",
        evidence={"path": wanted.path, "bytes": size},
        action="the image refers to it by name: it must be there, with this size, on restore",
        remedy="keep it on storage that both nodes share, or name it with --include to take it along",
    )
