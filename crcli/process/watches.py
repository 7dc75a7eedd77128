"""What a tree watches for changes (inotify, fanotify), and whether CRIU can find it again.

The kernel tells of a watch which file it is on, as device, inode and handle, but not its path. CRIU opens
the handle and asks for the path; where a file system does not open handles (overlay, most of /proc and /sys)
it compares inodes below a few folders of its own choice (irmap.c). So we look first, where it is likely to
be, and tell CRIU the path.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from enum import StrEnum

from crcli import kernel
from crcli.process.files import DELETED, FileId, Mount, OpenFile
from crcli.records import Struct

SEARCH_LIMIT_S = 1.0
"""How long all watches of a tree are looked for, at most: what is not found is in the way of a dump."""

WITHOUT_LASTING_INODES = frozenset(("tmpfs", "devtmpfs"))
_MINOR_BITS = 20  # the kernel's own way to write a device number, which fdinfo shows


class Fate(StrEnum):
    """What becomes of a watch: CRIU finds it itself, by a path of ours, by its handle alone, or not."""

    OPENABLE = "openable"
    SEARCHED = "searched"
    NAMELESS = "nameless"
    LOST = "lost"


class Watch(Struct, frozen=True):
    """One watch of one descriptor, on the file `id`. `path` is empty where none was found."""

    holder: OpenFile
    id: FileId
    path: str
    fate: Fate


def watches(
    files: Iterable[OpenFile], root: int, mounts: Iterable[Mount], likely: Iterable[str]
) -> tuple[Watch, ...]:
    """Return the watches on single files that these descriptors hold; those on whole mounts need no path.

    `root` is the process whose mounts count; `likely` are paths at and around which a file is looked for.
    """
    mounts = tuple(mounts)
    held = [(file, watched, handle) for file in files for watched, handle in _parse(file)]
    known = {(watched, handle): _by_handle(watched, handle, root, mounts) for _, watched, handle in held}
    unknown = {watched for (watched, _), result in known.items() if result is None}
    paths = _search(unknown, root, mounts, tuple(dict.fromkeys(likely)))
    found = []
    for file, watched, handle in held:
        path = paths.get(watched, "")
        searched = path, Fate.SEARCHED if path else Fate.LOST
        found.append(Watch(file, watched, *(known[watched, handle] or searched)))
    return tuple(found)


def _parse(file: OpenFile) -> Iterator[tuple[FileId, str]]:
    """Yield file and handle (`TYPE:BYTES`) of each line such as `inotify wd:1 ino:9e7e sdev:800013 …`."""
    for line in file.info.splitlines():
        kind, _, rest = line.partition(" ")
        fields = dict(word.partition(":")[::2] for word in rest.split())
        if kind in ("inotify", "fanotify") and "ino" in fields:
            device = int(fields["sdev"], 16)
            watched = FileId(
                os.makedev(device >> _MINOR_BITS, device & (1 << _MINOR_BITS) - 1), int(fields["ino"], 16)
            )
            yield watched, f"{fields.get('fhandle-type', '')}:{fields.get('f_handle', '')}"


def _by_handle(watched: FileId, handle: str, root: int, mounts: tuple[Mount, ...]) -> tuple[str, Fate] | None:
    """Return path and fate, as CRIU's check_open_handle decides it; None where no handle is opened."""
    candidates = [mount for mount in mounts if mount.dev == watched.dev]
    opened = False
    for mount in candidates:
        path = _open_by_handle(f"/proc/{root}/root{mount.point}", handle)
        if path is None:
            continue
        opened = True
        if not path.endswith(DELETED) and _id_of(root, path) == watched:
            return path, Fate.OPENABLE
    if not opened:
        return None
    nameless = not any(mount.fstype in WITHOUT_LASTING_INODES for mount in candidates)
    return "", Fate.NAMELESS if nameless else Fate.LOST


def _open_by_handle(mount: str, handle: str) -> str | None:
    """Return where the file with this handle lies; None when the file system does not open it."""
    kind, _, raw = handle.partition(":")
    if not raw:
        return None
    try:
        mount_fd = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fd = kernel.open_by_handle(mount_fd, int(kind, 16), bytes.fromhex(raw))
    except OSError:
        return None
    finally:
        os.close(mount_fd)
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _search(
    wanted: Collection[FileId], root: int, mounts: tuple[Mount, ...], likely: tuple[str, ...]
) -> dict[FileId, str]:
    """Return a path of each of these files that is found: they are looked for at the likely paths, above
    them, then below, all at once. Below what is watched first: who watches a folder may watch all in it.
    """
    if not wanted:
        return {}
    devices, inodes = {file.dev for file in wanted}, {file.ino for file in wanted}
    points = [mount.point for mount in mounts if mount.dev in devices]
    around = dict.fromkeys((*likely, *(parent for path in likely for parent in _parents(path)), *points))
    found: dict[FileId, str] = {}
    waiting = deque(path for path in around if path != "/")
    seen = set(around)
    waiting.extend(points)

    def look(path: str) -> bool:
        file = _id_of(root, path)
        if file is None or file not in wanted:
            return False
        found.setdefault(file, path)
        return True

    for path in around:
        look(path)
    end = time.monotonic() + SEARCH_LIMIT_S
    while waiting and len(found) < len(wanted) and time.monotonic() < end:
        folder = waiting.popleft()
        for path, is_folder in _entries(root, folder, inodes):
            is_watched = look(path)
            if is_folder and path not in seen:
                seen.add(path)
                (waiting.appendleft if is_watched else waiting.append)(path)
    return found


def _parents(path: str) -> Iterator[str]:
    while path not in ("", "/"):
        path = os.path.dirname(path)
        yield path


def _entries(root: int, folder: str, inodes: Collection[int]) -> Iterator[tuple[str, bool]]:
    """Yield what in a folder is a folder itself (its inode there may be another, on overlay file systems), or
    may be a file with one of these inodes."""
    try:
        with os.scandir(f"/proc/{root}/root{folder}") as entries:
            for entry in entries:
                is_folder = entry.is_dir(follow_symlinks=False)
                if is_folder or entry.inode() in inodes:
                    yield f"{folder.rstrip('/')}/{entry.name}", is_folder
    except OSError:
        return


def _id_of(root: int, path: str) -> FileId | None:
    try:
        status = os.lstat(f"/proc/{root}/root{path}")
    except OSError:
        return None
    return FileId(status.st_dev, status.st_ino)
