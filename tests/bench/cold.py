"""Files that have to come from the disk again."""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING

from tests.bench.commands import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LEFT_OF_A_FILE = 0.01
_DROP = "/proc/sys/vm/drop_caches"
_LIBC = ctypes.CDLL(None, use_errno=True)


def forget(folder: Path) -> None:
    """Have the page cache hold nothing of the files below this folder; raise BenchError if it keeps some.

    Only these files: the programs that read them stay in memory. The whole page cache goes if asking for
    these does not help, where that is allowed.
    """
    os.sync()
    for path in _files(folder):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    if cached_share(folder) > LEFT_OF_A_FILE and os.access(_DROP, os.W_OK):
        with open(_DROP, "w") as file:
            file.write("1")
    if (left := cached_share(folder)) > LEFT_OF_A_FILE:
        raise BenchError(f"{left:.0%} of {folder} stays in the page cache")


def cached_share(folder: Path) -> float:
    """How much of the files below a folder the page cache holds (0 to 1)."""
    pages = [_cached_pages(path) for path in _files(folder) if path.stat().st_size]
    return sum(held for held, _ in pages) / max(1, sum(count for _, count in pages))


def _cached_pages(path: Path) -> tuple[int, int]:
    """How many pages of a file are in memory, of how many."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        count = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * count)()
        first = ctypes.c_char.from_buffer(mapped)
        failed = _LIBC.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)), found)
        del first  # it keeps the mapping open
        if failed:
            raise OSError(ctypes.get_errno(), "mincore", str(path))
        return sum(one & 1 for one in found), count


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
