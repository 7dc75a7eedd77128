"""System calls that a program would see interrupted by a dump, made to go on instead.

A frozen program that waits in poll(2), nanosleep(2) or futex(2) is in a call that the kernel restarts by
notes of its own (restart_syscall(2)). CRIU cannot carry those notes, and lets the call return EINTR, which no
program expects that has no signal handler: `tail -f` ends of it. CRIU does so in the image, and in the tree
itself, where that is to run on. Where the arguments say enough, the call is made once more: a sleep for what
is left of it, a wait for what it waited for (its time limit begins anew, but in a tree that runs on: who is
dumped often is not to wait for ever).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from crcli.criu import messages
from crcli.criu.images import ImageFile

if TYPE_CHECKING:
    from crcli.criu.images import ImageFolder
    from crcli.criu.workspace import Workspace

_INTERRUPTED = (1 << 64) - errno.EINTR
_NATIVE = 1
_INSTRUCTION_BYTES = 2  # syscall

# x86_64 only: elsewhere the first argument's register already holds the call's result.
_POLL, _NANOSLEEP, _FUTEX, _CLOCK_NANOSLEEP = 7, 35, 202, 230
_OFFSETS = {"ax": 80, "dx": 96, "di": 112, "ip": 128}
"""In struct user_regs_struct."""


def resume_interrupted_calls(images: Workspace) -> None:
    """Edit the registers of threads that were interrupted in such a call."""
    if os.uname().machine != "x86_64":
        return
    for name in images.names():
        if name.startswith("core-"):
            image = ImageFile.parse(images.read(name), messages.core_entry)
            changes = _to_call_again(image.entries[0])
            for register, value in changes.items():
                setattr(image.entries[0].thread_info.gpregs, register, value)
            if changes:
                images.write(name, image.encode())


class CallAgain(NamedTuple):
    """What a thread that stands still is to have in its registers, so that it makes its call once more.

    `ip` is where it stands. `changes` are for PTRACE_POKEUSER: a register's offset, and its value.
    `limit_ms` is the time limit of a poll(2) that has one, else 0.
    """

    ip: int
    changes: tuple[tuple[int, int], ...]
    limit_ms: int

    def after(self, waited_ms: int) -> CallAgain:
        """The same for a thread that had waited so long of its time limit."""
        if not self.limit_ms:
            return self
        left = max(1, self.limit_ms - waited_ms)
        return self._replace(changes=(*self.changes, (_OFFSETS["dx"], left)), limit_ms=left)


def calls_to_make_again(images: ImageFolder) -> dict[int, CallAgain]:
    """The threads whose call CRIU has interrupted in the tree itself, by their id inside the tree."""
    if os.uname().machine != "x86_64":
        return {}
    found = {}
    for name in images.names():
        if name.startswith("core-"):
            core = ImageFile.parse(images.read(name), messages.core_entry).entries[0]
            if changes := _to_call_again(core):
                registers = core.thread_info.gpregs
                limit = registers.dx & 0xFFFF_FFFF if registers.orig_ax == _POLL else 0
                pokes = tuple((_OFFSETS[register], value) for register, value in changes.items())
                found[int(name[5:-4])] = CallAgain(registers.ip, pokes, limit if limit < 1 << 31 else 0)
    return found


def _to_call_again(core: Any) -> dict[str, int]:
    """Registers with which a thread makes its call once more, by name.

    Empty when it is in no such call, or had better see it interrupted.
    """
    registers = core.thread_info.gpregs
    if registers.ax != _INTERRUPTED or registers.mode != _NATIVE or _has_pending_signals(core):
        return {}
    again = {"ax": registers.orig_ax, "ip": registers.ip - _INSTRUCTION_BYTES}
    if registers.orig_ax == _NANOSLEEP and registers.si:
        again["di"] = registers.si  # the kernel has written there what is left
    elif registers.orig_ax == _CLOCK_NANOSLEEP and registers.r10 and not registers.si:
        again["dx"] = registers.r10
    elif registers.orig_ax not in (_POLL, _FUTEX):
        return {}
    return again


def _has_pending_signals(core: Any) -> bool:
    """Whether a handler may be about to run: the program may rely on its wait being interrupted by that."""
    return bool(core.thread_core.signals_p.signals or core.tc.signals_s.signals)
