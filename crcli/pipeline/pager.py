"""The pager: the process that fills a restored tree's memory in while the tree runs already.

It is forked by a lazy restore before anything else (clients of a store may run threads, which a fork loses),
is told later what is missing, opens the store for itself, and outlives the command. A smaller process beside
it, the keeper, holds the same userfaultfd descriptors: were the last of those closed too early, the kernel
would give zeros for what has not come. So whoever of the two is killed, no process ever sees a page that is
not its own: without a keeper the pager goes on, without a pager the keeper ends the tree, whose image is
still there.

A store that fails is asked again until it answers. Meanwhile who touches a missing page waits, and all
others run on.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import select
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from crcli import kernel
from crcli.criu.lazy_socket import listen_in, receive_memories, wait_for_end
from crcli.errors import CrcliError, HostLacks, ImageDamaged, NotFound, StoreError, StoreUnreachable
from crcli.image.cached import open_cached
from crcli.image.packs import SOON_BYTES, ChunkReader
from crcli.image.session import Session
from crcli.image.weights import MemoryReader
from crcli.logs import keep_log
from crcli.memory.extents import PAGE, Source, SpaceKey, SpaceKind
from crcli.memory.lazy import LazyFill, first_wanted
from crcli.memory.replay import targets
from crcli.memory.userfault import Userfault, is_available
from crcli.process.identity import ProcessId, identify
from crcli.process.tree import child_pids
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from crcli.image.manifest import Manifest
    from crcli.memory.extents import Extent, Origin
    from crcli.store.base import Buffer, Store

    Read = Callable[[Sequence[Origin]], Iterable[tuple[Origin, Buffer]]]
    Plan = Sequence[Sequence[Origin]]

COMM = "crcli-pager"
"""What the pager is called in ps, and found by."""

_MISSING, _HOLD, _WHOLE = b"missing", b"hold", b"whole"
_MESSAGE_LIMIT = 1 << 20
_END_LIMIT_S = 10.0
_OWN_END_S = 0.5
"""How long a pager with nothing to do may take to end (seconds) until it is killed: its store may hang."""

_PATIENCE_S = (0.5, 30.0)
"""How long the pager waits before it asks a store again that failed (seconds): at first, and at most."""

_SAID_EVERY_S = 1800.0
"""How often the log is told of a store that fails, at most (seconds): it may be away for days."""

_FEW = 64
"""How many memories the keeper holds before it looks which of them are gone."""

_LOOK_EVERY_S = 0.5

_MANY_PAGES, _MANY_BYTES = (256 << 20) // PAGE, 6 << 20
"""From so much on it counts more how soon all of it is here, and requests are for so many bytes. With 8 MiB
all of 1 GiB is here 5 % sooner, but the first page that somebody waits for 0.1 s later."""

_PATHS = (
    "AWS_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "CRCLI_LOG_DIR",
)
"""Variables whose values may be relative to the folder that the pager leaves."""


class Missing(Struct, frozen=True):
    """What will be missing from a tree (`spaces`), and the image that has it. Paths are absolute."""

    spaces: Mapping[SpaceKey, list[Extent]]
    manifest: Manifest
    store: str
    endpoint_url: str | None
    weights_map: Sequence[tuple[str, str]]
    weights_folders: Sequence[str]
    threads: int

    def open(self) -> tuple[Plan, Read, Callable[[], None]]:
        """In which order its sources are to be fetched, how, and what is to be called at the end.

        First what a process touches before anything else, then what changed since the image before.
        """
        store = open_cached(self.store, endpoint_url=self.endpoint_url)
        announced = _announce(store, self.manifest.id)
        chunks = ChunkReader(store, self.manifest.packs, self.manifest.chunks)
        memory = MemoryReader(store, self.manifest, chunks, self.weights_map, self.weights_folders)
        wanted = targets(self.spaces)
        memory.make_sure(wanted)
        first = first_wanted(self.spaces)
        pages = sum(target.pages for whither in wanted.values() for target in whither)
        plan = memory.plan(wanted.keys() - first, _MANY_BYTES if pages >= _MANY_PAGES else SOON_BYTES)
        own = set(self.manifest.meta.get("own_packs", ()))
        plan.sort(key=lambda group: not self._is_in(own, group[0]))

        def close() -> None:
            announced.close()
            store.close()

        return memory.plan(first, SOON_BYTES) + plan, memory.read, close

    def _is_in(self, packs: set[int], origin: Origin) -> bool:
        """Whether a source of memory is kept in one of these packs."""
        return origin.source == Source.CHUNK and self.manifest.chunks[origin.number].pack in packs


def _announce(store: Store, image_id: str) -> ExitStack:
    """Have collections leave alone what is missing, should somebody remove the image meanwhile, until it is
    closed. Who may only read the store does without."""
    announced = ExitStack()
    with suppress(StoreError):
        announced.enter_context(Session(store, f"{image_id}-lazy-{os.urandom(4).hex()}"))
    return announced


class Pager:
    """The pager as the restore sees it. Unless it is told to `go` it ends with us, and has done nothing."""

    def __init__(self) -> None:
        """Fork it; call before any thread is started, one of a store's client included. Raises HostLacks."""
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
            _live(self._listener, theirs)
        theirs.close()

    def prepare(self, missing: Missing) -> None:
        """Tell it what it will have to fill in, and have it open the store."""
        fd = os.memfd_create("crcli-missing")
        with open(fd, "wb") as file:
            pickle.dump(missing, file, pickle.HIGHEST_PROTOCOL)
            file.flush()
            try:
                socket.send_fds(self._control, [_MISSING], [fd])
            except ConnectionError:
                pass  # it was killed, as `go` will say

    def listen_in(self, folder_fd: int, processes: int) -> None:
        """Have a CRIU that will restore so many processes, and works in this folder, find it."""
        listen_in(self._listener, folder_fd)
        try:
            self._control.send(b"%d" % processes)
        except ConnectionError:
            pass  # why it has failed is what `go` is told

    def go(self, init: int, processes: Sequence[ProcessId]) -> int:
        """Begin: CRIU has restored these processes, in the namespace of `init` (0: ours), and holds them.

        Returns how many bytes are missing. From now on it ends when nothing is, or nobody misses it.
        Raises ImageDamaged when memory of the image is not in its store, StoreError when that did not answer,
        OSError when it failed otherwise.
        """
        everyone = [*processes, identify(init)] if init else processes
        try:
            self._control.send(json.dumps([[one.pid, one.start_time] for one in everyone]).encode())
        except ConnectionError:
            pass  # it has ended, but said why before
        answer = self._answer()
        if isinstance(answer, int):
            return answer
        kind, text = answer
        for error in (ImageDamaged, StoreError, StoreUnreachable):
            if kind == error.__name__:
                raise error(text, hint="use another image" if error is ImageDamaged else "")
        raise OSError(f"the process that fills in memory failed: {text}")

    def last_word(self) -> str:
        """Of what it has failed since it began, as far as it has said so; does not wait."""
        try:
            _, text = json.loads(self._control.recv(_MESSAGE_LIMIT, socket.MSG_DONTWAIT))
        except (OSError, ValueError, TypeError):
            return ""
        return str(text)

    def _answer(self) -> Any:
        """What it said last; what it did not read of ours makes the first look fail."""
        for _ in range(2):
            try:
                return json.loads(self._control.recv(_MESSAGE_LIMIT) or b'["", "it was killed"]')
            except ConnectionError:
                continue
        return "", "it was killed"

    def leave(self) -> None:
        """Let it work on without us."""
        self._control.close()
        self._listener.close()

    def reap(self) -> None:
        """Have it reaped when it ends, for as long as we live."""
        threading.Thread(target=self._reap, name="pager's end", daemon=True).start()

    def _reap(self) -> None:
        with suppress(ChildProcessError):  # somebody has who reaps all
            os.waitpid(self.pid, 0)

    def close(self) -> None:
        """Return when it has ended: it does unless it was told to `go`, or its tree is dead."""
        self.leave()
        end = time.monotonic() + _OWN_END_S
        try:
            while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > end:
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.002)
        except (ChildProcessError, ProcessLookupError):
            pass


