"""Whatever CUDA's driver refuses, and whoever is killed when: the tree runs on, or its image brings it back.

Real CRIU and the real command over the simulator (tests/gpu/sim), which fails, hangs or kills its caller at
the call that is meant. A tree of three processes on two GPUs counts in GPU memory. Afterwards each counts on
with its bytes unchanged and is RUNNING for the driver, or all three come back so.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.crcli import Done, assert_goes_on, counted, reap, tree_of, wait_until
from tests.support.faults import marked, state_of
from tests.support.gpu_simulator import GpuCrcli, SimulatedHost
from tests.support.programs import SLOWNESS, Program

pytestmark = pytest.mark.timeout(300)

FIRST, SECOND = 0, 1
"""The root, and its first child."""

SETTLED_WITHIN_S = 60.0 * SLOWNESS
UNKNOWN = 999

SOAK = int(os.environ.get("CRCLI_FAULT_ROUNDS", "0")) > 10


def instants(*calls: str) -> pytest.MarkDecorator:
    """Each of these calls, for the first and for the second process, before it is done or after it was.

    Half of those, so that each call and each process has both; all of them with CRCLI_FAULT_ROUNDS above 10.
    """
    chosen = [
        pytest.param(call, after, which, id=f"{'after' if after else 'before'} {call} of the {name}")
        for number, call in enumerate(calls)
        for which, name in enumerate(("first", "second"))
        for after in (False, True)
        if SOAK or after == ((number + which) % 2 == 1)
    ]
    return pytest.mark.parametrize(("call", "after", "which"), chosen)


@dataclass
class Family:
    """The tree: its processes in the order in which crcli takes them, and the output of each."""

    sim: SimulatedHost
    programs: list[Program]
    processes: list[psutil.Process]

    @property
    def pids(self) -> list[int]:
        """Their pids; a restored tree has the same."""
        return [process.pid for process in self.processes]

    @property
    def root(self) -> int:
        """The pid of the root."""
        return self.pids[0]

    def lives(self) -> bool:
        """Whether one of them is still there, zombies aside."""
        return any(state_of(pid) not in ("", "Z") for pid in self.pids)

    def assert_runs_on(self) -> None:
        """Assert that the driver calls all RUNNING, and that each counts on with the same bytes."""
        assert [self.sim.state(pid) for pid in self.pids] == ["running"] * 3
        for program in self.programs:
            assert_goes_on(program)

    def reap(self) -> None:
        """Reap those that came to us when they ended."""
        for pid in self.pids:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                pass


@pytest.fixture
def family(sim: SimulatedHost, crcli: GpuCrcli) -> Iterator[Family]:
    """A tree of three on two GPUs that counts."""
    with sim.start_tree("--patient", megabytes=1) as (root, programs):
        yield Family(sim, programs, tree_of(root.pid))


def states_told(error: dict[str, Any]) -> dict[int, str]:
    """What the error of a command says of each process."""
    found = [one["evidence"] for one in error["findings"] if one["name"] == "gpu-process"]
    return {one["pid"]: one["state"] for one in found}


def error_of(crcli: GpuCrcli, code: int, *arguments: str) -> dict[str, Any]:
    """Run a command that fails with this code, and return its error."""
    done: Done = crcli.run(*arguments, "--store", crcli.store, "--json", code=code)
    error: dict[str, Any] = done.json["error"]
    return error


def images(crcli: GpuCrcli) -> list[str]:
    """The images in the store."""
    listed: list[dict[str, Any]] = crcli.run("ls", "--store", crcli.store, "--json").json["images"]
    return [one["image"] for one in listed]


def assert_nothing_left(crcli: GpuCrcli) -> None:
    """Assert that soon nothing runs that a command started, and that no process is noted as asleep."""
    mark = f"CRCLI_STATE_DIR={crcli.folder}/state"
    wait_until(lambda: not marked(mark), f"left behind: {marked(mark)}", SETTLED_WITHIN_S)
    notes = Path(f"{crcli.folder}/state/gpu")
    assert not notes.is_dir() or not list(notes.iterdir())


def assert_restores(crcli: GpuCrcli, family: Family, image: str) -> None:
    """Assert that an image brings the whole tree back.

    What a restore that failed had let run for a moment has printed too: so only what is printed now counts.
    """
    printed = [len(counted(program)) for program in family.programs]
    family.processes = tree_of(crcli.restore(image)["host_pid"])
    assert [family.sim.state(pid) for pid in family.pids] == ["running"] * 3
    for program, before in zip(family.programs, printed, strict=True):
        wait_until(lambda: len(counted(program)) >= before + 5, "it stands still")  # noqa: B023
        since = counted(program)[before:]
        assert since == list(range(since[0], since[0] + len(since)))


# A dump, and a call that fails.


@instants("lock", "checkpoint")
def test_a_dump_whose_call_fails_leaves_all_running(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str, after: bool, which: int
) -> None:
    """An error at one process, also one that was done all the same: all are woken, and can be dumped."""
    sim.inject(call, "error", UNKNOWN, pid=family.pids[which], after=after)
    error = error_of(crcli, 11, "dump", str(family.root))
    assert error["state"] == "running"
    assert f"({family.pids[which]})" in error["message"] or f" {family.pids[which]}" in error["message"]
    assert set(states_told(error).values()) == {"running"}
    family.assert_runs_on()
    assert_nothing_left(crcli)
    assert images(crcli) == []
    assert_restores(crcli, family, crcli.dump(family.root)["image"])


@pytest.mark.parametrize("which", [FIRST, SECOND], ids=["first", "second"])
@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_a_process_that_failed_is_named_as_lost(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str, which: int
) -> None:
    """Where the driver gives one up the dump says which, never calls it running, and wakes the others."""
    sim.inject(call, "fail", UNKNOWN, pid=family.pids[which])
    error = error_of(crcli, 12, "dump", str(family.root))
    assert error["state"] == "dead"
    others = [number for number in range(3) if number != which]
    told = states_told(error)
    assert told.pop(family.pids[which]) == "failed"
    assert set(told.values()) <= {"running"}
    for number in others:
        assert sim.state(family.pids[number]) == "running"
        assert_goes_on(family.programs[number])
    assert_nothing_left(crcli)
    assert images(crcli) == []


def test_a_lock_that_comes_too_late_leaves_all_running(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Work on a GPU that does not end in time: the dump gives up, and the tree runs on."""
    with sim.start_program("--spin", "20000") as busy:
        error = error_of(crcli, 11, "dump", str(busy.pid))
        assert error["state"] == "running" and states_told(error) == {busy.pid: "running"}
        assert sim.state(busy.pid) == "running"
        assert_nothing_left(crcli)


