"""Files: those that must be here as they were, those that travel in the image, and what they lie on."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from crcli.findings import change, note
from crcli.guard.carried import Standing
from crcli.guard.contents import hash_of, open_quietly
from crcli.guard.wording import blocker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.findings import Finding
    from crcli.guard.here import Here
    from crcli.guard.needs import NeededFile, Needs
    from crcli.guard.wording import Check
    from crcli.image.manifest import StoredFile

_MADE_BY_THE_KERNEL = ("/proc/", "/sys/", "/dev/pts/")
_NAMED = 20


def opened(needs: Needs, here: Here) -> Iterator[Finding]:
    """What the tree has open, mapped, or works in must be here as it was: by build-id or hash, mode, size."""
    if "mnt" in needs.own_namespaces:
        return  # its paths are those of file systems that CRIU mounts for it
    carried = {file.name: file for file in needs.manifest.files}
    made = _folders_made(needs)
    mounts = _mount_points(needs)
    for file in needs.files:
        path = file.opened.path
        if path.startswith(_MADE_BY_THE_KERNEL):
            continue
        status = _status(path, file.opened.mode or 0)
        if path in carried:
            if status is not None and not _is_replaced(needs, here, carried[path]):
                yield from _mode(file, status)
        elif status is not None:
            yield from _mode(file, status)
            yield from _content(file, status, here)
        elif path not in made and not any(_is_below(path, point) for point in here.cgroup_mounts):
            yield _missing(file, next((point for point in mounts if _is_below(path, point)), ""))


def watched(needs: Needs, here: Here) -> Iterator[Finding]:
    """What the tree watches must be here, whatever it holds now: CRIU lays the watch on its path."""
    if "mnt" in needs.own_namespaces:
        return
    brought = {file.name for file in needs.manifest.files} | _folders_made(needs)
    known = brought | {file.opened.path for file in needs.files}
    for path in needs.watched:
        if path not in known and not path.startswith(_MADE_BY_THE_KERNEL) and not os.path.exists(path):
            yield blocker(
                "file-missing",
                f"{path}, which the tree watches, is not here",
                {"path": path},
                "make the folder, or copy the file from the host of the dump",
            )


def _folders_made(needs: Needs) -> set[str]:
    """The folders of files that travel in the image."""
    return {folder for file in needs.manifest.files for folder in _folders_above(file.name)}


def _status(path: str, mode: int = 0) -> os.stat_result | None:
    """What stands there; where the tree has a symbolic link itself open (`mode`), what the link is."""
    try:
        return os.lstat(path) if stat.S_ISLNK(mode) else os.stat(path)
    except OSError:
        return None


def _folders_above(path: str) -> Iterator[str]:
    while (folder := os.path.dirname(path)) != path:
        yield folder
        path = folder


def _is_replaced(needs: Needs, here: Here, file: StoredFile) -> bool:
    return (
        needs.asked.changed_files != "host" and here.standing(file, needs.manifest.chunks) == Standing.CHANGED
    )


def _missing(file: NeededFile, mount: str) -> Finding:
    path = file.opened.path
    is_folder = file.opened.mode is not None and stat.S_ISDIR(file.opened.mode)
    what = "in which the tree works" if is_folder else "which the tree has open or mapped"
    if mount:
        remedy = f"mount {mount} here as on the host of the dump"
    elif is_folder:
        remedy = "make the folder"
    else:
        remedy = "install the same version of what it belongs to, or dump with --include"
    return blocker("file-missing", f"{path}, {what}, is not here", {"path": path}, remedy)


def _mode(file: NeededFile, status: os.stat_result) -> list[Finding]:
    """CRIU compares the type and the permissions of whatever it opens."""
    then, now = file.opened.mode, status.st_mode
    if then is None or then == now:
        return []
    path = file.opened.path
    if stat.S_IFMT(then) != stat.S_IFMT(now):
        message, remedy = f"{path} is another kind of file than it was", "put back what was there"
    else:
        message = f"{path} has other permissions than it had: {stat.filemode(now)}, not {stat.filemode(then)}"
        remedy = f"chmod {stat.S_IMODE(then):o} {path}"
    return [
        blocker(
            "file-mode",
            message,
            {"path": path, "image": stat.filemode(then), "here": stat.filemode(now)},
            remedy,
        )
    ]


def _content(file: NeededFile, status: os.stat_result, here: Here) -> list[Finding]:
    size = file.opened.size
    if size is None or not stat.S_ISREG(status.st_mode):
        return []
    evidence: dict[str, Any] = {
        "path": file.opened.path,
        "image": {"bytes": size, "build_id": file.opened.build_id, "hash": file.digest},
        "here": {"bytes": status.st_size, "mtime": status.st_mtime},
    }
    try:
        if file.opened.build_id:
            now = here.contents.build_id(file.opened.path)
            evidence["here"]["build_id"] = now
            return (
                [] if now == file.opened.build_id and size == status.st_size else [_library(file, evidence)]
            )
        if status.st_size == size:
            return [] if _has_hash(file, here, evidence["here"]) else [_changed(file, evidence)]
        if status.st_size > size and not file.opened.mapped and not file.opened.writes:
            return [_grown(file, evidence) if _begins_the_same(file, size) else _changed(file, evidence)]
        if file.opened.appends:
            return []  # a log that was rotated
    except OSError as error:
        evidence["here"]["error"] = str(error)
    return [_changed(file, evidence)]


def _has_hash(file: NeededFile, here: Here, found: dict[str, Any]) -> bool:
    if not file.digest:
        return True
    found["hash"] = here.contents.digest(file.opened.path)
    return bool(found["hash"] == file.digest)


def _begins_the_same(file: NeededFile, size: int) -> bool:
    if not file.digest:
        return True
    fd = open_quietly(file.opened.path)
    try:
        return hash_of(fd, size) == file.digest
    finally:
        os.close(fd)


def _library(file: NeededFile, evidence: dict[str, Any]) -> Finding:
    then, now = file.opened.build_id, evidence["here"]["build_id"] or "none"
    return blocker(
        "library-changed",
        f"{file.opened.path} is another version than the tree runs: build-id {now}, not {then}",
        evidence,
        "install the version of the dump; code that was loaded already and code from another version do not "
        "fit together",
    )


def _changed(file: NeededFile, evidence: dict[str, Any]) -> Finding:
    what = "mapped" if file.opened.mapped else "open"
    return blocker(
        "file-changed",
        f"{file.opened.path}, which the tree has {what}, was changed since the dump",
        evidence,
        "put the version of the dump back; or dump with --include, so that the file travels in the image",
    )


def _grown(file: NeededFile, evidence: dict[str, Any]) -> Finding:
    then, now = evidence["image"]["bytes"], evidence["here"]["bytes"]
    path = file.opened.path
    return change(
        "file-grown",
        f"{path}, which the tree has open, has grown from {then} to {now} bytes since the dump",
        {"path": path, "image": then, "here": now},
        "takes it that nothing but its end is new"
        if not file.digest
        else "opens it: what was there at the dump is still the same",
    )


def carried(needs: Needs, here: Here) -> Iterator[Finding]:
    """Files that travel in the image, where something else stands by now."""
    for file in needs.manifest.files:
        if here.standing(file, needs.manifest.chunks) == Standing.CHANGED:
            yield _standing_in_the_way(file, needs, here)


def _standing_in_the_way(file: StoredFile, needs: Needs, here: Here) -> Finding:
    status = _status(file.name)
    evidence = {
        "path": file.name,
        "image": {"bytes": file.size, "mtime": file.mtime_ns / 1e9},
        "here": {} if status is None else {"bytes": status.st_size, "mtime": status.st_mtime},
    }
    message = f"{file.name} was changed since the dump, and has not only grown"
    if needs.asked.changed_files == "image" or (
        needs.asked.changed_files == "refuse" and here.is_left_behind(file)
    ):
        action = f"puts the image's version back, and today's aside as {file.name}.before-{needs.manifest.id}"
        return change("file-changed", message, evidence, action)
    if needs.asked.changed_files == "host":
        return change("file-changed", message, evidence, "goes on with today's")
    return blocker(
        "file-changed",
        message,
        evidence,
        "--files image puts the image's versions back (keeping today's aside), "
        "--files host goes on with today's",
    )


def unknown(needs: Needs, here: Here) -> Iterator[Finding]:
    """Files whose content nobody knows, because the dump did not hash them: they are taken by their size."""
    carried = {file.name for file in needs.manifest.files}
    held = [
        file.opened.path
        for file in needs.files
        if not (file.digest or file.opened.build_id or file.opened.path in carried)
        and file.opened.size
        and not file.opened.path.startswith(_MADE_BY_THE_KERNEL)
    ]
    if held and "opened" in needs.meta:
        more = f" (and {len(held) - 1} more)" if len(held) > 1 else ""
        yield note(
            "file-unverified",
            f"{held[0]}{more} can be compared by size only: the dump did not hash it",
            {"paths": held[:_NAMED], "count": len(held)},
            "takes it that nobody changed it",
            "see for yourself that it is the file of the dump",
        )


def mounts(needs: Needs, here: Here) -> Iterator[Finding]:
    """File systems that the tree's files were on, and that are not mounted here."""
    if "mnt" in needs.own_namespaces:
        return
    for record in needs.meta.get("mounts", []):
        if not os.path.ismount(record["point"]):
            yield change(
                "mount-missing",
                f"{record['point']} ({record['fstype']}), on which the tree has files, is not mounted here",
                dict(record),
                "takes what lies there instead",
                f"mount {record['point']} as on the host of the dump ({record['source']})",
            )


def _mount_points(needs: Needs) -> list[str]:
    """The mounts of the dump that are not here, the innermost first."""
    points = (str(record["point"]) for record in needs.meta.get("mounts", []))
    return sorted((point for point in points if not os.path.ismount(point)), key=len, reverse=True)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


FILES: tuple[Check, ...] = (opened, watched, carried, unknown, mounts)
