"""The hand (crcli/gpu/hand.py, worker.py) over a simulated GPU host: what it does, what it leaves behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pynvml
import pytest

from crcli.errors import HostLacks
from crcli.gpu.facts import CudaState
from crcli.gpu.hand import GpuFailed, Hand, Purpose
from tests.support.crcli import ROOT, assert_goes_on, tree_of, wait_until
from tests.support.gpu_simulator import MIB, SimulatedHost, gpu
from tests.support.programs import Program

NOT_READY, OUT_OF_MEMORY, UNKNOWN = 600, 2, 999


@pytest.fixture
def here(sim: SimulatedHost, monkeypatch: pytest.MonkeyPatch) -> SimulatedHost:
    """The simulated host, for this process as well."""
    for name, value in sim.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CRCLI_STATE_DIR", str(sim.folder / "state"))
    return sim


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after some time, as a deadline interrupts a dump."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def pids_of(root: Program) -> list[int]:
    """The pids of a tree, the root first."""
    return [process.pid for process in tree_of(root.pid)]


def test_it_says_what_the_host_has_and_who_uses_it(here: SimulatedHost) -> None:
    """GPUs, driver, and each CUDA process with its restore thread and its bytes on each GPU."""
    with (
        here.start_program("--gpu", "0", "--gpu", "1", "--megabytes", "2") as program,
        Hand(Purpose.DUMP) as hand,
    ):
        host = hand.host()
        assert (host.driver, host.api, [one.uuid for one in host.gpus]) == (
            "580.95.05",
            13000,
            [gpu(1).uuid, gpu(2).uuid],
        )
        found = hand.find([program.pid, os.getpid()])
        assert [(one.pid, one.state) for one in found] == [(program.pid, CudaState.RUNNING)]
        assert os.path.exists(f"/proc/{program.pid}/task/{found[0].restore_tid}")
        assert all(size >= 2 * MIB for size in found[0].used.values())
        assert set(found[0].used) == {gpu(1).uuid, gpu(2).uuid}


def test_gpus_are_told_without_nvml(here: SimulatedHost) -> None:
    """Who uses how much is not known then, and the processes are found all the same."""
    here.configure(gpu(1), gpu(2), tells_processes=False)
    with here.start_program() as program, Hand(Purpose.DUMP) as hand:
        found = hand.find([program.pid])
        assert [(one.pid, dict(one.used)) for one in found] == [(program.pid, {})]


_REAL = f"""
import sys
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("real", {pynvml.__file__!r})
real = sys.modules["real"] = module_from_spec(spec)
spec.loader.exec_module(real)
from real import *
"""


@pytest.mark.parametrize(
    ("module", "is_told"),
    [
        ("raise SyntaxError('Missing parentheses')", False),
        ("def nvmlInit(): raise OSError('no such function')", False),
        (f"{_REAL}def nvmlDeviceGetCount(): raise real.NVMLLibraryMismatchError", False),
        (f"{_REAL}def nvmlDeviceGetUUID(handle): return real.nvmlDeviceGetUUID(handle).encode()", True),
    ],
    ids=["of Python 2", "without errors of its own", "older than the driver", "texts of bytes"],
)
def test_nvml_of_another_age_does_no_harm(
    here: SimulatedHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, is_told: bool
) -> None:
    """What it cannot tell CUDA does; UUIDs are as ever, whatever else is installed as pynvml."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pynvml.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "old"))
    with here.start_program() as program, Hand(Purpose.DUMP) as hand:
        assert [one.uuid for one in hand.host().gpus] == [gpu(1).uuid, gpu(2).uuid]
        assert bool(hand.find([program.pid])[0].used) is is_told


