"""Who outside the tree holds something of it: asked only when the tree leaves the question open.

The answer costs a walk through the descriptors of every process of the host, so it is read once and kept.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Set
from typing import NamedTuple

from crcli.process.files import FileId, mapped_file
from crcli.process.identity import read_proc, read_stat
from crcli.process.maps import areas
from crcli.process.tree import Tree


class Outsider(NamedTuple):
    """A process outside the tree that holds something of it, and through which descriptor."""

    pid: int
    comm: str
    fd: int
    readable: bool
    writable: bool

    @property
    def label(self) -> str:
        """The process in a sentence: `tee (812)`."""
        return f"{self.comm} ({self.pid})"


class Outside:
    """The descriptors of every process outside the tree, read once, and only when somebody asks."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._holders: dict[str, list[tuple[int, int]]] | None = None

    def holders(self, target: str) -> tuple[Outsider, ...]:
        """Return who outside the tree has a descriptor whose link reads `target` (`pipe:[12]`, a path)."""
        if self._holders is None:
            self._holders = self._read()
        found = (_outsider(pid, fd) for pid, fd in self._holders.get(target, ()))
        return tuple(outsider for outsider in found if outsider is not None)

    def sharers(self, wanted: Set[FileId], targets: Set[str]) -> dict[FileId, tuple[Outsider, ...]]:
        """Return who outside has this memory mapped (then fd is -1), or open under one of these names."""
        found: dict[FileId, dict[int, Outsider]] = defaultdict(dict)
        for target in targets:
            for outsider in self.holders(target):
                file = _file_behind(outsider.pid, outsider.fd)
                if file is not None and file in wanted:
                    found[file][outsider.pid] = outsider
        for pid in self._pids():
            for file in wanted & _mapped_shared(pid):
                if pid not in found[file] and (mapper := _mapper(pid)) is not None:
                    found[file][pid] = mapper
        return {file: tuple(by_pid.values()) for file, by_pid in found.items()}

    def master_of(self, index: int) -> Outsider | None:
        """Return who outside the tree drives the pseudo-terminal /dev/pts/N."""
        for target in ("/dev/ptmx", "/dev/pts/ptmx"):
            for outsider in self.holders(target):
                if _tty_index(outsider.pid, outsider.fd) == index:
                    return outsider
        return None

    def _read(self) -> dict[str, list[tuple[int, int]]]:
        holders: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for pid in self._pids():
            for fd, target in _links(pid):
                holders[target].append((pid, fd))
        return holders

    def _pids(self) -> Iterator[int]:
        return (int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) not in self._tree)


def _links(pid: int) -> Iterator[tuple[int, str]]:
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for fd in fds:
        try:
            yield int(fd), os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue


def _file_behind(pid: int, fd: int) -> FileId | None:
    try:
        status = os.stat(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return None
    return FileId(status.st_dev, status.st_ino)


def _mapped_shared(pid: int) -> set[FileId]:
    """Return what a process has mapped MAP_SHARED; nothing of one that we may not look into."""
    try:
        return {mapped_file(area) for area in areas(pid, holding=b"s ") if area.is_shared}
    except OSError:
        return set()


def _mapper(pid: int) -> Outsider | None:
    try:
        return Outsider(pid, read_stat(pid).comm, -1, True, True)
    except OSError:
        return None


def _outsider(pid: int, fd: int) -> Outsider | None:
    try:
        mode = _fdinfo(pid, fd, b"flags", base=8) & os.O_ACCMODE
        comm = read_stat(pid).comm
    except OSError:
        return None
    return Outsider(pid, comm, fd, mode != os.O_WRONLY, mode != os.O_RDONLY)


def _tty_index(pid: int, fd: int) -> int:
    try:
        return _fdinfo(pid, fd, b"tty-index", base=10)
    except OSError:
        return -1


def _fdinfo(pid: int, fd: int, key: bytes, base: int) -> int:
    for line in read_proc(f"/proc/{pid}/fdinfo/{fd}").splitlines():
        name, _, value = line.partition(b":")
        if name == key:
            return int(value, base)
    return -1
