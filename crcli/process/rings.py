"""The io_uring of libuv's event loops: each has one since libuv 1.49 (Node 22, uvloop, PyTorch's store).

No ring can be saved. But a loop uses this one for nothing but to change what it waits for, a call of
epoll_ctl(2) at a time, and does without where the kernel has none. For that it looks at one number: the
ring's descriptor in its `struct uv__iou` (src/unix/linux.c of libuv 1.45 to 1.52), which is -1 then. Whose
ring it is, and where that number stands, is found here, in the process's memory; crcli.criu.rings changes it.

    void *sq, *cqe, *sqe; size_t sqlen, cqlen, maxlen, sqelen; int ringfd; uint32_t in_flight, …
"""

from __future__ import annotations

import os
import struct
from contextlib import closing
from typing import TYPE_CHECKING

from crcli.memory.extents import PAGE
from crcli.memory.pagemap import AddressSpace
from crcli.process.identity import read_proc
from crcli.process.maps import areas
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from crcli.process.files import OpenFile
    from crcli.process.maps import Area

LINK = "anon_inode:[io_uring]"
_QUEUES, _ENTRIES = 0, 0x1000_0000
"""The offsets at which a ring is mapped: the queues, and the entries to be submitted."""

_LOOP = struct.Struct("=QQQQQQQiI")
_RINGFD_AT = 56
_ENTRY, _OPCODE_AND_FD = 64, struct.Struct("=BBHi")
_EPOLL_CTL = 29
"""IORING_OP_EPOLL_CTL."""

_MOST_SEARCHED = 1 << 30
"""So much of a process's memory is looked through for event loops (bytes): the heap first, or its beginning,
then from small mappings to large ones."""

_MOST_READS = 20
"""How often a ring's fdinfo is read: it says little while somebody is at work in the ring."""

_PLAIN = {"SqThread": "-1", "UserFiles": "0", "UserBufs": "0"}
_EQUAL = (("SqHead", "SqTail"), ("SqHead", "CachedSqHead"), ("CqHead", "CqTail"), ("CqTail", "CachedCqTail"))


class EventRing(Struct, frozen=True):
    """The ring of one event loop of libuv.

    `field` is where the loop keeps the ring's descriptor; `pieces` are where it is mapped, (address, bytes);
    `epoll` is the descriptor that the loop waits with, -1 as long as it has never run.
    """

    pid: int
    fd: int
    ino: int
    field: int
    pieces: tuple[tuple[int, int], ...]
    epoll: int

    def is_there(self) -> bool:
        """Whether the process still has it open."""
        try:
            return os.stat(f"/proc/{self.pid}/fd/{self.fd}").st_ino == self.ino
        except OSError:
            return False

    def is_idle(self) -> bool:
        """Whether nothing is in it, or under way, and the loop still has it."""
        try:
            info = read_proc(f"/proc/{self.pid}/fdinfo/{self.fd}").decode(errors="replace")
            with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
                number = os.pread(memory.fileno(), 4, self.field)
        except OSError:
            return False
        return _is_idle(info) and number == struct.pack("=i", self.fd)


def event_rings(files: Iterable[OpenFile]) -> tuple[EventRing, ...]:
    """Return those of these descriptors that are rings of libuv's event loops."""
    rings: dict[int, list[OpenFile]] = {}
    for file in files:
        if file.target == LINK:
            rings.setdefault(file.pid, []).append(file)
    return tuple(found for pid, held in rings.items() for found in _of_process(pid, held))


