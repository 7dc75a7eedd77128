"""Where a tree is restored: below a process of ours that ends all of it unless the restore succeeds.

CRIU restores a tree as siblings of itself, so the warden, CRIU's parent, becomes the tree's parent. Whatever
becomes of CRIU and of crcli (SIGKILL included), somebody is left who knows all that was started and every
file that was put in place, and who clears it away.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from crcli import kernel
from crcli.criu.question import remove_question
from crcli.criu.rpc import CriuProcess
from crcli.criu.sandbox import dodge_pids, exec_criu, reap_until_alone
from crcli.errors import HostLacks
from crcli.process import warden
from crcli.process.tree import child_pids
from crcli.process.warden import READY, reset_signals, say
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

_MESSAGE_LIMIT = 1 << 16


class Residence:
    """The place for one tree, with its warden.

    Left before `settle`, also by our death, the warden kills all that was restored and undoes what was noted
    with `note`. With `taken_pids` it is the first process of a new pid namespace (with a /proc of its own),
    and after `settle` stays as a small reaper for as long as anything lives inside; it then ends with the
    root's exit code. Without, the tree becomes our
    own child, or, if the warden is to `stay`, the warden ends when the root does, with its exit code.

    Should we die, who holds the other end of the pipe `first` (-1: nobody) has something to do before the
    tree is killed, and bounds it himself: the pipe's hang-up is waited for.

    With `new_root` CRIU and the tree have that folder as their root, in one more mount namespace, while the
    warden stays with ours, where the noted changes are. It needs `taken_pids`.
    """

    def __init__(
        self,
        keep_fds: Sequence[int],
        undo: Callable[[list[dict[str, Any]]], None],
        taken_pids: Sequence[int] | None,
        new_root: str,
        first: int,
    ) -> None:
        """Fork it and start CRIU below it. Call before any thread is started. `undo` runs in the warden.

        Closes `first`.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        channel, criu_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.criu = CriuProcess(channel, None)
        self.init = 0
        """The first process of the tree's namespace, as we see it; 0 where it lives in ours."""
        self._is_over = False
        self._root = new_root or "/"
        self._began = time.time()
        self._ending, ending = os.pipe()
        ours = os.pidfd_open(os.getpid())
        duty = _Duty(theirs, criu_end, tuple(keep_fds), undo, new_root, ending, ours, first)
        child = kernel.quiet_fork()
        if child == 0:
            self._control.close()
            channel.close()
            if taken_pids is not None:
                warden.found(theirs, partial(_reside, duty, tuple(taken_pids)))
            _oversee(duty)
        theirs.close()
        criu_end.close()
        os.close(ending)
        os.close(ours)
        if first >= 0:
            os.close(first)
        answer, self.warden = warden.first_word(self._control)
        self.warden = self.warden or child
        if taken_pids is not None:
            self.init = self.warden
            os.waitpid(child, 0)
        if answer != READY:
            self.close()
            raise HostLacks(
                f"cannot make namespaces for the tree: {answer.decode() or 'their first process died'}",
                hint="run crcli as root; --pid-namespace host restores without one when the pids are free",
            )

    def note(self, change: dict[str, Any]) -> None:
        """Have a change undone, should we die before the tree lives. Call before it is made."""
        self._tell({"change": change})

    def settle(self, root: int, stay: bool, bound: bool = False) -> int:
        """Let the tree live on without us; `root` is its root's pid inside.

        A tree that is `bound` (to us, who stay) lives no longer than its root, and no longer than we do.
        Returns the child of ours whose end tells of the root's.
        """
        self._is_over = True
        self._tell({"root": root, "stay": stay, "bound": bound, "until": "root" if bound else "all"})
        if self.init or stay:
            return self.warden
        os.waitpid(self.warden, 0)
        return root

    def end_of_root(self) -> int:
        """A descriptor, the caller's to close, that can be read when the root of a tree with a warden that
        stays has ended: its exit code in decimal, or nothing when the warden was killed."""
        return os.dup(self._ending)

    def root_end(self, limit_s: float) -> int | None:
        """The exit code of the root (negative: the signal that ended it) as the warden that stays saw it.

        Waits for it so many seconds; None when it has not come, or there is no such warden.
        """
        ready, _, _ = select.select([self._ending], [], [], limit_s)
        word = os.read(self._ending, 64) if ready else b""
        return int(word) if word else None

    def close(self) -> None:
        """Kill all that was restored, unless it was settled, and undo what was noted."""
        if not self._is_over and self.warden > 0:
            self._is_over = True
            try:
                self._control.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it is dead
            _reap_within(self.warden, _UNDO_LIMIT_S)
            remove_question(self._began, self._root)  # should the warden have been killed too
        self._control.close()
        self.criu.channel.close()
        if self._ending >= 0:
            os.close(self._ending)
            self._ending = -1

    def _tell(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            pass  # it was killed: then we are the parent of all that it was

    def __enter__(self) -> Residence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_PID = struct.Struct("i")
_START_LIMIT_S = 10.0
_RECEIVING = {"x86_64": ("45", "47"), "aarch64": ("207", "212")}.get(os.uname().machine, ())
"""The numbers of recvfrom(2) and recvmsg(2)."""

_UNDO_LIMIT_S = 10.0
_GRACE_S = 1.0
"""How long CRIU may take to undo its own work once nobody answers it any more (seconds)."""

_UNHEARD_S = 5.0
"""How long CRIU may go on once a process that it has begun was killed (seconds). Mostly it hears of that, and
fails by itself; but it is not the parent, and waits for ever for the next step of one that dies just then."""

_LOOK_EVERY_S = 0.5


def _reap_within(pid: int, limit_s: float) -> None:
    """Wait until a child of ours has ended; kill it when it takes longer."""
    end = time.monotonic() + limit_s
    try:
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.0005)
    except (ChildProcessError, ProcessLookupError):
        pass


