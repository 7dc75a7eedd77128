"""The GPU side of the two stories, for trees that have one; not imported for any other.

**dump**: all CUDA processes are locked, then all checkpointed: their GPU memory lies in their own, and CRIU
takes it like any other. A tree that lives on gets it back as soon as CRIU has let it go. Whatever fails,
everything is woken in the reverse order, and the error says in what state each process is.

**restore**: once CRIU has restored the tree, all are restored on the GPUs of this host, then unlocked. When
that fails they are checkpointed again, so that nothing holds a GPU, and then killed like any failed restore.

The calls are made by the hand (crcli.gpu.hand), which does the same should we be killed.

From CUDA 13.4 on the driver can hand the bytes on a GPU to us without a copy in the host's memory (custom
storage; `GpuHost.custom_storage` says whether it can here). They would then come to the Intake beside the
pages that CRIU sends, as those of one more kind of space, and go back before `unlock`: `DumpSide.asleep`
and `RestoreSide.wake` are where. No machine of ours has such a driver yet.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from crcli.errors import (
    CrcliError,
    DumpFailed,
    HostLacks,
    PreflightRefused,
    RestoreFailed,
    TooLate,
    TreeState,
)
from crcli.findings import Finding, Severity
from crcli.gpu.care import alone, is_cared_for
from crcli.gpu.facts import CudaState
from crcli.gpu.hand import GpuFailed, Hand
from crcli.gpu.inherited import forked_from, holds_devices
from crcli.gpu.mapping import in_force
from crcli.gpu.preflight import Scene, gpu_findings, host_memory, survey
from crcli.gpu.saved import added, ordinary_memory
from crcli.gpu.words import LINK_BYTES_PER_S, LOCK_LIMIT_S, Purpose
from crcli.pipeline.interrupts import seconds_left
from crcli.pipeline.shared import Shared
from crcli.pipeline.stages import Outcome
from crcli.pipeline.watch import tree_state
from crcli.process.gather import gather
from crcli.process.identity import ProcessId, identify, read_proc
from crcli.process.tree import child_pids, read_process, scan_tree

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from crcli.gpu.facts import CudaProcess, GpuHost
    from crcli.gpu.preflight import Survey
    from crcli.guard.here import Here
    from crcli.pipeline.interrupts import Interrupts
    from crcli.pipeline.stages import DumpOptions, DumpReport, Stopwatch
    from crcli.process.evidence import Evidence
    from crcli.process.tree import Tree

_MOST_LOOKS = 8
"""How often a tree is looked through for CUDA processes that came while the others were locked."""

_OTHERS_S, _OTHERS_STEP_S = 30.0, 0.05
"""How long a dump waits for the hand of another, which was killed perhaps, to wake the tree (seconds)."""

_LESS = 0.9
"""A restored process that has less than this of its GPU memory is worth a word."""

_TRACES = (b"/libcuda.so", b"/dev/nvidia")
"""What the maps of a process hold that uses CUDA."""


class DumpSide:
    """The GPU side of one dump. A context manager: leaving it ends the hand, once all is set right."""

    def __init__(self, evidence: Evidence, options: DumpOptions, shared: Shared | None = None) -> None:
        """Start the hand, which initialises CUDA meanwhile, unless `shared` has one from the last dump."""
        self._evidence = evidence
        self._options = options
        self._shared = shared or Shared()
        self._hand = self._shared.take_hand() or Hand(Purpose.DUMP)
        self._host: GpuHost | None = None
        self._states: dict[int, CudaState] = {}
        self._saved: dict[int, list[tuple[int, int]]] = {}
        self._saved_bytes = 0
        self._locked: list[int] = []
        self.processes: list[CudaProcess] = []
        """The tree's CUDA processes, in its order; empty when it has none after all."""
        self.findings: list[Finding] = []
        self.asleep_since = 0.0

    @property
    def memory_bytes(self) -> int:
        """GPU memory in use: as NVML tells, or else as it showed when it came to lie in the host's."""
        return sum(process.used_bytes for process in self.processes) or self._saved_bytes

    def look(self) -> list[Finding]:
        """Learn what is there to be told from the driver, and return what was found.

        Raises PreflightRefused, and HostLacks where nobody can tell; the tree is not touched.
        """
        found = self._survey()
        if found.lacks is not None and found.findings:
            raise HostLacks(
                f"process {self._options.pid} uses GPUs: {found.lacks.message}",
                hint=found.lacks.hint,
                findings=found.findings,
            ) from found.lacks
        self._host, self.processes = found.host, list(found.processes)
        self.findings = [*found.findings, *self._ways()]
        blockers = [one for one in self.findings if one.severity == Severity.BLOCKER]
        if blockers:
            raise PreflightRefused(
                f"process {self._options.pid} cannot be dumped: {blockers[0].message}",
                hint=blockers[0].remedy,
                findings=self.findings,
            )
        return self.findings

    def _survey(self) -> Survey:
        """What the driver says; of processes that another hand is about to wake, once it has.

        It may have done so after the driver said otherwise: what counts was heard when no hand was at work.
        """
        end = time.monotonic() + _OTHERS_S
        were_others = True
        while True:
            found = survey(self._evidence, self._hand)
            asleep = [one for one in found.processes if one.state is not CudaState.RUNNING]
            others = any(is_cared_for(ProcessId(one.pid, one.start_time)) for one in asleep)
            if not asleep or not (others or were_others) or time.monotonic() > end:
                return found
            were_others = others
            time.sleep(_OTHERS_STEP_S)

    def _ways(self) -> Iterator[Finding]:
        """What cannot be had of the ways in which a dump can be asked for."""
        if self.processes and self._options.outcome == Outcome.STOPPED:
            yield Finding(
                "gpu-leave-stopped",
                Severity.BLOCKER,
                "a process that is stopped cannot take its GPU memory back",
                {"pids": [process.pid for process in self.processes]},
                remedy="leave it running with --leave-running, or have it killed",
            )
        if self.processes and self._options.pre_copy:
            yield Finding(
                "gpu-no-pre-copy",
                Severity.NOTE,
                "memory is not copied ahead from a tree that uses GPUs",
                action="makes no rounds: CRIU takes such a tree only while it is off its GPUs",
            )

    def see_time_left(self) -> None:
        """Raise TooLate if the deadline comes before the memory of the fullest GPU can have left it, at
        best: a checkpoint that was begun cannot be taken back."""
        sizes: Counter[str] = Counter()
        for process in self.processes:
            sizes.update(process.used)
        least_s = max(sizes.values(), default=0) / LINK_BYTES_PER_S
        left_s = seconds_left()
        if left_s is not None and least_s > left_s:
            raise TooLate(
                f"GPU memory takes {least_s:.1f} s at least to reach the host's, and {left_s:.1f} s are left",
                hint="take images while there is time",
                state=TreeState.RUNNING,
            )

    @contextmanager
    def asleep(self, dump: Sleeper) -> Iterator[None]:
        """Within the block the tree is off its GPUs, until `wake`. On the way out nothing of it is asleep:
        it runs, or is dead, or the error says what became of each process."""
        is_asleep = False
        try:
            self._put_to_sleep(dump)
            is_asleep = True
            yield
        except BaseException as error:
            dump.interrupts.past_return()
            self._states |= self._hand.resume()
            if not _not_running(self._states):
                self._hand.settled()
            raise self._told(error if is_asleep else self._not_asleep(error), dump) from error
        if _not_running(self._states):
            self._states |= self._hand.resume()
        if self._states and (left := _not_running(self._states) or self._lost()):
            raise self._image_only(left, dump)
        self._hand.settled()

    def _put_to_sleep(self, dump: Sleeper) -> None:
        """Lock all, then checkpoint all. Not one instruction of the GPUs' is lost: they have come to rest.

        One tree after another on this host: each must find the memory that the last has left.
        """
        with alone():
            self._see_room()
            self._sleep(dump)

    def _see_room(self) -> None:
        """Raise PreflightRefused if the host's memory has become too little for that of the GPUs."""
        assert self._host is not None
        if tight := list(host_memory(Scene(self._evidence, self._host, self.processes))):
            pid = self._options.pid
            raise PreflightRefused(
                f"process {pid} cannot be dumped: {tight[0].message}", hint=tight[0].remedy, findings=tight
            )

    def _sleep(self, dump: Sleeper) -> None:
        self.asleep_since = time.monotonic()
        with dump.watch.phase("gpu lock"):
            waiting = self.processes
            for _ in range(_MOST_LOOKS):
                if not waiting:
                    break
                states = self._hand.lock([process.pid for process in waiting], _lock_limit_s())
                self._locked += [pid for pid, state in states.items() if state is not CudaState.GONE]
                waiting = self._newcomers(self._locked)
            self._take_inherited_devices()
        self.see_time_left()
        dump.reserve_for_gpus()
        before = {pid: (_anonymous_bytes(pid), ordinary_memory(pid)) for pid in self._locked}
        with dump.watch.phase("gpu checkpoint"):
            self._hand.checkpoint(self._locked)
        for pid, (size, places) in before.items():
            self._saved_bytes += max(0, _anonymous_bytes(pid) - size)
            self._saved[pid] = added(places, ordinary_memory(pid))
        if left := [pid for pid in _pids_of(self._evidence.root.pid) if holds_devices(pid)]:
            raise GpuFailed("checkpoint", left[0], "DEVICE_LEFT", {})

    def _take_inherited_devices(self) -> None:
        """Have no process hold devices but those that use them; a child that a fork of theirs has forked
        meanwhile holds them as well."""
        tried: set[int] = set(self._locked)
        for _ in range(_MOST_LOOKS):
            others = [pid for pid in _pids_of(self._evidence.root.pid) if pid not in tried]
            heirs = [pid for pid in others if holds_devices(pid) and forked_from(pid, self._locked)]
            if not heirs:
                return
            self._hand.take_devices(heirs)
            tried.update(heirs)

    def _newcomers(self, known: Sequence[int]) -> list[CudaProcess]:
        """The CUDA processes of the tree that were not there, or did not use CUDA, when it was looked at."""
        root = self._evidence.root
        pids = [pid for pid in _pids_of(root.pid) if pid not in known and _has_traces(pid)]
        found = self._hand.find(pids)
        if found:
            assert self._host is not None
            fresh = gather(scan_tree(root.identity))
            self.processes = [*self.processes, *found]
            alive = [one for one in self.processes if one.pid in fresh.tree]
            blockers = [
                one
                for one in gpu_findings(fresh, self._host, alive)
                if one.severity == Severity.BLOCKER and one.name != "gpu-state"
            ]
            if blockers:
                raise PreflightRefused(
                    f"process {root.pid} cannot be dumped: {blockers[0].message}", hint=blockers[0].remedy
                )
        return found

    def wake(self, dump: Sleeper) -> None:
        """CRIU has let the tree go, which is to live on: give it its GPUs back.

        When all run again they are no concern of ours from now on: while the image is still on its way they
        may end, and another may dump them. Whoever cannot be woken is told at the end: the image comes first.
        """
        with dump.watch.phase("gpu resume"):
            self._states = self._hand.resume()
        if not _not_running(self._states) and not self._lost():
            self._hand.settled()
            self._locked = []
        dump.report.frozen_ms = round((time.monotonic() - self.asleep_since) * 1000, 2)

    def _image_only(self, left: Sequence[int], dump: Sleeper) -> DumpFailed:
        """The error of a dump that left nothing whole but the image."""
        state = self._states[left[0]]
        return DumpFailed(
            f"the image {dump.report.image} is durable, but {self._label(left[0])} {_STATES[state]}",
            hint=f"end the tree, and restore {dump.report.image}",
            state=TreeState.DEAD if self._lost() else TreeState.STOPPED,
            findings=tuple(self._state_findings()),
        )

    def _not_asleep(self, error: BaseException) -> BaseException:
        """The error of a dump whose tree could not be put to sleep: the driver's doing, or the hand's."""
        if not isinstance(error, CrcliError) or isinstance(error, DumpFailed | PreflightRefused):
            return error
        text = error.message
        if isinstance(error, GpuFailed):
            text = text.replace(f"process {error.pid}", self._label(error.pid), 1)
        return DumpFailed(f"the dump failed: {text}", hint=error.hint, state=tree_state(self._evidence.tree))

    def _told(self, error: BaseException, dump: Sleeper) -> BaseException:
        """The error to raise, with what became of each process."""
        told = error if isinstance(error, CrcliError) else dump.failure(error)
        if not isinstance(told, CrcliError):
            return told
        if dump.published:  # then it is no loss that they have ended
            self._locked = []
        told.findings = (*told.findings, *self._state_findings())
        lost = self._lost()
        left = lost or _not_running(self._states)
        if not left:
            return told
        return DumpFailed(
            f"{told.message}; and {self._label(left[0])} {_STATES[self._states[left[0]]]}",
            hint="end the tree: it is not whole any more; start it again, or restore an older image"
            if lost
            else "crcli goes on to wake it for ten minutes; afterwards `crcli doctor --fix` does",
            state=TreeState.DEAD if lost else TreeState.STOPPED,
            findings=told.findings,
            cause=told.cause,
        )

    def _lost(self) -> list[int]:
        """Those that nothing brings back: the driver has given them up, or they ended off their GPUs."""
        ended = [pid for pid in self._locked if self._states.get(pid) is CudaState.GONE]
        return [pid for pid, state in self._states.items() if state is CudaState.FAILED] + ended

    def _state_findings(self) -> Iterator[Finding]:
        for pid, state in self._states.items():
            if state is not CudaState.GONE or pid in self._locked:
                is_well = state is CudaState.RUNNING
                yield Finding(
                    "gpu-process",
                    Severity.NOTE if is_well else Severity.BLOCKER,
                    f"{self._label(pid)} {_STATES[state]}",
                    {"pid": pid, "state": state.value},
                )

    def _label(self, pid: int) -> str:
        tree = self._evidence.tree
        return tree.process(pid).label if pid in tree else f"process {pid}"

    # For the image and the report.

    def described(self, tree: Tree) -> dict[str, Any]:
        """As it stands in the manifest."""
        assert self._host is not None
        inside = {process.pid: process.nspid[-1] for process in tree.living if process.nspid}
        return {
            "host": self._host.as_json(),
            "processes": [
                {
                    "pid": inside[process.pid],
                    "used": dict(process.used),
                    "saved": self._saved.get(process.pid, []),
                }
                for process in self.processes
                if process.pid in inside
            ],
        }

    def as_json(self) -> dict[str, Any]:
        """As it stands in the report."""
        states = self._states or {process.pid: CudaState.GONE for process in self.processes}
        return _report(self.memory_bytes, states, {})

    def __enter__(self) -> DumpSide:
        self._criu_plugins = _without_criu_plugins()
        return self

    def __exit__(self, *_: object) -> None:
        _with_criu_plugins(self._criu_plugins)
        if self._hand.is_idle and self.processes:
            self._shared.keep_hand(self._hand)
        else:
            self._hand.close()


