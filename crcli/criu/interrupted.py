"""System calls that a restored program would see interrupted, made to go on instead.

A frozen program that waits in poll(2), nanosleep(2) or futex(2) is in a call that the kernel restarts by
notes of its own (restart_syscall(2)). CRIU cannot carry those notes, and lets the call return EINTR, which no
program expects that has no signal handler: `tail -f` ends of it. Where the arguments say enough, the call is
made once more: a sleep for what is left of it, a wait for what it waited for (a relative time limit begins
anew).
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

from crcli.criu import messages
from crcli.criu.images import ImageFile

if TYPE_CHECKING:
    from crcli.criu.workspace import Workspace

_INTERRUPTED = (1 << 64) - errno.EINTR
_NATIVE = 1
_INSTRUCTION_BYTES = 2  # syscall

# x86_64 only: elsewhere the first argument's register already holds the call's result.
_POLL, _NANOSLEEP, _FUTEX, _CLOCK_NANOSLEEP = 7, 35, 202, 230


def resume_interrupted_calls(images: Workspace) -> None:
    """Edit the registers of threads that were interrupted in such a call."""
    if os.uname().machine != "x86_64":
        return
    for name in images.names():
        if name.startswith("core-"):
            image = ImageFile.parse(images.read(name), messages.core_entry)
            if _resume(image.entries[0]):
                images.write(name, image.encode())


def _resume(core: Any) -> bool:
    """Have one thread make its call once more; False when it is in none, or had better see it interrupted."""
    registers = core.thread_info.gpregs
    if registers.ax != _INTERRUPTED or registers.mode != _NATIVE or _has_pending_signals(core):
        return False
    if registers.orig_ax == _NANOSLEEP and registers.si:
        registers.di = registers.si  # the kernel has written there what is left
    elif registers.orig_ax == _CLOCK_NANOSLEEP and registers.r10 and not registers.si:
        registers.dx = registers.r10
    elif registers.orig_ax not in (_POLL, _FUTEX):
        return False
    registers.ax = registers.orig_ax
    registers.ip -= _INSTRUCTION_BYTES
    return True


def _has_pending_signals(core: Any) -> bool:
    """Whether a handler may be about to run: the program may rely on its wait being interrupted by that."""
    return bool(core.thread_core.signals_p.signals or core.tc.signals_s.signals)
