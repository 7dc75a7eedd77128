"""The packet filter tables by which CRIU holds a frozen tree's connections, found and removed.

CRIU makes a table `inet CRIU-<run id>` for the time of a dump and removes it when it can. When it is
killed, when a tree is left stopped, or when an image is never restored, the table stays and drops the
peers' packets for ever. This speaks nf_tables' netlink protocol (linux/netfilter/nf_tables.h) directly,
because neither `nft` nor a library for it can be counted on.
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

from crcli import kernel

PREFIX = "CRIU-"

_NETLINK_NETFILTER = 12
_NFNL_SUBSYS_NFTABLES, _NFNL_SUBSYS_NONE = 10, 0
_GET_TABLE, _DELETE_TABLE = 1, 2
_BATCH_BEGIN, _BATCH_END = 16, 17
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_INET = 1
_TABLE_NAME = 1
_HEADER = struct.Struct("<IHHII")
_FAMILY = struct.Struct(">BBH")


def tables() -> set[str]:
    """Names of CRIU's tables in this network namespace (none where nf_tables is not there)."""
    try:
        with _open() as channel:
            kind = _NFNL_SUBSYS_NFTABLES << 8 | _GET_TABLE
            channel.send(_message(kind, _REQUEST | _DUMP, _INET, 0, b""))
            return {name for name in _names(channel) if name.startswith(PREFIX)}
    except OSError:
        return set()


def remove(name: str) -> None:
    """Remove one table; it is not an error when it is not there."""
    attribute = name.encode() + b"\0"
    body = struct.pack("<HH", 4 + len(attribute), _TABLE_NAME) + attribute
    body += bytes(-len(body) % 4)
    delete = _NFNL_SUBSYS_NFTABLES << 8 | _DELETE_TABLE
    batch = (
        _message(_BATCH_BEGIN, _REQUEST, 0, _NFNL_SUBSYS_NFTABLES, b"")
        + _message(delete, _REQUEST | _ACK, _INET, 0, body)
        + _message(_BATCH_END, _REQUEST, 0, _NFNL_SUBSYS_NFTABLES, b"")
    )
    try:
        with _open() as channel:
            channel.send(batch)
            channel.recv(1 << 16)
    except OSError:
        pass


def tables_of(run_id: str) -> list[str]:
    """The tables of the dump with this run id (their names hold as much of the id as fits)."""
    return [name for name in tables() if run_id and run_id.startswith(name.removeprefix(PREFIX))]


def remove_for(run_id: str) -> None:
    """Remove the tables of the dump with this run id."""
    for name in tables_of(run_id):
        remove(name)


def other_network(pid: int) -> int | None:
    """A descriptor of the network that a process lives in; None where it is this thread's own."""
    try:
        network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(network).st_ino != os.stat("/proc/thread-self/ns/net").st_ino:
        return network
    os.close(network)
    return None


def remove_in(network: int, run_id: str) -> None:
    """As `remove_for`, in the network of this descriptor, where we may work in that."""
    with suppress(OSError):
        kernel.in_network(network, lambda: remove_for(run_id))


def _open() -> socket.socket:
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    channel.settimeout(2.0)
    channel.bind((0, 0))
    return channel


def _message(kind: int, flags: int, family: int, resource: int, body: bytes) -> bytes:
    payload = _FAMILY.pack(family, 0, resource) + body
    return _HEADER.pack(_HEADER.size + len(payload), kind, flags, 0, 0) + payload


def _names(channel: socket.socket) -> list[str]:
    names: list[str] = []
    while True:
        data = channel.recv(1 << 16)
        at = 0
        while at + _HEADER.size <= len(data):
            length, kind, _, _, _ = _HEADER.unpack_from(data, at)
            if kind in (_DONE, _ERROR) or length < _HEADER.size:
                return names
            names += _attributes(data[at + _HEADER.size + _FAMILY.size : at + length])
            at += (length + 3) & ~3


def _attributes(data: bytes) -> list[str]:
    found: list[str] = []
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("<HH", data, at)
        if length < 4:
            break
        if kind & 0x3FFF == _TABLE_NAME:
            found.append(data[at + 4 : at + length].rstrip(b"\0").decode(errors="replace"))
        at += (length + 3) & ~3
    return found