def test_masks_of_the_caller_hide_no_gpu(here: SimulatedHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver wants every GPU mapped, whatever CUDA_VISIBLE_DEVICES says to crcli."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with Hand(Purpose.DUMP) as hand:
        assert len(hand.host().gpus) == 2


def test_a_host_without_the_library_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """HostLacks, with what to install; no traceback of another's code."""
    with Hand(Purpose.DUMP) as hand, pytest.raises(HostLacks, match="CUDA's driver cannot be used") as told:
        hand.host()
    assert "570" in told.value.hint


def test_a_driver_that_is_too_old_is_told_so(here: SimulatedHost) -> None:
    """CUDA 12.4 has no checkpoint."""
    here.configure(gpu(1), driver="550.54.14", api=12040)
    with Hand(Purpose.DUMP) as hand, pytest.raises(HostLacks, match=r"CUDA 12\.4"):
        hand.host()


def test_a_process_goes_off_its_gpu_and_back(here: SimulatedHost) -> None:
    """Locked, checkpointed (its GPU is free then), restored, unlocked: it counts on."""
    with here.start_program("--megabytes", "4") as program, Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find([program.pid])]
        hand.lock(pids)
        hand.checkpoint(pids)
        assert here.in_use(0) == 0
        hand.restore(pids, {})
        hand.unlock(pids)
        hand.settled()
        assert_goes_on(program)


def test_one_that_does_not_come_to_rest_is_named_and_nothing_is_rolled_back(here: SimulatedHost) -> None:
    """NOT_READY for the second of three: the first is LOCKED, the others RUNNING; `resume` wakes it."""
    with here.start_tree() as (root, family), Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find(pids_of(root))]
        here.inject("lock", "error", NOT_READY, pid=pids[1])
        with pytest.raises(GpuFailed, match="did not come to rest") as told:
            hand.lock(pids)
        assert told.value.pid == pids[1]
        assert list(told.value.states.values()) == [CudaState.LOCKED, CudaState.RUNNING, CudaState.RUNNING]
        assert set(hand.resume().values()) == {CudaState.RUNNING}
        for one in family:
            assert_goes_on(one)


def test_who_is_interrupted_takes_back_a_call_that_still_hangs(here: SimulatedHost) -> None:
    """The checkpoint goes on in the hand; `resume` waits for its end, then wakes the process."""
    with here.start_program() as program, Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find([program.pid])]
        hand.lock(pids)
        hang = here.inject("checkpoint", "hang")
        with pytest.raises(TimeoutError), alarm(0.3):
            hand.checkpoint(pids)
        threading.Timer(0.5, hang.release).start()
        assert hand.resume() == {program.pid: CudaState.RUNNING}
        assert_goes_on(program)


def test_a_lock_that_was_given_up_is_not_left_behind(here: SimulatedHost) -> None:
    """It succeeds after crcli stopped to wait for it, and is undone at once."""
    with here.start_program() as program, Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find([program.pid])]
        hang = here.inject("lock", "hang")
        with pytest.raises(TimeoutError), alarm(0.3):
            hand.lock(pids)
        threading.Timer(0.3, hang.release).start()
        assert hand.resume() == {program.pid: CudaState.RUNNING}
        assert_goes_on(program)


def test_a_failed_process_is_never_called_running(here: SimulatedHost) -> None:
    """FAILED is what `checkpoint` raises with and `resume` says, or GONE once it has died of that."""
    with here.start_program() as program, Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find([program.pid])]
        hand.lock(pids)
        here.inject("checkpoint", "fail", UNKNOWN)
        with pytest.raises(GpuFailed) as told:
            hand.checkpoint(pids)
        assert told.value.states[program.pid] in (CudaState.FAILED, CudaState.GONE)
        assert hand.resume()[program.pid] in (CudaState.FAILED, CudaState.GONE)


def test_one_that_ends_while_its_state_is_asked_for_is_gone(here: SimulatedHost) -> None:
    """The driver does not know what became of it; what was heard last is not true any more."""
    with here.start_program() as program, Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find([program.pid])]
        hand.lock(pids)
        here.inject("checkpoint", "error", UNKNOWN)
        hang = here.inject("state", "hang")
        here.inject("state", "error", UNKNOWN, after=True)

        def end() -> None:
            here.wait_for("state", "hang")
            program.process.kill()
            program.process.wait()
            hang.release()

        ending = threading.Thread(target=end)
        ending.start()
        with pytest.raises(GpuFailed) as told:
            hand.checkpoint(pids)
        ending.join()
        assert told.value.states == {program.pid: CudaState.GONE}