@instants("restore", "unlock")
def test_waking_is_tried_again(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str, after: bool, which: int
) -> None:
    """A tree that is left running is woken although the driver refuses at first, and its image is whole."""
    sim.inject(call, "error", UNKNOWN, pid=family.pids[which], after=after, times=2)
    report = crcli.dump(family.root, "--leave-running")
    assert {one["state"] for one in report["gpu"]["states"]} == {"running"}
    family.assert_runs_on()
    assert_nothing_left(crcli)
    assert crcli.run("verify", report["image"], "--store", crcli.store).code == 0


def test_a_process_lost_after_the_dump_leaves_the_image(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family
) -> None:
    """Where the driver gives one up while it is woken, the image is there and the error names it."""
    sim.inject("restore", "fail", UNKNOWN, pid=family.pids[SECOND])
    error = error_of(crcli, 12, "dump", str(family.root), "--leave-running")
    assert states_told(error)[family.pids[SECOND]] == "failed"
    [image] = images(crcli)
    for process in family.processes[::-1]:
        process.kill()
    reap(family.processes)
    assert_nothing_left(crcli)
    assert_restores(crcli, family, image)


# A restore, and a call that fails.


@pytest.fixture
def dumped(crcli: GpuCrcli, family: Family) -> str:
    """The image of the tree, which is killed."""
    image: str = crcli.dump(family.root)["image"]
    return image


def assert_holds_no_gpu(sim: SimulatedHost, family: Family) -> None:
    """Assert that nothing of the tree is left, nor uses a GPU."""
    family.reap()
    wait_until(lambda: not family.lives(), "the tree is still there", SETTLED_WITHIN_S)
    family.reap()
    assert [sim.in_use(number) for number in range(2)] == [0, 0]


def assert_was_put_down(sim: SimulatedHost, family: Family) -> None:
    """Assert that each that got its memory back was checkpointed again before it was killed."""
    for pid in family.pids:
        done = [call.name for call in sim.calls() if (call.pid, call.what, call.result) == (pid, "end", 0)]
        moves = [name for name in done if name in ("checkpoint", "restore")]
        assert moves[-1] == "checkpoint", f"{pid}: {done}"


@instants("restore", "unlock")
@pytest.mark.parametrize("action", ["error", "fail"])
def test_a_restore_whose_call_fails_leaves_nothing(
    sim: SimulatedHost,
    crcli: GpuCrcli,
    family: Family,
    dumped: str,
    action: str,
    call: str,
    after: bool,
    which: int,
) -> None:
    """Nothing is left running or holding a GPU, and the image can be restored afterwards."""
    sim.inject(call, action, UNKNOWN, pid=family.pids[which], after=after)
    error = error_of(crcli, 21, "restore", dumped)
    assert error["state"] == "dead"
    assert_holds_no_gpu(sim, family)
    if action != "fail":
        assert_was_put_down(sim, family)
    assert_nothing_left(crcli)
    assert_restores(crcli, family, dumped)


