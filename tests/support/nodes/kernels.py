"""Kernels for virtual machines, as `scripts/fetch-kernel` unpacks them, and what boots one: an initramfs.

The initramfs holds a static busybox and the few modules that reach the machine's root. It is written here, so
that neither cpio nor depmod has to be installed.
"""

from __future__ import annotations

import io
import lzma
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KERNELS = Path(os.environ.get("CRCLI_GUEST_KERNELS", "/usr/local/lib/crcli/kernels"))
BUSYBOX = Path("/bin/busybox")

MODULES = (
    *("virtio_pci", "9pnet_virtio", "9p"),  # the root
    "virtio_net",
    "overlay",  # the trial
    "crc32c_generic",  # which nf_tables wants, and does not name
    *("nf_tables", "unix_diag", "tcp_diag", "udp_diag", "raw_diag", "netlink_diag", "af_packet_diag"),  # CRIU
)


@dataclass(frozen=True)
class Kernel:
    """A kernel and its modules, unpacked from a distribution's package and not installed."""

    folder: Path

    @property
    def image(self) -> Path:
        """What a machine boots."""
        return next(self.folder.glob("boot/vmlinuz-*"))

    @property
    def release(self) -> str:
        """What it calls itself, as in `uname -r`."""
        return self.image.name.removeprefix("vmlinuz-")

    def modules(self, wanted: Iterable[str]) -> list[Path]:
        """The files of these modules and of those that they need, in the order in which they load.

        What is built in, or what this kernel does not have, is left out.
        """
        there = {_plain(path): path for path in self.folder.glob("**/kernel/**/*.ko*")}
        found: dict[str, Path] = {}

        def need(name: str) -> None:
            if name in there and name not in found:
                for other in _dependencies(there[name]):
                    need(other)
                found[name] = there[name]

        for name in wanted:
            need(name.replace("-", "_"))
        return list(found.values())


def kernels() -> list[Kernel]:
    """Every kernel that is here, by its folder's name."""
    return [Kernel(path) for path in sorted(KERNELS.glob("*")) if list(path.glob("boot/vmlinuz-*"))]


def kernel_like(version: str) -> Kernel | None:
    """The newest kernel of a version (`6.12`) that is here."""
    found = [kernel for kernel in kernels() if re.match(rf"{re.escape(version)}[.-]", kernel.release)]
    return found[-1] if found else None


def initramfs(kernel: Kernel, init: str) -> bytes:
    """An initramfs in which `init`, a script for busybox's shell, finds the modules' names in /modules."""
    modules = kernel.modules(MODULES)
    archive = _Archive()
    for folder in ("bin", "proc", "sys", "dev", "lib", "new"):
        archive.folder(folder)
    archive.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    archive.file("init", init.encode(), 0o755)
    for path in modules:
        archive.file(f"lib/{_plain(path)}.ko", _bytes_of(path))
    archive.file("modules", "".join(f"{_plain(path)}\n" for path in modules).encode())
    return archive.end()


def _plain(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _bytes_of(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _dependencies(path: Path) -> Iterator[str]:
    """The names of the modules that one needs, as its own `depends=` says."""
    _, found, rest = _bytes_of(path).partition(b"\0depends=")
    names = rest.partition(b"\0")[0].decode() if found else ""
    yield from (name.replace("-", "_") for name in names.split(",") if name)


class _Archive:
    """A cpio archive of the kind that the kernel unpacks (newc)."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._count = 0

    def folder(self, name: str) -> None:
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._add(name, stat.S_IFREG | mode, data)

    def end(self) -> bytes:
        self._add("TRAILER!!!", 0, b"")
        return self._out.getvalue()

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._count += 1
        raw = name.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        self._out.write(b"070701" + b"".join(b"%08X" % field for field in fields) + raw)
        self._pad()
        self._out.write(data)
        self._pad()

    def _pad(self) -> None:
        self._out.write(bytes(-self._out.tell() % 4))
