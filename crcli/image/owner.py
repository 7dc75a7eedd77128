"""Who is at work on a store: a process, as others find it again in an object that it wrote.

A pid and its start time mean something only within one boot of one kernel, one pid namespace and one time
namespace: whoever shares these can see whether the owner still runs, and nobody else can.
"""

from __future__ import annotations

import os
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from crcli.process.identity import ProcessId, identify

if TYPE_CHECKING:
    from collections.abc import Mapping


class Sight(StrEnum):
    """What can be seen of a process from here."""

    ALIVE = "alive"
    ENDED = "ended"
    UNSEEN = "unseen"
    """It is, or was, elsewhere: another host, an earlier boot, another pid or time namespace. Or it is of a
    user whose processes are hidden from us."""


def describe_owner() -> dict[str, Any]:
    """What an object says of the process that writes it (this one); no two descriptions are the same."""
    us = identify(os.getpid())
    return {**_here(), "pid": us.pid, "start_time": us.start_time, "nonce": os.urandom(8).hex()}


def sight_of(owner: Mapping[str, Any]) -> Sight:
    """Look for the process that an object describes."""
    try:
        if any(owner[name] != value for name, value in _here().items()):
            return Sight.UNSEEN
        if ProcessId(owner["pid"], owner["start_time"]).alive():
            return Sight.ALIVE
        return Sight.UNSEEN if _is_hidden(owner["pid"]) else Sight.ENDED
    except (ValueError, KeyError, TypeError, OverflowError, PermissionError):
        return Sight.UNSEEN


def _is_hidden(pid: int) -> bool:
    """Whether there is such a process, of another user, which /proc does not show us (hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not os.path.exists(f"/proc/{pid}")
    except ProcessLookupError:
        pass
    return False


def clock() -> float:
    """Seconds that also count while this machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _here() -> dict[str, str]:
    """What makes pids and start times comparable: the boot of this kernel, and the namespaces of both.

    A tree that CRIU restored has a time namespace: in it every process has started at another time.
    """
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return {"boot": boot, "pids": os.readlink("/proc/self/ns/pid"), "times": _time_namespace()}


def _time_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/time")
    except FileNotFoundError:  # a kernel without them
        return ""
