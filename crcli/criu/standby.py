"""A process that stands by while CRIU holds a tree, and sets the tree right when CRIU dies.

When CRIU is killed, the kernel lets go of the tree at once, in whatever state it is: sockets in repair mode,
some processes killed and others not. Who learns of the death afterwards is too late: the program has seen
its connections fail. So the standby is CRIU's tracer. On the way out, before CRIU's own grip on the tree
ends, the kernel stops CRIU for its tracer (PTRACE_EVENT_EXIT, also after SIGKILL). The tree stands still
until the standby has set it right. That costs a wake-up for each signal that CRIU gets, about 30 for each
process of the tree and 10 microseconds each.

It has a session of its own and outlives crcli, whose death ends CRIU's work as well: by CRIU's own hand,
or, should CRIU be killed too, by the standby's.

**What nobody can set right**: a thread that CRIU had borrowed has run into its breakpoint, and CRIU has not
seen that yet (see crcli.criu.borrowed). A CRIU that is killed just then takes that process with it (SIGTRAP).
Such moments last for microseconds, as CRIU and the standby go before all others.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from crcli import kernel
from crcli.criu.borrowed import Recalled
from crcli.criu.compel import Text
from crcli.criu.kerndat import forget_loans
from crcli.criu.netlock import other_network
from crcli.criu.options import LOG_NAME
from crcli.criu.puppet import MACHINES, Ending, Puppet
from crcli.criu.question import remove_question
from crcli.criu.rescue import SocketSettings, free_sockets, remember, remove_link_remaps, remove_tables
from crcli.criu.unread import give_back_unread
from crcli.criu.workspace import Workspace
from crcli.process.crash import Fates
from crcli.process.identity import ProcessId, identify, read_proc
from crcli.process.tree import child_pids
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from crcli.kernel import Stop

_LIMIT_S = 20.0
_START_S = 1.0
"""How long ago, at most, CRIU was started when it begins to be watched (seconds)."""
_POKE_LIMIT_S = 5.0
_POKES_AT_ONCE = 200
_PTRACE_POKEUSER = 6
_TO_BE_HEARD = signal.SIGWINCH
"""CRIU gets it, and the standby, which sees CRIU's signals first, keeps it and looks at what it was told."""
_MESSAGE_LIMIT = 1 << 20
_SIGKILL_BIT = 1 << (signal.SIGKILL - 1)


class AfterDeath(Struct, frozen=True):
    """What the standby did once CRIU was killed.

    `finished`: the image was durable, and the tree is killed or stopped now, as CRIU was told. Otherwise the
    tree runs as before; `held` are the processes that CRIU held when it died.
    """

    finished: bool
    held: tuple[ProcessId, ...]
    lost: tuple[ProcessId, ...] = ()
    """Those of them that nobody could help, and that died of it: see crcli.criu.borrowed."""


