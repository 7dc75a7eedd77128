"""A thread that stands still under our ptrace, made to call the kernel, and left as it was or should be."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from crcli import kernel
from crcli.process.identity import read_proc
from crcli.process.maps import areas

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType


class Machine(NamedTuple):
    """One architecture: its registers by index, the numbers of calls, the instruction for system calls."""

    registers: int
    number: int
    arguments: tuple[int, int, int, int, int, int]
    result: int
    instruction_pointer: int
    stack_pointer: int
    original_number: int | None
    nr_close: int
    nr_fcntl: int
    nr_ptrace: int
    nr_mmap: int
    nr_mremap: int
    nr_munmap: int
    nr_dup3: int
    nr_epoll_create1: int
    waits: tuple[int, ...]
    """epoll_wait, epoll_pwait and epoll_pwait2: what ptrace interrupts, and nothing begins again."""
    instruction: bytes


MACHINES = {
    "x86_64": Machine(
        registers=27,
        number=10,
        arguments=(14, 13, 12, 7, 9, 8),
        result=10,
        instruction_pointer=16,
        stack_pointer=19,
        original_number=15,
        nr_close=3,
        nr_fcntl=72,
        nr_ptrace=101,
        nr_mmap=9,
        nr_mremap=25,
        nr_munmap=11,
        nr_dup3=292,
        nr_epoll_create1=291,
        waits=(232, 281, 441),
        instruction=b"\x0f\x05",
    ),
    "aarch64": Machine(
        registers=34,
        number=8,
        arguments=(0, 1, 2, 3, 4, 5),
        result=0,
        instruction_pointer=32,
        stack_pointer=31,
        original_number=None,
        nr_close=57,
        nr_fcntl=25,
        nr_ptrace=117,
        nr_mmap=222,
        nr_mremap=216,
        nr_munmap=215,
        nr_dup3=24,
        nr_epoll_create1=20,
        waits=(22, 441),
        instruction=b"\x01\x00\x00\xd4",
    ),
}

_INTERRUPTED = (1 << 64) - errno.EINTR

_AT_SYSTEM_CALL = signal.SIGTRAP | 0x80
_ALL_SIGNALS = (1 << 64) - 1
_NO_FD = (1 << 64) - 1


class Ending(Exception):
    """The process is ending: there is nothing to put back."""


class Puppet:
    """A context manager, for a thread that we trace (see `kernel.seize`) and that stands still.

    `wait` waits for its next stop, and returns the stop's signal; it raises `Ending` when there is none. On
    leaving the thread gets `registers`, and blocks the signals of `mask`: its own, unless they were changed.
    `see_that_it_stands`, called before it goes on, raises `Ending` when it stands on its way out by now.
    """

    def __init__(
        self,
        tid: int,
        machine: Machine,
        wait: Callable[[], int],
        see_that_it_stands: Callable[[], None] = lambda: None,
    ) -> None:
        self.tid = tid
        self.machine = machine
        self._wait = wait
        self._see_that_it_stands = see_that_it_stands

    def __enter__(self) -> Puppet:
        self.memory = os.open(f"/proc/{self.tid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self.registers = self._registers()
        self.mask = kernel.blocked_signals(self.tid)
        kernel.block_signals(self.tid, _ALL_SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None or not issubclass(kind, Ending):
                self._set_registers(self.registers)
                kernel.block_signals(self.tid, self.mask)
        finally:
            os.close(self.memory)

    def call(self, number: int, *arguments: int) -> int:
        """Have the process make a system call, and return its result; raise OSError when it fails."""
        changed = list(self.registers)
        changed[self.machine.number] = number
        for register, value in zip(self.machine.arguments, arguments, strict=False):
            changed[register] = value
        changed[self.machine.instruction_pointer] = self._system_call_instruction()
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
        """The same, with a pointer to `argument` as its third.

        That lies in memory of its own: a lazily restored stack may be missing, and what is missing nobody
        else reads or writes (EIO).
        """
        allowed, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        place = self.call(self.machine.nr_mmap, 0, mmap.PAGESIZE, allowed, kind, _NO_FD, 0)
        try:
            os.pwrite(self.memory, argument, place)
            return self.call(number, first, second, place)
        finally:
            self.call(self.machine.nr_munmap, place, mmap.PAGESIZE)

    def stand_as_if_signalled(self) -> None:
        """Have it stand where signals are looked at: the call that it was in when it stopped begins again."""
        kernel.interrupt(self.tid)
        self._see_that_it_stands()
        kernel.go_on(self.tid, 0)
        self._wait()

    def make_again(self) -> None:
        """Have a wait for events that was interrupted begin again, when it gets its registers."""
        machine, registers = self.machine, list(self.registers)
        at = machine.original_number
        if at is not None and registers[machine.result] == _INTERRUPTED and registers[at] in machine.waits:
            registers[machine.result] = registers[at]
            registers[machine.instruction_pointer] -= len(machine.instruction)
            registers[at] = (1 << 64) - 1
            self.registers = tuple(registers)

    def _system_call_instruction(self) -> int:
        """The address of one in the kernel's own code that each process has mapped (vdso)."""
        named = areas(self.tid, holding=b"[vdso]")
        start, end = next((area.bounds for area in named if area.name == b"[vdso]"), (0, 0))
        code = os.pread(self.memory, end - start, start)
        at = code.find(self.machine.instruction)
        if at < 0:
            raise OSError("no system call instruction in its vdso")
        return start + at

    def _run_to_system_call(self) -> None:
        """Let it run until it enters, or leaves, a system call."""
        for _ in range(16):
            self._see_that_it_stands()
            kernel.go_on_to_system_call(self.tid)
            if self._wait() == _AT_SYSTEM_CALL:
                return
        raise OSError("it does not reach the system call")

    def _registers(self) -> tuple[int, ...]:
        raw = kernel.registers(self.tid, kernel.GENERAL)
        if len(raw) != 8 * self.machine.registers:
            raise OSError("it has other registers than 64-bit programs have")
        return struct.unpack(f"={self.machine.registers}Q", raw)

    def _set_registers(self, values: Sequence[int]) -> None:
        raw = struct.pack(f"={self.machine.registers}Q", *values)
        kernel.set_registers(self.tid, kernel.GENERAL, raw)


