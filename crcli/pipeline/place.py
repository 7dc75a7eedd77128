"""Files that travel in an image, put where they were; what stands there already is never lost unasked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from crcli.errors import GuardRefused
from crcli.findings import Finding, Severity
from crcli.memory.replay import write_all
from crcli.pipeline.stages import ChangedFiles

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crcli.image.manifest import Manifest, StoredFile
    from crcli.image.packs import ChunkReader


class Standing(StrEnum):
    """How the file at a path compares with the one in the image."""

    MISSING = "missing"
    SAME = "same"
    GROWN = "grown"
    CHANGED = "changed"


@dataclass
class Placement:
    """What was done to files, so that a restore that fails can take it back."""

    made: list[str] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)
    """Path -> where the file that stood there was put aside."""

    def undo(self) -> None:
        """Remove what was made, and put back what was replaced. Never raises."""
        for path in self.made:
            try:
                os.unlink(path)
            except OSError:
                pass
        for path, aside in self.replaced.items():
            try:
                os.rename(aside, path)
            except OSError:
                pass


def place_files(manifest: Manifest, reader: ChunkReader, policy: ChangedFiles) -> Placement:
    """Put the image's files in place; raise GuardRefused, with nothing changed, where others stand there.

    A file that only grew since the dump (a log) stays as it is. With ChangedFiles.IMAGE others are replaced
    (and put aside as PATH.before-<image id>), with ChangedFiles.HOST they stay.
    """
    standings = [(file, _compare(file, reader)) for file in manifest.files]
    changed = [file for file, standing in standings if standing == Standing.CHANGED]
    if changed and policy == ChangedFiles.REFUSE:
        raise GuardRefused(
            f"{changed[0].name} was changed since the dump" + _others(len(changed) - 1),
            hint="--files image puts the image's versions back (keeping today's aside), "
            "--files host goes on with today's",
            findings=[_changed_finding(file) for file in changed],
        )
    placement = Placement()
    try:
        for file, standing in standings:
            if standing == Standing.MISSING:
                _write(file, reader)
                placement.made.append(file.name)
            elif standing == Standing.CHANGED and policy == ChangedFiles.IMAGE:
                aside = f"{file.name}.before-{manifest.id}"
                os.rename(file.name, aside)
                placement.replaced[file.name] = aside
                _write(file, reader)
    except BaseException:
        placement.undo()
        raise
    return placement


def _compare(file: StoredFile, reader: ChunkReader) -> Standing:
    """How the file at this path stands to the image's."""
    try:
        fd = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return Standing.MISSING
    except OSError:
        return Standing.CHANGED
    try:
        size = os.fstat(fd).st_size
        if size < file.size:
            return Standing.CHANGED
        at = 0
        for raw in _contents(file, reader):
            if os.pread(fd, len(raw), at) != raw:
                return Standing.CHANGED
            at += len(raw)
        return Standing.SAME if size == file.size else Standing.GROWN
    finally:
        os.close(fd)


def _contents(file: StoredFile, reader: ChunkReader) -> Iterable[bytes]:
    for number in file.chunks:
        yield reader.blob([number])


def _write(file: StoredFile, reader: ChunkReader) -> None:
    os.makedirs(os.path.dirname(file.name), exist_ok=True)
    fd = os.open(file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        at = 0
        for raw in _contents(file, reader):
            write_all(fd, memoryview(raw), at)
            at += len(raw)
        os.fchown(fd, file.uid, file.gid)
        os.fchmod(fd, file.mode)
        os.utime(fd, ns=(file.mtime_ns, file.mtime_ns))
    finally:
        os.close(fd)


def _others(count: int) -> str:
    return f" (and {count} more files were)" if count else ""


def _changed_finding(file: StoredFile) -> Finding:
    try:
        now = os.stat(file.name)
        today = {"bytes": now.st_size, "mtime": now.st_mtime}
    except OSError:
        today = {}
    return Finding(
        name="file-changed",
        severity=Severity.BLOCKER,
        message=f"{file.name} is not what it was at the dump, nor has it only grown",
        evidence={
            "path": file.name,
            "image": {"bytes": file.size, "mtime": file.mtime_ns / 1e9},
            "here": today,
        },
        action="nothing was changed",
        remedy="--files image or --files host",
    )
