"""CRIU's images made ready for a restore: the memory that CRIU reads itself, and edits for this place."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.criu.images import (
    FD,
    create_pages,
    read_files,
    remapped_ids,
    write_pagemap,
)
from crcli.memory.extents import PAGE, Extent, SpaceKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from crcli.criu.workspace import Workspace

_TCP, _TCP_CLOSE, _TCP_LISTEN = 6, 7, 10
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


def close_outside_connections(images: Workspace) -> list[tuple[str, str]]:
    """Turn every established TCP connection whose other end is not in the image into a closed socket.

    Connections inside the tree stay as they are. Returns the (local, remote) addresses of the closed ones.
    The program sees ECONNRESET or EOF on its next use, and reconnects.
    """
    files = read_files(images)
    sockets = [entry.isk for entry in files.entries if entry.type == FD.INETSK and entry.isk.proto == _TCP]
    ends = {(_address(s.src_addr, s.src_port), _address(s.dst_addr, s.dst_port)) for s in sockets}
    closed: list[tuple[str, str]] = []
    for sock in sockets:
        if sock.state not in _ESTABLISHED_STATES:
            continue
        local, remote = _address(sock.src_addr, sock.src_port), _address(sock.dst_addr, sock.dst_port)
        if (remote, local) in ends:
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


def regular_files(images: Workspace) -> list[tuple[str, int, int, int | None]]:
    """Every regular file that the tree has open or mapped: (path, flags, mode, size at the dump)."""
    return [
        (e.reg.name, e.reg.flags, e.reg.mode, e.reg.size if e.reg.HasField("size") else None)
        for e in read_files(images).entries
        if e.type == FD.REG
    ]


def accept_sizes(images: Workspace, sizes: Mapping[str, int]) -> None:
    """Tell CRIU that these files have these sizes now: those that only grew since the dump."""
    if not sizes:
        return
    files = read_files(images)
    for entry in files.entries:
        if entry.type == FD.REG and entry.reg.name in sizes:
            entry.reg.size = sizes[entry.reg.name]
    images.write("files.img", files.encode())


def present_sizes(images: Workspace) -> dict[str, int]:
    """Files whose size here is not the one in the images, with their present size (bytes)."""
    found: dict[str, int] = {}
    for path, _, _, size in regular_files(images):
        try:
            now = os.stat(path).st_size
        except OSError:
            continue
        if size is not None and now != size:
            found[path] = now
    return found


def touched_folders(images: Workspace) -> list[str]:
    """Folders in which CRIU makes or removes names during a restore: of bound sockets and unnamed files."""
    found: set[str] = set()
    remapped = remapped_ids(images)
    for entry in read_files(images).entries:
        if entry.type == FD.UNIXSK and entry.usk.name[:1] not in (b"", b"\0"):
            name = os.fsdecode(entry.usk.name.rstrip(b"\0"))
            found.add(os.path.dirname(os.path.join(entry.usk.name_dir or "/", name)))
        elif entry.type == FD.REG and entry.id in remapped:
            found.add(os.path.dirname(entry.reg.name))
    return sorted(os.path.normpath(folder) for folder in found if os.path.isdir(folder))
