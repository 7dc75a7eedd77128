"""The pager: the process that fills a restored tree's memory in while the tree runs already.

It is forked by a lazy restore before anything else, opens the store for itself, and outlives the command. A
smaller process beside it, the keeper, holds the same userfaultfd descriptors: were the last of those closed
too early, the kernel would give zeros for what has not come. So whoever of the two is killed, no process
ever sees a page that is not its own: without a keeper the pager goes on, without a pager the keeper ends the
tree, whose image is still there.

A store that fails is asked again until it answers. Meanwhile who touches a missing page waits, and all
others run on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.criu.lazy_socket import listen_in, receive_memories
from crcli.errors import CrcliError, HostLacks, NotFound, StoreError
from crcli.memory.extents import SpaceKey, SpaceKind
from crcli.memory.lazy import LazyFill
from crcli.memory.userfault import is_available
from crcli.pipeline.logs import keep_log
from crcli.process.identity import ProcessId, identify
from crcli.process.tree import child_pids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from crcli.memory.extents import Extent, Origin
    from crcli.store.base import Buffer

    Read = Callable[[Sequence[Origin]], Iterable[tuple[Origin, Buffer]]]
    Plan = Sequence[Sequence[Origin]]

COMM = "crcli-pager"
"""What the pager is called in ps, and found by."""

_HOLD, _WHOLE = b"hold", b"whole"
_MESSAGE_LIMIT = 1 << 20
_END_LIMIT_S = 10.0
_PATIENCE_S = (0.5, 30.0)
"""How long the pager waits before it asks a store again that failed (seconds): at first, and at most."""


class Pager:
    """The pager as the restore sees it. Unless it is told to `go` it ends with us, and has done nothing."""

    def __init__(
        self,
        spaces: Mapping[SpaceKey, list[Extent]],
        open_source: Callable[[], tuple[Plan, Read]],
        threads: int,
    ) -> None:
        """Fork it; call before any thread is started.

        `spaces` is what will be missing; `open_source`, which runs in the pager, tells in which order its
        sources are to be fetched, and how. Raises HostLacks.
        """
        if not is_available():
            raise HostLacks(
                "this host does not let crcli fill memory in behind a running tree (userfaultfd)",
                hint="leave out --lazy; it needs a kernel with CONFIG_USERFAULTFD, and CAP_SYS_PTRACE",
            )
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = kernel.quiet_fork()
        if self.pid == 0:
            self._control.close()
            _live(self._listener, theirs, spaces, open_source, threads)
        theirs.close()

    def listen_in(self, folder_fd: int, processes: int) -> None:
        """Have a CRIU that will restore so many processes, and works in this folder, find it."""
        listen_in(self._listener, folder_fd)
        self._control.send(b"%d" % processes)

    def go(self, init: int, processes: Sequence[ProcessId]) -> int:
        """Begin: CRIU has restored these processes, in the namespace of `init` (0: ours), and holds them.

        Returns how many bytes are missing. From now on it ends when nothing is, or nobody misses it.
        Raises OSError when it failed.
        """
        try:
            self._control.send(json.dumps([init, [[one.pid, one.start_time] for one in processes]]).encode())
            answer = json.loads(self._control.recv(_MESSAGE_LIMIT) or b'"it was killed"')
        except ConnectionError:
            answer = "it was killed"
        if isinstance(answer, str):
            raise OSError(f"the process that fills in memory failed: {answer}")
        return int(answer)

    def leave(self) -> None:
        """Let it work on without us."""
        self._control.close()
        self._listener.close()

    def close(self) -> None:
        """Return when it has ended: it does unless it was told to `go`, or its tree is dead."""
        self.leave()
        end = time.monotonic() + _END_LIMIT_S
        try:
            while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > end:
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.002)
        except (ChildProcessError, ProcessLookupError):
            pass


# --- the pager itself --------------------------------------------------------------------------------------


def _live(
    listener: socket.socket,
    control: socket.socket,
    spaces: Mapping[SpaceKey, list[Extent]],
    open_source: Callable[[], tuple[Plan, Read]],
    threads: int,
) -> None:
    """The pager's whole life. Never returns."""
    try:
        _settle_in()
        keeper = _Keeper()
        fill = LazyFill(spaces, *_steadily(*open_source()), threads, keeper.hold)
        if channel := _begin(fill, listener, control, keeper):
            fill.wait()
            channel.close()  # not before: CRIU tells us there that it has finished, and fails if it cannot
        keeper.end()  # nothing is missing, or nobody is left who misses it
    except BaseException as error:
        _say(control, error)
    finally:
        os._exit(0)


