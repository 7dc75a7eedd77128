"""What files a process holds: open descriptors, mappings, and the mounts they come from."""

from __future__ import annotations

import os
import stat as mode_bits
from enum import StrEnum
from functools import cache
from typing import NamedTuple

from crcli.process.file_locks import kernel_locks
from crcli.process.identity import read_proc
from crcli.process.maps import Area, areas
from crcli.process.tree import PID_GONE
from crcli.records import Struct

DELETED = " (deleted)"


class Kind(StrEnum):
    """What an open descriptor refers to."""

    REGULAR = "regular"
    DIRECTORY = "directory"
    PIPE = "pipe"
    FIFO = "fifo"
    SOCKET = "socket"
    TTY = "tty"
    DEVICE = "device"
    MEMFD = "memfd"  # or other memory without a name, opened through /proc/PID/map_files
    NAMESPACE = "namespace"
    ANON = "anon"


class FileId(NamedTuple):
    """A file itself, whatever its name: its device and inode."""

    dev: int
    ino: int


class Lock(NamedTuple):
    """One lock as fdinfo shows it: kind POSIX, FLOCK, OFDLCK or LEASE; mode READ or WRITE."""

    kind: str
    mode: str
    start: str
    end: str


class OpenFile(Struct, frozen=True):
    """One open descriptor of one process.

    `target` is the link as the kernel writes it, `path` the same without the mark of deletion. `flags`,
    `pos` and `mnt_id` come from fdinfo, the rest from stat. `info` is the whole fdinfo, for what only some
    kinds have.
    """

    pid: int
    fd: int
    target: str
    kind: Kind
    flags: int
    pos: int
    mnt_id: int
    mode: int
    size: int
    dev: int
    ino: int
    nlink: int
    rdev: int
    deleted: bool
    info: str

    @property
    def id(self) -> FileId:
        """The file behind the descriptor."""
        return FileId(self.dev, self.ino)

    @property
    def path(self) -> str:
        """The path, as it was before a deletion; for what has none, the kernel's own word for it."""
        return self.target.removesuffix(DELETED) if self.deleted else self.target

    @property
    def anon_name(self) -> str:
        """What kind of anonymous inode it is: `eventpoll`, `io_uring`, `pidfd`…; empty for other kinds."""
        if self.kind is not Kind.ANON:
            return ""
        return (
            self.target.removeprefix("anon_inode:")
            .removesuffix(DELETED)
            .lstrip("/")
            .strip("[]")
            .partition(":")[0]
        )

    @property
    def readable(self) -> bool:
        """Whether the descriptor was opened for reading."""
        return self.flags & os.O_ACCMODE in (os.O_RDONLY, os.O_RDWR) and not self.flags & os.O_PATH

    @property
    def writable(self) -> bool:
        """Whether the descriptor was opened for writing."""
        return self.flags & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR) and not self.flags & os.O_PATH

    @property
    def path_only(self) -> bool:
        """Whether it only names a file and does not open it (O_PATH)."""
        return bool(self.flags & os.O_PATH)

    @property
    def locks(self) -> tuple[Lock, ...]:
        """The locks held through this descriptor; a POSIX lock shows on every descriptor of its file."""
        return tuple(_parse_lock(value) for key, value in self._info_pairs() if key == "lock")

    def info_field(self, name: str) -> str | None:
        """Return one field of fdinfo (`tty-index`, `Pid`…); None when it is not there."""
        return next((value for key, value in self._info_pairs() if key == name), None)

    def _info_pairs(self) -> list[tuple[str, str]]:
        pairs = (line.partition(":") for line in self.info.splitlines())
        return [(key, value.strip()) for key, _, value in pairs]


