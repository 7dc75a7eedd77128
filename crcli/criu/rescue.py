"""What CRIU would have undone had it not died: a tree made to run as before.

When CRIU is killed in the middle of a dump the kernel detaches it from the tree, and its code inside each
process returns to where the program was. What stays is outside: TCP sockets in repair mode, which send
nothing, and the packet filter table.
"""

from __future__ import annotations

import os
import signal
import socket
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.criu import netlock

if TYPE_CHECKING:
    from collections.abc import Iterable

_TCP_REPAIR, _TCP_REPAIR_OFF_NO_WINDOW_PROBE, _TCP_REPAIR_ON = 19, -1, 1


def rescue(pids: Iterable[int], stopped: Iterable[int], tables_before: set[str]) -> None:
    """Undo what a dead CRIU left: repair mode, filter tables, stops. Never raises.

    `stopped` are the processes that job control had stopped before; they stay so.
    """
    was_stopped = set(stopped)
    for pid in pids:
        try:
            _end_repair(pid)
            if pid not in was_stopped and _state(pid) == "T":
                os.kill(pid, signal.SIGCONT)
        except OSError:
            continue
    for name in netlock.tables() - tables_before:
        netlock.remove(name)


def _end_repair(pid: int) -> None:
    sockets = [
        int(name)
        for name in os.listdir(f"/proc/{pid}/fd")
        if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:")
    ]
    if not sockets:
        return
    pidfd = os.pidfd_open(pid)
    try:
        for number in sockets:
            with socket.socket(fileno=kernel.pidfd_getfd(pidfd, number)) as sock:
                _end_repair_of(sock)
    finally:
        os.close(pidfd)


def _end_repair_of(sock: socket.socket) -> None:
    try:
        if sock.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR) == _TCP_REPAIR_ON:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF_NO_WINDOW_PROBE)
    except OSError:
        pass  # not a TCP socket


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0].decode()
