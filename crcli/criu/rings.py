"""libuv's event loops made to do without their rings (see crcli.process.rings), which CRIU cannot take.

A loop's thread is stopped for some tenths of a millisecond while it waits for events, when it is at no ring
for certain. What it keeps as the ring's descriptor becomes -1, as where the kernel has no io_uring; then it
unmaps and closes the ring, and waits again. A loop that is too busy to be met waiting, or has never run, may
be anybody's: then all threads of the process are stopped, and none of them may be at the loop.

It is done by a process of its own, which a signal does not end in the middle, only between two tries.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NoReturn

from crcli import kernel
from crcli.criu.puppet import MACHINES, Ending, seized
from crcli.process.identity import read_proc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.criu.puppet import Puppet
    from crcli.process.rings import EventRing

_SLEEPS = {"x86_64": (202, 7, 271, 23, 270, 35, 230), "aarch64": (98, 73, 72, 101, 115)}
"""futex, poll, ppoll, select, pselect6, nanosleep, clock_nanosleep: nobody makes these at a ring either."""

_AT_HAND, _BEFORE, _BEHIND = 2048, 1024, 256
"""How much of its stack a thread is at work with, and how far the data of a loop reach before and behind its
ring's descriptor (bytes)."""

_STEP_S, _STOP_S = 0.002, 0.5
"""Between two tries, and how long a thread may take to come to stand (seconds): longer in a frozen cgroup."""
_F_GETFD = 1
_NONE = b"\xff\xff\xff\xff"


def leave_rings(rings: Sequence[EventRing], limit_s: float) -> bool:
    """Have the loops of these rings do without them; say whether all do, within `limit_s` seconds.

    Call it before any thread of ours is started. A loop that is not done goes on as before. Nothing is under
    way any more when it is interrupted.
    """
    pid = 0
    try:
        with kernel.signals_held():
            pid = kernel.quiet_fork()
            if pid == 0:
                _leave_and_exit(rings, time.monotonic() + limit_s)
        _, status = os.waitpid(pid, 0)
    except BaseException:
        _end(pid)
        raise
    return os.waitstatus_to_exitcode(status) == 0


def _end(pid: int) -> None:
    """See the process off after the try that it is at."""
    with suppress(ChildProcessError):
        if pid and os.waitpid(pid, os.WNOHANG) == (0, 0):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)


def _leave_and_exit(rings: Sequence[EventRing], until: float) -> NoReturn:
    code = 1
    signals: list[int] = []
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGALRM):
            signal.signal(number, lambda number, _: signals.append(number))
        os.setsid()
        kernel.close_all_but()
        done = [_leave(ring, lambda: bool(signals) or time.monotonic() > until) for ring in rings]
        code = 0 if all(done) else 1
    finally:
        os._exit(code)


def _leave(ring: EventRing, is_over: Callable[[], bool]) -> bool:
    while ring.is_there() and not _left(ring):
        if is_over():
            return False
        time.sleep(_STEP_S)
    return True


def _left(ring: EventRing) -> bool:
    """Try once."""
    try:
        tids = sorted(map(int, os.listdir(f"/proc/{ring.pid}/task")))
        waiting = [tid for tid in tids if _waits_for(ring, tid)][:1]
        with ExitStack() as held:
            puppets = [held.enter_context(seized(ring.pid, tid, _STOP_S)) for tid in waiting or tids]
            if waiting:
                is_away = _waits_for(ring, waiting[0])
            else:
                is_away = len(tids) == len(os.listdir(f"/proc/{ring.pid}/task"))
                is_away = is_away and not any(_may_be_at(ring, puppet) for puppet in puppets)
            if is_away and ring.is_idle():
                _take_away(ring, puppets[0])
            for puppet in puppets:
                puppet.make_again()
            return not ring.is_there()
    except (OSError, Ending):
        return False


def _waits_for(ring: EventRing, tid: int) -> bool:
    """Whether a thread waits for the events of the ring's loop."""
    call, first = _call_of(ring.pid, tid)
    return call in MACHINES[os.uname().machine].waits and first == ring.epoll


def _call_of(pid: int, tid: int) -> tuple[int, int]:
    """The number of the system call that a thread is in, and its first argument; -1 when it is in none."""
    words = read_proc(f"/proc/{pid}/task/{tid}/syscall").split()
    return (int(words[0]), int(words[1], 16)) if len(words) > 3 else (-1, 0)


def _may_be_at(ring: EventRing, puppet: Puppet) -> bool:
    """Whether a thread that stands still may be at work on the ring: it has something of the loop at hand, in
    its registers or on top of its stack, and does not merely wait for something."""
    if _call_of(ring.pid, puppet.tid)[0] in (*puppet.machine.waits, *_SLEEPS[os.uname().machine]):
        return False
    top = os.pread(puppet.memory, _AT_HAND, puppet.registers[puppet.machine.stack_pointer])
    words = (*puppet.registers, *memoryview(top[: len(top) // 8 * 8]).cast("Q"))
    return any(ring.field - _BEFORE < word < ring.field + _BEHIND for word in words)


def _take_away(ring: EventRing, puppet: Puppet) -> None:
    """From the second step on the loop does without; what comes then only makes it possible to save it."""
    puppet.call(puppet.machine.nr_fcntl, ring.fd, _F_GETFD)  # it can make calls: no cgroup is frozen
    os.pwrite(puppet.memory, _NONE, ring.field)
    for start, size in ring.pieces:
        puppet.call(puppet.machine.nr_munmap, start, size)
    puppet.call(puppet.machine.nr_close, ring.fd)
    puppet.stand_as_if_signalled()
