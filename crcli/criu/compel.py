"""What CRIU's compel does to a process while it looks into it, told from outside (x86-64).

CRIU has a process's own threads run code of its. The first thread runs system calls that are written over the
beginning of the program's text. Each of the others runs a routine that lies in a mapping which CRIU made.
While a thread is borrowed for that all its signals but SIGTRAP are blocked, and its registers are CRIU's.
What it runs ends in a breakpoint, at which CRIU gives the thread back what is its own.

The layouts are those of compel/src/lib/infect.c, compel/arch/x86/plugins/std/parasite-head.S and
compel/include/infect-priv.h (struct thread_ctx) of CRIU 4.2. What does not look like them is not found.
"""

from __future__ import annotations

import os
import re
import signal
import struct
from typing import TYPE_CHECKING

from crcli.process.maps import areas
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MEMORY_FILE = "/memfd:CRIUMFD"
"""What the file that CRIU's mapping in a process is of is called."""

_CALL = bytes.fromhex("0f05cccccccccccc")
PARKED_CALL = bytes.fromhex("0f0590ebfe")
"""A system call, and then, whether the breakpoint after it was passed or not: a jump to itself."""
_NAME = b"CRIUMFD\0"
_TEXT_BYTES = len(_CALL) + len(_NAME)

_TAIL = bytes.fromhex("7e0c4889c448c7c00f0000000f05cc")
"""The end of the routine: a jump to the breakpoint, unless a stack pointer for rt_sigreturn was returned."""
_PARKED_TAIL = bytes.fromhex("7efe4889c448c7c00f0000000f0590ebfe")
_HEAD_BYTES = 4096

ALL_BUT_TRAP = (1 << 64) - 1
"""The signals that a borrowed thread blocks."""
for _number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTRAP):
    ALL_BUT_TRAP &= ~(1 << (_number - 1))

_REGISTERS = struct.Struct("27Q")
"""struct user_regs_struct."""
_UNTOUCHED = (0, 1, 2, 3, 4, 5, 21, 22)
"""r15 to r12, rbp, rbx, fs_base, gs_base: after CRIU's code they are what they were."""

_SEGMENTS = re.compile(rb"(?=\x33\0{7}.{16}\x2b\0{7})", re.DOTALL)
_SEGMENTS_AT = 17 * 8
_NATIVE = b"\x0a\0"
_OWNER_WITHIN, _XSTATE_WITHIN = 1024, 512
"""How far before the registers CRIU notes whose they are, and how far behind them the floating-point ones."""
_MXCSR_MASK, _XSTATE_RESERVED = slice(28, 32), slice(520, 576)
_XSTATE_LIMIT = 16 << 10
_HEAP_LIMIT = 1 << 30


class Text(Struct, frozen=True):
    """The beginning of a process's program text, over which CRIU writes its system calls."""

    pid: int
    address: int
    content: bytes

    @classmethod
    def of(cls, pid: int) -> Text | None:
        """Note it while CRIU has written nothing there; None where that cannot be."""
        if os.uname().machine != "x86_64":
            return None
        try:
            address = next(start for start, _, is_criu in code(pid) if not is_criu)
            text = cls(pid, address, read_memory(pid, address, _TEXT_BYTES))
        except (OSError, StopIteration):
            return None
        return None if _is_criu_text(text.content) else text

    def park(self) -> None:
        """Have what follows CRIU's system call, if one is there, be a loop."""
        if read_memory(self.pid, self.address, len(_CALL)) == _CALL:
            write_memory(self.pid, self.address, PARKED_CALL)

    @property
    def is_parked(self) -> bool:
        """Whether there was one."""
        return read_memory(self.pid, self.address, len(PARKED_CALL)) == PARKED_CALL

    def mend(self) -> None:
        """Undo what CRIU has written, or we have to park it."""
        if _is_criu_text(read_memory(self.pid, self.address, _TEXT_BYTES)):
            write_memory(self.pid, self.address, self.content)

    def __contains__(self, address: int) -> bool:
        return self.address <= address < self.address + len(_CALL)


