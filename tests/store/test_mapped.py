"""Pieces of files as the page cache has them: the same bytes as reading gives, or nothing."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from crcli import kernel
from crcli.store.mapped import LEAST_BYTES, mapped

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZE = 2 * LEAST_BYTES + 5000


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file that was just written, so that all of it is in memory."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, os.urandom(SIZE))
    yield fd
    os.close(fd)


@pytest.mark.parametrize("offset", [0, 8, 4096, 4999])
@pytest.mark.parametrize("length", [LEAST_BYTES, LEAST_BYTES + 1, 2 * LEAST_BYTES])
def test_it_is_what_reading_gives(file: int, offset: int, length: int) -> None:
    """Wherever a piece begins and ends, also in the middle of pages."""
    found = mapped(file, offset, length)
    assert found is not None
    assert found == os.pread(file, length, offset)


def test_a_file_that_was_unlinked_is_there(file: int, tmp_path: Path) -> None:
    """A collection, or a cache that makes room, takes nothing away from who has mapped it."""
    before = os.pread(file, LEAST_BYTES, 0)
    found = mapped(file, 0, LEAST_BYTES)
    os.unlink(tmp_path / "file")
    assert found == before


@pytest.mark.parametrize(("offset", "length"), [(8, SIZE), (SIZE, LEAST_BYTES), (0, LEAST_BYTES - 1)])
def test_what_is_not_there_or_small_is_not_mapped(file: int, offset: int, length: int) -> None:
    """Who looked behind a file's end would get SIGBUS."""
    assert mapped(file, offset, length) is None


def test_what_is_not_in_memory_is_not_mapped(file: int) -> None:
    """The disk is read by read(2), which says when it fails; here it is a hole that nobody has looked at."""
    os.ftruncate(file, SIZE + LEAST_BYTES)
    assert mapped(file, 0, SIZE) is not None
    assert mapped(file, 0, SIZE + LEAST_BYTES) is None


def test_a_kernel_that_does_not_tell_is_believed_nothing(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its word the piece is read."""

    def refuse(*_: int) -> bool:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(kernel, "is_in_memory", refuse)
    assert mapped(file, 0, SIZE) is None
