"""Images of trees that use GPUs, restored on simulated hosts, and what failed restores leave behind."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from crcli.memory.huge import can_be_had
from tests.support.crcli import assert_goes_on, tree_of, wait_until
from tests.support.gpu_simulator import MIB, GpuCrcli, SimulatedHost, gpu
from tests.support.jobs import job
from tests.support.programs import Program

INVALID_VALUE, OUT_OF_MEMORY, UNKNOWN = 1, 2, 999


def test_three_processes_on_two_gpus_move_to_two_others_by_a_map(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Each GPU goes where the map says, with other minor numbers, and all three count on."""
    with sim.start_tree() as (root, family):
        image = crcli.dump(root.pid)["image"]
        sim.configure(gpu(7, minor=5), gpu(8, minor=3))
        restored = crcli.restore(
            image, "--gpu-map", f"{gpu(1).uuid}={gpu(8).uuid}", "--gpu-map", f"1={gpu(7).uuid}"
        )
        assert restored["gpu"]["map"] == {gpu(1).uuid: gpu(8).uuid, gpu(2).uuid: gpu(7).uuid}
        assert "gpu-moved" in {one["name"] for one in restored["findings"]}
        for one in family:
            assert_goes_on(one)
        assert sim.in_use(0) > 0
        assert sim.in_use(1) > 0


