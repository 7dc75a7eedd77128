"""Places that only one can have: pids, ports, addresses, connections, names of sockets, locks.

Whether a port is free the kernel is asked by taking it for a moment, as the program would. CRIU alone would
not notice: it lets two sockets listen on one port.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from typing import TYPE_CHECKING, Any

from crcli.findings import note
from crcli.guard.carried import Standing
from crcli.guard.wording import blocker
from crcli.process.file_locks import flock_holder, range_holder
from crcli.process.here import holder_of, kernel_file_id, pid_limit
from crcli.process.sockets import Address, State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.criu.needs import InetSocket, LockedFile
    from crcli.findings import Finding
    from crcli.guard.here import Here
    from crcli.guard.needs import Needs
    from crcli.guard.wording import Check
    from crcli.image.manifest import StoredFile
    from crcli.process.sockets import Socket

_NAMED = 20
_LOCK_PATIENCE_S, _LOCK_STEP_S = 1.0, 0.05
_WILDCARDS = ("0.0.0.0", "::")
_NOT_OURS = (errno.EADDRNOTAVAIL, errno.ENODEV)


def pids(needs: Needs, here: Here) -> Iterator[Finding]:
    """Every process and thread gets its number back, or the tree gets a pid namespace of its own."""
    if needs.root_pid == 1 or needs.asked.pid_namespace == "new":
        return
    if not (taken := here.taken_pids(needs.numbers, needs.asked.pid_namespace == "host")):
        return
    evidence: dict[str, Any] = {"pids": taken[:_NAMED], "count": len(taken)}
    limit = pid_limit()
    if taken[-1] >= limit:
        taken, evidence["limit"] = taken[::-1], limit
    why = (
        f"is beyond the last one here (kernel.pid_max is {limit})" if taken[0] >= limit else "is in use here"
    )
    message = f"pid {taken[0]} of the image {why}" + (
        f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
    )
    if needs.asked.pid_namespace == "host":
        yield blocker(
            "pid-taken",
            message,
            evidence,
            "leave out --pid-namespace host: crcli then restores in a pid namespace of its own",
        )
    else:
        yield note("pid-taken", message, evidence, "restores the tree in a pid namespace of its own")


def ports(needs: Needs, here: Here) -> Iterator[Finding]:
    """Ports on which the tree listens, or which it has for itself."""
    if "net" in needs.own_namespaces:
        return
    for one in dict.fromkeys(needs.sockets):
        if _is_kept_by_tcp(one) or _why_not(one) != errno.EADDRINUSE:
            continue
        owners = [found for found in here.sockets if _is_in_the_way(found, one)]
        if not owners:
            continue  # the remains of a connection, which do not hinder CRIU
        owner = next(filter(None, (holder_of(found.inode) for found in owners)), "")
        address = str(Address(one.host, one.port))
        yield blocker(
            "port-taken",
            f"{one.protocol} {address}, {_use(one)}, is in use here" + (f" by {owner}" if owner else ""),
            {"protocol": one.protocol, "address": address, "holder": owner},
            f"end {owner or 'what uses it'} first, restore with --port {one.port}=OTHER, or on another host"
            if one.state != "connected"
            else f"end {owner or 'what uses it'} first, or restore on another host",
        )


def _is_kept_by_tcp(one: InetSocket) -> bool:
    """A connection shares its port with others: `connections` is about those."""
    return one.protocol == "tcp" and one.state == "connected"


def _use(one: InetSocket) -> str:
    return "on which the tree listens" if one.state == "listening" else "which the tree has"


def _is_in_the_way(found: Socket, one: InetSocket) -> bool:
    if found.protocol != one.protocol or found.local.port != one.port:
        return False
    if one.protocol == "tcp" and found.state is not State.LISTEN:
        return False
    return found.local.host == one.host or one.host in _WILDCARDS or found.local.host in _WILDCARDS


def _why_not(one: InetSocket, *, port: bool = True) -> int:
    """Take this address (and port) for a moment: 0 when that works, or the errno with which it does not."""
    kind = socket.SOCK_STREAM if one.protocol == "tcp" else socket.SOCK_DGRAM
    try:
        with socket.socket(one.family, kind) as trial:
            # What is left of old connections must not count; two that listen exclude each other all the same.
            trial.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, one.protocol == "tcp" or one.reuse_address
            )
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, one.reuse_port)
            if one.family == socket.AF_INET6:
                trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, one.only_v6)
            if one.free_bind:
                trial.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND
            if one.device:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, one.device.encode())
            trial.bind((one.host, one.port if port else 0))
    except OSError as error:
        return error.errno or 0
    return 0


def has_address(one: InetSocket) -> bool:
    """Whether the address that a socket is bound to is one of this host's."""
    return _why_not(one, port=False) not in _NOT_OURS


def addresses(needs: Needs, here: Here) -> Iterator[Finding]:
    """Addresses that the tree's sockets are bound to, and that this host does not have."""
    if "net" in needs.own_namespaces:
        return
    seen = set()
    for one in needs.sockets:
        place = (one.host, one.device)
        if place in seen or (_is_kept_by_tcp(one) and not _lives_on(one, needs, here)):
            continue
        if one.may_have_another_address(needs.sockets):
            continue  # it gets one of ours
        seen.add(place)
        if not has_address(one):
            yield _address_missing(one)