class Sleeper(Protocol):
    """What the GPU side must know of the dump whose tree it puts to sleep."""

    watch: Stopwatch
    report: DumpReport
    interrupts: Interrupts
    published: bool

    def failure(self, error: BaseException) -> BaseException:
        """The error of a dump that this one means."""
        ...

    def reserve_for_gpus(self) -> None:
        """Begin to get memory for the tree's pages: that of its GPUs is about to come to the host."""
        ...


def look_at_gpus(evidence: Evidence, options: DumpOptions) -> tuple[list[Finding], int]:
    """What there is to be said of the GPU side of a tree that is not dumped now, and its GPU memory (bytes).

    Raises PreflightRefused and HostLacks, as a dump would.
    """
    with DumpSide(evidence, options) as side:
        return side.look(), side.memory_bytes


class RestoreSide:
    """The GPU side of one restore. A context manager, as DumpSide is."""

    def __init__(self, recorded: Mapping[str, Any], asked: Sequence[tuple[str, str]]) -> None:
        """Start the hand; `recorded` is what the image says of its GPUs, `asked` what the user maps."""
        self._recorded = recorded
        self._asked = asked
        self._hand = Hand(Purpose.RESTORE)
        self._mapping: dict[str, str] = {}
        self._pids: list[int] = []
        self._states: dict[int, CudaState] = {}
        self._inside: dict[int, int] = {}
        self.feeder = 0
        """The process that still brings the tree's memory; 0 where all of it is there."""

    def tell(self, here: Here) -> None:
        """Let the guard know of this host's GPUs; where CUDA cannot be used it finds out by itself."""
        from crcli.guard.gpus import gpu_guard

        try:
            here.gpus = self._hand.host()
        except HostLacks:
            return
        _, self._mapping = gpu_guard(self._recorded, here.gpus, self._asked)

    def saved(self) -> dict[int, list[tuple[int, int]]]:
        """Where the driver had put what was on GPUs, by pid inside the tree, as (first page, pages)."""
        places = {one["pid"]: one.get("saved", ()) for one in self._recorded["processes"]}
        return {pid: [(start, pages) for start, pages in runs] for pid, runs in places.items()}

    def last_words(self) -> int:
        """A descriptor, the caller's to close, that hangs up once the hand has nothing more to do."""
        return self._hand.end()

    def wake(self, host_pids: Mapping[int, int], watch: Stopwatch) -> list[Finding]:
        """All processes run on their GPUs, by this map of their pids; what is odd about it is returned.

        Raises RestoreFailed.
        """
        recorded = {one["pid"]: one["used"] for one in self._recorded["processes"]}
        used = {host_pids[pid]: sizes for pid, sizes in recorded.items()}
        self._inside = {host_pids[pid]: pid for pid in recorded}
        self._pids = list(used)
        try:
            with watch.phase("gpu restore"):
                self._see_asleep(self._hand.find(self._pids))
                for pid, sizes in used.items():
                    self._hand.expect(pid, sizes)
                self._hand.restore(self._pids, self._mapping, self.feeder)
            with watch.phase("gpu unlock"):
                self._hand.unlock(self._pids[::-1])
            with watch.phase("gpu check"):
                return list(self._check(used))
        except CrcliError as error:  # GpuFailed, or the hand's own fault
            raise RestoreFailed(
                f"the tree was restored, but not its GPU side: {error.message}",
                hint=error.hint,
                state=TreeState.DEAD,
            ) from error

    def _see_asleep(self, found: Iterable[CudaProcess]) -> None:
        states = {process.pid: process.state for process in found}
        for pid in self._pids:
            if states.get(pid) is not CudaState.CHECKPOINTED:
                result = "NOT_CHECKPOINTED" if pid in states else "CUDA_ERROR_INVALID_VALUE"
                raise GpuFailed("restore", pid, result, states)

    def _check(self, used: Mapping[int, Mapping[str, int]]) -> Iterator[Finding]:
        """Whether all run, and have as much GPU memory as they had where that can be told."""
        found = {process.pid: process for process in self._hand.find(self._pids)}
        self._states = {pid: found[pid].state if pid in found else CudaState.GONE for pid in self._pids}
        unknown = [pid for pid in self._pids if pid not in found and _lives(pid)]
        if wrong := _not_running(self._states) + unknown:
            raise GpuFailed("unlock", wrong[0], "NOT_RUNNING", self._states)
        for pid, process in found.items():
            before = sum(used[pid].values())
            if process.used and process.used_bytes < _LESS * before:
                yield Finding(
                    "gpu-memory-less",
                    Severity.CHANGE,
                    f"process {pid} has {process.used_bytes} bytes of GPU memory now, and had {before}",
                    {"pid": pid, "before": before, "now": process.used_bytes},
                    remedy="see whether the program works as before",
                )

    def settled(self) -> None:
        """The tree is to live: nothing is to be set right any more."""
        self._hand.settled()

    def give_up(self) -> list[Finding]:
        """Have nothing of the tree hold a GPU, as it is about to be killed; return what came of that.

        Never raises; ends the hand.
        """
        states = self._hand.release(self._pids)
        self._hand.settled()
        self._hand.close()
        return [_given_up(pid, state) for pid, state in states.items() if state is not CudaState.GONE]

    def as_json(self) -> dict[str, Any]:
        """As it stands in the report."""
        used = dict.fromkeys(uuid for one in self._recorded["processes"] for uuid in one["used"])
        total = sum(sum(one["used"].values()) for one in self._recorded["processes"])
        states = {self._inside[pid]: state for pid, state in self._states.items()}
        return _report(total, states, in_force(self._mapping, used or self._mapping))

    def __enter__(self) -> RestoreSide:
        self._criu_plugins = _without_criu_plugins()
        return self

    def __exit__(self, *_: object) -> None:
        _with_criu_plugins(self._criu_plugins)
        self._hand.close()