def test_gpus_of_the_same_kind_are_found_without_a_map(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """As many as there were, all alike: one by one in the order of their indexes."""
    with sim.start_tree() as (root, family):
        image = crcli.dump(root.pid)["image"]
        sim.configure(gpu(7), gpu(8))
        restored = crcli.restore(image)
        assert restored["gpu"]["map"] == {gpu(1).uuid: gpu(7).uuid, gpu(2).uuid: gpu(8).uuid}
        for one in family:
            assert_goes_on(one)


def test_what_cannot_be_told_is_refused_with_what_to_say(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Three GPUs where there were two: exit 20, nothing started, and options that would do."""
    with sim.start_program("--megabytes", "2") as program:
        image = crcli.dump(program.pid)["image"]
        sim.configure(gpu(3), gpu(4), gpu(5))
        error = crcli.restore(image, code=20)["error"]
        assert "--gpu-map 0=" in error["hint"]
        assert not sim.calls("restore")


def test_a_restore_in_a_namespace_of_its_own(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """The driver is asked by the pids of this host, whatever the tree takes itself for."""
    with sim.start_tree() as (root, family):
        image = crcli.dump(root.pid)["image"]
        restored = crcli.restore(image, "--pid-namespace", "new")
        assert restored["host_pid"] != restored["pid"]
        assert {one["pid"] for one in restored["gpu"]["states"]} >= {root.pid}
        for one in family:
            assert_goes_on(one)
        again = crcli.dump(restored["host_pid"])["image"]  # and out of that namespace once more
        crcli.restore(again)
        for one in family:
            assert_goes_on(one)


@pytest.mark.skipif(not can_be_had(), reason="this kernel gives no huge pages")
@pytest.mark.parametrize("fill_in_bytes", ["0", str(1 << 60)], ids=["filled in", "written"])
def test_what_goes_to_a_gpu_lies_in_memory_of_huge_pages(
    sim: SimulatedHost, crcli: GpuCrcli, monkeypatch: pytest.MonkeyPatch, fill_in_bytes: str
) -> None:
    """Until the driver has taken it; nothing else of the program is asked for in that way, then or later."""
    monkeypatch.setenv("CRCLI_FILL_IN_BYTES", fill_in_bytes)
    with sim.start_program("--megabytes", "16") as program:
        image = crcli.dump(program.pid)["image"]
        hang = sim.inject("restore", "hang")
        with crcli.start("restore", image, "--store", crcli.store, "--json") as restoring:
            sim.wait_for("restore", "hang")
            huge = [size for size, flags in mapped(program.pid) if "hg" in flags]
            hang.release()
            crcli.adopt(json.loads(restoring.communicate()[0])["host_pid"])
        assert sum(huge) > 12 * MIB  # whole ones only
        assert all(size % (2 * MIB) == 0 for size in huge)
        assert not [size for size, flags in mapped(program.pid) if "hg" in flags]
        assert_goes_on(program)


def test_processes_with_the_same_on_their_gpus(sim: SimulatedHost, crcli: GpuCrcli, tmp_path: Path) -> None:
    """What parent and child have in common is CRIU's to restore: nobody takes that memory for empty."""
    output = tmp_path / "child"
    with sim.start_program("--megabytes", "16", "--child", f"--megabytes 16 --output {output}") as parent:
        wait_until(output.exists, "the child does not start")
        child = Program(parent.process, output)
        child.wait_for("ready")
        crcli.restore(crcli.dump(parent.pid)["image"])
        assert_goes_on(parent)
        assert_goes_on(child)


def mapped(pid: int) -> list[tuple[int, list[str]]]:
    """The size in bytes and the flags of each mapping of a process."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps").read_text().splitlines()]
    sizes = [int(words[1]) << 10 for words in lines if words[0] == "Size:"]
    return list(zip(sizes, (words[1:] for words in lines if words[0] == "VmFlags:"), strict=True))


def test_memory_may_still_be_on_its_way(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """With --lazy the driver, as whoever else, waits for what it touches."""
    with sim.start_program("--megabytes", "16") as program:
        image = crcli.dump(program.pid)["image"]
        restored = crcli.restore(image, "--lazy")
        assert restored["missing_bytes"] >= 16 * MIB
        assert_goes_on(program)


def test_less_memory_than_before_is_said(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """The check after a restore compares with what the image says."""
    with sim.start_program("--megabytes", "4", "--zeros", "16") as program:
        image = crcli.dump(program.pid)["image"]
        names = {one["name"] for one in crcli.restore(image)["findings"]}
        assert "gpu-memory-less" not in names


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_a_failed_restore_leaves_nothing_on_a_gpu(sim: SimulatedHost, crcli: GpuCrcli, call: str) -> None:
    """Exit 21: whoever had its memory back is checkpointed again, then all are killed."""
    with sim.start_tree() as (root, family):
        pids = [process.pid for process in tree_of(root.pid)]
        image = crcli.dump(root.pid)["image"]
        checkpoints = len(sim.calls("checkpoint"))
        sim.inject(call, "error", OUT_OF_MEMORY, pid=pids[1], times=-1)
        error = crcli.restore(image, code=21)["error"]
        assert "not its GPU side" in error["message"]
        put_down = {one.pid for one in sim.calls("checkpoint")[checkpoints:]}
        assert put_down == (set(pids) if call == "unlock" else set(pids) - {pids[1]})
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)
        assert (sim.in_use(0), sim.in_use(1)) == (0, 0)
        for fault in (sim.folder / "faults").iterdir():
            fault.unlink()
        crcli.restore(image)
        for one in family:
            assert_counts(one)


def test_a_process_that_is_lost_on_the_way_is_a_failed_restore(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """FAILED while it gets its memory back: exit 21, and the image is still good."""
    with sim.start_program("--megabytes", "2") as program:
        image = crcli.dump(program.pid)["image"]
        sim.inject("restore", "fail", UNKNOWN)
        crcli.restore(image, code=21)
        assert sim.in_use(0) == 0
        crcli.restore(image)
        assert_goes_on(program)


def test_a_process_that_cuda_does_not_know_afterwards_is_a_failed_restore(
    sim: SimulatedHost, crcli: GpuCrcli
) -> None:
    """It lives, and the driver refused nothing, but nobody could say that it runs on its GPU: exit 21."""
    with sim.start_program("--megabytes", "2") as program:
        image = crcli.dump(program.pid)["image"]
        fault = sim.inject("tid", "error", INVALID_VALUE, pid=program.pid, skip=1, times=-1)
        error = crcli.restore(image, code=21)["error"]
        assert "does not run on its GPUs" in error["message"]
        (told,) = (one for one in error["findings"] if one["name"] == "gpu-process")
        assert (told["evidence"]["state"], told["severity"]) == ("checkpointed", "note")
        assert sim.in_use(0) == 0
        fault.release()
        crcli.restore(image)
        assert_counts(program)


def test_what_could_not_be_taken_off_its_gpus_is_told(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """The findings say what came of it, not what was meant."""
    with sim.start_program("--megabytes", "2") as program:
        image = crcli.dump(program.pid)["image"]
        faults = [sim.inject(call, "error", UNKNOWN, times=-1) for call in ("unlock", "checkpoint")]
        error = crcli.restore(image, code=21)["error"]
        (told,) = (one for one in error["findings"] if one["name"] == "gpu-process")
        assert told["evidence"]["state"] == "locked"
        assert "taken it off" not in told["action"]
        for fault in faults:
            fault.release()
        crcli.restore(image)
        assert_counts(program)


def test_a_hand_that_cannot_be_had_is_a_failed_restore(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Killed twice in a row once the tree is there: exit 21, as nothing of it is left."""
    with sim.start_program("--megabytes", "2") as program:
        image = crcli.dump(program.pid)["image"]
        sim.inject("tid", "die", pid=program.pid, times=2)
        error = crcli.restore(image, code=21)["error"]
        assert error["state"] == "dead"
        assert sim.in_use(0) == 0
        crcli.restore(image)
        assert_goes_on(program)


@pytest.mark.parametrize("namespace", ["host", "new"])
@pytest.mark.parametrize("call", ["restore", "unlock"])
@pytest.mark.parametrize("after", [False, True])
def test_a_killed_crcli_leaves_nothing_of_a_restore(
    sim: SimulatedHost, crcli: GpuCrcli, call: str, after: bool, namespace: str
) -> None:
    """SIGKILL before and after every call: taken off the GPUs by the hand, then killed; the image is good."""
    with sim.start_tree() as (root, family):
        pids = [process.pid for process in tree_of(root.pid)]
        image = crcli.dump(root.pid)["image"]
        checkpoints = len(sim.calls("checkpoint"))
        hang = sim.inject(call, "hang", after=after)
        arguments = ("restore", image, "--store", crcli.store, "--pid-namespace", namespace)
        with crcli.start(*arguments) as process:
            sim.wait_for(call, "hang")
            process.kill()
            process.wait()
            hang.release()
            wait_until(lambda: sim.in_use(0) + sim.in_use(1) == 0, "a GPU is still in use")
            if namespace == "host":
                wait_until(lambda: all(map(has_ended, pids)), "something lives")
        assert len(sim.calls("checkpoint")) > checkpoints
        collect()
        crcli.restore(image)
        for one in family:
            assert_counts(one)


@pytest.mark.parametrize("call", ["restore", "unlock"])
def test_an_interrupted_restore_leaves_nothing(sim: SimulatedHost, crcli: GpuCrcli, call: str) -> None:
    """SIGTERM while the driver works: exit 21, and nothing on a GPU."""
    with sim.start_program("--megabytes", "2") as program:
        image = crcli.dump(program.pid)["image"]
        hang = sim.inject(call, "hang")
        with crcli.start("restore", image, "--store", crcli.store, "--json") as process:
            sim.wait_for(call, "hang")
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            hang.release()
            out, err = process.communicate(timeout=60)
        assert process.returncode == 21, out + err
        assert sim.in_use(0) == 0
        crcli.restore(image)
        assert_counts(program)


def test_a_host_without_cuda_cannot_take_it(
    sim: SimulatedHost, crcli: GpuCrcli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 20 before anything is started: the image needs what is not here."""
    with sim.start_program() as program:
        image = crcli.dump(program.pid)["image"]
        crcli.host = None
        error = crcli.restore(image, code=20)["error"]
        assert "gpu-missing" in {one["name"] for one in error["findings"]}
        crcli.host = sim


def test_a_job_with_a_gpu_is_saved_on_notice_and_brought_back(
    sim: SimulatedHost, crcli: GpuCrcli, tmp_path: Path
) -> None:
    """`crcli run` ends with 75 on SIGTERM; the same command goes on where the job was."""
    command = ("--", str(sim.libraries / "gpu_counter"), "--megabytes", "2")
    with job(crcli, tmp_path / "first", *command) as one:
        one.lines(20)
        one.tell()
        one.end(75)
        first = numbers(one.out)
    with job(crcli, tmp_path / "second", *command) as one:
        one.lines(10)
        second = numbers(one.out)
        assert one.has_begun
    assert second[0] <= first[-1] + 2
    assert second[0] > 10
    assert second == list(range(second[0], second[0] + len(second)))


def test_images_are_taken_of_a_job_that_is_watched(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """`crcli watch --every` puts it to sleep and wakes it each time, by one hand that stays for all."""
    with sim.start_program("--megabytes", "2") as program:
        arguments = ("watch", str(program.pid), "--store", crcli.store, "--name", "watched", "--every", "1s")
        with crcli.start(*arguments) as process:
            wait_until(lambda: len(sim.calls("unlock")) >= 4, "no two images", 30)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        assert process.returncode == 75
        assert len({one.caller for one in sim.calls("lock")}) == 1
        crcli.restore("watched")
        assert_goes_on(program)


def assert_counts(program: Program) -> None:
    """Assert that a counter counts, which may have counted on for a moment before it was killed."""
    before = len(numbers(program.output))
    wait_until(lambda: len(numbers(program.output)) > before + 5, "it stands still")
    last = numbers(program.output)[before + 1 :]
    assert last == list(range(last[0], last[0] + len(last)))


def numbers(text: str) -> list[int]:
    """What a counter has printed, as far as it is whole."""
    return [
        int(line.split()[0]) for line in text.splitlines() if line[:1].isdigit() and len(line.split()) == 2
    ]


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def collect() -> None:
    """Reap what has come to us."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
