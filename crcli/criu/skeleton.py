"""CRIU's images made ready for a restore: the memory that CRIU reads itself, and edits for this place."""

from __future__ import annotations

import os
import stat
import struct
from typing import TYPE_CHECKING, Any

from crcli.criu.images import (
    FD,
    ImageFile,
    create_pages,
    mapped_ids,
    read_files,
    remapped_ids,
    write_pagemap,
)
from crcli.criu.messages import inventory_entry, tcp_stream_entry, tty_info_entry
from crcli.memory.extents import PAGE, Extent, SpaceKey

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from crcli.criu.workspace import Workspace

_TCP, _TCP_CLOSE, _TCP_LISTEN = 6, 7, 10
_EXTERNAL_TERMINAL = 5
_OUTSIDE_SOCKET = 1
_NO_NETWORK_LOCK = 2
_ESTABLISHED_STATES = frozenset((1, 2, 3, 4, 5, 6, 8, 9, 11))


def lay_out_memory(
    images: Workspace,
    early: Mapping[SpaceKey, list[Extent]],
    fill: Callable[[Mapping[SpaceKey, tuple[int, dict[int, int]]]], None],
) -> None:
    """Write pagemaps and page files that hold the `early` extents.

    `fill` is called once with, for each space, a descriptor of its page file and the map from an extent's
    first page to its offset in that file (bytes); it writes what is not zero.
    """
    places: dict[SpaceKey, tuple[int, dict[int, int]]] = {}
    try:
        for pages_id, (space, extents) in enumerate(early.items(), start=1):
            offsets: dict[int, int] = {}
            at = 0
            for extent in extents:
                offsets[extent.start] = at
                at += extent.pages * PAGE
            write_pagemap(images, space, pages_id, ((e.start, e.pages) for e in extents))
            places[space] = (create_pages(images, pages_id, at // PAGE), offsets)
        fill(places)
    finally:
        for fd, _ in places.values():
            os.close(fd)


def close_outside_connections(images: Workspace, here: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turn established TCP connections whose other end is lost into closed sockets.

    Connections inside the tree stay as they are, and so do those whose other end is a socket of this host
    that still waits: `here` are the (local, remote) ends of all its connections, as "address:port". Returns
    the ends of the closed ones. The program sees ECONNRESET or EOF on its next use, and reconnects.
    """
    files = read_files(images)
    sockets = [entry.isk for entry in files.entries if entry.type == FD.INETSK and entry.isk.proto == _TCP]
    ends = {(_address(s.src_addr, s.src_port), _address(s.dst_addr, s.dst_port)) for s in sockets}
    closed: list[tuple[str, str]] = []
    for sock in sockets:
        if sock.state not in _ESTABLISHED_STATES:
            continue
        local, remote = _address(sock.src_addr, sock.src_port), _address(sock.dst_addr, sock.dst_port)
        if (remote, local) in ends or (_text(remote), _text(local)) in here:
            continue
        sock.src_port = sock.dst_port = 0
        sock.state = _TCP_CLOSE
        closed.append((_text(local), _text(remote)))
    if closed:
        images.write("files.img", files.encode())
    return closed


def _address(words: Iterable[int], port: int) -> tuple[bytes, int]:
    raw = b"".join(word.to_bytes(4, "little") for word in words)
    if len(raw) == 16 and raw.startswith(bytes(10) + b"\xff\xff"):
        raw = raw[12:]  # an IPv4 address in IPv6 clothes: the peer may wear none
    return raw, port


def _text(address: tuple[bytes, int]) -> str:
    from ipaddress import ip_address

    raw, port = address
    host = str(ip_address(raw)) if len(raw) in (4, 16) else raw.hex()
    return f"[{host}]:{port}" if len(raw) == 16 else f"{host}:{port}"


def mend_connections(images: Workspace) -> None:
    """Put right what keeps CRIU from restoring a busy TCP connection.

    A window update may lie beyond what the kernel accepts back: about one dump in a hundred records a
    `snd_wl1` past `rcv_nxt + rcv_wnd`, and restoring it fails with "Unable to set window parameters". The
    value only says how fresh the window is: the last sequence received is as good.

    Data that was not sent yet CRIU really sends while it restores. Where the other end is restored a moment
    later, and no filter holds the packets back, the answer is a reset (EPIPE). So all data counts as sent and
    not acknowledged: the kernel sends it again by itself.
    """
    for name in images.names():
        if not name.startswith("tcp-stream-"):
            continue
        data = images.read(name)
        (size,) = struct.unpack_from("<I", data, 8)
        entry = tcp_stream_entry.FromString(data[12 : 12 + size])
        beyond = (entry.snd_wl1 - entry.inq_seq - entry.rcv_wnd) & 0xFFFF_FFFF
        if entry.HasField("snd_wl1") and 0 < beyond < 1 << 31:
            entry.snd_wl1 = entry.inq_seq
        entry.unsq_len = 0
        body = entry.SerializeToString()
        images.write(name, data[:8] + struct.pack("<I", len(body)) + body + data[12 + size :])


def forget_foreign_sessions(images: Workspace, members: Collection[int]) -> None:
    """Let a terminal that controlled a session outside of the tree control none: its leader is not here."""
    if "tty-info.img" not in images.names():
        return
    info = ImageFile.parse(images.read("tty-info.img"), tty_info_entry)
    for entry in info.entries:
        if entry.type == _EXTERNAL_TERMINAL and entry.sid not in members:
            entry.sid = entry.pgrp = 0
    images.write("tty-info.img", info.encode())


def forget_network_lock(images: Workspace) -> None:
    """Let CRIU look for no packet filter table where there is none: to find none takes the kernel 10 ms.

    A tree that brings its network namespace along is left as it is: CRIU locks that one anew while it works.
    """
    if any(name.startswith("netns-") for name in images.names()):
        return
    inventory = ImageFile.parse(images.read("inventory.img"), inventory_entry)
    inventory.entries[0].network_lock_method = _NO_NETWORK_LOCK
    images.write("inventory.img", inventory.encode())


def regular_files(images: Workspace) -> list[tuple[str, int, int, int | None]]:
    """Every regular file that the tree has open or mapped: (path, flags, mode, size at the dump)."""
    return [
        (e.reg.name, e.reg.flags, e.reg.mode, e.reg.size if e.reg.HasField("size") else None)
        for e in read_files(images).entries
        if e.type == FD.REG
    ]


def named_files(images: Workspace) -> list[dict[str, Any]]:
    """The files that CRIU opens by name on restore, by path: not deleted ones, not external ones.

    Each with its size (bytes), mode, and build-id in hexadecimal where it has one.
    """
    remapped = remapped_ids(images)
    found: dict[str, dict[str, Any]] = {}
    for entry in read_files(images).entries:
        if entry.type == FD.REG and entry.id not in remapped and not entry.reg.ext:
            words = b"".join(word.to_bytes(4, "little") for word in entry.reg.build_id)
            found[entry.reg.name] = {
                "path": entry.reg.name,
                "size": entry.reg.size,
                "mode": entry.reg.mode,
                "build_id": words.hex(),
            }
    return [found[path] for path in sorted(found)]


def forget_sizes(images: Workspace, paths: Collection[str] | None = None) -> None:
    """Let CRIU open these files (None: all) whatever their size: their content was compared, or may grow."""
    files = read_files(images)
    for entry in files.entries:
        if entry.type == FD.REG and (paths is None or entry.reg.name in paths):
            entry.reg.ClearField("size")
    images.write("files.img", files.encode())


def accept_growth(images: Workspace) -> list[tuple[str, int, int]]:
    """Let CRIU open files that have only grown since the dump, such as logs that the tree reads.

    Returns their paths, sizes then and sizes now. Files that are mapped, or that the tree writes to other
    than at their end, are left out: they must be the same.
    """
    files = read_files(images)
    remapped = remapped_ids(images)
    regular = [entry for entry in files.entries if entry.type == FD.REG]
    grown: dict[str, tuple[str, int, int]] = {}
    for entry in regular:
        if entry.reg.HasField("size") and entry.id not in remapped and not entry.reg.ext:
            now = _size_of(entry.reg.name)
            if now > entry.reg.size:
                grown[entry.reg.name] = (entry.reg.name, entry.reg.size, now)
    if grown:
        mapped = mapped_ids(images)
        for entry in regular:
            if entry.id in mapped or _writes_anywhere(entry.reg.flags):
                grown.pop(entry.reg.name, None)
        for entry in regular:
            if entry.reg.name in grown:
                entry.reg.ClearField("size")
        images.write("files.img", files.encode())
    return list(grown.values())


def _writes_anywhere(flags: int) -> bool:
    return bool(flags & os.O_ACCMODE) and not flags & os.O_APPEND


def _size_of(path: str) -> int:
    """The size of a regular file; 0 when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def touched_folders(images: Workspace) -> list[str]:
    """Folders with names that a restore makes, removes or fills: bound sockets, FIFOs, unnamed files."""
    found: set[str] = set()
    entries = read_files(images).entries
    special = remapped_ids(images) | {entry.fifo.regf_id for entry in entries if entry.type == FD.FIFO}
    for entry in entries:
        if entry.type == FD.UNIXSK and not entry.usk.uflags & _OUTSIDE_SOCKET:
            if path := _socket_path(entry.usk):
                found.add(os.path.dirname(path))
        elif entry.type == FD.REG and entry.id in special:
            found.add(os.path.dirname(entry.reg.name))
    return sorted(os.path.normpath(folder) for folder in found if os.path.isdir(folder))


def outside_sockets(images: Workspace) -> list[str]:
    """Paths of the unix sockets of others that the tree sends to."""
    return sorted(
        path
        for entry in read_files(images).entries
        if entry.type == FD.UNIXSK
        and entry.usk.uflags & _OUTSIDE_SOCKET
        and (path := _socket_path(entry.usk))
    )


def _socket_path(entry: Any) -> str:
    """Where a unix socket is bound; empty for one without a name, or with an abstract one."""
    if entry.name[:1] in (b"", b"\0"):
        return ""
    return os.path.join(entry.name_dir or "/", os.fsdecode(entry.name.rstrip(b"\0")))