class Seized(Puppet):
    """The same, for a thread that nobody traces yet: on leaving nobody does any more.

    Entering raises PermissionError when somebody else traces it, and still does after `patience_s`.
    With `limit_s`, TimeoutError is raised, here and by calls, when it does not come to stand in so many
    seconds: it waits in the kernel, or a frozen cgroup holds it up. With `past_filters` its seccomp filters,
    which may kill it for a call, have no say in what it is made to call.
    """

    def __init__(
        self,
        tid: int,
        machine: Machine,
        patience_s: float = 0.0,
        limit_s: float | None = None,
        *,
        past_filters: bool = False,
    ) -> None:
        super().__init__(tid, machine, self._wait_for_it)
        self._patience_s = patience_s
        self._limit_s = limit_s
        self._past_filters = past_filters
        self._missed: set[int] = set()

    def __enter__(self) -> Puppet:
        self._seize()
        try:
            kernel.interrupt(self.tid)
            self._wait()
            return super().__enter__()
        except OSError:
            self._let_go()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, TimeoutError):
                self._stand_again()
            super().__exit__(kind, error, trace)
        finally:
            self._let_go()

    def _seize(self) -> None:
        end = time.monotonic() + self._patience_s
        while True:
            try:
                return kernel.seize(self.tid, past_filters=self._past_filters)
            except PermissionError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.0002)

    def _stand_again(self) -> None:
        """Have it stop where it is, if it is on its way with registers of ours."""
        try:
            kernel.blocked_signals(self.tid)
        except ProcessLookupError:  # so it answers who does not stand
            self._limit_s = None
            kernel.interrupt(self.tid)
            self._wait()

    def _wait_for_it(self) -> int:
        number, is_signal = kernel.wait_for_thread(self.tid, self._limit_s)
        if is_signal and number != signal.SIGTRAP:
            self._missed.add(number)
        return number

    def _let_go(self) -> None:
        """Untrace it, and send it once more what it was about to get."""
        kernel.let_go(self.tid)
        for number in self._missed:
            os.kill(self.tid, number)


def seized(pid: int, tid: int, limit_s: float) -> Seized:
    """A thread of a living process, which may have seccomp filters: even these calls may be what it is killed
    for."""
    status = read_proc(f"/proc/{pid}/task/{tid}/status")
    is_filtered = b"\nSeccomp:\t" in status and b"\nSeccomp:\t0" not in status
    return Seized(tid, MACHINES[os.uname().machine], limit_s=limit_s, past_filters=is_filtered)
