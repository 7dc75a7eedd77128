"""The hand itself: the one process that makes all calls to CUDA's driver for a dump or a restore.

It outlives crcli. When crcli is gone, and has not said that all is settled, the hand sets right what it did:
see `Purpose`. It has a session of its own, and only SIGKILL ends it; another hand then does the same, by the
states that the driver tells.

A call to the driver cannot be taken back, and may block for as long as it likes. So each is made in a thread
of its own: whoever waits for it gives up after a while, while the thread stays, and with it the process's
mutex. The next call for that process waits for that one's end.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, TypeVar

from crcli.gpu.care import Care
from crcli.gpu.driver import CudaLacks, CudaRefused, Driver
from crcli.gpu.facts import CudaState
from crcli.gpu.inherited import take_devices
from crcli.gpu.words import COMM, LOCK_LIMIT_S, MESSAGE_LIMIT, PATIENCE_S, Purpose
from crcli.logs import keep_log
from crcli.process.identity import ProcessId, identify, read_proc, read_stat
from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

T = TypeVar("T")

_STATE_LIMIT_S, _FIRST_STATE_LIMIT_S = 5.0, 10.0
"""How long the driver may take to say what state a process is in, and when it is asked for the first time:
it asks one of the process's threads, which must get a processor (seconds)."""

_SPARE_S = 5.0
"""How much longer than its own limit a lock may take before we stop to wait for it (seconds)."""

_STEP_S, _PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.05, 2.0
_LOOK_S = 0.5
"""How often is looked whether the memory of a process is all there (seconds)."""

_ASLEEP = (CudaState.LOCKED, CudaState.CHECKPOINTED, CudaState.CHECKPOINTING, CudaState.RESTORING)


class _Charge(Struct):
    """A CUDA process that was put into our hands.

    Whoever calls the driver for it holds the `mutex`. `state` is the last that was heard of, None: nothing
    yet. `move_s` is how long its memory may be on the way (seconds).
    """

    id: ProcessId
    move_s: float
    state: CudaState | None = None
    mutex: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int:
        """Its pid here."""
        return self.id.pid


class _Order(Struct):
    """What crcli has asked for, of these processes. Once it `is_over` nothing more of it is begun."""

    request: Mapping[str, Any]
    charges: list[_Charge]
    is_over: bool = False
    fresh: list[_Charge] = field(default_factory=list)
    """Those that came into our hands by this order."""
    others: list[_Charge] = field(default_factory=list)
    """Those that are in the hands of another: what that one does to them is its own to set right."""

    @property
    def name(self) -> str:
        """What is asked for."""
        return str(self.request["op"])

    @property
    def limit_s(self) -> float:
        """How long it may take for each process (seconds)."""
        return float(self.request["limit_s"])