def _address_missing(one: InetSocket) -> Finding:
    is_connection = _is_kept_by_tcp(one)
    where = f"the network interface {one.device}" if one.device else f"the address {one.host}"
    use = "from which a connection of the tree goes" if is_connection else _use(one)
    return blocker(
        "address-missing",
        f"this host does not have {where}, {use}",
        {"address": one.host, "port": one.port, "device": one.device},
        f"give it to this host (ip address add {one.host} dev …)"
        + (", or close the connections: --tcp close" if is_connection else ""),
    )


def _lives_on(one: InetSocket, needs: Needs, here: Here) -> bool:
    """Whether a connection will be kept: see `criu.connections.close_outside_connections`."""
    if needs.asked.tcp != "auto":
        return needs.asked.tcp == "keep"
    ends = (_plain(one.host, one.port), _plain(*one.remote))
    mirror = ends[::-1]
    if any((_plain(o.host, o.port), _plain(*o.remote)) == mirror for o in needs.sockets):
        return True
    there = {found.endpoints for found in here.sockets if found.connected}
    return mirror in there and ends not in there  # else the other end talks to the original


def _plain(host: str, port: int) -> Address:
    """An end of a connection; an IPv4 address that travels in IPv6 is written as IPv4."""
    return Address(host.removeprefix("::ffff:") if "." in host else host, port)


def connections(needs: Needs, here: Here) -> Iterator[Finding]:
    """Connections that would live on, and that somebody here has already: the tree itself, or its copy."""
    if "net" in needs.own_namespaces:
        return
    mine = [one for one in needs.sockets if _is_kept_by_tcp(one)]
    if not mine:
        return
    there = {found.endpoints: found for found in here.sockets if found.protocol == "tcp" and found.connected}
    for one in mine:
        ends = (_plain(one.host, one.port), _plain(*one.remote))
        if ends in there and _lives_on(one, needs, here):
            owner = holder_of(there[ends].inode)
            yield blocker(
                "connection-taken",
                f"the connection {ends[0]} to {ends[1]} exists here" + (f": {owner} has it" if owner else ""),
                {"local": str(ends[0]), "remote": str(ends[1]), "holder": owner},
                f"end {owner or 'what has it'} first, or close the tree's connections: --tcp close",
            )


def socket_names(needs: Needs, here: Here) -> Iterator[Finding]:
    """Names that unix sockets of the tree are bound to: paths, and abstract names."""
    for name in needs.unix_names:
        if name.startswith("@"):
            if "net" not in needs.own_namespaces and (owners := here.unix_sockets.get(name)):
                yield _name_taken(name, holder_of(owners[0].inode))
        elif "mnt" not in needs.own_namespaces:
            yield from _socket_path(name, needs, here)


def _socket_path(path: str, needs: Needs, here: Here) -> Iterator[Finding]:
    """A path that a living socket has, or another kind of file; what a dead one left behind CRIU replaces."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        folder = os.path.dirname(path)
        made = any(file.name.startswith(f"{folder}/") for file in needs.manifest.files)
        if not os.path.isdir(folder) and not made:
            yield blocker(
                "file-missing",
                f"{folder}, in which the tree has a socket, is not here",
                {"path": folder},
                "make the folder",
            )
        return
    except OSError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        yield _name_taken(path, "")
        return
    file = kernel_file_id(status)
    for one in here.unix_sockets.get(path, []):
        if one.file == file:
            yield _name_taken(path, holder_of(one.inode))
            return


def _name_taken(name: str, owner: str) -> Finding:
    return blocker(
        "socket-name-taken",
        f"{name}, where a unix socket of the tree belongs, is in use here"
        + (f" by {owner}" if owner else ""),
        {"name": name, "holder": owner},
        f"end {owner or 'what uses it'} first, or restore on another host",
    )


def locks(needs: Needs, here: Here) -> Iterator[Finding]:
    """Locks on files that the tree had: for one that another process has CRIU would wait, and we for CRIU.

    What somebody has for a moment is waited for.
    """
    if "mnt" in needs.own_namespaces:
        return
    put_back = {file.name for file in needs.manifest.files if _is_put_back(file, needs, here)}
    waited_for = [lock for lock in needs.locks if lock.path not in put_back]
    end = time.monotonic() + _LOCK_PATIENCE_S
    while taken := {lock.path: owner for lock in waited_for if (owner := _lock_owner(lock)) is not None}:
        if time.monotonic() >= end:
            break
        time.sleep(_LOCK_STEP_S)
    for path, owner in taken.items():
        yield blocker(
            "lock-taken",
            f"{path}, which the tree has locked, is locked here" + (f" by {owner}" if owner else ""),
            {"path": path, "holder": owner},
            f"end {owner or 'what has the lock'} first, or restore on another host",
        )


def _is_put_back(file: StoredFile, needs: Needs, here: Here) -> bool:
    """Whether the tree gets a file of its own, on which nobody has a lock."""
    is_wanted = needs.asked.changed_files != "host"
    return is_wanted and here.standing(file, needs.manifest.chunks) == Standing.CHANGED


def _lock_owner(lock: LockedFile) -> str | None:
    """Who has a lock in the way of this one, empty where that is not known; None when nobody has."""
    try:
        if lock.whole:
            return flock_holder(lock.path, exclusive=lock.exclusive)
        return range_holder(lock.path, exclusive=lock.exclusive, start=lock.start, length=lock.length)
    except OSError:
        return None  # it is still to be laid out, or other checks are about it


PLACES: tuple[Check, ...] = (pids, ports, addresses, connections, socket_names, locks)
