"""Starting a job: a command below an init of ours, in a pid namespace of its own, below a warden.

What the job writes into pipes, and its terminal, go through us; so nothing of it is lost when its tree is
dumped and killed, and a restored job finds the same kind of thing whatever our own output is there.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NoReturn

from crcli import kernel
from crcli.errors import HostLacks
from crcli.job import init, sentry
from crcli.job.relay import Relay
from crcli.process import warden
from crcli.process.identity import ProcessId, identify
from crcli.process.tree import child_pids
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


class Job(Struct, frozen=True):
    """A job that runs: the root of its tree, and our child, the warden, which ends when the root does.

    `ended` becomes readable when the root has ended, and then says how: its exit code in decimal, negative
    for a signal's number; nothing when the warden was killed.
    """

    root: ProcessId
    child: int
    ended: int
    relay: Relay


_PYTHONS_OWN = {signal.SIGPIPE, signal.SIGXFSZ}
"""What Python ignores in every process of its own: what whoever started it did with them is not known."""


class SignalHandling(Struct, frozen=True):
    """Which signals are ignored, and which are blocked: what a program has from whoever starts it."""

    ignored: frozenset[int]
    blocked: frozenset[int]

    @classmethod
    def now(cls) -> SignalHandling:
        """That of this thread. As long as we have no handlers it is that of whoever started us."""
        numbers = signal.valid_signals() - _PYTHONS_OWN
        ignored = frozenset(number for number in numbers if signal.getsignal(number) is signal.SIG_IGN)
        return cls(ignored, frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ())))

    def take(self) -> None:
        """Have it from now on, and pass it on to the program that we become."""
        for number in self.ignored:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)


def start_job(
    command: Sequence[str], environment: Mapping[str, str], handling: SignalHandling, own_namespace: bool
) -> Job:
    """Start the command with our working folder, user and input; return when its init runs.

    The job lives no longer than we do. Raises HostLacks where a pid namespace is wanted and not allowed.
    """
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    stdio = _Stdio()
    ended, ending = os.pipe()
    ours = os.pidfd_open(os.getpid())
    live = partial(
        _live, theirs, _Start(command, environment, handling, stdio.theirs, ending, ours, own_namespace)
    )
    child = kernel.quiet_fork()
    if child == 0:
        control.close()
        if own_namespace:
            warden.found(theirs, live)
        live()
    theirs.close()
    stdio.close_theirs()
    os.close(ending)
    os.close(ours)
    answer, first = warden.first_word(control)
    if own_namespace:
        os.waitpid(child, 0)
        child = first
    root = _only_child(child) if answer == warden.READY else None
    control.close()  # the warden reaps from now on
    if root is None:
        os.close(ended)
        stdio.relay.close()
        raise HostLacks(
            f"the job cannot be started: {answer.decode() or 'its first process died'}",
            hint="--pid-namespace host starts it without a namespace of its own" if own_namespace else "",
        )
    return Job(root, child, ended, stdio.relay)


def _only_child(pid: int) -> ProcessId | None:
    """The child of a process that does not reap it yet; None when it was killed."""
    try:
        (child,) = child_pids(pid)
        return identify(child)
    except (ValueError, ProcessLookupError):
        return None


@contextmanager
def watched(deadline: int, root: ProcessId, file: str) -> Iterator[None]:
    """Until the end of the block a sentry stops the tree of this root while the lease has lapsed.

    `deadline` is a descriptor of the time until which it is good (`Lease.deadline`), `file` is where the job
    finds its number: the sentry removes that should we be killed.
    """
    ours = os.pidfd_open(os.getpid())
    words = (deadline, ours, root.pid, root.start_time)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", sentry.__file__, file, *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(deadline, ours),
        start_new_session=True,
    )
    os.close(ours)
    try:
        yield
    finally:
        process.kill()
        process.wait()


class _Stdio:
    """What a job gets as input, output and errors (`theirs`), and our side of it.

    A terminal where our input is one; else our input itself. For what is no terminal of ours there is a pipe,
    the same one for output and errors where ours are the same.
    """

    def __init__(self) -> None:
        self.relay = Relay()
        self.is_terminal = os.isatty(0)
        self._made: list[int] = []
        source = self._terminal() if self.is_terminal else _open_input()
        output = source if self.is_terminal and os.isatty(1) else self._pipe(1)
        if self.is_terminal and os.isatty(2):
            errors = source
        elif _same(1, 2) and output != source:
            errors = output
        else:
            errors = self._pipe(2)
        self.theirs = (source, output, errors)

    def close_theirs(self) -> None:
        """Close our copies of the job's ends: the job has them."""
        for fd in self._made:
            os.close(fd)
        self._made.clear()

    def _terminal(self) -> int:
        import termios

        master, slave = os.openpty()
        termios.tcsetattr(slave, termios.TCSANOW, termios.tcgetattr(0))
        self.relay.masters.append(master)
        self.relay.resize()
        self._made.append(slave)
        return slave

    def _pipe(self, target: int) -> int:
        reads, writes = os.pipe()
        self.relay.outputs.append((reads, target))
        self._made.append(writes)
        return writes


def _open_input() -> int:
    """Our input; something empty where we have none."""
    try:
        os.fstat(0)
    except OSError:
        os.open(os.devnull, os.O_RDONLY)  # becomes descriptor 0
    return 0


def _same(one: int, other: int) -> bool:
    """Whether two descriptors of ours lead to the same file."""
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:
        return False


class _Start(Struct, frozen=True):
    """What a warden is forked with."""

    command: Sequence[str]
    environment: Mapping[str, str]
    handling: SignalHandling
    stdio: tuple[int, int, int]
    ending: int
    crcli: int
    own_namespace: bool


def _live(control: socket.socket, start: _Start) -> NoReturn:
    """The warden: start the init, say so, reap. Never returns."""
    try:
        warden.reset_signals()
        if start.own_namespace:
            warden.mount_proc()
            _reopen(start.stdio[0])
        else:
            os.setsid()
        kernel.become_subreaper()
        root = os.fork()
        if root == 0:
            _become_init(start)
        control.send(warden.READY)
        control.recv(1)  # until we were looked at, or there is nobody to look
        warden.become_reaper(root, "root", start.ending, start.crcli)
    except BaseException as error:
        warden.say(control, str(error))
    finally:
        os._exit(1)


def _reopen(source: int) -> None:
    try:
        warden.reopen(source)
    except OSError:
        pass  # a file without a name: the job reads it all the same


def _become_init(start: _Start) -> NoReturn:
    """Be the leader of a session with nothing open but its three, and become the init. Never returns."""
    try:
        os.setsid()
        kernel.become_subreaper()
        end = os.sysconf("SC_OPEN_MAX")
        for low, high in pairwise(sorted({2, *start.stdio, end})):  # the others first: there may be few
            os.closerange(low + 1, high)
        for number, fd in enumerate([os.dup(fd) for fd in start.stdio]):
            os.dup2(fd, number, inheritable=True)
        os.closerange(3, end)
        start.handling.take()
        python = os.path.realpath(sys.executable)
        os.execve(python, [python, "-I", "-S", "-E", init.__file__, *start.command], dict(start.environment))
    finally:
        os._exit(init.CANNOT_EXECUTE)
