"""What this host has now, for a restore to compare with."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from crcli.process import sockets
from crcli.process.identity import read_stat
from crcli.process.sockets import Socket, sockets_of

ZOMBIE_LIMIT_S, ZOMBIE_PATIENCE_S = 2.0, 0.2
"""How long pids that only zombies hold are waited for (seconds): an init reaps within that, if slowly; of
other parents those that reap at all do so at once."""

_UDIAG_SHOW_VFS, _UNIX_DIAG_VFS = 2, 1
_VFS = struct.Struct("=II")  # unix_diag_vfs: inode, device, each cut to 32 bits
_MINOR_BITS = 20


class UnixSocket(NamedTuple):
    """A unix socket that is bound to a name. `file` is the (device, inode) of its path, if it has one.

    As the kernel writes both: the device in its own way, each cut to 32 bits.
    """

    inode: int
    file: tuple[int, int] | None


def sockets_here() -> list[Socket]:
    """The TCP, UDP and unix sockets of this network namespace that somebody has open."""
    return list(sockets_of(os.getpid(), same_netns=True).values())


def established_here() -> set[tuple[str, str]]:
    """The (local, remote) ends of all TCP connections of this network namespace, as "address:port"."""
    return {
        (str(found.local), str(found.remote))
        for found in sockets_here()
        if found.protocol == "tcp" and found.connected
    }


def unix_sockets_here() -> dict[str, list[UnixSocket]]:
    """The unix sockets of this network namespace that are bound, by name; '@' begins abstract ones.

    One path can stand for several: in mount namespaces of their own, or where a file was replaced. Empty when
    the kernel does not say.
    """
    found: dict[str, list[UnixSocket]] = {}
    show = sockets.UDIAG_SHOW_NAME | _UDIAG_SHOW_VFS
    request = sockets._UNIX_REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, show)
    try:
        with sockets._diag_socket_here() as diag:
            answers = list(sockets._dump(diag, request))
    except OSError:
        return found
    for body in answers:
        *_, inode = sockets._UNIX_ANSWER.unpack_from(body)
        attributes = dict(sockets._attributes(body[sockets._UNIX_ANSWER.size :]))
        if name := attributes.get(sockets.UNIX_DIAG_NAME):
            vfs = attributes.get(_UNIX_DIAG_VFS)
            file = _VFS.unpack_from(vfs)[::-1] if vfs else None
            found.setdefault(sockets._unix_path(name), []).append(UnixSocket(inode, file))
    return found


def kernel_file_id(status: os.stat_result) -> tuple[int, int]:
    """The (device, inode) of a file in the words of `UnixSocket.file`."""
    device = os.major(status.st_dev) << _MINOR_BITS | os.minor(status.st_dev)
    return device & 0xFFFF_FFFF, status.st_ino & 0xFFFF_FFFF


def holder_of(inode: int) -> str:
    """A process that has this socket open, as `nginx (4711)`; empty when none can be found."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if any(target == f"socket:[{inode}]" for target in _targets(pid)):
                return f"{read_stat(int(pid)).comm} ({pid})"
        except OSError:
            continue
    return ""


def _targets(pid: str) -> Iterator[str]:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            yield os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue  # closed since: the one that we listed with, if it is ourselves


def pid_limit() -> int:
    """All pids are below this. Since Linux 6.14 each pid namespace has a limit of its own, mostly 2^22."""
    with open("/proc/sys/kernel/pid_max", "rb") as file:
        return int(file.read())


def taken_pids(numbers: frozenset[int] | set[int]) -> list[int]:
    """Which of these no process can get: in use, if only by zombies, or beyond `pid_limit`.

    CRIU would raise the host's limit for those, for good and without a word.
    """
    limit = pid_limit()
    return sorted(number for number in numbers if number >= limit or os.path.exists(f"/proc/{number}"))


def await_pids(numbers: frozenset[int], *, insist: bool) -> list[int]:
    """Which of these stay in use: zombies' pids are waited for, and longer by who must `insist`."""
    began = time.monotonic()
    while True:
        taken = taken_pids(numbers)
        reapers = [_reaper(number) for number in taken]
        patience = ZOMBIE_LIMIT_S if insist or set(reapers) <= {0, 1} else ZOMBIE_PATIENCE_S
        if not taken or None in reapers or time.monotonic() >= began + patience:
            return taken
        time.sleep(0.01)


def _reaper(pid: int) -> int | None:
    """The parent that a zombie waits for, 0 for one that is gone by now; None when it is no zombie, and for
    a pid that there is not."""
    try:
        stat = read_stat(pid)
    except ProcessLookupError:
        return 0 if pid < pid_limit() else None
    return stat.ppid if stat.is_zombie else None
