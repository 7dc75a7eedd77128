"""Threads that CRIU had borrowed when it was killed, given back.

What CRIU does with them: see crcli.criu.compel. When it is killed meanwhile nobody gives a borrowed thread
what is its own: it runs into the breakpoint, which ends the process, or beyond it. So before the dead CRIU
lets go of them such threads are parked: what comes after CRIU's code is made a loop. Their registers are
found in CRIU's memory, which is still there. Once CRIU is gone each thread is stopped, gets its registers,
its signals and its program text, and goes on.

**Too late** it is for a thread that has run into the breakpoint when CRIU has not seen that yet, which takes
CRIU some microseconds: the kernel has its SIGTRAP in hand, and nobody but CRIU could take that away.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.criu import compel
from crcli.criu.puppet import MACHINES, Seized
from crcli.process.identity import read_proc
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from crcli.criu.compel import Context, Text
    from crcli.criu.puppet import Puppet

_LIMIT_S = 5.0


class Borrowed(Struct, frozen=True):
    """A thread that CRIU had borrowed when it died. `is_lost`: it has run into the breakpoint already."""

    text: Text
    tid: int
    is_lost: bool

    @property
    def is_first(self) -> bool:
        """Whether it is its process's first thread."""
        return self.tid == self.text.pid


class Recalled:
    """The borrowed threads of a tree whose CRIU is dead, but holds it still: parked.

    `lost`: the processes that nobody can help.
    """

    def __init__(self, criu: int, texts: Iterable[Text]) -> None:
        """Park them in the processes whose `texts` were noted, and find their registers. Never raises."""
        self._texts = tuple(texts)
        for text in self._texts:  # at once: some may not have come to the breakpoint yet
            _park(text)
        self._threads = [thread for text in self._texts for thread in _borrowed(text)]
        self._contexts: list[Context] = []
        if self._threads:
            try:
                self._contexts = compel.contexts(criu)
            except (OSError, MemoryError):
                pass
        self.lost = {thread.text.pid for thread in self._threads if thread.is_lost}

    def give_back(self) -> None:
        """Give the threads what is theirs; CRIU has ended. Never raises."""
        for thread in self._threads:
            if not thread.is_lost and not self._given_back(thread):
                self.lost.add(thread.text.pid)
        for text in self._texts:
            if text.pid not in self.lost:
                _close_what_is_left(text)

    def _given_back(self, thread: Borrowed) -> bool:
        try:
            with _seized(thread.tid) as puppet:
                is_whole = _restored(thread, puppet, self._contexts)
            if not is_whole:
                os.kill(thread.text.pid, signal.SIGKILL)  # else it would run in circles
        except OSError:
            return False
        return is_whole


def _park(text: Text) -> None:
    try:
        text.park()
        compel.park_routines(text.pid)
    except OSError:
        return


def _borrowed(text: Text) -> Iterator[Borrowed]:
    """The borrowed threads of a process; its program text is mended unless one of them is in it."""
    try:
        in_text = False
        for tid in map(int, os.listdir(f"/proc/{text.pid}/task")):
            if _blocked(text.pid, tid) == compel.ALL_BUT_TRAP:
                is_lost = _has_trapped(text.pid, tid)
                if is_lost or tid != text.pid or _is_in_program(text):
                    yield Borrowed(text, tid, is_lost)
                    in_text = in_text or tid == text.pid
        if not in_text:
            text.mend()
    except OSError:
        return


def _is_in_program(text: Text) -> bool:
    """Whether the first thread of a process, which is borrowed, does not just serve CRIU in its own code.

    If it does, it goes back to where it was by itself when nobody asks any more.
    """
    if text.is_parked:
        return True
    words = read_proc(f"/proc/{text.pid}/syscall").split()
    at = int(words[-1], 16) if len(words) > 1 else 0  # 0: it runs
    return any(start <= at < end and not is_criu for start, end, is_criu in compel.code(text.pid))


def _blocked(pid: int, tid: int) -> int:
    """The signals that a thread blocks."""
    for line in read_proc(f"/proc/{pid}/task/{tid}/status").splitlines():
        if line.startswith(b"SigBlk:"):
            return int(line.split()[1], 16)
    return 0


def _has_trapped(pid: int, tid: int) -> bool:
    """Whether a thread has a SIGTRAP in hand that its tracer has not seen."""
    words = read_proc(f"/proc/{pid}/task/{tid}/stat").rpartition(b")")[2].split()
    return words[0] == b"t" and int(words[-1]) == signal.SIGTRAP


def _restored(thread: Borrowed, puppet: Puppet, contexts: Iterable[Context]) -> bool:
    """Set all that CRIU would have set of a thread that we hold; say whether it can go on now."""
    context = next((one for one in contexts if one.is_of(thread.tid, puppet.registers)), None)
    floating = b""
    if context is not None and not thread.is_first:  # the routine uses them, a system call does not
        floating = context.xstate(kernel.registers(thread.tid, kernel.XSTATE))
    if context is None or not (floating or thread.is_first):
        at = puppet.registers[puppet.machine.instruction_pointer]
        return not _is_criu_code(thread.text, at)  # it was not borrowed: all that it blocks is its own will
    puppet.registers, puppet.mask = context.registers, context.blocked
    if floating:
        kernel.set_registers(thread.tid, kernel.XSTATE, floating)
    if thread.is_first:
        thread.text.mend()
    return True


def _is_criu_code(text: Text, at: int) -> bool:
    return at in text or any(start <= at < end for start, end, is_criu in compel.code(text.pid) if is_criu)


def _seized(tid: int) -> Seized:
    """A thread to be held as soon as CRIU's hold on it has ended."""
    return Seized(tid, MACHINES["x86_64"], _LIMIT_S)


def _close_what_is_left(text: Text) -> None:
    """Have a process close what CRIU had it open, and would have had it close. Never raises."""
    folder = f"/proc/{text.pid}/fd"
    try:
        left = [
            int(name)
            for name in os.listdir(folder)
            if os.readlink(f"{folder}/{name}").startswith(compel.MEMORY_FILE)
        ]
        if left:
            with _seized(text.pid) as puppet:
                for number in left:
                    puppet.call(puppet.machine.nr_close, number)
    except OSError:
        return
