"""System V semaphores and message queues of the host that a tree has used: they belong to nobody.

The kernel keeps no list of who uses them. It does keep, for each, which process touched it last.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Set

from crcli.records import Struct

GETPID = 11
_libc = ctypes.CDLL(None, use_errno=True)


class SysvObject(Struct, frozen=True):
    """A semaphore set or message queue; `kind` is `semaphores` or `message queue`, `pid` who used it last."""

    kind: str
    key: int
    id: int
    pid: int


def sysv_objects(pids: Set[int]) -> tuple[SysvObject, ...]:
    """Return the semaphores and queues of our IPC namespace that one of these processes touched last."""
    return (*_semaphores(pids), *_queues(pids))


def _semaphores(pids: Set[int]) -> Iterator[SysvObject]:
    for key, number, _, count, *_ in _lines("sem"):
        for index in range(count):
            user = _libc.semctl(number, index, GETPID)
            if user in pids:
                yield SysvObject("semaphores", key, number, user)
                break


def _queues(pids: Set[int]) -> Iterator[SysvObject]:
    for key, number, _, _, _, sender, receiver, *_ in _lines("msg"):
        for user in (sender, receiver):
            if user in pids:
                yield SysvObject("message queue", key, number, user)
                break


def _lines(kind: str) -> Iterator[list[int]]:
    """Yield the numbers of each line of /proc/sysvipc/KIND; `perms` is octal, and nobody here needs it."""
    try:
        with open(f"/proc/sysvipc/{kind}", encoding="ascii") as file:
            next(file)
            for line in file:
                yield [int(word) for word in line.split()]
    except OSError:
        return