class Context(Struct, frozen=True):
    """What CRIU has noted of a thread: registers, blocked signals, and what lies around them in memory."""

    registers: tuple[int, ...]
    blocked: int
    before: bytes
    behind: bytes

    def is_of(self, tid: int, now: Sequence[int]) -> bool:
        """Whether these can be the registers of a borrowed thread that has those `now`."""
        owners = (self.before[at : at + 4] for at in range(0, len(self.before), 8))
        is_alike = all(self.registers[number] == now[number] for number in _UNTOUCHED)
        return is_alike and tid.to_bytes(4, "little") in owners

    def xstate(self, now: bytes) -> bytes:
        """The floating-point registers, told by what cannot differ from those of `now`; empty if none."""
        for at in range(0, _XSTATE_WITHIN, 8):
            noted = self.behind[at : at + len(now)]
            if all(noted[part] == now[part] for part in (_MXCSR_MASK, _XSTATE_RESERVED)):
                return noted
        return b""


def park_routines(pid: int) -> None:
    """Have CRIU's routine in a process, if it is there, end in a loop. Raises OSError."""
    for start, end, is_criu in code(pid):
        if is_criu:
            fd = os.open(f"/proc/{pid}/map_files/{start:x}-{end:x}", os.O_RDWR | os.O_CLOEXEC)
            try:
                at = os.pread(fd, _HEAD_BYTES, 0).find(_TAIL)
                if at >= 0:
                    os.pwrite(fd, _PARKED_TAIL, at)
            finally:
                os.close(fd)


def contexts(criu: int) -> list[Context]:
    """Return all that CRIU's memory holds of threads. Raises OSError when it is gone."""
    found = []
    left = _HEAP_LIMIT
    for start, end in _heap(criu):
        left -= end - start
        memory = read_memory(criu, start, end - start) if left >= 0 else b""
        for match in _SEGMENTS.finditer(memory):
            at = match.start() - _SEGMENTS_AT
            behind = at + _REGISTERS.size
            if at % 8 == 0 and at >= 8 and memory[behind : behind + len(_NATIVE)] == _NATIVE:
                blocked = int.from_bytes(memory[at - 8 : at], "little")
                before = memory[max(0, at - _OWNER_WITHIN) : at]
                rest = memory[behind : behind + _XSTATE_WITHIN + _XSTATE_LIMIT]
                found.append(Context(_REGISTERS.unpack_from(memory, at), blocked, before, rest))
    return found


def code(pid: int) -> Iterator[tuple[int, int, bool]]:
    """The mappings of code of a process, first to last, and whether they are CRIU's. Raises OSError."""
    for area in areas(pid, holding=b"x"):
        if b"x" in area.permissions:
            yield *area.bounds, MEMORY_FILE.encode() in area.name


def writes_over_memory(pid: int) -> bool:
    """Whether CRIU writes its system calls over anonymous memory of a process, and not over a file's: for as
    long as they run it is other than the program left it. Raises OSError."""
    for area in areas(pid, holding=b"x"):
        if b"x" in area.permissions and MEMORY_FILE.encode() not in area.name:
            return not area.name.startswith(b"/")
    return True


def read_memory(pid: int, address: int, length: int) -> bytes:
    """Return memory of another process. Raises OSError."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, length, address)
    finally:
        os.close(fd)


def write_memory(pid: int, address: int, content: bytes) -> None:
    """Write to memory of another process, read-only or not. Raises OSError."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, content, address)
    finally:
        os.close(fd)


def _is_criu_text(content: bytes) -> bool:
    return content.startswith((_CALL, PARKED_CALL)) or content.endswith(_NAME)


def _heap(pid: int) -> Iterator[tuple[int, int]]:
    for area in areas(pid, holding=b" rw-p "):
        if area.permissions == b"rw-p" and area.inode == b"0" and area.name in (b"", b"[heap]"):
            yield area.bounds
