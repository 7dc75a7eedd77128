"""The folder that CRIU writes its small images into, and reads them from.

It is a tmpfs that is mounted nowhere: CRIU reaches it through our descriptor. However crcli ends, the
kernel frees it, so no temporary folder is ever left behind, and no memory image touches a disk.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.errors import HostLacks

if TYPE_CHECKING:
    from types import TracebackType

    from crcli.store.base import Buffer


class OverflowFile:
    """Room for pages that wait to be worked on: a file of a tmpfs that is mounted nowhere.

    `limit` (bytes) is half of the memory that is free when it is made, in the host and in our cgroup: the
    rest is left to those who work here.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.fd = workspace.create("overflow")
        workspace.remove("overflow")
        self.limit = spare_memory() // 2

    def close(self) -> None:
        """Give the memory back."""
        os.close(self.fd)


def spare_memory() -> int:
    """Bytes that can be used here without pushing anything out, by the host's and our cgroup's account."""
    spare = 0
    with open("/proc/meminfo", "rb") as file:
        for line in file:
            if line.startswith(b"MemAvailable:"):
                spare = int(line.split()[1]) * 1024
    try:
        with open("/sys/fs/cgroup/memory.max", "rb") as most, open(
            "/sys/fs/cgroup/memory.current", "rb"
        ) as now:
            limit = most.read().strip()
            if limit != b"max":
                spare = min(spare, max(0, int(limit) - int(now.read())))
    except OSError:
        pass
    return spare


class Workspace:
    """An empty private folder, named by descriptor; a context manager that frees it."""

    def __init__(self) -> None:
        try:
            self.fd = kernel.tmpfs_fd()
        except OSError as error:
            hint = (
                "run crcli as root (CAP_SYS_ADMIN)"
                if error.errno == errno.EPERM and os.geteuid() != 0
                else "crcli needs Linux 5.2 or newer and CAP_SYS_ADMIN; a container needs it granted"
            )
            raise HostLacks(f"cannot make a private tmpfs: {error.strerror}", hint=hint) from error

    @property
    def path(self) -> str:
        """The folder's path for this process and for those that may look at its descriptors."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def names(self) -> list[str]:
        """The files in it, sorted."""
        return sorted(os.listdir(self.fd))

    def read(self, name: str) -> bytes:
        """Return one file whole."""
        with open(name, "rb", opener=self._open) as file:
            return file.read()

    def write(self, name: str, data: Buffer) -> None:
        """Write one file whole, replacing what was there."""
        with open(name, "wb", opener=self._open) as file:
            file.write(data)

    def create(self, name: str) -> int:
        """Make an empty file and return a descriptor that it can be read and written with."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self.fd)

    def link(self, name: str, other: Workspace) -> None:
        """Make the file `name` of `other` appear here too (by copy: each workspace is its own file system)."""
        self.write(name, other.read(name))

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, 0o600, dir_fd=self.fd)

    def close(self) -> None:
        """Free the folder and all in it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