# --- the pager itself --------------------------------------------------------------------------------------


def _live(listener: socket.socket, control: socket.socket) -> None:
    """The pager's whole life. Never returns."""
    try:
        _settle_in({listener.fileno(), control.fileno()})
        keeper = _Keeper()
        if missing := _told(control):
            plan, read, close = missing.open()
            fill = LazyFill(missing.spaces, *_steadily(plan, read), missing.threads, keeper.hold)
            if channel := _begin(fill, listener, control, keeper):
                _see_through(fill, channel)
            keeper.end()  # nothing is missing, or nobody is left who misses it
            close()
    except BaseException as error:
        _say(control, error)
    finally:
        os._exit(0)


def _told(control: socket.socket) -> Missing | None:
    """What is to be filled in; None when the restore gives up before it knows."""
    _, fds, _, _ = socket.recv_fds(control, _MESSAGE_LIMIT, 1)
    if not fds:
        return None
    with open(fds[0], "rb") as file:
        file.seek(0)
        missing: Missing = pickle.load(file)
        return missing


def _see_through(fill: LazyFill, channel: socket.socket) -> None:
    """Return when all is there, and CRIU has told that it has finished: it fails if it cannot."""
    try:
        fill.wait()
    except BaseException as error:
        _note(f"gave up, so the tree is ended (its image is still there): {_text(error)}")
        raise
    wait_for_end(channel)
    channel.close()


def _settle_in(keep: Collection[int]) -> None:
    """Become a process that no terminal and no caller knows, and that only SIGKILL ends."""
    os.setsid()
    _forget_files(keep)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each process of the tree
    for name in _PATHS:
        if name in os.environ:
            os.environ[name] = os.path.abspath(os.environ[name])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    with open("/proc/self/comm", "w") as file:
        file.write(COMM)


