"""Files of an image put where they were, on file systems of every kind."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from crcli.guard.here import Here
from crcli.image.manifest import Manifest, StoredFile
from crcli.image.packs import ChunkReader, PackWriter
from crcli.pipeline import place
from crcli.pipeline.place import Change, place_files, undo
from crcli.pipeline.stages import ChangedFiles
from crcli.records import asdict
from crcli.store.file import FileStore

IMAGE = "20260101T000000000-abcdef"


@pytest.fixture(params=["all", "no files without a name", "no links either"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system that has hard links and files without a name, or, as buckets and shares that are mounted,
    has not."""
    kind: str = request.param
    open_ = os.open

    def no_link(source: str, target: str, **how: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", source, None, target)

    def no_nameless(path: str, flags: int, *mode: int, **how: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported", path)
        return open_(path, flags, *mode, **how)

    if kind != "all":
        monkeypatch.setattr(place.os, "open", no_nameless)
    if kind == "no links either":
        monkeypatch.setattr(place.os, "link", no_link)
    return kind


def image_of(folder: Path, path: Path, text: bytes) -> tuple[Manifest, ChunkReader]:
    """An image with one file."""
    store = FileStore(str(folder / "store"))
    writer = PackWriter(store, IMAGE)
    number = writer.add_blob(text)
    writer.seal()
    writer.close()
    file = StoredFile(str(path), len(text), (number,), 0o640, os.getuid(), os.getgid(), 10**18)
    manifest = Manifest("agent", IMAGE, writer.packs, writer.chunks, {}, [], [file])
    return manifest, ChunkReader(store, manifest.packs, manifest.chunks)


@pytest.mark.usefixtures("file_system")
@pytest.mark.parametrize("is_undone", [False, True])
@pytest.mark.parametrize("there", [None, b"today's"])
def test_a_file_is_put_where_it_was(tmp_path: Path, there: bytes | None, is_undone: bool) -> None:
    """Where none is, or another, which is kept aside; and all is as before once it is undone."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    if there is not None:
        path.write_bytes(there)
    manifest, reader = image_of(tmp_path, path, b"the image's")
    changes: list[Change] = []
    place_files(manifest, reader, ChangedFiles.IMAGE, Here(), changes.append)
    aside = path.with_name(f"file.before-{IMAGE}")
    left = {"file": b"the image's"} | ({} if there is None else {aside.name: there})
    assert {one.name: one.read_bytes() for one in path.parent.iterdir()} == left
    status = path.stat()
    assert (status.st_mode & 0o7777, status.st_mtime_ns) == (0o640, 10**18)
    if is_undone:
        undo([asdict(change) for change in changes])
        left = {} if there is None else {"file": there}
        assert {one.name: one.read_bytes() for one in path.parent.iterdir()} == left


@pytest.mark.usefixtures("file_system")
def test_what_has_come_to_stand_there_is_not_replaced(tmp_path: Path) -> None:
    """A file that somebody makes there at the last moment stays."""
    path = tmp_path / "file"
    manifest, reader = image_of(tmp_path, path, b"the image's")

    def note(change: Change) -> None:
        if change.path == str(path):
            path.write_bytes(b"somebody's")

    with pytest.raises(FileExistsError):
        place_files(manifest, reader, ChangedFiles.IMAGE, Here(), note)
    assert path.read_bytes() == b"somebody's"
