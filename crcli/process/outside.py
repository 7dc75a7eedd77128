"""Who outside the tree holds something of it: asked only when the tree leaves the question open.

The answer costs a walk through the descriptors of every process of the host, so it is read once and kept.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from crcli.process.identity import read_proc, read_stat
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

    def master_of(self, index: int) -> Outsider | None:
        """Return who outside the tree drives the pseudo-terminal /dev/pts/N."""
        for target in ("/dev/ptmx", "/dev/pts/ptmx"):
            for outsider in self.holders(target):
                if _tty_index(outsider.pid, outsider.fd) == index:
                    return outsider
        return None

    def _read(self) -> dict[str, list[tuple[int, int]]]:
        holders: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for name in os.listdir("/proc"):
            if not name.isdecimal() or int(name) in self._tree:
                continue
            for fd, target in _links(int(name)):
                holders[target].append((int(name), fd))
        return holders


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
