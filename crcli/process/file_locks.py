"""Who has a lock on a file that a restored tree is to take."""

from __future__ import annotations

import fcntl
import os
import struct

from crcli.process.identity import read_proc, read_stat

_FLOCK = struct.Struct("=hh4xqqi4x")


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
    """Who has an flock(2) on a file (0: nobody that we see), from lines of /proc/locks such as
    `1: FLOCK  ADVISORY  WRITE 812 00:15:2 0 EOF`; devices are left out, for some file systems tell two."""
    for line in read_proc("/proc/locks").decode().splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[1] == "FLOCK" and int(fields[5].rpartition(":")[2]) == inode:
            return int(fields[4])
    return 0


def _named(pid: int) -> str:
    try:
        return f"{read_stat(pid).comm} ({pid})" if pid > 0 else ""
    except OSError:
        return ""
