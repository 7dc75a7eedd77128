"""Files of weights, read while others may write to them: what was read is compared, never trusted."""

from __future__ import annotations

import os
import stat
import time
from typing import TYPE_CHECKING

from crcli.memory.weights.views import View, apply, source_bytes, source_element
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

_TICK_NS, _COARSE_NS = 50_000_000, 3_000_000_000
"""A file that was changed this short a time ago (ns) may change again without its times showing it: the
kernel's clock ticks every few milliseconds, that of some file systems every second or two."""


class Identity(Struct, frozen=True):
    """What changes when a file is replaced or written to (mappings that others write through apart)."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity of the file with this status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class WeightsFile:
    """One file, open for reading. `path` is absolute, and not resolved: another node may link elsewhere."""

    def __init__(self, path: str) -> None:
        """Open it. Raises OSError; IsADirectoryError for what is no regular file."""
        self.path = os.path.abspath(path)
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self.fd)
            raise IsADirectoryError(f"{self.path} is not a regular file")
        self.identity = Identity.of(status)
        self._is_fresh = _is_fresh(self.identity)

    @property
    def size(self) -> int:
        """Its size in bytes when it was opened."""
        return self.identity.size

    def read(self, offset: int, length: int) -> bytes:
        """Read up to `length` bytes; fewer where the file ends, or was cut short."""
        try:
            return os.pread(self.fd, length, offset)
        except OSError:
            return b""  # a failing disk, a network file system that is gone: nothing matches

    def read_view(self, view: View, offset: int, length: int) -> Any:
        """Return `length` bytes of memory as `view` makes them from `offset` on (a numpy array, or less)."""
        raw = self.read(offset, source_bytes(view, length))
        return apply(view, raw[: len(raw) // source_element(view) * source_element(view)])

    def has_changed(self) -> bool:
        """Whether it was written to, cut or replaced since it was opened, for all one can tell."""
        try:
            return self._is_fresh or not (
                Identity.of(os.fstat(self.fd)) == self.identity == Identity.of(os.stat(self.path))
            )
        except OSError:
            return True

    def close(self) -> None:
        """Close it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _is_fresh(identity: Identity) -> bool:
    changed = max(identity.mtime_ns, identity.ctime_ns)
    is_coarse = changed % 1_000_000_000 == 0
    age = time.time_ns() - changed  # negative where another clock wrote it: that says nothing
    return 0 <= age < (_COARSE_NS if is_coarse else _TICK_NS)


def files_below(folder: str, most: int | None = None) -> Iterator[str]:
    """Every file in a folder and those below it, links followed, no folder twice.

    After `most` entries the rest is left out.
    """
    seen: set[tuple[int, int]] = set()
    count = 0
    for here, folders, names in os.walk(folder, followlinks=True):
        fresh = []
        for name in sorted(folders):
            try:
                status = os.stat(os.path.join(here, name))
            except OSError:
                continue
            if (status.st_dev, status.st_ino) not in seen:
                seen.add((status.st_dev, status.st_ino))
                fresh.append(name)
        folders[:] = fresh
        count += len(fresh) + len(names)
        if most is not None and count > most:
            return
        yield from (os.path.join(here, name) for name in sorted(names))
