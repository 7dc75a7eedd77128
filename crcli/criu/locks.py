"""POSIX file locks that CRIU's restore takes and loses again, taken once more.

A POSIX lock (fcntl F_SETLK) goes when its owner closes *any* descriptor of the file. CRIU takes the locks,
then opens each mapped file to map it, and closes that descriptor. So a lock on a file that is also mapped
is lost without a word: that of an SQLite database in WAL mode on its -shm file, of LMDB, of Berkeley DB. Only
its owner can take such a lock. So the owner is kept stopped when CRIU lets go of it, made to call fcntl(2)
by ptrace(2), and left with nothing changed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from typing import TYPE_CHECKING, NamedTuple

from crcli.criu import messages
from crcli.criu.images import ImageFile, mapped_ids, read_descriptors, read_files, text_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.criu.workspace import Workspace

_POSIX = 1


class FileLock(NamedTuple):
    """One lock: its descriptor, F_RDLCK or F_WRLCK, and its range (length 0: to the end)."""

    fd: int
    type: int
    start: int
    length: int


def lost_locks(images: Workspace) -> dict[int, list[FileLock]]:
    """The locks that CRIU will lose (and maybe others), by the pid of their owner inside the tree."""
    if "filelocks.img" not in images.names():
        return {}
    entries = ImageFile.parse(images.read("filelocks.img"), messages.file_lock_entry).entries
    locks = [entry for entry in entries if entry.flag & _POSIX]
    if not locks:
        return {}
    files = read_files(images).entries
    names = {file.id: text_of(file.reg.name) for file in files if file.type == messages.fd_types.REG}
    open_as: dict[int, set[str]] = {}
    for file_id, users in read_descriptors(images).items():
        for _, fd in users:
            open_as.setdefault(fd, set()).add(names.get(file_id, ""))
    lost: dict[int, list[FileLock]] = {}
    for pid in {lock.pid for lock in locks}:
        mapped = {names[number] for number in mapped_ids(images, pid) if number in names}
        found = [FileLock(e.fd, e.type, e.start, e.len) for e in locks if e.pid == pid]
        if any(mapped & open_as.get(lock.fd, set()) for lock in found):
            lost[pid] = found
    return lost


class Machine(NamedTuple):
    """One architecture: its registers by index, the number of fcntl, the instruction for system calls."""

    registers: int
    number: int
    arguments: tuple[int, int, int]
    result: int
    instruction_pointer: int
    stack_pointer: int
    original_number: int | None
    nr_fcntl: int
    instruction: bytes


MACHINES = {
    "x86_64": Machine(27, 10, (14, 13, 12), 10, 16, 19, 15, 72, b"\x0f\x05"),
    "aarch64": Machine(34, 8, (0, 1, 2), 0, 32, 31, None, 25, b"\x01\x00\x00\xd4"),
}

_SEIZE, _INTERRUPT, _SYSCALL, _DETACH = 0x4206, 0x4207, 24, 17
_GETREGSET, _SETREGSET, _GETSIGMASK, _SETSIGMASK = 0x4204, 0x4205, 0x420A, 0x420B
_TRACESYSGOOD = 1
_GENERAL_REGISTERS = 1  # NT_PRSTATUS
_AT_SYSTEM_CALL = signal.SIGTRAP | 0x80
_WALL = 0x40000000
_F_SETLK = 6
_FLOCK = struct.Struct("=hh4xqqi4x")
_BELOW_THE_STACK = 512
"""Bytes under the stack pointer: what a function may use without moving it, and room for a flock."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def take_again(pid: int, locks: Sequence[FileLock]) -> None:
    """Have a process that stands stopped take these locks; it stands stopped as before on return.

    Raises OSError when another process holds one of them, or when this process cannot be made to.
    """
    machine = MACHINES.get(os.uname().machine)
    if machine is None:
        raise OSError("this architecture's registers are not known to crcli")
    with _Puppet(pid, machine) as puppet:
        for lock in locks:
            puppet.fcntl(lock.fd, _F_SETLK, _FLOCK.pack(lock.type, os.SEEK_SET, lock.start, lock.length, 0))


