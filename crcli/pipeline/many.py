"""Several trees dumped in one call: the story of dump.py for each, told by a few processes of ours.

The parent imports and looks at what all need, forks a worker for each core, and hands out one tree after
another. While a tree that is left running has its pages compressed and sent by one worker, another tree is
frozen by the next (see shared.py). No worker knows of the others: what fails, or kills one, is the affair of
one tree. A signal, or the deadline, ends the dumps that are under way as each promises; trees whose turn had
not come stay untouched and are reported so.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from crcli import kernel
from crcli.errors import CrcliError, DumpFailed, TreeState, UsageError
from crcli.image.names import check_name, suggested_name
from crcli.pipeline.aftermath import lost
from crcli.pipeline.dump import dump
from crcli.pipeline.interrupts import FOR_PEOPLE, Interrupted, noted
from crcli.pipeline.own_limits import shortage
from crcli.pipeline.shared import Shared, Turn
from crcli.pipeline.stages import DumpsReport, Silent, TreeResult
from crcli.process.identity import ProcessId, read_stat
from crcli.process.tree import find_target
from crcli.records import Struct, replace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.pipeline.stages import DumpOptions, Progress

_AGAIN_S = 0.1
"""How often (seconds) a worker is told again to stop: word that comes before its dump listens is lost."""

_SIZE = struct.Struct("<Q")


def dump_many(pids: Sequence[int], options: DumpOptions, progress: Progress | None = None) -> DumpsReport:
    """Dump the trees of `pids` into the store; return what became of each. `options.pid` does not count.

    Each image is called NAME-PID, or after the command and the pid. Only a dry run makes forecasts: dumps
    that share the machine say nothing of how long one takes alone. Raises UsageError, with nothing touched,
    when a tree is named twice or lies in another; everything else that goes wrong is in the report.
    """
    began = time.monotonic()
    refuse_overlap(pids)
    trees = [_choose(pid, options) for pid in pids]
    calls = [call for call in trees if isinstance(call, Call)]
    work = _Work(calls, progress or Silent(), began, options.deadline_s)
    if calls:
        warm(options)
        work.run(min(os.cpu_count() or 1, len(calls)))
    results = [work.results[one.pid] if isinstance(one, Call) else one for one in trees]
    return DumpsReport(tuple(results), round((time.monotonic() - began) * 1000, 2))


class Call(Struct, frozen=True):
    """A tree that was looked at briefly and is to be dumped, and how."""

    options: DumpOptions
    root: ProcessId

    @property
    def pid(self) -> int:
        """The pid of the tree's root."""
        return self.root.pid


def refuse_overlap(pids: Sequence[int]) -> None:
    """Raise UsageError when a pid stands there twice, or is a descendant of another."""
    named = set(pids)
    if len(named) < len(pids):
        twice = next(pid for pid in pids if list(pids).count(pid) > 1)
        raise UsageError(f"process {twice} is named twice", hint="name each tree once, by its root")
    for pid in pids:
        above = pid
        while above > 1:
            try:
                above = read_stat(above).ppid
            except ProcessLookupError:
                break
            if above in named:
                raise UsageError(
                    f"process {pid} belongs to the tree of {above}, which is named too",
                    hint=f"leave {pid} out: the image of {above} holds it",
                )


def _choose(pid: int, options: DumpOptions) -> Call | TreeResult:
    """Find the process and name its image; what cannot be dumped has its result already."""
    try:
        root = find_target(pid)
        name = options.name or suggested_name(read_stat(pid).comm)
        check_name(f"{name}-{pid}")
    except UsageError:
        raise
    except CrcliError as error:
        return TreeResult(pid, error=error)
    except ProcessLookupError:
        return TreeResult(pid, error=DumpFailed(f"process {pid} has ended", state=TreeState.DEAD))
    wanted = replace(options, pid=pid, name=f"{name}-{pid}", start_time=root.start_time, forecast=False)
    return Call(wanted, root)


def warm(options: DumpOptions) -> None:
    """Import once what every dump needs, before there are workers to do so each for itself."""
    import zstandard  # noqa: F401

    if options.store.startswith("s3:"):
        import crcli.store.s3.client
        import crcli.store.s3.errors  # noqa: F401


