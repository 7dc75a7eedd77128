"""Asks the tree's own objects, through copies of its descriptors, what /proc does not say.

A copy (pidfd_getfd(2)) is the very same open file; it is closed at once, and only questions are asked of it
that change nothing.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import termios
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from crcli import kernel
from crcli.process.files import OpenFile
from crcli.process.identity import read_stat

MCAST_MSFILTER = 48
_SOL_NETLINK, _NETLINK_LIST_MEMBERSHIPS, _MOST_GROUPS = 270, 9, 4096
_libc = ctypes.CDLL(None, use_errno=True)


def unread_bytes(file: OpenFile) -> int:
    """Return how many bytes wait to be read from a descriptor (FIONREAD); 0 when it cannot be asked."""
    return unread_in(file.pid, file.fd)


def unread_in(pid: int, fd: int) -> int:
    """The same, of a process's descriptor."""
    try:
        with _copy(pid, fd) as copy:
            return int(struct.unpack("=i", fcntl.ioctl(copy, termios.FIONREAD, b"\0\0\0\0"))[0])
    except OSError:
        return 0


def terminal_device(pid: int, fd: int) -> int:
    """Return the device number of the terminal behind a descriptor; behind /dev/tty, that of the terminal.

    Where it cannot be asked (before Linux 5.6, or when it has been hung up), that of the terminal that
    controls the process (0: none does), which is the one that it would get by opening /dev/tty now.
    """
    try:
        with _copy(pid, fd) as copy:
            number = kernel.terminal_device(copy)
    except OSError:
        number = _controlling_tty_nr(pid)
    return device_of_tty_nr(number)


def _controlling_tty_nr(pid: int) -> int:
    try:
        return read_stat(pid).tty_nr
    except ProcessLookupError:
        return 0


def device_of_tty_nr(number: int) -> int:
    """Return the device that the kernel means: minor in bits 31-20 and 7-0, major in 19-8."""
    return os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)


def rewrites(file: OpenFile) -> bool:
    """Whether what passes through a terminal is not what was written: lines, echo, carriage returns.

    False when it cannot be asked.
    """
    try:
        with _copy(file.pid, file.fd) as fd:
            settings = termios.tcgetattr(fd)
    except (OSError, termios.error):
        return False
    return bool(settings[1] & termios.OPOST or settings[3] & (termios.ECHO | termios.ICANON))


def path_of_socket(file: OpenFile) -> str:
    """Return where the file that a unix socket is bound to lies now; empty when it cannot be asked.

    The name that it was bound to stays the socket's; the file may have been renamed since. One that was
    deleted ends with ` (deleted)`.
    """
    try:
        with _copy(file.pid, file.fd) as fd:
            bound = kernel.file_of_socket(fd)
    except OSError:
        return ""
    try:
        return os.readlink(f"/proc/self/fd/{bound}")
    finally:
        os.close(bound)


def netlink_groups(file: OpenFile) -> tuple[int, ...]:
    """Return the multicast groups of the kernel that a netlink socket listens to, counted from 1."""
    try:
        with _copy(file.pid, file.fd) as fd, socket.socket(fileno=os.dup(fd)) as copy:
            words = copy.getsockopt(_SOL_NETLINK, _NETLINK_LIST_MEMBERSHIPS, _MOST_GROUPS // 8)
    except OSError:
        return ()
    bits = int.from_bytes(words, "little")
    return tuple(number + 1 for number in range(bits.bit_length()) if bits >> number & 1)


def joined_groups(file: OpenFile, groups: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """Return to which of these multicast groups a UDP socket listens; each is (interface, address)."""
    try:
        with _copy(file.pid, file.fd) as fd, socket.socket(fileno=os.dup(fd)) as copy:
            return tuple(address for interface, address in groups if _listens(copy, interface, address))
    except OSError:
        return ()


def multicast_groups(pid: int) -> tuple[tuple[int, str], ...]:
    """Return the multicast groups that anybody in a process's network namespace has joined."""
    return (*_groups_v4(pid), *_groups_v6(pid))


@contextmanager
def _copy(pid: int, fd: int) -> Iterator[int]:
    copy = kernel.copy_descriptor(pid, fd)
    try:
        yield copy
    finally:
        os.close(copy)


def _listens(copy: socket.socket, interface: int, address: str) -> bool:
    """Ask for the sources that it wants of this group: the kernel has no such list for one not joined."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    level = socket.IPPROTO_IPV6 if family == socket.AF_INET6 else socket.IPPROTO_IP
    raw = socket.inet_pton(family, address)
    start = struct.pack("=HH", family, 0) if family == socket.AF_INET else struct.pack("=HHI", family, 0, 0)
    group = (start + raw).ljust(128, b"\0")  # struct sockaddr_storage
    filter_ = struct.pack("=I4x", interface) + group + struct.pack("=II", 0, 0)  # struct group_filter
    buffer = ctypes.create_string_buffer(filter_, len(filter_))
    size = ctypes.c_uint(len(filter_))  # an argument goes in, which Python's getsockopt does not let us pass
    result = _libc.getsockopt(copy.fileno(), level, MCAST_MSFILTER, buffer, ctypes.byref(size))
    return bool(result == 0)


def _groups_v4(pid: int) -> Iterator[tuple[int, str]]:
    """Parse /proc/PID/net/igmp: a line per interface, and below it one per group, as a number in hex."""
    interface = 0
    for line in _lines(pid, "igmp"):
        words = line.split()
        if not line.startswith("\t"):
            interface = int(words[0])
        elif len(words[0]) == 8:
            yield interface, socket.inet_ntop(socket.AF_INET, struct.pack("=I", int(words[0], 16)))


def _groups_v6(pid: int) -> Iterator[tuple[int, str]]:
    """Parse /proc/PID/net/igmp6: `2    eth0    ff02…0001     1 0000000C 0`."""
    for line in _lines(pid, "igmp6", header=False):
        words = line.split()
        yield int(words[0]), socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[2]))


def _lines(pid: int, name: str, header: bool = True) -> list[str]:
    try:
        with open(f"/proc/{pid}/net/{name}", encoding="ascii") as file:
            return file.readlines()[1 if header else 0 :]
    except OSError:
        return []