def test_what_is_refused_once_is_tried_again(here: SimulatedHost) -> None:
    """A restore that finds no memory on the GPU for a moment, and a state that cannot be told."""
    with here.start_program() as program, Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find([program.pid])]
        hand.lock(pids)
        hand.checkpoint(pids)
        here.inject("restore", "error", OUT_OF_MEMORY, times=2)
        here.inject("state", "error", UNKNOWN, skip=1, times=2)
        assert hand.resume() == {program.pid: CudaState.RUNNING}
        assert_goes_on(program)


def test_a_killed_hand_is_replaced_and_the_next_one_wakes_all(here: SimulatedHost) -> None:
    """It goes by what the driver says; the call during which the first was killed has failed."""
    with here.start_tree() as (root, family), Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find(pids_of(root))]
        hand.lock(pids)
        here.inject("checkpoint", "die", pid=pids[1], after=True)
        first = hand.pid
        with pytest.raises(GpuFailed, match="killed"):
            hand.checkpoint(pids)
        assert set(hand.resume().values()) == {CudaState.RUNNING}
        assert hand.pid != first
        for one in family:
            assert_goes_on(one)


def test_memory_that_is_still_on_its_way_takes_the_time_it_takes(
    here: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as somebody brings it the limit of a restore does not count, and from then on it does."""
    with here.start_program() as program, Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find([program.pid])]
        hand.lock(pids)
        hand.checkpoint(pids)
        monkeypatch.setattr("crcli.gpu.hand.move_limit_s", lambda _: 0.2)
        monkeypatch.setattr("crcli.gpu.hand._SPARE_S", 5.0)
        hang = here.inject("restore", "hang")
        with subprocess.Popen(["sleep", "1000"]) as feeder:
            threading.Timer(2.0, hang.release).start()
            hand.restore(pids, {}, feeder.pid)
            assert hand.find(pids)[0].state is CudaState.LOCKED
            hand.checkpoint(pids)
            hang = here.inject("restore", "hang")
            threading.Timer(1.0, feeder.kill).start()
            with pytest.raises(GpuFailed, match="in time"):
                hand.restore(pids, {}, feeder.pid)
        hang.release()
        assert set(hand.resume().values()) == {CudaState.RUNNING}


def test_its_end_is_that_of_the_last_hand(here: SimulatedHost) -> None:
    """Who waits for the hand's end waits for the one that took its place, too."""
    with here.start_program() as program:
        with Hand(Purpose.DUMP) as hand:
            end = hand.end()
            first = hand.pid
            os.kill(first, signal.SIGKILL)
            hand.find([program.pid])
            assert hand.pid != first
            assert not hangs_up(end, 0.2)
        assert hangs_up(end, 10.0)
        os.close(end)


def hangs_up(fd: int, within_s: float) -> bool:
    """Whether a pipe's other end is closed."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(within_s * 1000))


OTHER = """
import sys, time
from crcli.gpu.hand import Hand, Purpose
hand = Hand(Purpose(sys.argv[1]))
pids = [process.pid for process in hand.find(map(int, sys.argv[2].split(",")))]
if sys.argv[1] == "dump":
    hand.lock(pids)
    hand.checkpoint(pids)
else:
    hand.restore(pids, {})
print(hand.pid, flush=True)
time.sleep(1000)
"""


@contextmanager
def other(purpose: str, pids: list[int]) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Another process with a hand that has done its work; and the hand's pid."""
    command = [sys.executable, "-c", OTHER, purpose, ",".join(map(str, pids))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


def test_it_wakes_what_it_put_to_sleep_when_crcli_is_killed(here: SimulatedHost) -> None:
    """SIGKILL to crcli, SIGTERM and SIGINT to the hand: the tree runs on, and then the hand has ended."""
    with here.start_tree() as (root, family), other("dump", pids_of(root)) as (crcli, hand):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(hand, number)
        crcli.kill()
        for one in family:
            assert_goes_on(one)
        wait_until(lambda: not is_running(hand), "the hand stays")


def test_it_takes_a_restored_tree_off_its_gpus_and_kills_it_when_crcli_is_killed(here: SimulatedHost) -> None:
    """What was not finished holds nothing: checkpointed again first, then killed."""
    with here.start_program() as program:
        with Hand(Purpose.DUMP) as hand:
            pids = [process.pid for process in hand.find([program.pid])]
            hand.lock(pids)
            hand.checkpoint(pids)
            hand.settled()
        with other("restore", [program.pid]) as (crcli, hand_pid):
            checkpoints = len(here.calls("checkpoint"))
            crcli.kill()
            program.process.wait(10)
            assert len(here.calls("checkpoint")) > checkpoints
            wait_until(lambda: not is_running(hand_pid), "the hand stays")


def test_what_another_dump_put_to_sleep_is_not_woken(here: SimulatedHost) -> None:
    """Both found it running; the second is refused, and its way back leaves the process to the first."""
    with here.start_program() as program, Hand(Purpose.DUMP) as first, Hand(Purpose.DUMP) as second:
        for hand in (first, second):
            assert [one.state for one in hand.find([program.pid])] == [CudaState.RUNNING]
        first.lock([program.pid])
        first.checkpoint([program.pid])
        with pytest.raises(GpuFailed, match="another has locked or checkpointed it"):
            second.lock([program.pid])
        assert (second.is_idle, second.resume()) == (True, {})
        assert here.state(program.pid) == "checkpointed"
        assert {one.caller for one in here.calls("lock")} == {first.pid}
        assert first.resume() == {program.pid: CudaState.RUNNING}
        first.settled()
        second.lock([program.pid])
        assert second.resume() == {program.pid: CudaState.RUNNING}
        assert_goes_on(program)


def test_what_another_program_put_to_sleep_is_not_woken(here: SimulatedHost) -> None:
    """One of a tree was locked with cuda-checkpoint since it was found: the others are woken, it is not."""
    with here.start_tree() as (root, family), Hand(Purpose.DUMP) as hand:
        pids = [process.pid for process in hand.find(pids_of(root))]
        assert here.call("Lock", pids[1]) == 0
        with pytest.raises(GpuFailed, match="another has locked") as told:
            hand.lock(pids)
        assert told.value.pid == pids[1]
        assert hand.resume() == dict.fromkeys((pids[0], pids[2]), CudaState.RUNNING)
        assert here.state(pids[1]) == "locked"
        hand.settled()
        assert here.call("Unlock", pids[1]) == 0
        for one in family:
            assert_goes_on(one)


def test_it_is_in_nobodys_way(here: SimulatedHost) -> None:
    """A session of its own, the folder /, no descriptor of crcli's, and a name by which it is known."""
    kept = open(__file__)  # noqa: SIM115
    os.set_inheritable(kept.fileno(), True)
    with kept, Hand(Purpose.DUMP) as hand:
        hand.host()
        assert os.getsid(hand.pid) == hand.pid
        assert os.readlink(f"/proc/{hand.pid}/cwd") == "/"
        assert Path(f"/proc/{hand.pid}/comm").read_text() == "crcli-gpu\n"
        links = {os.readlink(f"/proc/{hand.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{hand.pid}/fd")}
        assert __file__ not in links


def test_it_ends_with_its_context(here: SimulatedHost) -> None:
    """With nothing to set right there is nothing to stay for, also before CUDA is initialised."""
    here.configure(gpu(1), init_ms=100_000)
    began = time.monotonic()
    with Hand(Purpose.DUMP) as hand:
        pid = hand.pid
    assert not is_running(pid)
    assert time.monotonic() - began < 50


def is_running(pid: int) -> bool:
    """Whether the process lives: gone, or a zombie, it does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