class Worker:
    """The hand at work."""

    def __init__(self, control: socket.socket, crcli: int, purpose: Purpose) -> None:
        """`crcli` is a pidfd of the process that we work for: others may hold the other end of `control`."""
        self._control = control
        self._crcli = crcli
        self._purpose = purpose
        self._charges: dict[int, _Charge] = {}
        self._touched: list[_Charge] = []
        """What was locked, or was to be, and is not settled: in that order."""
        self._care = Care(_behind(crcli))
        self._order: _Order | None = None
        self._driver: Driver | None = None
        self._lacks: CudaLacks | None = None
        self._is_ready = threading.Event()
        self._saying = threading.Lock()
        self._taking = threading.Lock()
        """Held while threads of the tree are made to act for us: nothing may end us meanwhile."""

    def run(self) -> None:
        """Do what is asked until nobody asks any more, then set right what is not settled."""
        threading.Thread(target=self._load, daemon=True).start()
        while (request := self._next()) is not None:
            threading.Thread(target=self._serve, args=(self._admit(request),), daemon=True).start()
        self._end_order()
        if self._touched:
            self._set_right_alone()
        self._taking.acquire()

    def _load(self) -> None:
        try:
            self._driver = Driver()
        except CudaLacks as error:
            self._lacks = error
        except BaseException as error:
            self._lacks = CudaLacks(f"cuda-python failed: {error}", "see `nvidia-smi`, and `crcli doctor`")
        self._is_ready.set()

    def _next(self) -> dict[str, Any] | None:
        """The next request; None when there will be none."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._crcli, select.POLLIN)
        if self._control.fileno() not in {fd for fd, _ in poll.poll()}:
            return None
        try:
            text = self._control.recv(MESSAGE_LIMIT)
        except OSError:
            return None
        return json.loads(text) if text else None

    def _admit(self, request: dict[str, Any]) -> _Order:
        """Take a request on, in the order in which they came: from here on what it changes is ours to set
        right, and what was asked for before is over."""
        order = _Order(request, [self._charge(*one) for one in request["processes"]])
        if order.name in _CHANGES:
            self._end_order()
            self._order = order
            self._take(order)
        if order.name == "settled":
            for charge in self._touched:
                self._care.let_go(charge.id)
            self._touched = []
        return order

    def _take(self, order: _Order) -> None:
        """Have what is asked for, if none of it is another hand's; of what is to be set right, our part."""
        order.others = [charge for charge in order.charges if not self._care.take(charge.id)]
        ours = [charge for charge in order.charges if charge not in order.others]
        order.fresh = [charge for charge in ours if charge not in self._touched]
        self._touched += order.fresh
        if order.name in _SETS_RIGHT:
            order.charges = ours
        elif order.others:
            self._disown(order.fresh)

    def _disown(self, charges: Sequence[_Charge]) -> None:
        """They are not ours to set right, after all."""
        self._touched = [charge for charge in self._touched if charge not in charges]
        for charge in charges:
            self._care.let_go(charge.id)

    def _end_order(self) -> None:
        if self._order is not None:
            self._order.is_over = True

    def _charge(self, pid: int, start_time: int, move_s: float) -> _Charge:
        known = self._charges.get(pid)
        if known is None or known.id.start_time != start_time:
            known = self._charges[pid] = _Charge(ProcessId(pid, start_time), move_s)
        known.move_s = move_s
        return known

    def _serve(self, order: _Order) -> None:
        operations: dict[str, Callable[[_Order], dict[str, Any]]] = {
            "host": self._host,
            "find": self._find,
            "lock": self._lock,
            "checkpoint": self._checkpoint,
            "restore": self._restore,
            "unlock": self._unlock,
            "resume": self._resume,
            "release": self._release,
            "take_devices": self._take_devices,
            "settled": lambda _: {},
        }
        is_refused = bool(order.others) and order.name not in _SETS_RIGHT
        try:
            answer = self._refused(order) if is_refused else operations[order.name](order)
        except CudaLacks as error:
            answer = {"lacks": str(error), "hint": error.hint}
        except BaseException:
            answer = {"bug": traceback.format_exc()}
        with self._saying:
            try:
                self._control.send(json.dumps({"id": order.request["id"], **answer}).encode())
            except OSError:
                pass  # nobody is there: `run` sees it too

    @property
    def _cuda(self) -> Driver:
        """The driver, once it is initialised. Raises CudaLacks."""
        self._is_ready.wait()
        if self._driver is None:
            raise self._lacks or CudaLacks("CUDA cannot be used here", "")
        return self._driver

    # What is asked for.

    def _host(self, order: _Order) -> dict[str, Any]:
        return {"host": self._cuda.host().as_json()}

    def _find(self, order: _Order) -> dict[str, Any]:
        cuda = self._cuda
        used = cuda.used()
        tids = {charge.pid: cuda.restore_tid(charge.pid) for charge in order.charges}
        known = [charge for charge in order.charges if tids[charge.pid] is not None]
        states = zip(known, _all_at_once(known, self._first_state), strict=True)
        found = [
            [charge.pid, charge.id.start_time, tids[charge.pid], state, used.get(charge.pid, {})]
            for charge, state in states
            if state is not CudaState.GONE and charge.id.alive()
        ]
        return {"found": found}

    def _refused(self, order: _Order) -> dict[str, Any]:
        """Another hand works on some of them: nothing was done, as the driver would refuse it."""
        failure = {"pid": order.others[0].pid, "call": order.name, "result": _ILLEGAL_STATE}
        return self._told(order.charges, [failure]) | _others([*order.others, *order.fresh])

    def _lock(self, order: _Order) -> dict[str, Any]:
        """One after the other: the first that does not come to rest ends it.

        One that sleeps though we never locked it was put to sleep by another, who will wake it.
        """
        for number, charge in enumerate(order.charges):
            limit_s = order.limit_s + _SPARE_S
            failure = self._attempt(order, charge, limit_s, lambda one: self._do(one, "lock", order.limit_s))
            if failure is not None:
                told = self._told(order.charges, [failure])
                is_theirs = failure["result"] == _ILLEGAL_STATE
                untouched = order.charges[number if is_theirs else number + 1 :]
                asleep = [one for one in untouched if told["states"][one.pid] in _ASLEEP]
                theirs = [one for one in asleep if one in order.fresh]
                self._disown(theirs)
                return told | _others(theirs)
        return self._told(order.charges)

    def _checkpoint(self, order: _Order) -> dict[str, Any]:
        """All at once: each process has its own way to its GPUs."""
        return self._move_all(order, lambda one: self._do(one, "checkpoint"))

    def _restore(self, order: _Order) -> dict[str, Any]:
        return self._move_all(order, lambda one: self._do(one, "restore", order.request["map"]))

    def _move_all(self, order: _Order, move: Callable[[_Charge], None]) -> dict[str, Any]:
        def attempt(charge: _Charge) -> dict[str, Any] | None:
            return self._attempt(order, charge, charge.move_s, move, order.request["feeder"])

        return self._told(order.charges, _all_at_once(order.charges, attempt))

    def _unlock(self, order: _Order) -> dict[str, Any]:
        failures = [
            self._attempt(order, charge, order.limit_s, lambda one: self._do(one, "unlock"))
            for charge in order.charges
        ]
        return self._told(order.charges, failures)

    def _resume(self, order: _Order) -> dict[str, Any]:
        self._wake(order, time.monotonic() + order.limit_s)
        return self._told(order.charges)

    def _release(self, order: _Order) -> dict[str, Any]:
        self._put_down(order)
        return self._told(order.charges)

    def _take_devices(self, order: _Order) -> dict[str, Any]:
        """From processes that do not use CUDA, all at once: most of it is copying."""
        with self._taking:
            _all_at_once(order.charges, lambda charge: take_devices(charge.id))
        return {}

    def _told(self, charges: Sequence[_Charge], failures: Iterable[Any] = ()) -> dict[str, Any]:
        """The answer. Of whom nothing could be heard, the worst is told that can still be set right."""
        failed = [failure for failure in failures if failure is not None]
        states = _all_at_once(charges, self._state)
        told = {one.pid: state or CudaState.LOCKED for one, state in zip(charges, states, strict=True)}
        return {"states": told, "failures": failed}

    # One call, and what the driver says of a process.

    def _do(self, charge: _Charge, name: str, *arguments: Any) -> None:
        """Make this call for the process."""
        getattr(self._cuda, name)(charge.pid, *arguments)
        charge.state = _AFTER[name]

    def _attempt(
        self,
        order: _Order,
        charge: _Charge,
        limit_s: float,
        work: Callable[[_Charge], None],
        feeder: int = 0,
    ) -> dict[str, Any] | None:
        """Do something to a process while nobody else does; return why it failed, if it did.

        Nothing is begun for a process that has ended, nor for an order that is over. That a process ends
        while it is being locked is its own affair; later it may be the driver's doing.
        """

        def do() -> None:
            with charge.mutex:
                if charge.id.alive() and not order.is_over:
                    work(charge)

        try:
            _within(limit_s, do, order.name, feeder)
        except CudaRefused as error:
            if error.call != "lock" or charge.id.alive():
                return {"pid": charge.pid, "call": error.call, "result": error.result}
        return None

    def _first_state(self, charge: _Charge) -> CudaState:
        """What the driver says of a process that may not run at all."""
        if _is_stopped(charge.pid):
            return CudaState.SILENT
        return self._state(charge, _FIRST_STATE_LIMIT_S) or CudaState.SILENT

    def _state(self, charge: _Charge, limit_s: float = _STATE_LIMIT_S) -> CudaState | None:
        """What the driver says of a process; the last that was heard where it does not say.

        It does not while CRIU holds the process, of which it asks a thread.
        """
        if not self._hear(charge, limit_s):
            time.sleep(_PAUSE_S)  # it may be about to end, of a failure perhaps
            self._hear(charge, limit_s)
        return charge.state

    def _hear(self, charge: _Charge, limit_s: float) -> bool:
        """Ask for a process's state; return False where the driver refuses to tell it, at once."""

        def ask() -> None:
            charge.state = self._cuda.state(charge.pid)

        if not charge.id.alive():
            charge.state = CudaState.GONE
        elif not _is_held(charge.pid):
            try:
                _within(limit_s, ask, "state")
            except CudaRefused as error:
                if error.result == _UNKNOWN_TO_CUDA and self._cuda.restore_tid(charge.pid) is None:
                    charge.state = CudaState.GONE
                return error.result == _TOO_LONG or charge.state is CudaState.GONE
        return True

    def _asleep(self, charges: Sequence[_Charge]) -> list[_Charge]:
        """Those that are to be woken, in the same order."""
        sleeping = _all_at_once(charges, self._sleeps)
        return [charge for charge, sleeps in zip(charges, sleeping, strict=True) if sleeps]

    def _sleeps(self, charge: _Charge) -> bool:
        """Whether a process is to be woken, or may be: nothing is known, or a call for it is under way."""
        if not charge.mutex.acquire(timeout=_PAUSE_S):
            return True
        try:
            return self._state(charge) in (*_ASLEEP, None)
        finally:
            charge.mutex.release()

    # What sets it right.

    def _wake(self, order: _Order, until: float) -> None:
        """Have all run as before, in the reverse order; whoever cannot be woken is tried again until then."""
        pause = _PAUSE_S
        left = self._asleep(order.charges[::-1])
        while left:
            _all_at_once(left, lambda one: self._give_memory_back(order, one, until))
            for charge in left:
                self._attempt(order, charge, charge.move_s, self._unlock_if_locked)
            left = self._asleep(left)
            if order.is_over or time.monotonic() > until:
                return
            if left:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    def _give_memory_back(self, order: _Order, charge: _Charge, until: float) -> None:
        """Restore a process that is checkpointed, once CRIU does not hold it any more."""
        while _is_held(charge.pid) and time.monotonic() < until and not order.is_over:
            time.sleep(_STEP_S)
        self._attempt(order, charge, charge.move_s, self._restore_if_checkpointed)

    def _restore_if_checkpointed(self, charge: _Charge) -> None:
        if self._state(charge) is CudaState.CHECKPOINTED:
            self._do(charge, "restore", {})

    def _unlock_if_locked(self, charge: _Charge) -> None:
        if self._state(charge) is CudaState.LOCKED:
            self._do(charge, "unlock")

    def _put_down(self, order: _Order) -> None:
        """Have none of them hold a GPU any more, as far as the driver lets us."""

        def put_down(charge: _Charge) -> None:
            if self._state(charge) is CudaState.RUNNING:
                self._do(charge, "lock", LOCK_LIMIT_S)
            if self._state(charge) is CudaState.LOCKED:
                self._do(charge, "checkpoint")

        _all_at_once(order.charges, lambda one: self._attempt(order, one, one.move_s, put_down))

    def _set_right_alone(self) -> None:
        """Crcli is gone, and has not said that all is settled."""
        order = _Order({"op": "alone"}, self._touched)
        before = {charge.pid: self._state(charge) for charge in order.charges}
        if self._purpose is Purpose.DUMP:
            self._wake(order, time.monotonic() + PATIENCE_S)
        else:
            self._put_down(order)
            for charge in order.charges:
                charge.id.send(signal.SIGKILL)
                self._care.let_go(charge.id)
        lines = [f"process {one.pid} was {before[one.pid]}, is {self._state(one)}" for one in order.charges]
        for one in order.charges:
            if one.state not in (*_ASLEEP, None):
                self._care.let_go(one.id)
        keep_log("\n".join([f"crcli was killed ({self._purpose}):", *lines, ""]), COMM)


