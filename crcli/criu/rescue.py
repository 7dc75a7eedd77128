"""What CRIU would have undone had it not died: a tree made to run as before.

When CRIU is killed in the middle of a dump the kernel detaches it from the tree, and its code inside each
process returns to where the program was. What stays: TCP sockets in repair mode, in which every read and
write fails; sockets whose queue is read from where CRIU stopped; the packet filter table; and the temporary
names of files that have none. All of it is best undone before the kernel detaches (see crcli.criu.standby).
"""

from __future__ import annotations

import os
import re
import socket
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.criu import netlock
from crcli.criu.images import REMAP_PREFIX
from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_TCP_REPAIR, _REPAIR_ON, _REPAIR_OFF_NO_PROBE = 19, 1, -1
_SO_PEEK_OFF, _PEEK_OFF_NONE = 42, -1
_RUN_ID = re.compile(rb"CRIU run id = ([0-9a-f-]{36})")
_DELETED = " (deleted)"


class SocketSettings(Struct, frozen=True):
    """What CRIU changes about sockets and the kernel does not give back, by inode."""

    reused: frozenset[int] = frozenset()
    """Sockets with SO_REUSEADDR, which leaving repair mode clears."""
    peeked: dict[int, int] = field(default_factory=dict)
    """Sockets with SO_PEEK_OFF, and its value."""


def remember(pids: Iterable[int]) -> SocketSettings:
    """Note the settings of these processes' sockets, before CRIU touches them. Never raises."""
    reused: set[int] = set()
    peeked: dict[int, int] = {}
    for inode, sock in _sockets(pids):
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR):
            reused.add(inode)
        if (offset := _peek_offset(sock)) >= 0:
            peeked[inode] = offset
    return SocketSettings(frozenset(reused), peeked)


def free_sockets(pids: Iterable[int], before: SocketSettings | None = None) -> None:
    """Have these processes' sockets work again, as they did `before`. Never raises."""
    before = before or SocketSettings()
    for inode, sock in _sockets(pids):
        try:
            if _in_repair(sock):
                sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_NO_PROBE)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, inode in before.reused)
            offset = before.peeked.get(inode, _PEEK_OFF_NONE)
            if _peek_offset(sock) not in (offset, _PEEK_OFF_NONE):
                sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, offset)
        except OSError:
            continue


def _sockets(pids: Iterable[int]) -> Iterator[tuple[int, socket.socket]]:
    """Each socket of these processes once: its inode, and the socket, for as long as it is looked at."""
    seen: set[int] = set()
    for pid in pids:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            for number, inode in _socket_descriptors(pid):
                if inode not in seen:
                    seen.add(inode)
                    try:
                        with socket.socket(fileno=kernel.pidfd_getfd(pidfd, number)) as sock:
                            yield inode, sock
                    except OSError:
                        continue
        finally:
            os.close(pidfd)


def _socket_descriptors(pid: int) -> Iterator[tuple[int, int]]:
    for number, target in _links(f"/proc/{pid}/fd"):
        if target.startswith("socket:["):
            yield int(number), int(target[8:-1])


def _links(folder: str) -> Iterator[tuple[str, str]]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            yield name, os.readlink(f"{folder}/{name}")
        except OSError:
            continue


def _in_repair(sock: socket.socket) -> bool:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR) == _REPAIR_ON
    except OSError:
        return False  # not a TCP socket


def _peek_offset(sock: socket.socket) -> int:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF)
    except OSError:
        return _PEEK_OFF_NONE


def remove_tables(log: bytes, network: int | None) -> None:
    """Remove the filter tables of the CRIU that wrote this log, here and in that network. Never raises."""
    for run_id in {match.decode() for match in _RUN_ID.findall(log)}:
        netlock.remove_for(run_id)
        if network is not None:
            netlock.remove_in(network, run_id)


def remove_link_remaps(pids: Iterable[int]) -> None:
    """Remove the temporary names that CRIU gave to these processes' files without a name. Never raises."""
    for pid in pids:
        nameless: dict[str, set[tuple[int, int]]] = {}
        for folder in (f"/proc/{pid}/fd", f"/proc/{pid}/map_files"):
            for name, target in _links(folder):
                if target.startswith("/") and target.endswith(_DELETED):
                    try:
                        status = os.stat(f"{folder}/{name}")
                    except OSError:
                        continue
                    if status.st_nlink:
                        parent = os.path.dirname(target.removesuffix(_DELETED))
                        nameless.setdefault(parent, set()).add((status.st_dev, status.st_ino))
        for parent, files in nameless.items():
            _remove_remaps_in(f"/proc/{pid}/root{parent}", files)


def _remove_remaps_in(folder: str, files: set[tuple[int, int]]) -> None:
    try:
        for name in os.listdir(folder):
            if name.startswith(REMAP_PREFIX):
                status = os.lstat(f"{folder}/{name}")
                if (status.st_dev, status.st_ino) in files:
                    os.unlink(f"{folder}/{name}")
    except OSError:
        pass