def _settle_in() -> None:
    """Become a process that no terminal and no caller knows, and that only SIGKILL ends."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    with open("/proc/self/comm", "w") as file:
        file.write(COMM)


def _begin(
    fill: LazyFill, listener: socket.socket, control: socket.socket, keeper: _Keeper
) -> socket.socket | None:
    """Take all memories over, and begin when the restore says so; None when it gives up before.

    Returns the connection with CRIU.
    """
    if not (count := control.recv(_MESSAGE_LIMIT)):
        return None
    ready, _, _ = select.select([listener, control], [], [])
    if listener not in ready:
        return None
    channel, _ = listener.accept()
    for pid, fd in receive_memories(channel, int(count)):
        fill.add(SpaceKey(SpaceKind.PROCESS, pid), fd)
        keeper.hold(fd)
    if not (order := control.recv(_MESSAGE_LIMIT)):
        return None
    keeper.watch(order)
    fill.go()
    control.send(b"%d" % fill.missing_bytes)
    return channel


def _steadily(plan: Plan, read: Read) -> tuple[Plan, Read]:
    """The same plan, and reading that asks a failing store until it answers."""

    def patiently(group: Sequence[Origin]) -> Iterator[tuple[Origin, Buffer]]:
        left = list(group)
        wait, most = _PATIENCE_S
        while left:
            try:
                for origin, raw in read(left):
                    yield origin, raw
                    left.remove(origin)
            except NotFound:
                raise
            except StoreError as error:
                _note(f"the store does not answer, {len(left)} chunks wait for it: {error}")
                time.sleep(wait)
                wait = min(2 * wait, most)

    return plan, patiently


def _say(control: socket.socket, error: BaseException) -> None:
    """Tell of a failure: to the restore while it waits, and in the log."""
    text = f"{type(error).__name__}: {error}"
    try:
        control.send(json.dumps(text).encode())
    except OSError:
        _note(f"gave up, so the tree is ended (its image is still there): {text}")


def _note(text: str) -> None:
    keep_log(f"{time.strftime('%F %T')} {text}\n", COMM)


# --- the keeper ------------------------------------------------------------------------------------------


class _Keeper:
    """A process that holds what the pager holds, and ends the tree if the pager ends too early."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            self._channel.close()
            _keep(theirs)
        theirs.close()

    def hold(self, fd: int) -> None:
        """Have it hold a memory too."""
        self._send(lambda: socket.send_fds(self._channel, [_HOLD], [fd]))

    def watch(self, order: bytes) -> None:
        """Tell it whom to end: the message of Pager.go."""
        self._send(lambda: self._channel.send(order))

    def end(self) -> None:
        """Have it let go: all memory is whole, or nobody has it any more."""
        self._send(lambda: self._channel.send(_WHOLE))
        os.waitpid(self._pid, 0)

    def _send(self, send: Callable[[], object]) -> None:
        try:
            send()
        except OSError:
            pass  # it was killed; the pager holds the memories itself


def _keep(channel: socket.socket) -> None:
    """The keeper's whole life. Never returns."""
    order = b""
    try:
        with open("/proc/self/comm", "w") as file:
            file.write("crcli-keeper")
        while True:
            message, _, _, _ = socket.recv_fds(channel, _MESSAGE_LIMIT, 1)  # descriptors stay open
            if not message or message == _WHOLE:
                break
            order = message if message != _HOLD else order
        if not message and order:
            init, processes = json.loads(order)
            _note("the pager was killed, so the tree is ended; its image is still there")
            _end_tree(init, [ProcessId(*one) for one in processes])
    finally:
        os._exit(0)


def _end_tree(init: int, processes: Sequence[ProcessId]) -> None:
    """Kill the processes and all that they have forked; return when they are dead, or after a while."""
    victims = {process.pid: process for process in processes}
    end = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < end:
        living = [process for process in victims.values() if process.alive()]
        if not living:
            return
        for process in living:
            victims |= {child.pid: child for child in _children(process.pid)}
        for pid in [init] if init else [process.pid for process in victims.values() if process.alive()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.01)


def _children(pid: int) -> list[ProcessId]:
    try:
        return [identify(child) for child in child_pids(pid)]
    except (OSError, CrcliError):
        return []