_CHANGES = frozenset(("lock", "checkpoint", "restore", "unlock", "resume", "release"))
_SETS_RIGHT = frozenset(("resume", "release"))
_AFTER = {
    "lock": CudaState.LOCKED,
    "checkpoint": CudaState.CHECKPOINTED,
    "restore": CudaState.LOCKED,
    "unlock": CudaState.RUNNING,
}
_UNKNOWN_TO_CUDA, _ILLEGAL_STATE = "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_ILLEGAL_STATE"
_TOO_LONG = "TOOK_TOO_LONG"


def _others(charges: Iterable[_Charge]) -> dict[str, list[int]]:
    """The part of an answer that says who is not ours."""
    return {"others": [charge.pid for charge in charges]}


def _behind(pidfd: int) -> ProcessId | None:
    """The process that a pidfd stands for; None when it has ended."""
    found = re.search(rb"^Pid:\s*(\d+)$", read_proc(f"/proc/self/fdinfo/{pidfd}"), re.MULTILINE)
    try:
        return identify(int(found[1])) if found else None
    except ProcessLookupError:
        return None


def _within(limit_s: float, work: Callable[[], None], name: str, feeder: int = 0) -> None:
    """Return when the work is done, or raise what it raised; CudaRefused when it takes longer: it goes on.

    As long as the process `feeder` brings what the work needs, the time does not count.
    """
    raised: list[BaseException] = []

    def do() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=do, name=name, daemon=True)
    thread.start()
    while feeder and thread.is_alive() and _is_running(feeder):
        thread.join(_LOOK_S)
    thread.join(limit_s)
    if thread.is_alive():
        raise CudaRefused(name, _TOO_LONG)
    if raised:
        raise raised[0] if isinstance(raised[0], CudaRefused) else CudaRefused(name, str(raised[0]))


