"""The hand, as crcli sees it: a process of its own that makes all calls to CUDA's driver.

It is a process of its own because initialising CUDA takes seconds, because no call to the driver can be taken
back once it is made, and because somebody must wake what was put to sleep though crcli be killed. It works
for one dump or one restore (or one after the other), and sets right by itself what crcli leaves unsettled:
see `worker`. Nothing of CUDA is ever loaded into crcli itself.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import crcli
from crcli.errors import CrcliError, HostLacks
from crcli.gpu.facts import CudaProcess, CudaState, GpuHost
from crcli.gpu.meaning import meaning_of
from crcli.gpu.words import LOCK_LIMIT_S, MESSAGE_LIMIT, Purpose, move_limit_s
from crcli.process.identity import identify
from crcli.records import replace

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

__all__ = ["GpuFailed", "Hand", "Purpose"]

START_LIMIT_S = 30.0
"""How long cuInit may take (seconds): it was seen to take 3, and waits for GPUs that are being reset."""

RESUME_LIMIT_S = 60.0
"""How long crcli waits for processes to wake, beside the time that their memory takes (seconds)."""

_SPARE_S = 30.0
"""How much longer than all its calls may take an answer of the hand may be on the way (seconds)."""

_COPIES_S = 120.0
"""How long it may take to copy pinned memory that forks share with those who use CUDA (seconds)."""

_END_LIMIT_S = 2.0
_MASKS = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "CUDA_INJECTION64_PATH",
    "NVTX_INJECTION64_PATH",
)
"""What hides GPUs from programs, while the driver wants a mapping of all, or puts a profiler into them."""

_SETTINGS = {
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "CUDA_MPS_PIPE_DIRECTORY": "/nonexistent",  # else the hand becomes a client of MPS, where that runs
}


_PATHS = ("CRCLI_LOG_DIR", "CRCLI_STATE_DIR")


class GpuFailed(CrcliError):
    """CUDA's driver did not do what was asked, or the hand was killed. Nothing was rolled back by itself.

    `call` is what failed, `pid` for whom, `result` the driver's word; `states` what each process is in.
    """

    code = "gpu"

    def __init__(self, call: str, pid: int, result: str, states: Mapping[int, CudaState]) -> None:
        meaning = meaning_of(call, result)
        super().__init__(f"process {pid} {meaning.text} ({result})", hint=meaning.remedy)
        self.call = call
        self.pid = pid
        self.result = result
        self.states = dict(states)


class _Lost(Exception):
    """The hand is dead, or does not answer."""


class Hand:
    """See the module. A context manager: leaving it ends the hand, unless it has something to set right."""

    def __init__(self, purpose: Purpose) -> None:
        """Start it, and wait for nothing. Threads may run already: it is no fork of ours."""
        self._purpose = purpose
        self._host: GpuHost | None = None
        self._known: dict[int, CudaProcess] = {}
        self._touched: list[int] = []
        self._number = 0
        self._end, writer = os.pipe()
        os.close(writer)
        self._start()

    @property
    def pid(self) -> int:
        """The hand's own pid."""
        return self._process.pid

    @property
    def is_idle(self) -> bool:
        """Whether nothing is to be set right."""
        return not self._touched

    def end(self) -> int:
        """A descriptor, the caller's to close, that hangs up when the hand has ended, and whoever took its
        place: a pipe that nobody writes to, whose other end each hand has, and only hands."""
        return os.dup(self._end)

    def host(self) -> GpuHost:
        """The GPUs and the driver of this host. Raises HostLacks (no cuda-python, no driver, too old)."""
        if self._host is None:
            self._host = GpuHost.from_json(self._ask_again("host", (), START_LIMIT_S)["host"])
        return self._host

    def find(self, pids: Iterable[int]) -> list[CudaProcess]:
        """Those of the processes that CUDA's driver knows, by their restore threads.

        One that does not say what state it is in is SILENT. Raises HostLacks.
        """
        if not (processes := _named(pids)):
            return []
        answer = self._ask_again("find", processes, START_LIMIT_S)
        found = [
            CudaProcess(pid, start_time, tid, CudaState(state), used)
            for pid, start_time, tid, state, used in answer["found"]
        ]
        self._known |= {process.pid: process for process in found}
        return found

    def expect(self, pid: int, used: Mapping[str, int]) -> None:
        """It is known from elsewhere how much GPU memory a process that was found will have."""
        if pid in self._known:
            self._known[pid] = replace(self._known[pid], used=dict(used))

    def lock(self, pids: Sequence[int], limit_s: float = LOCK_LIMIT_S) -> dict[int, CudaState]:
        """They are LOCKED, or have ended, as is returned. `limit_s` is for each.

        This and the next three raise GpuFailed.
        """
        return self._do("lock", pids, limit_s, (limit_s + _SPARE_S) * len(pids))

    def checkpoint(self, pids: Sequence[int]) -> None:
        """They are CHECKPOINTED: their GPU memory lies in the host's, and they hold no GPU."""
        self._do("checkpoint", pids, 0.0, self._move_s(pids))

    def restore(self, pids: Sequence[int], mapping: Mapping[str, str], feeder: int = 0) -> None:
        """They are LOCKED, their memory on GPUs by this mapping of UUIDs (empty: on those it was on).

        Where the process `feeder` (0: none), a child of ours, still brings that memory, the time that it may
        take counts from that one's end.
        """
        self._do("restore", pids, 0.0, self._move_s(pids), mapping, feeder)

    def unlock(self, pids: Sequence[int]) -> None:
        """They are RUNNING."""
        self._do("unlock", pids, LOCK_LIMIT_S, LOCK_LIMIT_S * len(pids))

    def take_devices(self, pids: Iterable[int]) -> None:
        """Take NVIDIA's devices from processes that have them from a fork, as far as this can be done."""
        if not (processes := _named(pids)):
            return
        try:
            self._ask("take_devices", processes, _COPIES_S)
        except _Lost as error:
            raise GpuFailed("take_devices", processes[0][0], "HAND_LOST", {}) from error

    def resume(self) -> dict[int, CudaState]:
        """Have all that were locked run as before, in the reverse order; return the state of each now.

        Those that CRIU holds are waited for. Whoever cannot be woken in time the hand goes on to try, also
        when we have ended. Safe to call again. Never raises.
        """
        return self._set_right("resume", RESUME_LIMIT_S + self._move_s(self._touched))

    def release(self, pids: Sequence[int] = ()) -> dict[int, CudaState]:
        """Have these, or all that are not settled, hold no GPU any more: they are about to be killed.

        Returns their states. Never raises.
        """
        self._touched += [pid for pid in pids if pid not in self._touched]
        return self._set_right("release", LOCK_LIMIT_S + self._move_s(self._touched))

    def settled(self) -> None:
        """Nothing is to be set right any more."""
        self._touched = []
        try:
            self._ask("settled", (), _SPARE_S)
        except _Lost:
            pass  # then it sets nothing right either

    def close(self) -> None:
        """End it; where something is unsettled it works on without us, and ends by itself."""
        try:
            self._control.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is dead
        self._control.close()
        if self._end >= 0:
            os.close(self._end)
            self._end = -1
        if not self._touched:
            try:
                self._process.wait(_END_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Hand:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The process, and how it is spoken with.

    def _start(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours = os.pidfd_open(os.getpid())
        held = os.open(f"/proc/self/fd/{self._end}", os.O_WRONLY)
        here = os.path.dirname(os.path.dirname(crcli.__file__))
        arguments = [here, str(theirs.fileno()), str(ours), self._purpose.value]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), ours, held],
                start_new_session=True,
                env=_environment(),
            )
        except OSError as error:
            raise HostLacks(f"no process can be started here: {error}", hint="see `ulimit -u`") from error
        finally:
            theirs.close()
            os.close(ours)
            os.close(held)

    def _start_again(self) -> None:
        """Have another in the place of one that is dead, or that does not answer."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        self._start()

    def _do(
        self,
        name: str,
        pids: Sequence[int],
        limit_s: float,
        wait_s: float,
        mapping: Mapping[str, str] | None = None,
        feeder: int = 0,
    ) -> dict[int, CudaState]:
        self._touched += [pid for pid in pids if pid not in self._touched]
        try:
            answer = self._ask(name, self._described(pids), wait_s + _SPARE_S, limit_s, mapping, feeder)
        except _Lost as error:
            raise GpuFailed(name, pids[0], "HAND_LOST", {}) from error
        others = answer.get("others", ())
        self._touched = [pid for pid in self._touched if pid not in others]
        _see_failures(answer)
        states = _states(answer)
        if failed := [pid for pid, state in states.items() if state is CudaState.FAILED]:
            raise GpuFailed(name, failed[0], "FAILED", states)
        return states

    def _set_right(self, name: str, limit_s: float) -> dict[int, CudaState]:
        if not self._touched:
            return {}
        processes = self._described(self._touched)
        try:
            return _states(self._ask_again(name, processes, limit_s + _SPARE_S, limit_s))
        except CrcliError:
            return dict.fromkeys(self._touched, CudaState.LOCKED)  # nothing can be said, so nothing good

    def _ask_again(
        self, name: str, processes: Sequence[Sequence[Any]], wait_s: float, limit_s: float = 0.0
    ) -> dict[str, Any]:
        """Ask; where the hand is lost, ask another. Raises HostLacks."""
        try:
            return self._ask(name, processes, wait_s, limit_s)
        except _Lost:
            self._start_again()
        try:
            return self._ask(name, processes, wait_s + START_LIMIT_S, limit_s)
        except _Lost as error:
            raise HostLacks(
                "the process that speaks with CUDA's driver was killed or does not answer, and another too",
                hint="`nvidia-smi` says how the driver is, the kernel's log whether memory was short",
            ) from error

    def _ask(
        self,
        name: str,
        processes: Sequence[Sequence[Any]],
        wait_s: float,
        limit_s: float = 0.0,
        mapping: Mapping[str, str] | None = None,
        feeder: int = 0,
    ) -> dict[str, Any]:
        """The answer to a request. Raises _Lost, and HostLacks where CUDA cannot be used here."""
        self._number += 1
        request = {
            "id": self._number,
            "op": name,
            "processes": list(processes),
            "limit_s": limit_s,
            "map": dict(mapping or {}),
            "feeder": feeder,
        }
        try:
            self._control.send(json.dumps(request).encode())
        except OSError as error:
            raise _Lost from error
        if feeder:
            self._wait_for_end_of(feeder)
        answer = self._answer(self._number, time.monotonic() + wait_s)
        if "lacks" in answer:
            raise HostLacks(answer["lacks"], hint=answer["hint"])
        if "bug" in answer:
            raise CrcliError(f"the process that speaks with CUDA's driver failed: {answer['bug']}")
        return answer

    def _wait_for_end_of(self, child: int) -> None:
        """Return when a child of ours has ended, or something was said to us."""
        ended = os.pidfd_open(child)
        try:
            poll = select.poll()
            poll.register(self._control, select.POLLIN)
            poll.register(ended, select.POLLIN)
            poll.poll()
        finally:
            os.close(ended)

    def _answer(self, number: int, until: float) -> dict[str, Any]:
        """The answer with this number; those to what we stopped to wait for are passed over."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        while True:
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise _Lost
            try:
                text = self._control.recv(MESSAGE_LIMIT)
            except OSError as error:
                raise _Lost from error
            if not text:
                raise _Lost
            answer: dict[str, Any] = json.loads(text)
            if answer["id"] == number:
                return answer

    def _described(self, pids: Iterable[int]) -> list[list[Any]]:
        """Processes as the hand is told of them; one that was not found has ended."""
        return [
            [pid, self._known[pid].start_time, move_limit_s(self._bytes_of(self._known[pid]))]
            for pid in pids
            if pid in self._known
        ]

    def _bytes_of(self, process: CudaProcess) -> int:
        """How much GPU memory a process has, and where nobody knows, how much it can have at most."""
        if process.used or self._host is None:
            return process.used_bytes
        return sum(gpu.memory_bytes for gpu in self._host.gpus)

    def _move_s(self, pids: Iterable[int]) -> float:
        return max((move_s for _, _, move_s in self._described(pids)), default=0.0)


def _named(pids: Iterable[int]) -> list[list[Any]]:
    """Those of the processes that are there, as the hand is told of them; their memory is not moved."""
    processes: list[list[Any]] = []
    for pid in dict.fromkeys(pids):
        try:
            processes.append([pid, identify(pid).start_time, 0.0])
        except ProcessLookupError:
            continue
    return processes


def _environment() -> dict[str, str]:
    """Ours, without what would hide a GPU, and with paths that hold in another folder."""
    kept = {name: value for name, value in os.environ.items() if name not in _MASKS}
    paths = {name: os.path.abspath(kept[name]) for name in _PATHS if kept.get(name)}
    return kept | _SETTINGS | paths


def _see_failures(answer: Mapping[str, Any]) -> None:
    for failure in answer.get("failures", ()):
        raise GpuFailed(failure["call"], failure["pid"], failure["result"], _states(answer))


def _states(answer: Mapping[str, Any]) -> dict[int, CudaState]:
    return {int(pid): CudaState(state) for pid, state in answer["states"].items()}


_PROGRAM = (
    "import sys; here = sys.argv[1]\n"
    "if here not in sys.path: sys.path.insert(0, here)\n"
    "from crcli.gpu.worker import main; main(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])"
)