# CRIU's own plug-in for CUDA, where it is installed, would wake what crcli wakes, and in the trial too.

_CRIU_PLUGINS, _NOWHERE = "CRIU_LIBS_DIR", "/proc/self/ns"
"""The variable that says where CRIU looks for plug-ins, and a folder of every root that has none."""


def _without_criu_plugins() -> str | None:
    """Have every CRIU that is started from now on find no plug-in; return what was set before."""
    before = os.environ.get(_CRIU_PLUGINS)
    os.environ[_CRIU_PLUGINS] = _NOWHERE
    return before


def _with_criu_plugins(before: str | None) -> None:
    if before is None:
        os.environ.pop(_CRIU_PLUGINS, None)
    else:
        os.environ[_CRIU_PLUGINS] = before


_STATES = {
    CudaState.RUNNING: "runs on its GPUs as before",
    CudaState.LOCKED: "waits in its next call of CUDA: it is still locked",
    CudaState.CHECKPOINTED: "waits in its next call of CUDA: its GPU memory is still in the host's",
    CudaState.CHECKPOINTING: "is on its way off its GPUs",
    CudaState.RESTORING: "is on its way to its GPUs",
    CudaState.FAILED: "is lost: CUDA's driver has given it up (FAILED)",
    CudaState.GONE: "has ended while it was off its GPUs",
    CudaState.SILENT: "does not answer CUDA's driver",
}


