"""The process above a tree, of ours: it reaps, tells how the tree's root ended, and ends with its exit code.

Restored trees have one (criu/residence.py), and so have jobs that `crcli run` starts (job/start.py). It is no
part of the tree, and travels in no image. As the first process of a pid namespace it ends all inside with its
own end.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import stat
import struct
import sys
from typing import TYPE_CHECKING, NoReturn

from crcli import kernel
from crcli.process.tree import child_pids

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

READY = b"ready"

_CREDENTIALS = struct.Struct("3i")
"""`struct ucred`: pid, uid, gid."""

_REAPER = """
import os, signal, sys
root, until, ending = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
code = 0

def children():
    with open("/proc/self/task/%d/children" % os.getpid()) as file:
        return [int(pid) for pid in file.read().split()]

def end_all(*_):
    while found := children():
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
    os._exit(137)

signal.signal(signal.SIGTERM, end_all)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
while True:
    try:
        pid, status = os.wait()
    except ChildProcessError:
        break
    if pid == root:
        code = os.waitstatus_to_exitcode(status)
        try:
            os.write(ending, b"%d" % code)
        except OSError:
            pass  # nobody asks any more
        if until == "root":
            break
os._exit(code if code >= 0 else 128 - code)
"""


def say(control: socket.socket, text: str) -> None:
    """Send word of what went wrong, if somebody still listens."""
    try:
        control.send(text.encode()[:4000] or b"unknown")
    except OSError:
        pass


def first_word(control: socket.socket) -> tuple[bytes, int]:
    """The first message from the warden, and the pid that it has here; nothing and 0 when it died.

    The kernel says who sent it (SO_PASSCRED must be set): a process that is the first of a new namespace does
    not know its pid here.
    """
    room = socket.CMSG_SPACE(_CREDENTIALS.size)
    answer, ancillary, _, _ = control.recvmsg(4096, room)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            return answer, int(_CREDENTIALS.unpack_from(data)[0])
    return answer, 0


def reset_signals() -> None:
    """Give a forked child of ours the default signal handling."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def found(control: socket.socket, live: Callable[[], NoReturn]) -> NoReturn:
    """Make a pid namespace (and a mount namespace, for its /proc) whose first process calls `live`; end."""
    try:
        reset_signals()
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWPID)
        kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_SLAVE)
        first = os.fork()
        if first == 0:
            os.setsid()
            live()
    except BaseException as error:
        say(control, str(error))
    finally:
        os._exit(0)


def kill_descendants(but: Collection[int] = ()) -> None:
    """Kill and reap every descendant of this process (a subreaper, so none escapes) but these children."""
    while children := [pid for pid in child_pids(os.getpid()) if pid not in but]:
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                continue


def mount_proc() -> None:
    """Have a /proc of this pid namespace's own."""
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)


def reopen(fd: int) -> None:
    """Open a file or terminal again, here: CRIU cannot dump what was opened through other mounts."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISCHR(mode):
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        offset = os.lseek(fd, 0, os.SEEK_CUR) if stat.S_ISREG(mode) else 0
        kept = flags & (os.O_ACCMODE | os.O_APPEND)
        again = os.open(os.readlink(f"/proc/self/fd/{fd}"), kept | os.O_NOCTTY)
        if offset:
            os.lseek(again, offset, os.SEEK_SET)
        os.dup2(again, fd)
        os.close(again)


def become_reaper(root: int, until: str, ending: int, bound_to: int | None) -> NoReturn:
    """Reap until the `root` has ended, or "all" have; write the root's exit code to `ending`; end with it.

    With `bound_to` (a pidfd of our parent) our parent's death, by SIGKILL as well, is that of all below.
    """
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.chdir("/")
    os.set_inheritable(ending, True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # kept pending until its handler is there
    if bound_to is not None:
        kernel.die_with_parent(signal.SIGTERM)
        if select.select([bound_to], [], [], 0)[0]:  # it died before that
            os.kill(os.getpid(), signal.SIGTERM)
    command = [sys.executable, "-P", "-S", "-E", "-c", _REAPER, str(root), until, str(ending)]
    os.execv(sys.executable, command)