class _Duty(Struct, frozen=True):
    """What a warden is forked with."""

    control: socket.socket
    criu_end: socket.socket
    keep: tuple[int, ...]
    undo: Callable[[list[dict[str, Any]]], None]
    new_root: str
    ending: int
    """A pipe for the word of the root's end."""
    crcli: int
    """A pidfd of crcli's."""
    first: int
    """A pipe whose other end is held by who has something to do before a tree is killed; -1: nobody."""

    def let_others_finish(self) -> None:
        """Wait for whoever has something to do first."""
        if self.first >= 0:
            poll = select.poll()
            poll.register(self.first, select.POLLIN)
            poll.poll()

    def bound_to(self, word: dict[str, Any]) -> int | None:
        """The process with which the tree is to end, if it is."""
        return self.crcli if word["bound"] else None

    def start_criu_below(self) -> int:
        """Start CRIU as our child, with the new root as its own: CRIU itself is not to be found there.

        So somebody starts it in a mount namespace for both, and exchanges the root under it. It becomes ours
        when that somebody ends.
        """
        reader, writer = os.pipe()
        helper = os.fork()
        if helper == 0:
            try:
                kernel.unshare(kernel.CLONE_NEWNS)
                os.chdir("/")
                criu = self.start_criu()
                _wait_until_listening(criu, self.criu_end.fileno())
                _enter_root(self.new_root)
                os.write(writer, _PID.pack(criu))
            except BaseException as error:
                say(self.control, str(error))
            finally:
                os._exit(0)
        os.close(writer)
        told = os.read(reader, _PID.size)
        os.close(reader)
        os.waitpid(helper, 0)
        if not told:
            os._exit(1)
        return int(_PID.unpack(told)[0])

    def start_criu(self) -> int:
        """Start CRIU as our child."""
        pid = os.fork()
        if pid == 0:
            reset_signals()
            kernel.go_first_without_memory()  # its processes get scores of their own from the image
            exec_criu(self.criu_end, (), self.keep)
        return pid

    def wait_for_word(self, criu: int) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Wait until the tree may live (None: it may not, or crcli is dead); and the changes noted so far.

        When CRIU ends its channel is shut: what it has begun to restore holds the other end open too. It is
        ended when it waits in vain.
        """
        changes: list[dict[str, Any]] = []
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(ended := os.pidfd_open(criu), select.POLLIN)
        patience: float | None = _UNHEARD_S
        while True:
            ready = {fd for fd, _ in poll.poll(None if patience is None else _LOOK_EVERY_S * 1000)}
            if ended in ready:
                poll.unregister(ended)
                self.criu_end.shutdown(socket.SHUT_RDWR)
                patience = None
                continue
            if not ready and patience is not None:
                patience = patience - _LOOK_EVERY_S if _one_was_killed() else _UNHEARD_S
                if patience <= 0:
                    signal.pidfd_send_signal(ended, signal.SIGKILL)
            if self.control.fileno() not in ready:
                continue
            if not (text := self.control.recv(_MESSAGE_LIMIT)):
                return None, changes
            told = json.loads(text)
            if "root" in told:
                return told, changes
            changes.append(told["change"])


def _one_was_killed() -> bool:
    """Whether a child of ours was, and nobody has reaped it yet."""
    for pid in child_pids(os.getpid()):
        with suppress(ChildProcessError):
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None and end.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
                return True
    return False


def _oversee(duty: _Duty) -> None:
    """The warden of a tree in our own pid namespace. Never returns."""
    try:
        os.setpgid(0, 0)  # what the terminal sends is crcli's to handle
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_IGN)  # CRIU does not inherit this: see start_criu
        kernel.become_subreaper()
        began = time.time()
        criu = duty.start_criu()
        duty.control.send(READY)
        word, changes = duty.wait_for_word(criu)
        _reap_within(criu, _GRACE_S)
        if word is None:
            duty.let_others_finish()
            warden.kill_descendants()
            duty.undo(changes)
            remove_question(began)
        elif word["stay"]:
            warden.become_reaper(word["root"], "root", duty.ending, duty.bound_to(word))
    except BaseException as error:
        say(duty.control, str(error))
    finally:
        os._exit(0)


def _reside(duty: _Duty, taken: tuple[int, ...]) -> NoReturn:
    """The warden as the first process of a pid namespace, whose end ends all inside. Never returns."""
    try:
        warden.mount_proc()
        dodge_pids(taken)
        for fd in duty.keep:
            warden.reopen(fd)
        began = time.time()
        criu = duty.start_criu_below() if duty.new_root else duty.start_criu()
        duty.control.send(READY)
        word, changes = duty.wait_for_word(criu)
        if word is None:
            duty.let_others_finish()
            os.kill(-1, signal.SIGKILL)
            reap_until_alone()
            duty.undo(changes)
            remove_question(began, duty.new_root or "/")
        else:
            warden.become_reaper(word["root"], word["until"], duty.ending, duty.bound_to(word))
    except BaseException as error:
        say(duty.control, str(error))
    finally:
        os._exit(1)


def _wait_until_listening(criu: int, channel: int) -> None:
    """Wait until CRIU waits for its request, with all that it needs loaded. Raises OSError."""
    end = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < end:
        with open(f"/proc/{criu}/syscall") as file:
            words = file.read().split()
        if words[0] in _RECEIVING and int(words[1], 16) == channel:
            return
        time.sleep(0.001)
    raise OSError("CRIU did not start")


def _enter_root(root: str) -> None:
    """Make a folder the root of this mount namespace, with our devices and the kernel's own files in it."""
    kernel.mount(root, root, "", kernel.MS_BIND | kernel.MS_REC)
    for folder in ("/dev", "/sys"):
        kernel.mount(folder, root + folder, "", kernel.MS_BIND | kernel.MS_REC)
    flags = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("proc", f"{root}/proc", "proc", flags)
    kernel.change_root(root)
