"""A living tree's own memory, seen from outside: where it is, and one copy of it.

What is copied is what CRIU has to take out of it: the pages that are there and stand in no file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PAGE = 4096
_PRESENT, _FILE = np.uint64(1 << 63), np.uint64(1 << 61)
_RANGES_PER_CALL = 1024
_BYTES_PER_CALL = 256 << 20
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.process_vm_readv.restype = ctypes.c_ssize_t

_NOBODYS = ("[vvar]", "[vvar_vclock]", "[vdso]", "[vsyscall]")


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@dataclass(frozen=True)
class Piece:
    """What one call copies: ranges of one process, and how many bytes they are together."""

    pid: int
    ranges: ctypes.Array[_Vector]
    size: int


class TreeMemory:
    """The pages that these processes have now. They must neither change their mappings nor end meanwhile."""

    def __init__(self, pids: Iterable[int]) -> None:
        self.pieces = [piece for pid in pids for piece in _pieces(pid, own_ranges(pid))]
        self.size = sum(piece.size for piece in self.pieces)

    def copy(self, into: mmap.mmap) -> float:
        """Copy everything once, with one thread; return how many seconds it took."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(into))
        began = time.perf_counter()
        for piece in self.pieces:
            local = _Vector(address, piece.size)
            done = _LIBC.process_vm_readv(
                piece.pid, ctypes.byref(local), 1, piece.ranges, len(piece.ranges), 0
            )
            if done != piece.size:
                raise OSError(ctypes.get_errno(), f"{done} of {piece.size} bytes of {piece.pid} are there")
            address += piece.size
        return time.perf_counter() - began


def fresh(size: int) -> mmap.mmap:
    """Memory that the kernel has not given us yet."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def own_ranges(pid: int) -> Iterator[tuple[int, int]]:
    """Address and length of every run of pages that are in memory and in no file, in private mappings."""
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pages:
        for line in maps:
            where, rights, *rest = line.split()
            if rights[0] != "r" or rights[3] != "p" or rest[-1] in _NOBODYS:
                continue
            start, end = (int(text, 16) for text in where.split("-"))
            yield from runs(start, _entries(pages.fileno(), start // PAGE, end // PAGE))


def runs(start: int, entries: np.ndarray) -> Iterator[tuple[int, int]]:
    """Address and length of every run of own pages in a mapping at `start` with these pagemap entries."""
    ours = (entries & _PRESENT != 0) & (entries & _FILE == 0)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], ours, [False])).astype(np.int8)))
    for first, last in edges.reshape(-1, 2).tolist():
        yield start + first * PAGE, (last - first) * PAGE


def _entries(fd: int, first: int, last: int) -> np.ndarray:
    """The kernel's words about the pages from `first` up to `last`."""
    return np.frombuffer(os.pread(fd, (last - first) * 8, first * 8), dtype=np.uint64)


def _pieces(pid: int, ranges: Iterable[tuple[int, int]]) -> Iterator[Piece]:
    """Cut ranges to what one call takes."""
    taken: list[tuple[int, int]] = []
    size = 0
    for start, length in _cut(ranges):
        if len(taken) == _RANGES_PER_CALL or size + length > _BYTES_PER_CALL:
            yield Piece(pid, _vectors(taken), size)
            taken, size = [], 0
        taken.append((start, length))
        size += length
    if taken:
        yield Piece(pid, _vectors(taken), size)


def _cut(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, length in ranges:
        for at in range(0, length, _BYTES_PER_CALL):
            yield start + at, min(_BYTES_PER_CALL, length - at)


def _vectors(ranges: list[tuple[int, int]]) -> ctypes.Array[_Vector]:
    return (_Vector * len(ranges))(*(_Vector(start, length) for start, length in ranges))