class _Puppet:
    """A stopped process under our ptrace; a context manager that leaves it as it was."""

    def __init__(self, pid: int, machine: Machine) -> None:
        self.pid = pid
        self.machine = machine

    def __enter__(self) -> _Puppet:
        _ptrace(_SEIZE, self.pid, 0, _TRACESYSGOOD)
        _ptrace(_INTERRUPT, self.pid)
        self._wait()
        self.memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self.registers = self._registers()
        self.mask = ctypes.create_string_buffer(8)
        _ptrace(_GETSIGMASK, self.pid, 8, ctypes.addressof(self.mask))
        self._set_mask(ctypes.create_string_buffer(b"\xff" * 8, 8))
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._set_registers(self.registers)
            self._set_mask(self.mask)
        finally:
            os.close(self.memory)
            _ptrace(_DETACH, self.pid)

    def fcntl(self, fd: int, command: int, argument: bytes) -> None:
        """Have the process call fcntl with a pointer to `argument`."""
        machine = self.machine
        place = (self.registers[machine.stack_pointer] - _BELOW_THE_STACK) & ~15
        before = os.pread(self.memory, len(argument), place)
        os.pwrite(self.memory, argument, place)
        changed = list(self.registers)
        changed[machine.number] = machine.nr_fcntl
        for register, value in zip(machine.arguments, (fd, command, place), strict=True):
            changed[register] = value
        changed[machine.instruction_pointer] = self._system_call_instruction()
        if machine.original_number is not None:
            changed[machine.original_number] = (
                1 << 64
            ) - 1  # it is in no system call that is to be restarted
        self._set_registers(changed)
        self._run_to_system_call()
        self._run_to_system_call()
        result = ctypes.c_long(self._registers()[machine.result]).value
        os.pwrite(self.memory, before, place)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def _system_call_instruction(self) -> int:
        """The address of one in the kernel's own code that each process has mapped (vdso)."""
        with open(f"/proc/{self.pid}/maps") as file:
            line = next((line for line in file if line.rstrip().endswith("[vdso]")), "0-0")
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        code = os.pread(self.memory, end - start, start)
        at = code.find(self.machine.instruction)
        if at < 0:
            raise OSError("no system call instruction in its vdso")
        return start + at

    def _run_to_system_call(self) -> None:
        """Let it run until it enters, or leaves, a system call."""
        for _ in range(16):
            _ptrace(_SYSCALL, self.pid)
            if self._wait() == _AT_SYSTEM_CALL:
                return
        raise OSError("it does not reach the system call")

    def _wait(self) -> int:
        _, status = os.waitpid(self.pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(f"process {self.pid} ended")
        return os.WSTOPSIG(status)

    def _registers(self) -> list[int]:
        buffer, vector = self._vector(bytes(8 * self.machine.registers))
        _ptrace(_GETREGSET, self.pid, _GENERAL_REGISTERS, ctypes.addressof(vector))
        if vector[1] != len(buffer):
            raise OSError("it has other registers than 64-bit programs have")
        return list(struct.unpack(f"={self.machine.registers}Q", buffer.raw))

    def _set_registers(self, values: Sequence[int]) -> None:
        _, vector = self._vector(struct.pack(f"={self.machine.registers}Q", *values))
        _ptrace(_SETREGSET, self.pid, _GENERAL_REGISTERS, ctypes.addressof(vector))

    def _vector(self, data: bytes) -> tuple[ctypes.Array[ctypes.c_char], ctypes.Array[ctypes.c_size_t]]:
        """A buffer, and the iovec that describes it (and does not keep it)."""
        buffer = ctypes.create_string_buffer(data, len(data))
        self._kept = buffer
        return buffer, (ctypes.c_size_t * 2)(ctypes.addressof(buffer), len(data))

    def _set_mask(self, mask: ctypes.Array[ctypes.c_char]) -> None:
        _ptrace(_SETSIGMASK, self.pid, 8, ctypes.addressof(mask))


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace of process {pid}: {os.strerror(number)}")
