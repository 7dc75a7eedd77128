"""Hashes of the files that a tree has open or mapped and that do not travel: for the guard of its restore.

They are taken by a thread while the dump is prepared, never while the tree stands frozen. What no thread can
read in that time (files of weights, archives of data) is recorded as not hashed, and compared by size.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from typing import TYPE_CHECKING, Any

from crcli.guard.contents import Contents, same_file
from crcli.process.evidence import MEMORY_FILE_SYSTEMS, PSEUDO_FILE_SYSTEMS

if TYPE_CHECKING:
    from crcli.process.evidence import Evidence, NamedFile

BUDGET_BYTES = 256 << 20
"""Not more is read for hashes in one dump (bytes); what is known from earlier ones costs nothing."""

BUDGET_S = 1.0
"""And not longer than this (seconds): the tree is not frozen before."""


class Hashing(threading.Thread):
    """Hashes one tree's files, beside what else is prepared; `finish` it before the freeze."""

    def __init__(self, evidence: Evidence, until: float | None = None) -> None:
        """`until` is when no file is to be begun any more (time.monotonic), if that is sooner than usual."""
        super().__init__(name="hashing", daemon=True)
        self._evidence = evidence
        self._contents = Contents()
        usual = time.monotonic() + BUDGET_S
        self._deadline = usual if until is None else min(usual, until)
        self._left = BUDGET_BYTES
        self._root = f"/proc/{evidence.root.pid}/root"
        self._found: dict[str, tuple[os.stat_result, str]] = {}
        self._why: dict[str, str] = {}
        self._over = False

    def run(self) -> None:
        leased = {held.file.id for held in self._evidence.locks if held.lock.kind == "LEASE"}
        for file in sorted(self._evidence.named, key=_most_important_first):
            if self._over:
                return
            if file.written:
                self._why[file.path] = "written"
            elif file.id in leased or self._is_elsewhere(file):
                self._why[file.path] = "unreadable"
            else:
                self._take(file.path)
        self._contents.save()

    def _is_elsewhere(self, file: NamedFile) -> bool:
        """Whether it travels anyway, or asking for its bytes would ask another program for them."""
        mount = self._evidence.mounts.get(file.id.dev)
        return mount is not None and (mount.fstype in MEMORY_FILE_SYSTEMS or mount.fstype.startswith("fuse"))

    def _take(self, path: str) -> None:
        try:
            status = os.stat(self._root + path)
            if self._contents.build_id(self._root + path):
                return
            if not self._contents.has_digest(self._root + path):
                if status.st_size > self._left or time.monotonic() > self._deadline:
                    self._why[path] = "budget"
                    return
                self._left -= status.st_size
            self._found[path] = status, self._contents.digest(self._root + path, self._deadline)
        except (TimeoutError, MemoryError):
            self._why[path] = "budget"
        except OSError:
            self._why[path] = "unreadable"

    def finish(self) -> None:
        """Return when no file is read any more."""
        self.join(max(0.0, self._deadline - time.monotonic()))
        self._over = True

    def add_to(self, opened: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Complete records of opened files (see `named_files`) by their hashes; nothing but stat is done."""
        return [{**record, **self._hash_of(record)} for record in opened]

    def _hash_of(self, record: dict[str, Any]) -> dict[str, str]:
        path = record["path"]
        if record["build_id"] or not stat.S_ISREG(record["mode"]):
            return {"hash": "", "unhashed": ""}
        if path not in self._found:
            return {"hash": "", "unhashed": self._why.get(path, "late")}
        status, digest = self._found[path]
        try:
            is_same = status.st_size == record["size"] and same_file(status, os.stat(self._root + path))
        except OSError:
            is_same = False
        return {"hash": digest, "unhashed": ""} if is_same else {"hash": "", "unhashed": "late"}


def _most_important_first(file: NamedFile) -> tuple[bool, bool, int]:
    return not any(one.executable for one in file.mapped), not file.mapped, file.size


def describe_mounts(evidence: Evidence) -> list[dict[str, str]]:
    """The file systems beside the root's on which the tree has files or works, by where they are mounted."""
    kernels_own = MEMORY_FILE_SYSTEMS | PSEUDO_FILE_SYSTEMS
    paths = [file.path for file in evidence.named] + [process.cwd for process in evidence.tree if process.cwd]
    return [
        {"point": mount.point, "fstype": mount.fstype, "source": mount.source}
        for mount in sorted(evidence.mounts.values(), key=lambda mount: mount.point)
        if mount.point != "/"
        and mount.fstype not in kernels_own
        and any(path == mount.point or path.startswith(mount.point + "/") for path in paths)
    ]
