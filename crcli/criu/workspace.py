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
    from collections.abc import Iterator
    from types import TracebackType

    from crcli.store.base import Buffer


def temporary_folder() -> str:
    """The folder for temporary files. Where none can be written to, as on a full disk, it is the usual one:
    Python would have no word for it, and a folder may be made there all the same."""
    import tempfile

    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return "/tmp"


class Workspace:
    """A private folder, named by descriptor; a context manager that frees it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    @classmethod
    def create(cls) -> Workspace:
        """Return a new, empty one; raise HostLacks where the kernel does not allow it."""
        try:
            return cls(kernel.tmpfs_fd())
        except OSError as error:
            hint = (
                "run crcli as root (CAP_SYS_ADMIN)"
                if error.errno == errno.EPERM and os.geteuid() != 0
                else "crcli needs Linux 5.2 or newer and CAP_SYS_ADMIN; a container needs it granted"
            )
            raise HostLacks(f"cannot make a private tmpfs: {error.strerror}", hint=hint) from error

    def folder(self, name: str) -> Workspace:
        """Make a folder in this one, and return it; it goes with its parent's last descriptor."""
        os.mkdir(name, 0o700, dir_fd=self.fd)
        return Workspace(os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd))

    def names(self) -> list[str]:
        """The files in it, sorted."""
        return sorted(os.listdir(self.fd))

    def size(self, name: str) -> int:
        """The size of one file in bytes."""
        return os.stat(name, dir_fd=self.fd).st_size

    def read(self, name: str) -> bytes:
        """Return one file whole."""
        with open(name, "rb", opener=self._open) as file:
            return file.read()

    def blocks(self, name: str, size: int) -> Iterator[bytes]:
        """Read one file in pieces of `size` bytes."""
        with open(name, "rb", opener=self._open) as file:
            while block := file.read(size):
                yield block

    def write(self, name: str, data: Buffer) -> None:
        """Write one file whole, replacing (not changing) what was there."""
        self.remove(name)
        with open(name, "wb", opener=self._open) as file:
            file.write(data)

    def create_file(self, name: str) -> int:
        """Make an empty file and return a descriptor that it can be read and written with."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=self.fd)

    def link_from(self, other: Workspace, name: str, as_name: str = "") -> None:
        """Make the file `name` of `other` appear here too (`as_name`), without copying it."""
        os.link(name, as_name or name, src_dir_fd=other.fd, dst_dir_fd=self.fd)

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
