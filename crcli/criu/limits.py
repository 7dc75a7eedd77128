"""Answers CRIU's question for other users' limits, which the kernel refuses without CAP_SYS_RESOURCE.

CRIU asks prlimit64(pid, resource, NULL, &limit) for every member of a tree. The kernel answers only for
processes of our own uid and gid, or with CAP_SYS_RESOURCE, which containers rarely have; /proc/PID/limits
says the same to everybody. So CRIU is started under a seccomp filter that hands this one call to us
(seccomp(2), seccomp_unotify(2)): it returns what we read there, and every other call goes its way.

The filter is laid on a thread that does nothing but start CRIU: the child inherits it, crcli itself stays
without, nothing of ours runs between fork and exec, and no descriptor needs to be passed. When the
descriptor for the questions is closed, also by our death, the kernel answers ENOSYS; CRIU then fails the
dump and lets the tree go.

**The price**: a process under any filter may neither read nor suspend those of another
(PTRACE_SECCOMP_GET_FILTER, PTRACE_O_SUSPEND_SECCOMP), so a CRIU that was started this way cannot dump
processes that have filters themselves. Use it only for trees without.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import threading
from fcntl import ioctl
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from crcli.process.settings import read_limits

if TYPE_CHECKING:
    from collections.abc import Callable

Started = TypeVar("Started")

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_FILTER_FLAG_SPEC_ALLOW, SECCOMP_FILTER_FLAG_NEW_LISTENER = 1 << 2, 1 << 3
SECCOMP_RET_USER_NOTIF, SECCOMP_RET_ALLOW = 0x7FC0_0000, 0x7FFF_0000
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
SECCOMP_IOCTL_NOTIF_RECV = 0xC050_2100
SECCOMP_IOCTL_NOTIF_SEND = 0xC018_2101
SECCOMP_IOCTL_NOTIF_ID_VALID = 0x4008_2102

_LOAD, _JUMP_IF_EQUAL, _RETURN = (
    0x20,
    0x15,
    0x06,
)  # BPF_LD|BPF_W|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K


class Machine(NamedTuple):
    """What one architecture is called in a filter (AUDIT_ARCH_…), and its numbers of two system calls."""

    audit_arch: int
    nr_seccomp: int
    nr_prlimit64: int


MACHINES = {
    "x86_64": Machine(0xC000_003E, 317, 302),
    "aarch64": Machine(0xC000_00B7, 277, 261),
}

_SOCK_FILTER = struct.Struct("=HBBI")
_SECCOMP_NOTIF = struct.Struct("=QII iIQ6Q")  # id, pid, flags; then struct seccomp_data
_SECCOMP_NOTIF_RESP = struct.Struct("=QqiI")
_RLIMIT64 = struct.Struct("=QQ")

# Offsets in struct seccomp_data. Arguments are 64 bits wide, the low half first on both architectures.
_NR, _ARCH, _PID, _NEW_LIMIT = 0, 4, 16, 32

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _SockFprog(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def with_limits_answered(start: Callable[[], Started]) -> Started:
    """Call `start` in a thread of its own and return its result; what it starts can read everybody's limits.

    A thread of ours answers until the last of those processes has ended. Where no filter can be laid (no
    CAP_SYS_ADMIN, no seccomp, a container whose own supervisor answers calls already), `start` is called
    all the same, and the kernel refuses what it refuses.
    """
    from concurrent.futures import ThreadPoolExecutor

    listeners: list[int] = []

    def filtered() -> Started:
        try:
            listeners.append(_lay_filter())
        except OSError:
            pass
        return start()

    try:
        with ThreadPoolExecutor(1, "start-filtered") as threads:
            started = threads.submit(filtered).result()
    except BaseException:
        for listener in listeners:
            os.close(listener)
        raise
    for listener in listeners:
        threading.Thread(target=_answer_all, args=(listener,), name="limits", daemon=True).start()
    return started


def _lay_filter() -> int:
    """Put this thread, and what it will start, under the filter; return the descriptor of its questions.

    The descriptor is close-on-exec. no_new_privs stays as it is, for CAP_SYS_ADMIN does instead.
    """
    machine = MACHINES.get(os.uname().machine)
    if machine is None:
        raise OSError("the system calls of this architecture are not known here")
    program = filter_program(machine)
    described = _SockFprog(len(program) // _SOCK_FILTER.size, program)
    listener: int = _libc.syscall(
        ctypes.c_long(machine.nr_seccomp),
        ctypes.c_ulong(SECCOMP_SET_MODE_FILTER),
        ctypes.c_ulong(SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_SPEC_ALLOW),
        ctypes.byref(described),
    )
    if listener < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")
    return listener


def filter_program(machine: Machine) -> bytes:
    """Return the filter: ask about prlimit64 with a pid and without a new limit, allow everything else."""
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_JUMP_IF_EQUAL, 0, 9, machine.audit_arch),  # a jump counts from the next line: here, to the last
        (_LOAD, 0, 0, _NR),
        (_JUMP_IF_EQUAL, 0, 7, machine.nr_prlimit64),
        (_LOAD, 0, 0, _PID),
        (_JUMP_IF_EQUAL, 5, 0, 0),
        (_LOAD, 0, 0, _NEW_LIMIT),
        (_JUMP_IF_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _NEW_LIMIT + 4),
        (_JUMP_IF_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, SECCOMP_RET_USER_NOTIF),
        (_RETURN, 0, 0, SECCOMP_RET_ALLOW),
    ]
    return b"".join(_SOCK_FILTER.pack(*instruction) for instruction in program)


def _answer_all(listener: int) -> None:
    """Answer until nobody is left who could ask, then close the descriptor, whatever happens in between."""
    try:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        limits_of = _Limits()
        while poll.poll()[0][1] & select.POLLIN:  # the kernel says only POLLHUP once nobody is left
            _answer_one(listener, limits_of)
    finally:
        os.close(listener)


def _answer_one(listener: int, limits_of: _Limits) -> None:
    """Take one question and answer it; where we cannot, let the kernel do so."""
    question = bytearray(_SECCOMP_NOTIF.size)
    try:
        ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, question)
    except (FileNotFoundError, InterruptedError):  # whoever asked was interrupted, and may ask again
        return
    id_, asker, _, _, _, _, pid, resource, _, to, *_ = _SECCOMP_NOTIF.unpack(question)
    flags = 0
    try:
        limit = limits_of(asker, pid & 0xFFFF_FFFF, resource)
        _write(listener, id_, asker, to, _RLIMIT64.pack(*limit))
    except (OSError, ValueError, IndexError, OverflowError):
        flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE
    try:
        ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, _SECCOMP_NOTIF_RESP.pack(id_, 0, 0, flags))
    except FileNotFoundError:  # interrupted meanwhile
        pass


class _Limits:
    """Remembers the last process, for CRIU asks 16 times about each, beginning with limit 0."""

    def __init__(self) -> None:
        self._pid = 0
        self._limits: list[tuple[int, int]] = []

    def __call__(self, asker: int, pid: int, resource: int) -> tuple[int, int]:
        if resource == 0 or pid != self._pid:
            self._limits = read_limits(pid, f"/proc/{asker}/root")  # CRIU may work in another pid namespace
            self._pid = pid
        return self._limits[resource]


def _write(listener: int, id_: int, asker: int, address: int, data: bytes) -> None:
    """Write into the asker's memory. Raises OSError when it waits no longer or has no memory there."""
    memory = os.open(f"/proc/{asker}/mem", os.O_WRONLY | os.O_CLOEXEC)
    try:
        ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, struct.pack("=Q", id_))  # so the pid was not another's
        if os.pwrite(memory, data, address) != len(data):
            raise OSError("a part of the answer lies outside the asker's memory")
    finally:
        os.close(memory)
