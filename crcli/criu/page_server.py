"""The receiving half of CRIU's page server: memory arrives here, tagged with its owner and address.

During a dump CRIU sends each run of pages into a socket whose other end we hold. The protocol
(criu/page-xfer.c upstream) is little-endian: a header `u32 command, pad, u64 pages, u64 address, u64
owner` (until CRIU 4.1: `u32 command, u32 pages, u64 address, u64 owner`), followed, for runs that carry
them, by `pages * 4096` bytes. The low 16 bits of the command are the operation, the high 16 its flags.

Where a dump comes in rounds, CRIU asks of each space whether an earlier round sent it (PARENT, answered with
an i32, while the tree is frozen; OPEN2, answered with a byte, before the pages come). If so, pages that were
not written to come as headers without contents.
"""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from crcli.memory.extents import PAGE, SpaceKey, SpaceKind
from crcli.memory.intake import receive_exactly

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from crcli.memory.intake import Intake

_HEADER, _OLD_HEADER = struct.Struct("<I4xQQQ"), struct.Struct("<IIQQ")

_OPEN, _OPEN2, _PARENT, _ADD, _ADD_F, _HOLE, _GET = 3, 4, 5, 1, 6, 2, 7
_CLOSE, _FORCE_CLOSE = 0x1023, 0x1024

_TYPE_PROCESS, _TYPE_SHARED = 1, 2

_SO_SNDBUFFORCE = 32
_AHEAD_BYTES = 4 << 20

FLAG_PARENT, FLAG_LAZY, FLAG_PRESENT = 1, 2, 4


class PageProtocolError(Exception):
    """CRIU sent something that is not the page-server protocol as crcli knows it."""


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return (ours, CRIU's): a stream pair in which CRIU can be some MiB ahead of us."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        theirs.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _AHEAD_BYTES)
    except PermissionError:  # without CAP_NET_ADMIN: as much as net.core.wmem_max allows
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _AHEAD_BYTES)
    return ours, theirs


def receive_pages(channel: socket.socket, intake: Intake, moved: Callable[[], None] = lambda: None) -> None:
    """Take in all that CRIU sends until it ends the session; return when its last page is here.

    The intake gives the memory to receive into, and by giving none holds CRIU back. `moved` is called
    whenever something has come, and when it was taken in. Raises PageProtocolError on anything unexpected,
    ConnectionError when CRIU ends in the middle.
    """
    for command, pages, address, owner in _headers(channel):
        moved()
        operation, flags = command & 0xFFFF, command >> 16
        if operation == _ADD_F:
            space = _space(owner)
            if flags & FLAG_PRESENT:
                intake.receive(channel, space, address // PAGE, pages, bool(flags & FLAG_LAZY))
            elif flags & FLAG_PARENT and intake.has_parent(space):
                intake.inherit(space, address // PAGE, pages)
            elif pages:
                raise PageProtocolError(f"{pages} pages at {address:#x} without contents (flags {flags})")
        elif operation == _OPEN2:
            intake.begin_space(_space(owner))
            channel.send(struct.pack("<b", intake.has_parent(_space(owner))))
        elif operation == _PARENT:
            channel.send(struct.pack("<i", intake.has_parent(_space(owner))))
        elif command in (_CLOSE, _FORCE_CLOSE):
            intake.flush()
            channel.send(struct.pack("<i", 0))
            return
        else:
            raise PageProtocolError(f"unknown page-server command {command:#x}")
        moved()
    raise ConnectionError("CRIU closed the page connection before it said that all pages were sent")


def _headers(channel: socket.socket) -> Iterator[tuple[int, int, int, int]]:
    """Every header that comes, as (command, pages, address, owner).

    The first opens a space: it has an owner, but neither pages nor an address. So the owner's place in it
    tells which of the two layouts this CRIU speaks. Where the dump failed before that, the first ends the
    session: it has no owner, and is the last.
    """
    buffer = memoryview(bytearray(_HEADER.size))
    if not receive_exactly(channel, buffer[: _OLD_HEADER.size], end_allowed=True):
        return
    first = _OLD_HEADER.unpack_from(buffer)
    if first[0] in (_CLOSE, _FORCE_CLOSE):  # waiting for the rest of it, an older CRIU would wait for us
        yield first
        return
    if first[3]:
        layout, buffer = _OLD_HEADER, buffer[: _OLD_HEADER.size]
    else:
        layout = _HEADER
        receive_exactly(channel, buffer[_OLD_HEADER.size :])
    yield layout.unpack(buffer)
    while receive_exactly(channel, buffer, end_allowed=True):
        yield layout.unpack(buffer)


def _space(owner: int) -> SpaceKey:
    kind, number = owner & 0xFF, owner >> 8
    if kind == _TYPE_PROCESS:
        return SpaceKey(SpaceKind.PROCESS, number)
    if kind == _TYPE_SHARED:
        return SpaceKey(SpaceKind.SHARED, number)
    raise PageProtocolError(f"pages for an unknown kind of memory: {kind}")
