"""A process beside `crcli run` that stops the job once its lease has lapsed, should `crcli run` not do it.

`crcli run` itself can be kept from running: stopped (SIGSTOP, as Slurm suspends a job's own processes), hung
on a dead file system. The job, in a session of its own, would run on while another node takes its name. The
sentry is out of reach of what stops the one; it reads until when the lease is good, and what it has stopped
it lets go on when the lease is good again. It ends with `crcli run`, with which the job ends; after one that
was killed it removes the file in which the job could read the lease's number.

    python -I -S -E sentry.py FILE LEASE SUPERVISOR ROOT START_TIME

LEASE is a descriptor of 16 bytes, the time (CLOCK_BOOTTIME) until which the lease is good and its number,
SUPERVISOR a pidfd.
"""

import os
import select
import struct
import sys
import time
from _signal import SIGCONT, SIGSTOP  # type: ignore[import-not-found]  # `signal` costs more than all the rest

_LONGEST_S = 1.0
"""Between two looks, as waiting takes no note of a host that was suspended."""

_AGAIN_S = 0.05
"""Between two looks while the lease has lapsed: what is forked meanwhile must be stopped too."""


def main(file: str, lease: int, supervisor: int, root: int, start_time: int) -> None:
    """Watch until the supervisor, or the job, has ended."""
    _watch(lease, supervisor, root, start_time)
    if _has_ended(supervisor, 0):  # a supervisor that is not killed ends us before
        _remove(file, struct.unpack("q", os.pread(lease, 8, 8))[0])


def _watch(lease: int, supervisor: int, root: int, start_time: int) -> None:
    stopped: dict[int, int] = {}
    while _start_time(root) == start_time:
        left = struct.unpack("d", os.pread(lease, 8, 0))[0] - time.clock_gettime(time.CLOCK_BOOTTIME)
        if left > 0:
            _let_go_on(stopped)
        else:
            _stop(root, stopped)
        if _has_ended(supervisor, min(left, _LONGEST_S) if left > 0 else _AGAIN_S):
            return


def _has_ended(supervisor: int, within_s: float) -> bool:
    return bool(select.select([supervisor], [], [], within_s)[0])


def _remove(path: str, number: int) -> None:
    """Remove the file, unless it is by now that of who took the job over on this host."""
    try:
        with open(path) as file:
            if file.read() == f"{number}\n":
                os.unlink(path)
    except OSError:
        pass


def _stop(root: int, stopped: dict[int, int]) -> None:
    """Stop what runs of the tree, from the root down; note what was."""
    found = [root]
    for pid in found:
        state, began = _stat(pid)
        if state not in "TtZX":
            _send(pid, SIGSTOP)
            stopped[pid] = began
        found += _children(pid)


def _let_go_on(stopped: dict[int, int]) -> None:
    """Have what we stopped go on, children first; what others have stopped stays."""
    for pid, began in reversed(stopped.items()):
        if _start_time(pid) == began:
            _send(pid, SIGCONT)
    stopped.clear()


def _children(pid: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return []
    return [child for task in tasks for child in _children_of_task(f"/proc/{pid}/task/{task}/children")]


def _children_of_task(path: str) -> list[int]:
    try:
        with open(path) as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _start_time(pid: int) -> int:
    return _stat(pid)[1]


def _stat(pid: int) -> tuple[str, int]:
    """State and start time of a process; "X" and 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return "X", 0
    return fields[0].decode(), int(fields[19])


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
