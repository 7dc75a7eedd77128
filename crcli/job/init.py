"""The first process of a job's tree: it starts the command, passes signals on to it, and reaps.

It travels in the job's images. So it is a plain interpreter that imports nothing but what is built in: small,
and restored wherever the interpreter's own files are the same. It is the leader of its session, and what
started it made it a subreaper: daemons of the command stay in the tree. In a terminal the command leads a
session of its own, which the terminal controls. When the command has ended, whatever is left below is killed,
and the exit code is the command's (128 + N when signal N ended it).

    python -I -S -E init.py COMMAND [ARGUMENT...]
"""

import os
import sys
from _signal import (  # type: ignore[import-not-found]  # `signal` costs more than all the rest
    SIG_BLOCK,
    SIG_DFL,
    SIG_SETMASK,
    SIGCHLD,
    SIGKILL,
    SIGPIPE,
    SIGXFSZ,
    pthread_sigmask,
    signal,
    sigwaitinfo,
    valid_signals,
)

CANNOT_EXECUTE, NOT_FOUND = 126, 127
_FAULTS = {4, 5, 6, 7, 8, 11, 31}
"""SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS: our own mistakes, never to be blocked."""


def main(command: list[str]) -> int:
    """Run the command to its end; return its exit code."""
    passed_on = valid_signals() - _FAULTS
    before = pthread_sigmask(SIG_BLOCK, passed_on)
    job = os.fork()
    if job == 0:
        pthread_sigmask(SIG_SETMASK, before)
        _become(command)
    if os.isatty(0):
        _let_go_of_terminal()
    while True:
        arrived = sigwaitinfo(passed_on)
        if arrived.si_signo == SIGCHLD:
            status = _reap(job)
            if status is not None:
                _end_the_rest()
                return status if status >= 0 else 128 - status
        elif arrived.si_code <= 0:  # somebody sent it; what the terminal sends (> 0) the command gets as well
            _send(job, arrived.si_signo)


def _become(command: list[str]) -> None:
    for number in (SIGPIPE, SIGXFSZ):  # Python ignores them, and a program would go on doing so
        signal(number, SIG_DFL)
    if os.isatty(0):
        _take_terminal()
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"crcli run: {command[0]}: {error.strerror}\n".encode())
        os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else CANNOT_EXECUTE)


def _take_terminal() -> None:
    """Lead a session that our terminal controls: after a restore only who does can open /dev/tty."""
    os.setsid()
    try:
        os.close(os.open(os.ttyname(0), os.O_RDWR))
    except OSError:
        pass  # it has no name here: the command goes without


def _let_go_of_terminal() -> None:
    """Leave it to those whom it controls: CRIU asks the first who has it open which session that is."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)


def _reap(job: int) -> int | None:
    """Reap all that have ended; return how the job did, or None while it runs."""
    ended = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        if pid == job:
            ended = os.waitstatus_to_exitcode(status)


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it has ended, and SIGCHLD is on its way


def _end_the_rest() -> None:
    """Kill and reap all below us: orphans come to us, so none escapes."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            left = file.read().split()
        if not left:
            return
        for pid in left:
            _send(int(pid), SIGKILL)
            try:
                os.waitpid(int(pid), 0)
            except ChildProcessError:
                pass


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
