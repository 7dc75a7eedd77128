"""What SQLite remembers of a database's file, corrected where a restored tree finds another in its place.

SQLite knows the file of a connection by device and inode. Before it writes with a rollback journal (its
default) it compares the inode with that of the file which the path names now, and where that is another it
refuses for ever: "attempt to write a readonly database". By both numbers it also finds what the connections
of one process have in common; without that, one that is closed would take the locks of the others away.
A file that a restore laid out, or that lies on another host, has other numbers than the one of the dump.

They are found where only they can be: a connection (unixFile in SQLite's os_unix.c) has the address of what
is known of the file (unixInodeInfo, which begins with the numbers), and behind it the file's descriptor.
"""

from __future__ import annotations

import os
import struct
from itertools import islice
from typing import TYPE_CHECKING

from crcli.process.files import FileId
from crcli.process.maps import areas
from crcli.process.tree import PID_GONE
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    Span = tuple[int, int]
    """A run of addresses: the first, and the one behind the last."""

_NUMBERS = struct.Struct("=QQ")
_WORD = struct.Struct("=Q")
_DESCRIPTOR = struct.Struct("=i")

_BLOCK = 4 << 20
"""So much of a memory is searched at once (bytes)."""

_MOST = 64
"""So many places with a file's numbers are followed: some are what stat(2) has returned."""


class Moved(Struct, frozen=True):
    """A database that a process has open as `descriptors`, whose file was `before` and is `now`."""

    path: str
    before: FileId
    now: FileId
    descriptors: tuple[int, ...]


def moved_databases(pid: int, databases: Mapping[str, FileId]) -> tuple[Moved, ...]:
    """Return which of these databases, by path, a process has open whose file is another than it was."""
    found: dict[tuple[str, FileId], list[int]] = {}
    try:
        for fd in map(int, os.listdir(f"/proc/{pid}/fd")):
            path = os.readlink(f"/proc/{pid}/fd/{fd}")
            if path in databases:
                status = os.stat(f"/proc/{pid}/fd/{fd}")
                found.setdefault((path, FileId(status.st_dev, status.st_ino)), []).append(fd)
    except PID_GONE:
        return ()
    return tuple(
        Moved(path, databases[path], now, tuple(descriptors))
        for (path, now), descriptors in found.items()
        if now != databases[path]
    )


def correct(pid: int, moved: Iterable[Moved], spans: Sequence[Span]) -> tuple[Moved, ...]:
    """Correct what a process that stands still knows of these databases; return those of which it has
    descriptors that no connection was found for.

    Only `spans` of its memory are searched, its heap before others, where most programs have all. Raises
    OSError where its memory cannot be read.
    """
    heap = [area.bounds for area in areas(pid, holding=b"[heap]")]
    in_heap = [
        (max(start, first), min(end, behind))
        for start, end in spans
        for first, behind in heap
        if start < behind and first < end
    ]
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        return tuple(one for one in moved if not _correct(memory, one, (in_heap, spans)))
    finally:
        os.close(memory)


def _correct(memory: int, one: Moved, where: Iterable[Sequence[Span]]) -> bool:
    """Correct it; return whether all descriptors were found to be connections. First all are found: several
    have the same numbers."""
    left, confirmed = set(one.descriptors), set()
    candidates: set[int] = set()
    for spans in where:
        candidates.update(islice(_find(memory, _NUMBERS.pack(one.before.dev, one.before.ino), spans), _MOST))
        for address in candidates:
            for at in _find(memory, _WORD.pack(address), spans):
                if (fd := _descriptor_at(memory, at + _WORD.size)) in left:
                    left.remove(fd)
                    confirmed.add(address)
        if not left:
            break
    for address in confirmed:
        os.pwrite(memory, _NUMBERS.pack(one.now.dev, one.now.ino), address)
    return not left


def _descriptor_at(memory: int, address: int) -> int:
    try:
        (fd,) = _DESCRIPTOR.unpack(os.pread(memory, _DESCRIPTOR.size, address))
    except (OSError, struct.error):
        return -1  # the last word before memory that is not there
    return int(fd)


def _find(memory: int, wanted: bytes, spans: Iterable[Span]) -> Iterator[int]:
    """The addresses, of whole words, at which these bytes stand."""
    for start, end in spans:
        for address in range(start, end, _BLOCK):
            try:
                block = os.pread(memory, min(_BLOCK + len(wanted) - 1, end - address), address)
            except OSError:
                continue  # memory that nobody else may read holds no connection
            at = block.find(wanted)
            while at >= 0:
                if (address + at) % _WORD.size == 0:
                    yield address + at
                at = block.find(wanted, at + 1)