def _report(memory_bytes: int, states: Mapping[int, CudaState], mapping: Mapping[str, str]) -> dict[str, Any]:
    return {
        "processes": len(states),
        "memory_bytes": memory_bytes,
        "states": [{"pid": pid, "state": state.value} for pid, state in states.items()],
        "map": dict(mapping),
    }


def _given_up(pid: int, state: CudaState) -> Finding:
    """What became of a process whose restore has failed. `state` is what it is in before it is killed."""
    is_off = state is CudaState.CHECKPOINTED
    return Finding(
        "gpu-process",
        Severity.NOTE if is_off else Severity.CHANGE,
        f"process {pid} {'holds no GPU any more' if is_off else f'may have held a GPU to its end ({state})'}",
        {"pid": pid, "state": state.value},
        action="has taken it off its GPUs again, and killed it" if is_off else "has killed it as it was",
    )


def _lives(pid: int) -> bool:
    try:
        return identify(pid).alive()
    except ProcessLookupError:
        return False


def _not_running(states: Mapping[int, CudaState]) -> list[int]:
    """Those that live and do not run, in the order of the tree."""
    return [pid for pid, state in states.items() if state not in (CudaState.RUNNING, CudaState.GONE)]


def _lock_limit_s() -> float:
    """How long each process may take to come to rest: a third of the time until the deadline, at most."""
    left_s = seconds_left()
    return LOCK_LIMIT_S if left_s is None else min(LOCK_LIMIT_S, left_s / 3)


def _pids_of(root: int) -> list[int]:
    pids = [root]
    for pid in pids:
        pids += child_pids(pid)
    return pids


def _has_traces(pid: int) -> bool:
    try:
        maps = read_proc(f"/proc/{pid}/maps")
    except OSError:
        return False
    return any(trace in maps for trace in _TRACES)


def _anonymous_bytes(pid: int) -> int:
    process = read_process(pid)
    return process.anonymous_bytes if process is not None else 0
