"""Throwaway namespaces that CRIU is started in, for a trial.

A `Sandbox` is forked before the freeze, while crcli still has one thread, and makes its namespaces then, so
that none of that time falls into the freeze. It holds two processes: a keeper, whose death takes all with
it (its own parent's death kills it, crcli's included), and the first process of a new pid namespace,
which starts CRIU when told to and reaps. Its mounts are private, its network is an empty one with `lo` up.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.criu import kerndat
from crcli.criu.binary import criu_command
from crcli.criu.question import remove_question
from crcli.criu.rpc import CriuProcess
from crcli.errors import HostLacks
from crcli.process.warden import READY, mount_proc, reset_signals, say
from crcli.records import Struct, asdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_PID_MAX = "/proc/sys/kernel/pid_max"
_UNUSED_MOUNT_POINTS = ("/proc/sys/fs/binfmt_misc", "/proc/fs/nfsd", "/mnt")
_LAST_PID = "/proc/sys/kernel/ns_last_pid"


class Order(Struct, frozen=True):
    """What the sandbox is to do: overlay these folders, keep these pids free, then start CRIU.

    Writes below an overlaid folder land in the sandbox, so that a socket or temporary file that CRIU makes
    or removes there never touches the real one; the sockets `keep` stay the real ones. `stand_ins`
    says of each external object what CRIU is to put in its place: a "terminal" or a "socket".
    """

    overlays: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    taken_pids: tuple[int, ...] = ()
    stand_ins: tuple[str, ...] = ()


_ANSWERS = b"answers:"
_MOST_BYTES = 1 << 17


class Sandbox:
    """See the module. A context manager: leaving it destroys everything inside."""

    def __init__(self, images_fd: int) -> None:
        """Fork it. Call before any thread is started. CRIU will find its images in `images_fd`."""
        self._began = time.time()
        self._answers = kerndat.Answers() if kerndat.is_wanted() else None
        self._asks = self._answers is not None and not self._answers.known
        self._was_heard = not self._asks
        self._trouble = b""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel, criu_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.keeper = kernel.quiet_fork()
        if self.keeper == 0:
            self._control.close()
            self.channel.close()
            _keep(theirs, criu_end, images_fd, self._answers.known if self._answers is not None else None)
        theirs.close()
        criu_end.close()

    def wait_until_ready(self) -> None:
        """Return when its namespaces are made; raise HostLacks when they are not allowed."""
        answer = self._control.recv(4096)
        if answer != READY:
            self.close()
            raise HostLacks(
                f"cannot make the namespaces for a trial restore: {answer.decode() or 'the keeper died'}",
                hint="run crcli as root; --no-trial dumps without the trial",
            )

    def answers(self) -> bytes:
        """What CRIU has found out about this kernel, empty where that is not known. Nobody else is to ask: a
        CRIU inside was asked if need be, which is waited for."""
        if self._answers is None:
            return kerndat.answers_here()
        if not self._was_heard:
            self._was_heard = True
            said = self._control.recv(_MOST_BYTES)
            if said.startswith(_ANSWERS):
                self._answers.keep(said.removeprefix(_ANSWERS))
            else:
                self._trouble = said or b"the sandbox died"
        return self._answers.known

    def start_criu(self, order: Order) -> CriuProcess:
        """Start CRIU inside; its request's descriptors for external objects are 200, 201, …"""
        self.answers()
        if not self._trouble:
            self._control.send(json.dumps(asdict(order)).encode())
        answer = self._trouble or self._control.recv(4096)
        if answer != READY:
            raise OSError(answer.decode() or "the sandbox died")
        return CriuProcess(self.channel, None)

    def learn(self) -> None:
        """Keep what CRIU has found out about the kernel for other trials, where it does not do so itself."""
        if self._answers is not None:
            for first in _only_child(self.keeper):
                self._answers.learn(f"/proc/{first}/root")

    def close(self) -> None:
        """Kill everything inside, and reap the keeper, which reaps its child: no zombie is left to others."""
        keeper, self.keeper = self.keeper, 0
        if keeper > 0:
            for pid in _only_child(keeper) or [keeper]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            os.waitpid(keeper, 0)
            if self._asks:
                remove_question(self._began)  # of one that asked until now, or is still asking
        self._control.close()
        self.channel.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _only_child(keeper: int) -> list[int]:
    """The pid of the process that a keeper waits for, in a list; empty when it cannot be told."""
    try:
        with open(f"/proc/{keeper}/task/{keeper}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except FileNotFoundError:
        return []


STAND_IN_FD = 200
"""The first of the descriptors that stand in for external objects inside a sandbox."""


def _keep(control: socket.socket, criu_end: socket.socket, images_fd: int, answers: bytes | None) -> None:
    """The keeper: make the namespaces, fork their first process, wait. Never returns."""
    try:
        reset_signals()
        kernel.die_with_parent(signal.SIGKILL)
        kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWPID)
        kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        first = os.fork()
        if first == 0:
            kernel.die_with_parent(signal.SIGKILL)
            _serve(control, criu_end, images_fd, answers)
        os.waitpid(first, 0)
    except BaseException as error:
        say(control, str(error))
    finally:
        os._exit(1)


