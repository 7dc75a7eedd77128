"""POSIX file locks that CRIU's restore takes and loses again, taken once more.

A POSIX lock (fcntl F_SETLK) goes when its owner closes *any* descriptor of the file. CRIU takes the locks,
then opens each mapped file to map it, and closes that descriptor. So a lock on a file that is also mapped
is lost without a word: that of an SQLite database in WAL mode on its -shm file, of LMDB, of Berkeley DB. Only
its owner can take such a lock. So the owner is kept stopped when CRIU lets go of it, made to call fcntl(2)
by ptrace(2), and left with nothing changed.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from crcli.criu import messages
from crcli.criu.images import ImageFile, mapped_ids, read_descriptors, read_files, text_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.criu.workspace import Workspace

_POSIX = 1


class FileLock(NamedTuple):
    """One lock: its descriptor, F_RDLCK or F_WRLCK, and its range (length 0: to the end)."""

    fd: int
    type: int
    start: int
    length: int


def lost_locks(images: Workspace) -> dict[int, list[FileLock]]:
    """The locks that CRIU will lose (and maybe others), by the pid of their owner inside the tree."""
    if "filelocks.img" not in images.names():
        return {}
    entries = ImageFile.parse(images.read("filelocks.img"), messages.file_lock_entry).entries
    locks = [entry for entry in entries if entry.flag & _POSIX]
    if not locks:
        return {}
    files = read_files(images).entries
    names = {file.id: text_of(file.reg.name) for file in files if file.type == messages.fd_types.REG}
    open_as: dict[int, set[str]] = {}
    for file_id, users in read_descriptors(images).items():
        for _, fd in users:
            open_as.setdefault(fd, set()).add(names.get(file_id, ""))
    lost: dict[int, list[FileLock]] = {}
    for pid in {lock.pid for lock in locks}:
        mapped = {names[number] for number in mapped_ids(images, pid) if number in names}
        found = [FileLock(e.fd, e.type, e.start, e.len) for e in locks if e.pid == pid]
        if any(mapped & open_as.get(lock.fd, set()) for lock in found):
            lost[pid] = found
    return lost


_F_SETLK = 6
_FLOCK = struct.Struct("=hh4xqqi4x")


def take_again(pid: int, locks: Sequence[FileLock]) -> None:
    """Have a process that stands stopped take these locks; it stands stopped as before on return.

    Raises OSError when another process holds one of them, or when this process cannot be made to.
    """
    from crcli.criu.puppet import MACHINES, Seized  # few trees have such locks

    machine = MACHINES.get(os.uname().machine)
    if machine is None:
        raise OSError("this architecture's registers are not known to crcli")
    with Seized(pid, machine) as puppet:
        for lock in locks:
            flock = _FLOCK.pack(lock.type, os.SEEK_SET, lock.start, lock.length, 0)
            puppet.call_with(machine.nr_fcntl, lock.fd, _F_SETLK, flock)
