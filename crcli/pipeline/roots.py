"""Another root for a tree (`restore --root`): where its paths lie here, and what that root must have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.errors import GuardRefused
from crcli.findings import Finding, Severity
from crcli.records import replace

if TYPE_CHECKING:
    from crcli.guard.needs import Needs
    from crcli.image.manifest import Manifest

MOUNTED = ("/dev", "/proc", "/sys")
"""Folders of the new root over which this host's are mounted."""

_MOST_LINKS = 40


def check_root(root: str, manifest: Manifest) -> None:
    """Raise GuardRefused when this tree cannot live in this root."""
    missing = [one for one in MOUNTED if not os.path.isdir(root + one) or os.path.islink(root + one)]
    if missing:
        raise _refusal(
            "root-incomplete",
            f"{root} has no {', '.join(missing)}, where a root has the kernel's own files",
            f"mkdir {' '.join(root + folder for folder in missing)}",
            root,
        )
    if any(file.name.startswith("mountpoints-") for file in manifest.skeleton):
        raise _refusal(
            "root-of-its-own",
            "the tree brings mounts of its own along, and can have no other root",
            "restore it without --root",
            root,
        )


def _refusal(name: str, message: str, remedy: str, root: str) -> GuardRefused:
    finding = Finding(name, Severity.BLOCKER, message, {"root": root}, "nothing was started", remedy)
    return GuardRefused(message, hint=remedy, findings=[finding])


def below(root: str, path: str) -> str:
    """Where a path of a tree with this root lies on this host; links in its folders lead where they do there.

    The root "" is this host's own.
    """
    if not root or not path.startswith("/"):
        return path
    folder, _, name = path.rpartition("/")
    inside = f"{_followed(root, folder)}/{name}"
    return inside if inside.startswith(tuple(f"{one}/" for one in MOUNTED)) else root + inside


def _followed(root: str, folder: str) -> str:
    """A folder of a root, as a path inside it without symbolic links."""
    done, waiting, links = "", folder.split("/")[::-1], 0
    while waiting:
        name = waiting.pop()
        if name in ("", ".", ".."):
            done = os.path.dirname(done).rstrip("/") if name == ".." else done
            continue
        try:
            target = os.readlink(f"{root}{done}/{name}")
        except OSError:  # no link, or not there at all
            done = f"{done}/{name}"
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(f"too many symbolic links in {root}{folder}")
        done = "" if target.startswith("/") else done
        waiting += target.split("/")[::-1]
    return done


def manifest_below(root: str, manifest: Manifest) -> Manifest:
    """The manifest with the paths of files as they are on this host."""
    if not root:
        return manifest
    named = {
        kind: [{**one, "path": below(root, one["path"])} for one in manifest.meta.get(kind, [])]
        for kind in ("opened", "folders")
    }
    return replace(
        manifest,
        files=[
            replace(file, name=below(root, file.name), same_as=below(root, file.same_as))
            for file in manifest.files
        ],
        meta={**manifest.meta, **named},
    )


def needs_below(root: str, needs: Needs) -> Needs:
    """What the image needs, with paths as they are on this host; mounts of the dump do not matter there."""
    if not root:
        return needs
    manifest = manifest_below(root, needs.manifest)
    files = (
        replace(one, opened=replace(one.opened, path=below(root, one.opened.path))) for one in needs.files
    )
    return replace(
        needs,
        manifest=replace(manifest, meta={**manifest.meta, "mounts": []}),
        files=tuple(files),
        unix_names=tuple(below(root, name) for name in needs.unix_names),
        watched=tuple(below(root, path) for path in needs.watched),
        locks=tuple(replace(lock, path=below(root, lock.path)) for lock in needs.locks),
    )
