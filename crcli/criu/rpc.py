"""CRIU as our child: one `criu swrk` process, one request, its notifications, its answer.

pycriu brings the messages; its client class hides the notifications' pid and the server's error text,
gives no time limit and no say over the process, so the exchange itself is here. The protocol is CRIU's
(images/rpc.proto upstream): one protobuf message per SEQPACKET datagram; while a request runs, CRIU sends
NOTIFY messages and waits for each to be answered.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from crcli.criu.binary import criu_command
from crcli.criu.limits import with_limits_answered
from crcli.criu.messages import rpc
from crcli.criu.question import remove_question
from crcli.errors import HostLacks
from crcli.process.tree import child_pids
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

_MESSAGE_LIMIT = 1 << 20
_START_LIMIT_S, _DEATH_LIMIT_S = 2.0, 10.0


def _entering(pid: int) -> list[str]:
    """What to put before a command so that it works in a process's pid and mount namespaces (0: nothing)."""
    return ["nsenter", "--target", str(pid), "--pid", "--mount", "--"] if pid else []


__all__ = ["CriuAnswer", "CriuDied", "CriuProcess", "CriuTimeout", "rpc"]


class CriuDied(Exception):
    """CRIU ended, or was killed, without answering."""


class CriuTimeout(Exception):
    """CRIU did not finish within its time limit; its process group has been killed."""


class CriuAnswer(Struct, frozen=True):
    """What CRIU said at the end: whether it worked, and its error text."""

    success: bool
    message: str


class _Patience(Struct):
    """How long CRIU is waited for, in all: see `CriuProcess.request`."""

    limit_s: float | None
    idle_since: Callable[[], float]
    spent_s: float = 0.0

    def wait_for(self, channel: socket.socket) -> bool:
        """Whether something comes in time."""
        began = time.monotonic()
        while True:
            left_s = None if self.limit_s is None else max(0.0, self.limit_s - self._spent_s(began))
            ready, _, _ = select.select([channel], [], [], left_s)
            if ready:
                self.spent_s = self._spent_s(began)
                return True
            if left_s == 0.0:
                return False

    def _spent_s(self, began: float) -> float:
        """What CRIU has taken by now, with a wait that began then."""
        now, since = time.monotonic(), self.idle_since()
        return max(0.0, now - since) if since > began else self.spent_s + now - began


class CriuProcess:
    """A `criu swrk` process in its own process group; a context manager that never leaves one behind."""

    def __init__(
        self,
        channel: socket.socket,
        process: subprocess.Popen[bytes] | None,
        enter: int = 0,
        began: float = 0.0,
    ) -> None:
        self.channel = channel
        self.process = process
        self.enter = enter
        self._began = began

    @classmethod
    def start(cls, pass_fds: Sequence[int] = (), answer_limits: bool = False, enter: int = 0) -> CriuProcess:
        """Start criu, ready for one request. `pass_fds` keep their numbers in it.

        With `answer_limits` it can read other users' limits without CAP_SYS_RESOURCE, but not dump
        processes that have seccomp filters (see crcli.criu.limits).
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [*_entering(enter), *criu_command(), "swrk", str(theirs.fileno())]
            kept = (theirs.fileno(), *pass_fds)

            def launch() -> subprocess.Popen[bytes]:
                try:
                    return subprocess.Popen(
                        command,
                        pass_fds=kept,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        process_group=0,
                    )
                except OSError as error:
                    raise HostLacks(f"{command[0]} cannot be started: {error.strerror}") from error

            began = time.time()
            process = with_limits_answered(launch) if answer_limits else launch()
        return cls(ours, process, enter, began)

    def request(
        self,
        kind: int,
        options: Any,
        on_notify: Callable[[str, int], bool],
        limit_s: float | None = None,
        idle_since: Callable[[], float] = lambda: 0.0,
        meanwhile: Callable[[], None] = lambda: None,
        on_answered: Callable[[str], None] = lambda script: None,
    ) -> CriuAnswer:
        """Send one request and return CRIU's answer.

        `on_notify(script, pid)` is called for each notification; returning False (or raising, which is
        passed on once CRIU has been told) makes CRIU abandon what it does. Time spent in `on_notify` does
        not count against `limit_s`, which bounds CRIU's own work in seconds. It begins anew at `idle_since()`
        (by the monotonic clock): when CRIU last did something by which it is seen to go on. `meanwhile` is
        called once CRIU works on the request, and before anything that it says is heard;
        `on_answered(script)` once it was told to go on after a notification.
        """
        message = rpc.criu_req(type=kind, opts=options)
        try:
            self.channel.send(message.SerializeToString())
        except OSError as error:
            raise CriuDied("CRIU ended as soon as it was started") from error
        meanwhile()
        patience = _Patience(limit_s, idle_since)
        failure: BaseException | None = None
        while True:
            answer = self._receive(patience)
            if answer.type != rpc.NOTIFY:
                break
            go_on = False
            try:
                go_on = failure is None and on_notify(answer.notify.script, answer.notify.pid)
            except BaseException as error:  # told to CRIU first, raised when CRIU has let go of the tree
                failure = error
            reply = rpc.criu_req(type=rpc.NOTIFY, notify_success=go_on)
            try:
                self.channel.send(reply.SerializeToString())
            except OSError as error:
                raise failure or CriuDied("CRIU went away while it waited for us") from error
            if go_on:
                on_answered(answer.notify.script)
        self.wait()
        if failure is not None:
            raise failure
        return CriuAnswer(answer.success, answer.cr_errmsg.strip())

    def _receive(self, patience: _Patience) -> Any:
        if not patience.wait_for(self.channel):
            self.kill()
            raise CriuTimeout
        try:
            data = self.channel.recv(_MESSAGE_LIMIT)
        except ConnectionResetError:
            data = b""
        if not data:
            raise CriuDied("CRIU ended without an answer")
        return rpc.criu_resp.FromString(data)

    def host_pid(self) -> int:
        """The pid of CRIU itself as we see it: where it works inside other namespaces, nsenter's child."""
        if self.process is None or self.enter == 0:
            return self.process.pid if self.process is not None else 0
        end = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < end and self.process.poll() is None:
            if children := child_pids(self.process.pid):
                return children[0]
            time.sleep(0.001)
        return 0

    def wait(self) -> int | None:
        """Wait until the process has ended; kill it when it does not."""
        if self.process is None:
            return None
        try:
            return self.process.wait(_DEATH_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def kill(self) -> None:
        """Kill CRIU's whole process group: what it has begun to restore goes with it."""
        if self.process is not None and self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(_DEATH_LIMIT_S)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass

    def __enter__(self) -> CriuProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel, upon which CRIU thaws what it holds and ends; kill it only if it does not."""
        self.channel.close()
        if (code := self.wait()) is not None and code < 0:
            remove_question(self._began)