class Standby:
    """See the module. A context manager: leaving it ends the standby once CRIU has ended."""

    def __init__(self, root: int, images_fd: int, to_keep: Sequence[int] = ()) -> None:
        """Fork it. `root` is the tree's root, `to_keep` are descriptors that it is to hold while CRIU lives.

        Call before any thread is started and before CRIU is.
        """
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._report: AfterDeath | None = None
        self._listener: threading.Thread | None = None
        self._watching = threading.Event()
        self._poked = threading.Event()
        self._pid = kernel.quiet_fork()
        if self._pid == 0:
            _stand_by(theirs, root, images_fd, to_keep)
        theirs.close()

    def watch(
        self, criu: int, on_death: Callable[[], None], *, kills: bool = False, stays: bool = False
    ) -> None:
        """Begin to watch the CRIU with this pid; call `on_death` (in another thread) should it be killed.

        The tree is not to be touched before `wait_until_watching` has returned. `kills` says whether CRIU is
        to kill the tree: then it takes what is unread in terminals. `stays` says whether it is to kill or
        stop it: then crcli gives names to its files that have none.
        """
        self._send({"criu": criu, "kills": kills, "stays": stays})
        arguments = (bytearray(_MESSAGE_LIMIT), on_death)  # the thread needs no memory that it might not get
        listener = threading.Thread(target=self._listen, args=arguments, name="standby", daemon=True)
        listener.start()
        self._listener = listener

    def wait_until_watching(self) -> None:
        """Return once CRIU may touch the tree: its death would be seen. Or nobody watches (it was killed, or
        may trace nobody), and CRIU works as well."""
        self._watching.wait()

    def settle(self, outcome: str, members: Iterable[ProcessId], keep_lock: bool) -> None:
        """Tell what is to become of the tree, right before CRIU is told so: the image is durable.

        A CRIU that dies from now on with the tree half killed (or half stopped) leaves the rest to the
        standby.
        """
        pairs = [(member.pid, member.start_time) for member in members]
        self._send({"outcome": outcome, "members": pairs, "keep_lock": keep_lock})

    def poke(self, criu: int, threads: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> None:
        """Change registers of frozen threads, which only CRIU can reach; return when it is done.

        Each is a thread's id here, and pairs of an offset (PTRACE_POKEUSER) and a value.
        """
        if self._listener is None or not self._listener.is_alive():
            return  # it was killed
        self._poked.clear()
        for start in range(0, len(threads), _POKES_AT_ONCE):
            self._send({"poke": threads[start : start + _POKES_AT_ONCE]})
        try:
            os.kill(criu, _TO_BE_HEARD)
        except ProcessLookupError:
            return
        self._poked.wait(_POKE_LIMIT_S)

    def wait(self) -> AfterDeath | None:
        """Wait until CRIU has ended and the tree is set right; say how, if CRIU was killed.

        None when CRIU ended by itself, or when the standby is gone too.
        """
        try:
            self._control.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it is gone
        if self._listener is not None:
            self._listener.join(_LIMIT_S)
        return self._report

    def close(self) -> None:
        """End it."""
        if self._pid:
            self.wait()
            if self._listener is None or self._listener.is_alive():
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
            self._control.close()

    def __enter__(self) -> Standby:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._control.send(json.dumps(message).encode())
        except OSError:
            pass  # it was killed: CRIU works as well without it

    def _listen(self, text: bytearray, on_death: Callable[[], None]) -> None:
        while size := self._hear_into(text):
            told = json.loads(text[:size])
            if "watching" in told:
                self._watching.set()
                continue
            if "poked" in told:
                self._poked.set()
                continue
            held, lost = (tuple(ProcessId(*pair) for pair in told[name]) for name in ("held", "lost"))
            self._report = AfterDeath(told["finished"], held, lost)
            self._poked.set()
            on_death()
        self._watching.set()
        self._poked.set()

    def _hear_into(self, text: bytearray) -> int:
        """Wait for its next word; return how long that is, 0 when there will be none."""
        while True:
            try:
                return self._control.recv_into(text)
            except ConnectionResetError:  # once: it has ended before it read ours; what it said is there
                continue


def _stand_by(control: socket.socket, root: int, images_fd: int, to_keep: Sequence[int]) -> None:
    """What the process does. Never returns."""
    try:
        os.setsid()
        kernel.stay_without_memory()
        kernel.close_all_but(control.fileno(), images_fd, *to_keep)
        pids = _tree_of(root)
        before = _Before(remember(pids), {pid: Text.of(pid) for pid in pids})
        first = control.recv(_MESSAGE_LIMIT)
        kernel.hurry()
        if first:
            told = json.loads(first)
            watch = _Watch(control, root, images_fd, before, kills=told["kills"], stays=told["stays"])
            watch.run(told["criu"])
    finally:
        os._exit(0)


class _Before(Struct, frozen=True):
    """What CRIU will change about a tree, as it was."""

    sockets: SocketSettings
    texts: dict[int, Text | None]


class _Watch:
    """The standby at work."""

    def __init__(
        self,
        control: socket.socket,
        root: int,
        images_fd: int,
        before: _Before,
        *,
        kills: bool,
        stays: bool,
    ) -> None:
        self.control = control
        self.root = root
        self.images_fd = images_fd
        self.before = before
        self.kills = kills
        self.stays = stays
        self.network = other_network(root)  # opened now: a dead root has none, but others may live there
        self.outcome = ""
        self.members: list[ProcessId] = []
        self.keep_lock = True
        self.is_alone = False
        self.recalled: Recalled | None = None
        self.fates = Fates(())
        self.pokes: list[tuple[int, list[tuple[int, int]]]] = []

    def run(self, criu: int) -> None:
        """Trace CRIU to its end, and do what there is to do right before that."""
        began = time.time() - _START_S
        for pid in (os.getpid(), criu):
            kernel.go_first(pid)
        kernel.trace_exit(criu)
        self._say({"watching": criu})
        report = None
        was_seen_ending = False
        stop = kernel.wait_for_stop(criu)
        while stop is not None:
            number = stop.signal
            if number == _TO_BE_HEARD:
                self._hear()
                number = 0
                if self.pokes and (end := self._poke(criu)) is not None:
                    stop = end
            if stop.is_exit:
                was_seen_ending = True
                self._hear()
                killed = os.WIFSIGNALED(kernel.exit_status(criu))
                number = 0
                if killed:
                    report = self._after_death(criu)
                else:
                    self._after_end()
            if (stop := kernel.stopped_again(criu)) is None:
                kernel.go_on(criu, number)
                stop = kernel.wait_for_stop(criu)
        if not was_seen_ending:  # killed between the last two calls: what can be done late is done
            self._hear()
            report = self._after_death(criu)
        if self.recalled is not None and report is not None:
            self.recalled.give_back()
            report["lost"] = [pair for pair in report["held"] if pair[0] in self.recalled.lost]
        if report is not None:
            crashed = [(one.pid, one.start_time) for one in self.fates.crashed()]
            report["lost"] = list(dict.fromkeys(report["lost"] + crashed))
            self._say(report)
            if self.is_alone:
                remove_question(began)
        if self.is_alone:
            forget_loans()

    def _say(self, word: dict[str, Any]) -> None:
        try:
            self.control.send(json.dumps(word).encode())
        except OSError:
            pass  # crcli was killed: there is all the more to watch over

    def _poke(self, criu: int) -> Stop | None:
        """Have CRIU, which has stopped for us, change the registers; return a stop on its way out, if any."""
        stop: Stop | None = None

        def wait() -> int:
            nonlocal stop
            stop = kernel.wait_for_stop(criu)
            if stop is None or stop.is_exit:
                raise Ending
            return stop.signal

        def see_that_it_stands() -> None:
            nonlocal stop
            if (again := kernel.stopped_again(criu)) is not None:
                stop = again
                raise Ending

        machine = MACHINES[os.uname().machine]
        pokes, self.pokes = self.pokes, []
        try:
            with Puppet(criu, machine, wait, see_that_it_stands) as puppet:
                for tid, changes in pokes:
                    for offset, value in changes:
                        puppet.call(machine.nr_ptrace, _PTRACE_POKEUSER, tid, offset, value)
                puppet.stand_as_if_signalled()
        except Ending:
            return stop
        except OSError:
            pass  # those threads see their call interrupted
        self._say({"poked": len(pokes)})
        return None

    def _hear(self) -> None:
        """Take in what crcli has said since, and whether it is still there."""
        self.control.setblocking(False)
        try:
            while text := self.control.recv(_MESSAGE_LIMIT):
                told = json.loads(text)
                if "poke" in told:
                    self.pokes += told["poke"]
                    continue
                self.outcome, self.keep_lock = told["outcome"], told["keep_lock"]
                self.members = [ProcessId(*pair) for pair in told["members"]]
            self.is_alone = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_alone = True

    def _after_death(self, criu: int) -> dict[str, Any]:
        """CRIU was killed. The tree stands still: finish what CRIU had begun, or undo it."""
        if self.outcome == "killed" and any(map(_is_dying, self.members)):
            self._signal_all(signal.SIGKILL)
            self._unlock_if_alone()
            return {"finished": True, "held": [], "lost": []}
        self._recall(criu)
        held = [identify(pid) for pid in _tree_of(self.root) if os.path.exists(f"/proc/{pid}")]
        if self.outcome == "stopped":
            self._signal_all(signal.SIGSTOP)
        self._free()
        self.fates = Fates(held)
        pairs = [(one.pid, one.start_time) for one in held]
        return {"finished": self.outcome == "stopped", "held": pairs, "lost": []}

    def _recall(self, criu: int) -> None:
        texts = (self.before.texts.get(pid) or Text.of(pid) for pid in _tree_of(self.root))
        try:
            self.recalled = Recalled(criu, (text for text in texts if text is not None))
        except Exception:  # whatever is wrong with that, the tree's connections are to be set right
            return

    def _after_end(self) -> None:
        """CRIU ended by itself: it has undone what it did, unless the tree was to be killed or stopped."""
        if self.outcome == "stopped":
            self._free()
        elif self.outcome == "killed":
            self._unlock_if_alone()
        elif self.stays:
            # The tree runs on. A crcli that set this right has done so before it let CRIU go: then nothing is
            # left to do. Whether it lives says nothing: CRIU may hear of its death sooner than we do.
            remove_link_remaps(_tree_of(self.root))
            if self.kills:
                give_back_unread(Workspace(self.images_fd), self.root)

    def _unlock_if_alone(self) -> None:
        """Do for a killed tree what crcli would do, had it lived."""
        if self.is_alone and not self.keep_lock:
            remove_tables(self._log(), self.network)

    def _free(self) -> None:
        pids = _tree_of(self.root)
        free_sockets(pids, self.before.sockets)
        remove_link_remaps(pids)
        remove_tables(self._log(), self.network)
        if self.kills:
            give_back_unread(Workspace(self.images_fd), self.root)

    def _signal_all(self, number: int) -> None:
        for member in self.members:
            member.send(number)

    def _log(self) -> bytes:
        """The beginning of CRIU's log, where it says which run this is."""
        try:
            log = os.open(LOG_NAME, os.O_RDONLY, dir_fd=self.images_fd)
        except OSError:
            return b""
        return os.pread(log, 1 << 16, 0)


def _is_dying(process: ProcessId) -> bool:
    """Whether a process is dead, or is about to be: SIGKILL is on its way."""
    if not process.alive():
        return True
    try:
        lines = read_proc(f"/proc/{process.pid}/status").splitlines()
    except OSError:
        return True
    masks = [int(line.split()[1], 16) for line in lines if line.startswith((b"SigPnd:", b"ShdPnd:"))]
    return any(mask & _SIGKILL_BIT for mask in masks)


def _tree_of(root: int) -> list[int]:
    pids = [root]
    for pid in pids:
        pids += child_pids(pid)
    return pids