def _all_at_once(charges: Sequence[_Charge], work: Callable[[_Charge], T]) -> list[T]:
    """Do it for all at once, and return what came of each, in their order."""
    results: dict[int, T] = {}

    def one(charge: _Charge) -> None:
        results[charge.pid] = work(charge)

    threads = [threading.Thread(target=one, args=(charge,), daemon=True) for charge in charges]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[charge.pid] for charge in charges]


def _is_running(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return not read_stat(pid).is_zombie
    except ProcessLookupError:
        return False


def _is_stopped(pid: int) -> bool:
    """Whether job control has stopped the process, and with it the thread that the driver would ask."""
    try:
        return read_stat(pid).state == "T"
    except ProcessLookupError:
        return False


def _is_held(pid: int) -> bool:
    """Whether a tracer, which is CRIU, holds the process: the driver would wait for its thread in vain."""
    try:
        status = read_proc(f"/proc/{pid}/status")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return b"\nTracerPid:\t0\n" not in status


def main(control: int, crcli: int, purpose: str) -> None:
    """The whole life of the hand. Never returns."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGALRM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.path[:] = map(os.path.abspath, sys.path)
    os.chdir("/")
    with open("/proc/self/comm", "w") as file:
        file.write(COMM)
    try:
        Worker(socket.socket(fileno=control), crcli, Purpose(purpose)).run()
    finally:
        os._exit(0)  # CUDA's own way out takes a while, and nothing here needs it


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