class _Work:
    """The trees that are left, the workers, and the results so far."""

    def __init__(
        self, calls: Sequence[Call], progress: Progress, began: float, deadline_s: float | None
    ) -> None:
        self.results: dict[int, TreeResult] = {}
        self._waiting = deque(calls)
        self._count = len(calls)
        self._progress = progress
        self._end = None if deadline_s is None else began + deadline_s
        self._workers: list[_Worker] = []
        self._stopped_by = 0
        self._failed = 0

    def run(self, workers: int) -> None:
        """Have all trees dumped by so many workers; there is a result for each on return."""
        turn = Turn()
        shared = Shared(turn, workers, os.getpid(), keeps_hand=True)
        left_s = None if self._end is None else self._end - time.monotonic()
        try:
            with noted(self._note, left_s):
                self._tell()
                while self._waiting or any(worker.call for worker in self._workers):
                    self._keep_working(workers, shared)
                    self._hand_out()
                    self._take_in()
        finally:
            for worker in self._workers:
                worker.end()
            turn.close()

    def _keep_working(self, workers: int, shared: Shared) -> None:
        """Have so many workers, while there are trees for them; or fewer, where the host allows no more."""
        while self._waiting and not self._stopped_by and len(self._workers) < workers:
            try:
                self._workers.append(_Worker(shared, self._workers))
            except OSError:
                if not self._workers:
                    raise
                return

    def _note(self, number: int) -> None:
        """A signal came, or the deadline."""
        self._stopped_by = self._stopped_by or number

    def _hand_out(self) -> None:
        if self._stopped_by:
            while self._waiting:
                self._keep(_untouched(self._waiting.popleft(), self._stopped_by))
            for worker in self._workers:
                worker.interrupt(self._stopped_by)
            return
        for worker in self._workers:
            if worker.call is None and self._waiting:
                call = self._waiting.popleft()
                left_s = None if self._end is None else max(0.001, self._end - time.monotonic())
                worker.begin(replace(call, options=replace(call.options, deadline_s=left_s)))

    def _take_in(self) -> None:
        """Wait for results, for a moment."""
        busy = {worker.channel: worker for worker in self._workers if worker.call is not None}
        for channel in select.select(list(busy), [], [], _AGAIN_S)[0]:
            worker = busy[channel]
            result = worker.result()
            if worker.is_gone:
                worker.end()
                self._workers.remove(worker)
            self._keep(result)

    def _keep(self, result: TreeResult) -> None:
        self.results[result.pid] = result
        self._failed += result.error is not None
        for finding in result.report.findings if result.report is not None else ():
            self._progress.finding(finding)
        self._tell()

    def _tell(self) -> None:
        failed = f", {self._failed} not" if self._failed else ""
        self._progress.phase(f"{len(self.results) - self._failed} of {self._count} trees{failed}")


def _untouched(call: Call, number: int) -> TreeResult:
    error = DumpFailed(
        f"the dump was not begun: crcli was {Interrupted(number)}",
        hint="run it again",
        state=TreeState.UNTOUCHED if call.root.alive() else TreeState.DEAD,
    )
    return TreeResult(call.pid, error=error)


class _Worker:
    """A process of ours that dumps one tree after another, as seen from the parent."""

    def __init__(self, shared: Shared, others: Sequence[_Worker]) -> None:
        self.channel, theirs = socket.socketpair()
        self.call: Call | None = None
        self.is_gone = False
        ignored = [number for number in FOR_PEOPLE if signal.getsignal(number) is signal.SIG_IGN]
        self._pid = kernel.quiet_fork()
        if self._pid == 0:
            self.channel.close()
            for other in others:
                other.channel.close()  # else nobody would see that the parent is gone
            _work(theirs, shared, ignored)
        theirs.close()

    def begin(self, call: Call) -> None:
        """Have it dump a tree."""
        self.call = call
        try:
            _send(self.channel, call.options)
        except OSError:
            pass  # it is gone: `result` says so

    def result(self) -> TreeResult:
        """What became of the tree; also when the worker did not live to tell."""
        assert self.call is not None
        call, self.call = self.call, None
        try:
            found = _receive(self.channel)
        except (OSError, EOFError):
            self.is_gone = True
            state = TreeState.RUNNING if call.root.alive() else TreeState.DEAD
            return TreeResult(call.pid, error=lost(call.options, state))
        assert isinstance(found, TreeResult)
        return found

    def interrupt(self, number: int) -> None:
        """Have the dump that is under way end as a signal ends it; again and again is no harm."""
        if self.call is not None and not self.is_gone:
            os.kill(self._pid, number)

    def end(self) -> None:
        """Let it go, and reap it."""
        self.channel.close()
        if self._pid:
            os.waitpid(self._pid, 0)
            self._pid = 0


def _work(channel: socket.socket, shared: Shared, ignored: Sequence[int]) -> None:
    """What a worker does: a tree after another, until the parent has no more or is gone. Never returns."""
    try:
        for number in (*FOR_PEOPLE, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, lambda *_: None)  # between two dumps there is nothing to interrupt
        for other in (*ignored, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU):
            signal.signal(other, signal.SIG_IGN)
        kernel.die_with_parent(signal.SIGTERM)
        while True:
            _send(channel, attempt(_receive(channel), shared))
    except (OSError, EOFError):
        pass
    finally:
        os._exit(0)


def attempt(options: DumpOptions, shared: Shared, progress: Progress | None = None) -> TreeResult:
    """Dump one tree; whatever that ends with is in the result."""
    try:
        return TreeResult(options.pid, report=dump(options, progress, shared))
    except CrcliError as error:
        return TreeResult(options.pid, error=error)
    except Interrupted as error:  # before the freeze: later ones are the dump's own failure
        return TreeResult(options.pid, error=DumpFailed(f"the dump was {error}", hint="run it again"))
    except BaseException as error:
        return TreeResult(options.pid, error=shortage(error) or _bug(error))


def _bug(error: BaseException) -> CrcliError:
    return CrcliError(
        f"crcli itself failed: {type(error).__name__}: {error}",
        hint="this is a bug: dump this tree alone with CRCLI_DEBUG=1, and report what it prints",
        state=getattr(error, "state", TreeState.UNTOUCHED),
    )


def _send(channel: socket.socket, item: Any) -> None:
    text = pickle.dumps(item)
    channel.sendall(_SIZE.pack(len(text)) + text)


def _receive(channel: socket.socket) -> Any:
    """What the other side sent; raises EOFError when it is gone."""
    return pickle.loads(_exactly(channel, _SIZE.unpack(_exactly(channel, _SIZE.size))[0]))


def _exactly(channel: socket.socket, size: int) -> bytes:
    pieces = bytearray()
    while len(pieces) < size:
        piece = channel.recv(size - len(pieces))
        if not piece:
            raise EOFError
        pieces += piece
    return bytes(pieces)
