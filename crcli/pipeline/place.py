"""Files that travel in an image, put where they were; what stands there already is never lost unasked."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from crcli import kernel
from crcli.criu.kerndat import forget_loans
from crcli.guard.carried import Standing
from crcli.memory.writing import write_all
from crcli.pipeline.stages import ChangedFiles
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from crcli.guard.here import Here
    from crcli.image.manifest import Manifest, StoredFile
    from crcli.image.packs import ChunkReader


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems say that have no hard links."""


class Change(Struct, frozen=True):
    """One change to the host's files, noted before it is made; it can be undone at any moment since.

    `kind` is "file" (put at `path`; `device` and `inode` are the new file's, `aside` is where the one that
    stood there is kept, if any), "folder" (made), "moment" (a file that CRIU makes and removes again), "loan"
    (what CRIU finds there until it has looked: see crcli.criu.kerndat) or "mounts" (a folder in which CRIU
    mounts).
    """

    kind: str
    path: str
    aside: str = ""
    device: int = 0
    inode: int = 0


def undo(changes: Sequence[dict[str, Any]]) -> None:
    """Undo changes (as dictionaries), made or not, the last first. Never raises; safe to repeat."""
    for fields in reversed(changes):
        change = Change(**fields)
        try:
            _UNDO[change.kind](change)
        except OSError:
            continue


def _undo_file(change: Change) -> None:
    ours = (change.device, change.inode)
    stands = _identity(change.path)
    if change.aside and stands in (ours, None) and _identity(change.aside):
        os.rename(change.aside, change.path)
    elif change.aside and stands and stands == _identity(change.aside):
        os.unlink(change.aside)  # put aside, but not replaced yet
    elif stands == ours:
        os.unlink(change.path)


def _undo_folder(change: Change) -> None:
    os.rmdir(change.path)


def _undo_moment(change: Change) -> None:
    os.unlink(change.path)


def _undo_mounts(change: Change) -> None:
    """CRIU was killed with cgroup hierarchies mounted there; none of what they hold is to be touched."""
    for point in reversed(kernel.mount_points()):
        if point.startswith(change.path + "/"):
            kernel.unmount(point)
    for folder, folders, names in os.walk(change.path, topdown=False):
        for name in names:
            os.unlink(f"{folder}/{name}")
        for name in folders:
            os.rmdir(f"{folder}/{name}")
    os.rmdir(change.path)


_UNDO: dict[str, Callable[[Change], None]] = {
    "file": _undo_file,
    "folder": _undo_folder,
    "moment": _undo_moment,
    "loan": lambda _: forget_loans(),
    "mounts": _undo_mounts,
}


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def place_files(
    manifest: Manifest, reader: ChunkReader, policy: ChangedFiles, here: Here, note: Callable[[Change], None]
) -> None:
    """Put the image's files in place, as the guard has allowed it.

    A file that only grew since the dump (a log) stays as it is. With ChangedFiles.IMAGE others are replaced
    (and kept as PATH.before-<image id>), with ChangedFiles.HOST they stay. Each change is noted first.

    What had several names has them again, and is one file: by its `link` the tree gets it back, by the others
    programs find it. One that stands here and is in use, or is as it was, is the file.
    """
    folders = {one["path"]: one for one in manifest.meta.get("folders", [])}  # older images say nothing
    names: dict[str, list[StoredFile]] = {}
    for file in manifest.files:
        if file.same_as:
            names.setdefault(file.same_as, []).append(file)

    def needs_place(file: StoredFile) -> bool:
        standing = here.standing(file, manifest.chunks)
        if standing == Standing.CHANGED:
            return policy == ChangedFiles.IMAGE or (
                policy == ChangedFiles.REFUSE and here.is_left_behind(file)
            )
        return standing == Standing.MISSING

    def aside(file: StoredFile) -> str:
        stands = here.standing(file, manifest.chunks) != Standing.MISSING
        return _free_name(f"{file.name}.before-{manifest.id}") if stands else ""

    for file in manifest.files:
        if file.same_as:
            continue
        if here.standing(file, manifest.chunks) == Standing.MISSING:
            _make_folders(os.path.dirname(file.name), folders, note)
        known = next((one for one in names.get(file.name, ()) if not needs_place(one)), None)
        if known is not None and here.standing(file, manifest.chunks) == Standing.MISSING:
            _name_too(known.name, file.name, "", note)
        elif needs_place(file):
            _place(file, reader, aside(file), note)
        for one in names.get(file.name, ()):
            if needs_place(one):
                _name_too(file.name, one.name, aside(one), note)