def _forget_files(keep: Collection[int]) -> None:
    """Have no file, pipe, lock or socket open any more but these; the numbers stay taken, by /dev/null."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in map(int, os.listdir("/proc/self/fd")):
        if fd not in (*keep, null):
            os.dup2(null, fd, inheritable=False)


def _begin(
    fill: LazyFill, listener: socket.socket, control: socket.socket, keeper: _Keeper
) -> socket.socket | None:
    """Take all memories over, and begin when the restore says so; None when it gives up before.

    Returns the connection with CRIU.
    """
    if not (count := control.recv(_MESSAGE_LIMIT)):
        return None
    missing_bytes = fill.missing_bytes  # takes its time for many chunks: CRIU is at work meanwhile
    poll = select.poll()
    for one in (listener, control):
        poll.register(one, select.POLLIN)
    if listener.fileno() not in {fd for fd, _ in poll.poll()}:
        return None
    channel, _ = listener.accept()
    for pid, fd in receive_memories(channel, int(count)):
        fill.add(SpaceKey(SpaceKind.PROCESS, pid), fd)
        keeper.hold(fd)
    if not (order := control.recv(_MESSAGE_LIMIT)):
        return None
    keeper.watch(order)
    fill.go()
    control.send(b"%d" % missing_bytes)
    return channel


def _steadily(plan: Plan, read: Read) -> tuple[Plan, Read]:
    """The same plan, and reading that asks a failing store until it answers."""

    outage = _Outage()

    def patiently(group: Sequence[Origin]) -> Iterator[tuple[Origin, Buffer]]:
        left = list(group)
        wait, most = _PATIENCE_S
        is_second_look = False
        while left:
            try:
                for origin, raw in read(left):
                    outage.ends()
                    yield origin, raw
                    left.remove(origin)
            except NotFound:
                raise
            except ImageDamaged:
                if is_second_look:
                    raise
                is_second_look = True  # bytes change on their way, too
            except StoreError as error:
                outage.goes_on(error)
                time.sleep(wait)
                wait = min(2 * wait, most)

    return plan, patiently


class _Outage:
    """What the log is told of a store that fails: seldom, for it may go on for days. For several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said_at = float("-inf")
        self._is_said = False

    def goes_on(self, error: StoreError) -> None:
        """A request has failed."""
        with self._lock:
            if time.monotonic() > self._said_at + _SAID_EVERY_S:
                self._said_at, self._is_said = time.monotonic(), True
                _note(f"the store does not answer; who touches what is missing waits: {error}")

    def ends(self) -> None:
        """One was answered."""
        if self._is_said:
            with self._lock:
                if self._is_said:
                    self._is_said = False
                    _note("the store answers again")


def _say(control: socket.socket, error: BaseException) -> None:
    """Tell the restore of a failure, while it waits."""
    try:
        control.send(json.dumps([type(error).__name__, str(error)]).encode())
    except OSError:
        pass


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _note(text: str) -> None:
    keep_log(f"{time.strftime('%F %T')} {text}\n", COMM)


# --- the keeper ------------------------------------------------------------------------------------------


class _Keeper:
    """A process that holds what the pager holds, and ends the tree if the pager ends too early."""

    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
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
    held: list[Userfault] = []
    many = _FEW
    try:
        _forget_files({channel.fileno()})
        with open("/proc/self/comm", "w") as file:
            file.write("crcli-keeper")
        while True:
            message, fds, _, _ = socket.recv_fds(channel, _MESSAGE_LIMIT, 1)
            if not message or message == _WHOLE:
                break
            order = message if message != _HOLD else order
            held += map(Userfault, fds)
            if len(held) > many:
                held = _still_there(held)
                many = 2 * len(held) + _FEW
        if not message and order:
            _note("the pager was killed, so the tree is ended; its image is still there")
            _end_tree([ProcessId(*one) for one in json.loads(order)])
            while held := _still_there(held):  # who has left the tree waits rather than see zeros
                time.sleep(_LOOK_EVERY_S)
    finally:
        os._exit(0)


def _still_there(held: Iterable[Userfault]) -> list[Userfault]:
    """Those of the memories whose processes live; the others are let go of."""
    there = []
    for memory in held:
        if memory.is_gone():
            memory.close()
        else:
            there.append(memory)
    return there


def _end_tree(processes: Sequence[ProcessId]) -> None:
    """Kill the processes and all that they have forked; return when they are dead, or after a while."""
    victims = {process.pid: process for process in processes}
    end = time.monotonic() + _END_LIMIT_S
    while time.monotonic() < end:
        living = [process for process in victims.values() if process.alive()]
        if not living:
            return
        for process in living:
            victims |= {child.pid: child for child in _children(process.pid)}
        for process in victims.values():
            process.send(signal.SIGKILL)
        time.sleep(0.01)


def _children(pid: int) -> list[ProcessId]:
    try:
        return [identify(child) for child in child_pids(pid)]
    except (OSError, CrcliError):
        return []
