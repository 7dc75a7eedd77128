"""A process that stands still under our ptrace, made to call the kernel, and left with nothing changed."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType


class Machine(NamedTuple):
    """One architecture: its registers by index, the numbers of calls, the instruction for system calls."""

    registers: int
    number: int
    arguments: tuple[int, int, int, int]
    result: int
    instruction_pointer: int
    stack_pointer: int
    original_number: int | None
    nr_fcntl: int
    nr_ptrace: int
    instruction: bytes


MACHINES = {
    "x86_64": Machine(27, 10, (14, 13, 12, 7), 10, 16, 19, 15, 72, 101, b"\x0f\x05"),
    "aarch64": Machine(34, 8, (0, 1, 2, 3), 0, 32, 31, None, 25, 117, b"\x01\x00\x00\xd4"),
}

_CONT, _SYSCALL, _DETACH, _SEIZE, _INTERRUPT = 7, 24, 17, 0x4206, 0x4207
_GETREGSET, _SETREGSET, _GETSIGMASK, _SETSIGMASK = 0x4204, 0x4205, 0x420A, 0x420B
_TRACESYSGOOD = 1
_GENERAL_REGISTERS = 1  # NT_PRSTATUS
_AT_SYSTEM_CALL = signal.SIGTRAP | 0x80
_WALL = 0x40000000
_BELOW_THE_STACK = 512
"""Bytes under the stack pointer: what a function may use without moving it, and room for an argument."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


class Ending(Exception):
    """The process is ending: there is nothing to put back."""


class Puppet:
    """A context manager, for a process that we trace (with PTRACE_O_TRACESYSGOOD) and that stands still.

    `wait` waits for its next stop, and returns the stop's signal; it raises `Ending` when there is none.
    """

    def __init__(self, pid: int, machine: Machine, wait: Callable[[], int]) -> None:
        self.pid = pid
        self.machine = machine
        self._wait = wait

    def __enter__(self) -> Puppet:
        self.memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self.registers = self._registers()
        self.mask = ctypes.create_string_buffer(8)
        _ptrace(_GETSIGMASK, self.pid, 8, ctypes.addressof(self.mask))
        self._set_mask(ctypes.create_string_buffer(b"\xff" * 8, 8))
        self._instruction = self._system_call_instruction()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None or not issubclass(kind, Ending):
                self._set_registers(self.registers)
                self._set_mask(self.mask)
        finally:
            os.close(self.memory)

    def call(self, number: int, *arguments: int) -> int:
        """Have the process make a system call, and return its result; raise OSError when it fails."""
        changed = list(self.registers)
        changed[self.machine.number] = number
        for register, value in zip(self.machine.arguments, arguments, strict=False):
            changed[register] = value
        changed[self.machine.instruction_pointer] = self._instruction
        if self.machine.original_number is not None:
            changed[self.machine.original_number] = (1 << 64) - 1  # in no call that is to be restarted
        self._set_registers(changed)
        self._run_to_system_call()
        self._run_to_system_call()
        result = ctypes.c_long(self._registers()[self.machine.result]).value
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def call_with(self, number: int, first: int, second: int, argument: bytes) -> int:
        """The same, with a pointer to `argument` as its third."""
        place = (self.registers[self.machine.stack_pointer] - _BELOW_THE_STACK) & ~15
        before = os.pread(self.memory, len(argument), place)
        os.pwrite(self.memory, argument, place)
        try:
            return self.call(number, first, second, place)
        finally:
            os.pwrite(self.memory, before, place)

    def stand_as_if_signalled(self) -> None:
        """Have it stand where signals are looked at: the call that it was in when it stopped begins again."""
        _ptrace(_INTERRUPT, self.pid)
        _ptrace(_CONT, self.pid)
        self._wait()

    def _system_call_instruction(self) -> int:
        """The address of one in the kernel's own code that each process has mapped (vdso)."""
        with open(f"/proc/{self.pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
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


class Seized(Puppet):
    """The same, for a process that nobody traces yet: on leaving nobody does any more."""

    def __init__(self, pid: int, machine: Machine) -> None:
        super().__init__(pid, machine, self._wait_for_it)

    def __enter__(self) -> Puppet:
        _ptrace(_SEIZE, self.pid, 0, _TRACESYSGOOD)
        _ptrace(_INTERRUPT, self.pid)
        self._wait()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            _ptrace(_DETACH, self.pid)

    def _wait_for_it(self) -> int:
        _, status = os.waitpid(self.pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise ProcessLookupError(f"process {self.pid} ended")
        return os.WSTOPSIG(status)


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace of process {pid}: {os.strerror(number)}")
