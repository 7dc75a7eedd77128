"""The few system calls that crcli needs and Python 3.11 does not have.

Each raises OSError with the kernel's errno, as `os` functions do. Numbers are those of x86_64 and aarch64
(equal for every call here, which all came after the tables were unified, except where a name is used).
"""

from __future__ import annotations

import ctypes
import os
import struct
from fcntl import ioctl

CLONE_NEWNS = 0x0002_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWNET = 0x4000_0000
CLONE_NEWPID = 0x2000_0000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 0x1000, 0x4000, 1 << 18, 1 << 19

_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_SYS_PIDFD_GETFD = 438
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6
_CLOEXEC_MOUNT = 1

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SIOCSIFFLAGS, _SIOCGIFFLAGS, _IFF_UP = 0x8914, 0x8913, 1

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Put this process (its future children, for CLONE_NEWPID) into new namespaces."""
    _checked(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int = 0) -> None:
    """Enter the namespace that `fd` refers to (its future children, for a pid namespace)."""
    _checked(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    _checked(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount {kind} on {target}",
    )


def tmpfs_fd() -> int:
    """Return a descriptor of the root of a new, empty tmpfs that is mounted nowhere.

    Nothing else can see it, and the kernel frees it with the last descriptor, also when we are killed: a
    place for CRIU's small images that cannot be left behind. The descriptor is close-on-exec.
    """
    context = _checked(_libc.syscall(_SYS_FSOPEN, b"tmpfs", 1), "fsopen tmpfs")
    try:
        _checked(
            _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_STRING, b"mode", b"0700", 0), "fsconfig mode"
        )
        _checked(
            _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig create"
        )
        root = _checked(_libc.syscall(_SYS_FSMOUNT, context, _CLOEXEC_MOUNT, 0), "fsmount tmpfs")
        try:  # fsmount gives an O_PATH descriptor, which cannot be listed
            return os.open(f"/proc/self/fd/{root}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            os.close(root)
    finally:
        os.close(context)


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Give back the memory or blocks behind a range of a file; it reads as zeros from now on."""
    flags = _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE
    _checked(_libc.fallocate64(fd, flags, ctypes.c_long(offset), ctypes.c_long(length)), "fallocate")


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """Duplicate descriptor `fd` of the process behind `pidfd` into this one."""
    return _checked(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0), "pidfd_getfd")


def die_with_parent(signal: int) -> None:
    """Ask the kernel to send `signal` to this process when the thread that forked it ends."""
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl PDEATHSIG")


def become_subreaper() -> None:
    """Make this process the parent of orphans among its descendants."""
    _checked(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl CHILD_SUBREAPER")


def loopback_up() -> None:
    """Bring `lo` up in this network namespace (CRIU does not start without it)."""
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = bytearray(struct.pack("16sH22x", b"lo", 0))
        ioctl(sock, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("H", request, 16)[0]
        struct.pack_into("H", request, 16, flags | _IFF_UP)
        ioctl(sock, _SIOCSIFFLAGS, request)