def _free_name(path: str) -> str:
    """A name that nothing has: what was kept aside before stays kept."""
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = f"{path}-{number}"
    return free


def _contents(file: StoredFile, reader: ChunkReader) -> Iterable[bytes]:
    for number in file.chunks:
        yield reader.blob([number])


def _place(file: StoredFile, reader: ChunkReader, aside: str, note: Callable[[Change], None]) -> None:
    """Write the file without a name, then give it its own in one step: nobody ever sees a part of it."""
    fd, temporary = _nameless_file(os.path.dirname(file.name), note)
    try:
        at = 0
        for raw in _contents(file, reader):
            write_all(fd, memoryview(raw), at)
            at += len(raw)
        os.fchown(fd, file.uid, file.gid)
        os.fchmod(fd, file.mode)
        os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
        status = os.fstat(fd)
        note(Change("file", file.name, aside, status.st_dev, status.st_ino))
        try:
            _give_name(temporary or f"/proc/self/fd/{fd}", fd, file.name, aside, note)
        except OSError as error:
            if not temporary or error.errno not in _NO_LINKS:
                raise
            _rename(temporary, file.name, aside)  # nobody sees a part of it, but that nothing stands there
        else:
            if temporary:
                os.unlink(temporary)
    finally:
        os.close(fd)


def _name_too(known: str, path: str, aside: str, note: Callable[[Change], None]) -> None:
    """Give a file that is here another name; what has that now gets `aside`."""
    fd = os.open(known, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        note(Change("file", path, aside, status.st_dev, status.st_ino))
        _give_name(f"/proc/self/fd/{fd}", fd, path, aside, note)
    finally:
        os.close(fd)


def _give_name(source: str, fd: int, path: str, aside: str, note: Callable[[Change], None]) -> None:
    if not aside:
        os.link(source, path, src_dir_fd=fd, follow_symlinks=True)
        return
    os.link(path, aside, follow_symlinks=False)
    status = os.fstat(fd)
    ready = _free_name(f"{path}.crcli-{os.getpid()}")
    note(Change("file", ready, "", status.st_dev, status.st_ino))
    os.link(source, ready, src_dir_fd=fd, follow_symlinks=True)
    os.rename(ready, path)


def _rename(source: str, path: str, aside: str) -> None:
    if aside:
        os.rename(path, aside)
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    os.rename(source, path)


def _make_folders(folder: str, known: Mapping[str, dict[str, Any]], note: Callable[[Change], None]) -> None:
    """Make a folder that is not there, and those above it; what was one's own shall be no one else's now."""
    if os.path.isdir(folder):
        return
    _make_folders(os.path.dirname(folder), known, note)
    note(Change("folder", folder))
    if (then := known.get(folder)) is None:
        os.mkdir(folder)
        return
    os.mkdir(folder, 0o700)
    os.chown(folder, then["uid"], then["gid"])
    os.chmod(folder, then["mode"])


def _nameless_file(folder: str, note: Callable[[Change], None]) -> tuple[int, str]:
    """A new file in a folder, and its temporary name where the file system has no files without one."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600), ""
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    path = f"{folder}/.crcli-{os.urandom(8).hex()}"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    status = os.fstat(fd)
    note(Change("file", path, "", status.st_dev, status.st_ino))
    return fd, path