def _serve(control: socket.socket, criu_end: socket.socket, images_fd: int, answers: bytes | None) -> None:
    """The first process of the pid namespace: wait for the order, start CRIU, reap. Never returns."""
    try:
        mount_proc()
        kernel.loopback_up()
        kernel.own_every_address()  # connected sockets must find a way to wherever they are connected
        _allow_any_address()
        control.send(READY)
        if answers == b"":
            answers = kerndat.ask()  # nobody waits for us yet
            control.send(_ANSWERS + answers)
        text = control.recv(1 << 20)
        if not text:
            os._exit(0)
        kernel.hurry()
        order = Order(**json.loads(text))
        if answers is not None:
            kerndat.lay_out(answers, order.overlays)
        if order.overlays:
            layers = _mount_layers()
            for number, folder in enumerate(order.overlays):
                _overlay(folder, layers, number, order.keep)
        stand_ins = [_stand_in(kind) for kind in order.stand_ins]
        _fresh_terminals()
        dodge_pids(order.taken_pids)
        criu = os.fork()
        if criu == 0:
            exec_criu(criu_end, stand_ins, [images_fd])
        control.send(READY)
        reap_until_alone(criu, criu_end)
    except BaseException as error:
        say(control, str(error))
    finally:
        os._exit(1)


def reap_until_alone(criu: int = 0, criu_end: socket.socket | None = None) -> None:
    """Wait for children until there are none.

    When CRIU ends its channel is shut: what it has begun to restore holds that end open too.
    """
    while True:
        try:
            pid, _ = os.wait()
        except ChildProcessError:
            return
        if pid == criu and criu_end is not None:
            criu_end.shutdown(socket.SHUT_RDWR)


def _allow_any_address() -> None:
    """Let sockets bind to addresses that this empty network does not have, and anyone open ICMP ones.

    The image's sockets exist, so they were allowed where they came from.
    """
    for setting, value in (
        ("ipv4/ip_nonlocal_bind", "1"),
        ("ipv6/ip_nonlocal_bind", "1"),
        ("ipv4/ping_group_range", "0 2147483647"),
        ("ipv4/ip_unprivileged_port_start", "0"),
    ):
        try:
            with open(f"/proc/sys/net/{setting}", "w") as file:
                file.write(value)
        except OSError:
            pass


def _mount_layers() -> str:
    """Mount memory for the overlays' upper layers where it hides nothing; return the path."""
    for place in _UNUSED_MOUNT_POINTS:
        if os.path.isdir(place):
            kernel.mount("tmpfs", place, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=0700")
            return place
    raise OSError("no mount point for the trial's overlays")


def _overlay(folder: str, layers: str, number: int, keep: Sequence[str]) -> None:
    """Lay a throwaway layer over a folder; what is mounted below it stays visible, and so does `keep`."""
    upper, work = (f"{layers}/{kind}-{number}" for kind in ("upper", "work"))
    status = os.stat(folder)
    for path in (upper, work):
        os.mkdir(path, 0o755)
    os.chown(upper, status.st_uid, status.st_gid)
    os.chmod(upper, status.st_mode & 0o7777)
    below = [(os.open(path, os.O_PATH), path) for path in _mounts_below(folder)]
    below += [(os.open(path, os.O_PATH), path) for path in keep if os.path.dirname(path) == folder]
    escaped = folder.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,")
    options = f"lowerdir={escaped},upperdir={upper},workdir={work}"
    kernel.mount("overlay", folder, "overlay", 0, options)
    for fd, path in below:
        kernel.mount(f"/proc/self/fd/{fd}", path, "", kernel.MS_BIND | kernel.MS_REC)
        os.close(fd)


def _mounts_below(folder: str) -> list[str]:
    """Mount points directly or further below a folder, those inside another of them left out."""
    found: list[str] = []
    for point in sorted(set(kernel.mount_points())):
        inside = point.startswith(folder.rstrip("/") + "/")
        if inside and not any(point.startswith(f"{other}/") for other in found):
            found.append(point)
    return found


def dodge_pids(taken: Sequence[int]) -> None:
    """Make the next pids of this namespace ones that the tree does not need."""
    used = set(taken)
    with open(_PID_MAX) as file:
        last = int(file.read()) - 1
    span = 64
    while any(pid in used for pid in range(last - span, last)):
        last -= span
    with open(_LAST_PID, "w") as file:
        file.write(str(last - span))


def _stand_in(kind: str) -> int:
    """A descriptor to put in the place of an external object."""
    if kind == "socket":  # and nothing simpler: an event loop may wait for it
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours.detach()
    master, slave = os.openpty()
    os.set_inheritable(master, True)  # must outlive us: a terminal without its other side is hung up
    return slave


def _fresh_terminals() -> None:
    """Have pseudo-terminals of our own, numbered from 0: those of the image are in use by the original."""
    flags = kernel.MS_NOSUID | kernel.MS_NOEXEC
    kernel.mount("devpts", "/dev/pts", "devpts", flags, "newinstance,ptmxmode=0666,mode=0620")
    kernel.mount("/dev/pts/ptmx", "/dev/ptmx", "", kernel.MS_BIND)


def exec_criu(channel: socket.socket, stand_ins: Sequence[int], keep: Sequence[int]) -> None:
    """Become CRIU. Never returns."""
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for number, fd in enumerate(stand_ins):
            os.dup2(fd, STAND_IN_FD + number, inheritable=True)
        for fd in (0, 1, 2):
            os.dup2(null, fd, inheritable=True)
        for fd in (channel.fileno(), *keep):
            os.set_inheritable(fd, True)
        os.setpgid(0, 0)
        command = [*criu_command(), "swrk", str(channel.fileno())]
        os.execv(command[0], command)
    finally:
        os._exit(127)