def test_a_restore_without_the_memory_leaves_nothing(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, dumped: str
) -> None:
    """Where the GPU has too little memory left, whoever finds out, nothing of the tree is left behind."""
    with sim.start_program("--megabytes", "60", "--gpu", "1"):
        done = crcli.run("restore", dumped, "--store", crcli.store, "--json", code=20)
        assert done.json["error"]["state"] == "untouched"
        assert not family.lives()
    assert_restores(crcli, family, dumped)


# Somebody is killed.


def kill_at(
    sim: SimulatedHost, crcli: GpuCrcli, call: str, pid: int, after: bool, *arguments: str, hand: bool = False
) -> None:
    """Run a command and kill it (and its hand, if so wanted) at this instant."""
    hang = sim.inject(call, "hang", pid=pid, after=after)
    with crcli.start(*arguments, "--store", crcli.store, "--json") as command:
        caller = sim.wait_for(call, "hang").caller
        if hand:
            os.kill(caller, signal.SIGKILL)
        command.kill()
        command.wait()
        hang.release()


@instants("lock", "checkpoint")
def test_a_tree_runs_on_when_crcli_is_killed_while_it_goes_to_sleep(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str, after: bool, which: int
) -> None:
    """The hand, which outlives it, wakes what it has put to sleep, and ends."""
    kill_at(sim, crcli, call, family.pids[which], after, "dump", str(family.root))
    assert_nothing_left(crcli)
    family.assert_runs_on()
    assert images(crcli) == []


@instants("restore", "unlock")
def test_a_tree_runs_on_when_crcli_is_killed_while_it_wakes(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str, after: bool, which: int
) -> None:
    """Killed while a tree that is left running is woken: it is woken, and what is published is whole."""
    kill_at(sim, crcli, call, family.pids[which], after, "dump", str(family.root), "--leave-running")
    assert_nothing_left(crcli)
    family.assert_runs_on()
    for image in images(crcli):
        assert crcli.run("verify", image, "--store", crcli.store).code == 0


@instants("restore", "unlock")
def test_nothing_is_left_when_crcli_is_killed_while_it_restores(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, dumped: str, call: str, after: bool, which: int
) -> None:
    """Killed before the tree runs: it holds no GPU and is gone, and the image brings it back."""
    kill_at(sim, crcli, call, family.pids[which], after, "restore", dumped)
    assert_nothing_left(crcli)
    assert_holds_no_gpu(sim, family)
    assert_was_put_down(sim, family)
    assert_restores(crcli, family, dumped)


@pytest.mark.parametrize("call", ["init", "tid", "state"])
def test_a_tree_is_untouched_when_crcli_is_killed_while_it_looks(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str
) -> None:
    """Killed while the driver starts, or while it is asked about the tree: no call that changes anything."""
    kill_at(sim, crcli, call, 0, False, "dump", str(family.root))
    assert_nothing_left(crcli)
    family.assert_runs_on()
    assert not sim.calls("lock")


def test_a_tree_is_put_down_by_the_second_hand_when_crcli_is_killed(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, dumped: str
) -> None:
    """The first was killed early in the restore: whoever is about to kill the tree waits for the second."""
    sim.inject("state", "die", pid=family.pids[FIRST])
    kill_at(sim, crcli, "restore", family.pids[SECOND], True, "restore", dumped)
    assert_nothing_left(crcli)
    assert_holds_no_gpu(sim, family)
    assert_was_put_down(sim, family)
    assert_restores(crcli, family, dumped)


@pytest.mark.parametrize("call", ["tid", "state"])
def test_nothing_is_left_when_crcli_is_killed_before_the_gpu_side_of_a_restore(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, dumped: str, call: str
) -> None:
    """Killed when CRIU has restored the tree and the driver is asked about it: nothing is left of it."""
    kill_at(sim, crcli, call, family.pids[SECOND], False, "restore", dumped)
    assert_nothing_left(crcli)
    assert_holds_no_gpu(sim, family)
    assert_restores(crcli, family, dumped)


@pytest.mark.parametrize("delay_ms", [0, 40, 90, 150, 250, 400])
def test_the_tree_runs_or_its_image_is_whole_when_crcli_is_killed_in_the_dump(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, delay_ms: int
) -> None:
    """Killed at some instant between the checkpoint and its own end: the tree runs, or the image restores."""
    with crcli.start("dump", str(family.root), "--store", crcli.store, "--json") as command:
        sim.wait_for("checkpoint", "end", count=3)
        time.sleep(delay_ms / 1000 * SLOWNESS)
        command.kill()
        command.wait()
    assert_nothing_left(crcli)
    family.reap()
    if family.lives():
        family.assert_runs_on()
    else:
        [image] = images(crcli)
        assert_restores(crcli, family, image)


