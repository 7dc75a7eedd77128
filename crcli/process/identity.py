"""Who a process is: a pid together with its start time.

The kernel hands pids out again within minutes on a busy host (pid_max is often 32768), so a pid alone names
nobody. With the start time in clock ticks since boot (field 22 of /proc/PID/stat) it does.
"""

from __future__ import annotations

import os
import signal

from crcli.records import Struct

PF_KTHREAD = 0x00200000
"""The bit of `Stat.flags` that marks a kernel thread (include/linux/sched.h)."""

_PF_EXITING = 0x4

ENDED = ("Z", "X", "x")
"""The states of a thread that runs no more. Others of the process may: the first can end before them."""


class Stat(Struct, frozen=True):
    """The fields of one /proc/PID/stat that crcli uses, named as in proc_pid_stat(5).

    `layout` is where code, stack and heap begin: zeros for a zombie, and where the kernel does not tell us.
    """

    pid: int
    comm: str
    state: str
    ppid: int
    pgid: int
    sid: int
    tty_nr: int
    tty_pgid: int
    flags: int
    threads: int
    start_time: int
    layout: tuple[int, int, int]

    @property
    def is_kernel_thread(self) -> bool:
        """Whether this is a thread of the kernel, which has no memory to dump."""
        return bool(self.flags & PF_KTHREAD)

    @property
    def is_ending(self) -> bool:
        """Whether its first thread is about to end: with all others mostly, for it was killed."""
        return self.state not in ENDED and bool(self.flags & _PF_EXITING)

    @property
    def is_zombie(self) -> bool:
        """Whether the process has ended, all its threads too, and only waits for its parent to look."""
        return self.state in ENDED and self.threads <= 1


def parse_stat(raw: bytes) -> Stat:
    """Return the record of one stat file.

    The command name stands in parentheses and may itself hold spaces and parentheses; the last ')' ends it.
    """
    opening, closing = raw.index(b"("), raw.rindex(b")")
    rest = raw[closing + 1 :].split()
    return Stat(
        pid=int(raw[:opening]),
        comm=os.fsdecode(raw[opening + 1 : closing]),
        state=rest[0].decode(),
        ppid=int(rest[1]),
        pgid=int(rest[2]),
        sid=int(rest[3]),
        tty_nr=int(rest[4]),
        tty_pgid=int(rest[5]),
        flags=int(rest[6]),
        threads=int(rest[17]),
        start_time=int(rest[19]),
        layout=(int(rest[23]), int(rest[25]), int(rest[44])),
    )


def read_proc(path: str) -> bytes:
    """Return the whole content of a file in /proc.

    Raises FileNotFoundError or ProcessLookupError when the process is gone.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = []
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def read_stat(pid: int) -> Stat:
    """Return the stat record of a process that exists; raise ProcessLookupError when it does not."""
    try:
        return parse_stat(read_proc(f"/proc/{pid}/stat"))
    except FileNotFoundError:
        raise ProcessLookupError(f"no process {pid}") from None


class ProcessId(Struct, frozen=True):
    """One process, for ever: its pid and its start time in clock ticks since boot."""

    pid: int
    start_time: int

    def alive(self) -> bool:
        """Whether this very process still runs (or stands stopped): not gone, not replaced, not a zombie."""
        try:
            stat = read_stat(self.pid)
        except ProcessLookupError:
            return False
        return stat.start_time == self.start_time and not stat.is_zombie

    def is_at_work(self) -> bool:
        """Whether it runs or waits, and has not begun to end: whom it traces, it traces still. While a
        debugger has stopped it, that is not known: it may have been told of its end."""
        try:
            stat = read_stat(self.pid)
        except ProcessLookupError:
            return False
        return stat.start_time == self.start_time and stat.state in "RSD" and not stat.is_ending

    def stands_still(self) -> bool:
        """Whether it is stopped. Who kills it wakes it for good: then nothing has changed its memory since it
        was stopped, not even threads on their way out, which the kernel has write there (set_tid_address)."""
        try:
            stat = read_stat(self.pid)
        except ProcessLookupError:
            return False
        return stat.start_time == self.start_time and stat.state in "tT"

    def send(self, number: int) -> bool:
        """Send a signal to this very process, never to one that took its pid over; say whether it lived."""
        try:
            process = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if is_there := self.alive():
                signal.pidfd_send_signal(process, number)
            return is_there
        except ProcessLookupError:
            return False
        finally:
            os.close(process)


def identify(pid: int) -> ProcessId:
    """Return the identity of the process that has this pid now; raise ProcessLookupError for none."""
    return ProcessId(pid, read_stat(pid).start_time)