class Mapping(Struct, frozen=True):
    """One file mapped by one process, all its pieces together.

    `permissions` is the union over the pieces ("rwxs"), `bytes` their sum, `address` where the first one
    lies. `nlink` and `file_size` are known for deleted files only (a mapped file that was unlinked may have
    another name left); -1 stands for not asked.
    """

    pid: int
    path: str
    dev: int
    ino: int
    permissions: str
    bytes: int
    address: str
    deleted: bool
    nlink: int
    file_size: int

    @property
    def id(self) -> FileId:
        """The file that is mapped. On overlayfs and btrfs the device can differ from the one of stat."""
        return FileId(self.dev, self.ino)

    @property
    def executable(self) -> bool:
        """Whether code is run from it: the program, a library, the loader."""
        return "x" in self.permissions

    @property
    def shared(self) -> bool:
        """Whether any piece of it is MAP_SHARED."""
        return "s" in self.permissions

    @property
    def is_sysv(self) -> bool:
        """Whether it is a System V shared memory segment (shmat)."""
        return self.path.startswith("/SYSV")

    @property
    def is_memfd(self) -> bool:
        """Whether it is a memfd."""
        return self.path.startswith("/memfd:")

    @property
    def is_anonymous_shared(self) -> bool:
        """Whether it is shared memory without a name (MAP_SHARED|MAP_ANONYMOUS)."""
        return self.path == "/dev/zero" and self.deleted

    @property
    def has_name(self) -> bool:
        """Whether it is a file that a path once named, in contrast to the kernel's own inventions."""
        return (
            self.path.startswith("/")
            and not (self.is_sysv or self.is_memfd or self.is_anonymous_shared)
            and not self.path.startswith(("/secretmem", "/anon_hugepage", "/[aio]"))
        )


class Mount(Struct, frozen=True):
    """One line of mountinfo. `root` is what of the file system lies at the mount point."""

    mnt_id: int
    dev: int
    root: str
    fstype: str
    point: str
    source: str


def open_files(pid: int) -> tuple[OpenFile, ...]:
    """Return every open descriptor of a process, in order; those closed meanwhile are left out."""
    try:
        fds = sorted(map(int, os.listdir(f"/proc/{pid}/fd")))
    except PID_GONE:
        return ()
    found = (read_open_file(pid, fd) for fd in fds)
    return tuple(file for file in found if file is not None)


def read_open_file(pid: int, fd: int) -> OpenFile | None:
    """Return what one descriptor refers to; None when it is closed."""
    link = f"/proc/{pid}/fd/{fd}"
    try:
        target = os.readlink(link)
        status = os.stat(link)
        info = read_proc(f"/proc/{pid}/fdinfo/{fd}").decode(errors="surrogateescape")
    except PID_GONE:
        return None
    flags = pos = mnt_id = 0
    for line in info.splitlines()[:3]:
        key, _, value = line.partition(":")
        if key == "pos":
            pos = int(value)
        elif key == "flags":
            flags = int(value, 8)
        elif key == "mnt_id":
            mnt_id = int(value)
    return OpenFile(
        pid=pid,
        fd=fd,
        target=target,
        kind=_kind(target, status),
        flags=flags,
        pos=pos,
        mnt_id=mnt_id,
        mode=status.st_mode,
        size=status.st_size,
        dev=status.st_dev,
        ino=status.st_ino,
        nlink=status.st_nlink,
        rdev=status.st_rdev,
        deleted=target.endswith(DELETED) and not _is_at(pid, target, FileId(status.st_dev, status.st_ino)),
        info=info,
    )


def mappings(pid: int) -> tuple[Mapping, ...]:
    """Return the files that a process has mapped, one record per file."""
    pieces: dict[tuple[bytes, bytes, bytes], list[Area]] = {}
    try:
        for area in areas(pid, named=True):
            pieces.setdefault(area[3:], []).append(area)  # device, inode and name
    except PID_GONE:
        return ()
    return tuple(_mapping(pid, found) for found in pieces.values() if _is_file(found[0].name))


def mounts(pid: int) -> tuple[Mount, ...]:
    """Return the mounts that a process sees, those outside a chroot left out; none when it is gone."""
    try:
        raw = read_proc(f"/proc/{pid}/mountinfo").decode(errors="surrogateescape")
    except OSError:
        return ()
    return tuple(_mount(line) for line in raw.splitlines())


def leased_inodes() -> frozenset[int]:
    """Return the inodes that anybody here holds a lease on: merely opening such a file breaks the lease.

    Their device is left out, of which the kernel tells two on some file systems.
    """
    return frozenset(lock.inode for lock in kernel_locks() if lock.kind == "LEASE")


def is_tty(rdev: int) -> bool:
    """Whether CRIU has a driver for this character device as a terminal (its get_tty_driver)."""
    major, minor = os.major(rdev), os.minor(rdev)
    if major == 5:
        return minor in (0, 1, 2)
    return major == 4 or 136 <= major <= 143 or 128 <= major <= 135 or major in (188, 204)