@pytest.mark.parametrize("delay_ms", [0, 60, 200])
def test_a_tree_runs_on_when_crcli_is_killed_after_it_was_woken(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, delay_ms: int
) -> None:
    """Left running and awake, it stays so whatever becomes of its image; one that is published is whole."""
    with crcli.start("dump", str(family.root), "--leave-running", "--store", crcli.store) as command:
        sim.wait_for("unlock", "end", count=3)
        time.sleep(delay_ms / 1000 * SLOWNESS)
        command.kill()
        command.wait()
    assert_nothing_left(crcli)
    family.assert_runs_on()
    for image in images(crcli):
        assert crcli.run("verify", image, "--store", crcli.store).code == 0


@pytest.mark.parametrize("delay_ms", [0, 10, 40])
def test_a_restored_tree_lives_or_is_gone_when_crcli_is_killed_after_it_was_woken(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, dumped: str, delay_ms: int
) -> None:
    """Killed between the last unlock and its own end: all of it runs, or nothing of it is left."""
    with crcli.start("restore", dumped, "--store", crcli.store) as command:
        sim.wait_for("unlock", "end", count=3)
        time.sleep(delay_ms / 1000 * SLOWNESS)
        command.kill()
        command.wait()
    assert_nothing_left(crcli)
    if family.lives():
        crcli.adopt(family.root)
        assert [sim.state(pid) for pid in family.pids] == ["running"] * 3
    else:
        assert_holds_no_gpu(sim, family)


@instants("lock", "checkpoint")
def test_a_tree_runs_on_when_the_hand_is_killed_while_it_goes_to_sleep(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str, after: bool, which: int
) -> None:
    """Crcli sees it, and has another wake the tree."""
    sim.inject(call, "die", pid=family.pids[which], after=after)
    error = error_of(crcli, 11, "dump", str(family.root))
    assert error["state"] == "running" and set(states_told(error).values()) == {"running"}
    family.assert_runs_on()
    assert_nothing_left(crcli)


@instants("restore", "unlock")
def test_a_tree_runs_on_when_the_hand_is_killed_while_it_wakes(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str, after: bool, which: int
) -> None:
    """Another hand goes on where it was; the dump has worked."""
    sim.inject(call, "die", pid=family.pids[which], after=after)
    report = crcli.dump(family.root, "--leave-running")
    assert {one["state"] for one in report["gpu"]["states"]} == {"running"}
    family.assert_runs_on()
    assert_nothing_left(crcli)


@instants("restore", "unlock")
def test_nothing_is_left_when_the_hand_is_killed_while_it_restores(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, dumped: str, call: str, after: bool, which: int
) -> None:
    """The restore fails, nothing holds a GPU, and the image brings the tree back."""
    sim.inject(call, "die", pid=family.pids[which], after=after)
    error = error_of(crcli, 21, "restore", dumped)
    assert error["state"] == "dead"
    assert_holds_no_gpu(sim, family)
    assert_nothing_left(crcli)
    assert_was_put_down(sim, family)
    assert_restores(crcli, family, dumped)


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_doctor_wakes_a_tree_whose_crcli_and_hand_are_killed(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, call: str
) -> None:
    """Both killed at once leave processes asleep: `crcli doctor` says so, and with --fix wakes them."""
    kill_at(sim, crcli, call, family.pids[SECOND], True, "dump", str(family.root), hand=True)
    asleep = {"lock": "locked", "checkpoint": "checkpointed"}[call]
    assert sim.state(family.pids[SECOND]) == asleep
    crcli.run("doctor", "--fix", "--store", crcli.store)
    family.assert_runs_on()
    assert_nothing_left(crcli)


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_nothing_is_left_when_crcli_and_hand_are_killed_while_they_restore(
    sim: SimulatedHost, crcli: GpuCrcli, family: Family, dumped: str, call: str
) -> None:
    """Both killed at once: what was restored ends with crcli, and holds no GPU."""
    kill_at(sim, crcli, call, family.pids[SECOND], True, "restore", dumped, hand=True)
    assert_holds_no_gpu(sim, family)
    crcli.run("doctor", "--fix", "--store", crcli.store)  # forgets the notes of processes that are gone
    assert_nothing_left(crcli)
    assert_restores(crcli, family, dumped)


def test_a_failed_cuinit_leaves_all_untouched(sim: SimulatedHost, crcli: GpuCrcli, family: Family) -> None:
    """Where CUDA cannot be initialised a dump refuses before it touches anything."""
    sim.inject("init", "error", UNKNOWN, times=-1)
    error = error_of(crcli, 40, "dump", str(family.root))
    assert error["state"] == "untouched"
    family.assert_runs_on()
    assert_nothing_left(crcli)
