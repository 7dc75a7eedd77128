"""Locks on files: who has one, by what the kernel lists, and whether it can be had."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from crcli.process.identity import read_proc, read_stat

_FLOCK = struct.Struct("=hh4xqqi4x")


class KernelLock(NamedTuple):
    """A lock that somebody has (`pid`, 0 or less where we do not see who), as /proc/locks lists it.

    `kind` is FLOCK, POSIX, OFDLCK or LEASE, `mode` READ or WRITE; `device` is as the kernel writes it
    (`00:1a`), and on some file systems another than that of stat(2).
    """

    kind: str
    mode: str
    pid: int
    device: str
    inode: int


def kernel_locks() -> Iterator[KernelLock]:
    """Every lock that is had, from lines such as `1: FLOCK  ADVISORY  WRITE 812 00:15:2 0 EOF`. Who waits for
    one (`1: -> FLOCK …`) is left out. The kernel waits for every processor to list them."""
    for line in read_proc("/proc/locks").decode().splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] != "->":
            device, _, inode = fields[5].rpartition(":")
            yield KernelLock(fields[1], fields[3], int(fields[4]), device, int(inode))


def try_lock(fd: int, how: int = fcntl.LOCK_EX) -> bool:
    """Whether the file is locked by us now (flock(2)), or never can be by anybody."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK
    return True


def flock_holder(path: str, *, exclusive: bool) -> str | None:
    """Whose lock keeps others from an flock(2) on this file, as `python (4711)`, empty where that cannot be
    told; None when it can be had (and it was, for a moment). Raises OSError."""
    fd = _open(path)
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(_flock_owner(os.fstat(fd).st_ino))
    finally:
        os.close(fd)
    return None


def range_holder(path: str, *, exclusive: bool, start: int, length: int) -> str | None:
    """The same of a lock by fcntl(2) on a range of bytes (length 0: to the end), which is not taken."""
    asked = _FLOCK.pack(fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, os.SEEK_SET, start, length, 0)
    fd = _open(path)
    try:
        kind, *_, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK else _named(pid)


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)


def _flock_owner(inode: int) -> int:
    """Who has an flock(2) on a file (0: nobody that we see)."""
    return next((lock.pid for lock in kernel_locks() if (lock.kind, lock.inode) == ("FLOCK", inode)), 0)


def _named(pid: int) -> str:
    try:
        return f"{read_stat(pid).comm} ({pid})" if pid > 0 else ""
    except OSError:
        return ""