def _mount(line: str) -> Mount:
    """Parse `27 1 254:0 / /home rw,… shared:1 - ext4 /dev/vda rw`."""
    left, _, right = line.partition(" - ")
    mnt_id, _, device, root, point, *_ = left.split(" ")
    fstype, source, *_ = right.split(" ")
    return Mount(
        int(mnt_id),
        parse_device(device, base=10),
        _unescape(root),
        fstype,
        _unescape(point),
        _unescape(source),
    )


def _kind(target: str, status: os.stat_result) -> Kind:
    mode = status.st_mode
    if target.startswith("anon_inode:"):
        return Kind.ANON
    if mode_bits.S_ISSOCK(mode):
        return Kind.SOCKET
    if mode_bits.S_ISFIFO(mode):
        return Kind.PIPE if target.startswith("pipe:[") else Kind.FIFO
    if mode_bits.S_ISCHR(mode):
        return Kind.TTY if is_tty(status.st_rdev) else Kind.DEVICE
    if mode_bits.S_ISBLK(mode):
        return Kind.DEVICE
    if status.st_dev == _nameless_memory() or target.startswith(("/memfd:", "/anon_hugepage")):
        return Kind.MEMFD
    if not target.startswith("/"):
        return Kind.NAMESPACE if target.partition(":")[0] in _NAMESPACE_LINKS else Kind.ANON
    if target.startswith("/secretmem"):
        return Kind.ANON
    return Kind.DIRECTORY if mode_bits.S_ISDIR(mode) else Kind.REGULAR


@cache
def _nameless_memory() -> int:
    """Return the device of the kernel's own tmpfs, where memfds and anonymous shared memory are."""
    fd = os.memfd_create("crcli")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


_NAMESPACE_LINKS = frozenset(("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"))


def _is_file(name: bytes) -> bool:
    return not name.startswith(b"[") or name == b"[uprobes]"


def _mapping(pid: int, pieces: list[Area]) -> Mapping:
    first = pieces[0]
    target, address = first.path, first.span.decode()
    deleted, nlink, size = target.endswith(DELETED), -1, -1
    file = mapped_file(first)
    if deleted and _is_at(pid, target, file):
        deleted = False
    elif deleted:
        nlink, size = _links_and_size(pid, address)
    permissions = b"".join(piece.permissions for piece in pieces)
    return Mapping(
        pid=pid,
        path=target.removesuffix(DELETED) if deleted else target,
        dev=file.dev,
        ino=file.ino,
        permissions="".join(letter for letter in "rwxsp" if letter.encode() in permissions),
        bytes=sum(piece.size for piece in pieces),
        address=address,
        deleted=deleted,
        nlink=nlink,
        file_size=size,
    )


def mapped_file(area: Area) -> FileId:
    """Return the file of an area, as the kernel names it there (see `Mapping.id`)."""
    return FileId(parse_device(area.device.decode(), base=16), int(area.inode))


def _links_and_size(pid: int, address: str) -> tuple[int, int]:
    """Return links and size of a mapped file that has no path any more; (-1, -1) when we may not look."""
    try:
        status = os.stat(f"/proc/{pid}/map_files/{address}")
    except OSError:
        return -1, -1
    return status.st_nlink, status.st_size


def _is_at(pid: int, path: str, file: FileId) -> bool:
    """Whether this very file lies under this path, as the process sees the file system."""
    try:
        status = os.stat(f"/proc/{pid}/root{path}")
    except OSError:
        return False
    return FileId(status.st_dev, status.st_ino) == file


def parse_device(text: str, base: int) -> int:
    """Return the device number of `254:0`, written in this base."""
    major, _, minor = text.partition(":")
    return os.makedev(int(major, base), int(minor, base))


def _unescape(text: str) -> str:
    """Undo mountinfo's octal escapes of blanks, tabs, line ends and backslashes."""
    for code, letter in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        text = text.replace(code, letter)
    return text


def _parse_lock(value: str) -> Lock:
    """Parse `1: FLOCK  ADVISORY  WRITE 6415 fe:00:2146308 0 EOF`."""
    words = value.split()
    return Lock(kind=words[1], mode=words[3], start=words[-2], end=words[-1])