def _of_process(pid: int, held: list[OpenFile]) -> Iterator[EventRing]:
    try:
        listed = list(areas(pid))
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        pieces = {file.fd: _pieces(listed, file.ino) for file in held if _is_plain(_whole_info(file))}
        heap = next((area.start // PAGE for area in listed if area.name == b"[heap]"), 0)
        places = _places(pid, heap, {fd: found for fd, found in pieces.items() if found})
        for file in held:
            fields = places.get(file.fd, [])
            epoll = _epoll_of(memory, pieces[file.fd][_ENTRIES]) if len(fields) == 1 else None
            if epoll is not None:
                yield EventRing(pid, file.fd, file.ino, fields[0], tuple(pieces[file.fd].values()), epoll)
    except OSError:  # it has ended, or its loop has
        return
    finally:
        os.close(memory)


def _whole_info(file: OpenFile) -> str:
    """A ring's fdinfo, with what the kernel leaves out of it while somebody is in the ring."""
    info = file.info
    for _ in range(_MOST_READS):
        if _PLAIN.keys() <= _fields(info).keys():
            break
        info = read_proc(f"/proc/{file.pid}/fdinfo/{file.fd}").decode(errors="replace")
    return info


def _is_plain(info: str) -> bool:
    """Whether a ring's fdinfo may be a loop's: nothing is registered, no thread of the kernel serves it."""
    fields = _fields(info)
    return all(fields.get(name) == value for name, value in _PLAIN.items())


def _is_idle(info: str) -> bool:
    """Whether nothing is in it: entries that wait have lines of their own, which begin with blanks."""
    fields, lines = _fields(info), info.splitlines()
    is_empty = all(one in fields and fields[one] == fields.get(other) for one, other in _EQUAL)
    return _is_plain(info) and is_empty and not any(line.startswith(" ") for line in lines)


def _fields(info: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in info.splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _pieces(listed: list[Area], ino: int) -> dict[int, tuple[int, int]]:
    """Where a ring is mapped, by the offset of each piece; nothing if one is mapped twice."""
    found = [area for area in listed if int(area.inode) == ino and area.name == LINK.encode()]
    pieces = {int(area.offset, 16): (area.start, area.size) for area in found}
    return pieces if len(pieces) == len(found) and pieces.keys() == {_QUEUES, _ENTRIES} else {}


def _places(pid: int, heap: int, rings: dict[int, dict[int, tuple[int, int]]]) -> dict[int, list[int]]:
    """For each ring, by its descriptor, where a loop keeps it. `heap` is the heap's first page."""
    found: dict[int, list[int]] = {fd: [] for fd in rings}
    if not rings:
        return found
    left = _MOST_SEARCHED
    with closing(AddressSpace(pid)) as space:
        for _, part in sorted(space.slices(), key=lambda one: (one[1].start != heap, one)):
            for run in space.sent(part):
                if all(found.values()) or left < 0:
                    return found
                left -= (run.end - run.start) * PAGE
                data = space.read(run)
                for fd, pieces in rings.items():
                    found[fd] += [run.start * PAGE + at + _RINGFD_AT for at in _matches(data, fd, pieces)]
    return found


def _matches(data: bytes, fd: int, pieces: dict[int, tuple[int, int]]) -> Iterator[int]:
    """Where in these bytes stands what a loop keeps of this ring, which is mapped so."""
    (queues, size), (entries, entries_size) = pieces[_QUEUES], pieces[_ENTRIES]
    middle = struct.pack("=Q", queues)[1:6]  # without the zeros around, which are everywhere: found sooner
    found = data.find(middle)
    while 0 <= found <= len(data) - _LOOP.size:
        at = max(0, found - 1)
        sq, cqe, sqe, sqlen, cqlen, most, sqelen, ringfd, in_flight = _LOOP.unpack_from(data, at)
        is_mapped = sq == queues < cqe < queues + size and sqe == entries and most == max(sqlen, cqlen)
        is_whole = most <= size < most + 4096 and sqelen <= entries_size < sqelen + 4096
        if is_mapped and is_whole and ringfd == fd and not in_flight:
            yield at
        found = data.find(middle, found + 1)


def _epoll_of(memory: int, entries: tuple[int, int]) -> int | None:
    """What the loop waits with, from the entries that it has submitted; None when they are not a loop's."""
    data = os.pread(memory, entries[1], entries[0])
    used = {_OPCODE_AND_FD.unpack_from(data, at) for at in range(0, len(data) - _ENTRY + 1, _ENTRY)}
    used.discard((0, 0, 0, 0))
    if not used:
        return -1
    operations = {(one[0], one[3]) for one in used}
    (operation, fd), *others = operations
    return fd if operation == _EPOLL_CTL and not others else None
