"""Trees that use GPUs, dumped and brought back whole: real CRIU, a simulated GPU host (tests/gpu/sim)."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from crcli.errors import StoreError, TooLate, TreeState
from crcli.gpu.facts import CudaState
from crcli.gpu.inherited import holds_devices, mapped_devices, open_devices
from crcli.gpu.preflight import Survey, survey
from crcli.pipeline.dump import dump
from crcli.pipeline.gpu import DumpSide
from crcli.pipeline.stages import DumpOptions, Outcome, Stopwatch
from crcli.process.gather import gather
from crcli.process.identity import identify
from crcli.process.maps import areas
from crcli.process.tree import child_pids, scan_tree
from tests.support.crcli import assert_goes_on, tree_of, wait_until
from tests.support.gpu_simulator import MIB, GpuCrcli, SimulatedHost
from tests.support.programs import spawn_python

NOT_READY, OUT_OF_MEMORY, UNKNOWN = 600, 2, 999


def test_a_process_is_dumped_killed_and_restored(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """What lay on its GPU travels in the image; restored, it counts on from there."""
    with sim.start_program("--megabytes", "4") as program:
        report = crcli.dump(program.pid)
        assert report["outcome"] == "killed"
        assert report["gpu"]["processes"] == 1
        assert report["gpu"]["memory_bytes"] >= 4 * MIB
        assert sim.in_use(0) == 0
        restored = crcli.restore(report["image"])
        assert restored["gpu"]["states"] == [{"pid": program.pid, "state": "running"}]
        assert_goes_on(program)
        assert sim.state(restored["host_pid"]) == "running"


def test_a_process_that_is_left_running_has_its_gpu_back(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """The driver says RUNNING, and it counts on; its image can be restored once it is gone."""
    with sim.start_program("--megabytes", "4") as program:
        report = crcli.dump(program.pid, "--leave-running")
        assert report["gpu"]["states"] == [{"pid": program.pid, "state": "running"}]
        assert report["frozen_ms"] >= sum(
            report["phases"][name] for name in ("gpu lock", "gpu checkpoint", "take", "gpu resume")
        )
        assert sim.state(program.pid) == "running"
        assert_goes_on(program)


def test_an_image_of_one_that_ran_on_is_whole(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """It begins again where the image was taken."""
    with sim.start_program("--megabytes", "4") as program:
        image = crcli.dump(program.pid, "--leave-running")["image"]
        tree = tree_of(program.pid)
        program.process.kill()
        program.process.wait()
        assert not tree[0].is_running()
        before = program.output
        crcli.restore(image, "--files", "host")
        wait_until(lambda: program.output.count("\n") > before.count("\n") + 5, "it stands still")


def test_a_tree_of_three_on_two_gpus_is_locked_before_any_is_checkpointed(
    sim: SimulatedHost, crcli: GpuCrcli
) -> None:
    """All are locked, then all checkpointed, by one caller; all three count on after the restore."""
    with sim.start_tree() as (root, family):
        report = crcli.dump(root.pid)
        assert report["gpu"]["processes"] == 3
        locks, checkpoints = sim.calls("lock"), sim.calls("checkpoint")
        assert max(one.seconds for one in locks) < min(one.seconds for one in checkpoints)
        assert len({one.caller for one in locks + checkpoints}) == 1
        crcli.restore(report["image"])
        for one in family:
            assert_goes_on(one)


FORKED = """
import ctypes, mmap, os, select
assert ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
device = os.open("/dev/nvidia-uvm", os.O_RDWR)
mapped = mmap.mmap(device, 1 << 20, flags=mmap.MAP_PRIVATE)
mapped[70000:70005] = b"pinne"
unreadable = mmap.mmap(device, 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_WRITE)
if os.fork() == 0:
    events = select.epoll()
    number = 0
    print("ready", flush=True)
    while True:
        print(number, "0" * 16, flush=True)
        number += 1
        assert events.poll(0.02) == [] and mapped.find(b"pinne") == 70000
        mapped[8192:8200] = b"%8d" % number
unreadable.close()
mapped.close()
os.close(device)
os.wait()
"""


@pytest.mark.parametrize("options", [(), ("--leave-running",)])
def test_a_fork_that_has_devices_goes_on_without_them(
    sim: SimulatedHost, crcli: GpuCrcli, options: tuple[str, ...]
) -> None:
    """They are taken from it, their numbers and addresses kept; it waits on for what it waited for."""
    with spawn_python(FORKED, env=os.environ | sim.environment) as program:
        (child,) = child_pids(program.pid)
        before = {fd: os.readlink(f"/proc/{child}/fd/{fd}") for fd in open_devices(child)}
        mapped = {area.bounds: area.permissions for area in mapped_devices(child)}
        assert before and {word[:3] for word in mapped.values()} == {b"rw-", b"-w-"}
        report = crcli.dump(program.pid, *options)
        assert "gpu-inherited-left" in {one["name"] for one in report["findings"]}
        if not options:
            crcli.restore(report["image"])
        assert_goes_on(program)
        assert not holds_devices(child)
        assert {os.readlink(f"/proc/{child}/fd/{fd}") for fd in before} == {"anon_inode:[eventpoll]"}
        kept = {area.bounds: area.permissions for area in areas(child)}
        assert {kept[bounds] for bounds, word in mapped.items() if word[:1] == b"r"} == {b"rw-p"}
        assert {kept[bounds] for bounds, word in mapped.items() if word[:1] == b"-"} == {b"---p"}


def test_a_second_image_stores_what_changed(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """GPU memory is known by its content like any other, and zeros are not stored."""
    with sim.start_program("--megabytes", "8", "--zeros", "16") as program:
        first = crcli.dump(program.pid, "--leave-running")
        second = crcli.dump(program.pid, "--leave-running")
        assert first["zero_bytes"] >= 16 * MIB
        assert second["reused_bytes"] >= 8 * MIB
        assert second["stored_bytes"] < first["stored_bytes"] / 10
        assert_goes_on(program)


WEIGHTS = """
import sys, time
from cuda.bindings import driver
def call(result, *values):
    assert not int(result), result
    return values[0] if values else None
raw = open(sys.argv[1], "rb").read()
call(*driver.cuInit(0))
context = call(*driver.cuDevicePrimaryCtxRetain(0))
call(*driver.cuCtxSetCurrent(context))
memory = call(*driver.cuMemAlloc(len(raw)))
call(*driver.cuMemcpyHtoD(memory, raw, len(raw)))
del raw
print("ready", flush=True)
time.sleep(1000)
"""


def test_weights_that_lie_in_gpu_memory_are_left_out(
    sim: SimulatedHost, crcli: GpuCrcli, tmp_path: Path
) -> None:
    """Compared with their file, byte by byte, once the driver has brought them into the host's memory."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(random.Random(7).randbytes(8 * MIB))
    options = ("-c", WEIGHTS, str(weights))
    with sim.start_program(*options, program=sys.executable) as program:
        report = crcli.dump(program.pid, "--weights", str(weights))
        edges = 64 << 10  # of a few pages that reach into a block of their own nobody may know whose they are
        assert report["weights_bytes"] >= 8 * MIB - edges
        restored = crcli.restore(report["image"])
        assert sim.state(restored["host_pid"]) == "running"
        assert sim.in_use(0) >= 8 * MIB


def test_a_tree_with_gpus_is_not_left_stopped(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Refused before anything was touched, with what to do instead."""
    with sim.start_program() as program:
        error = crcli.dump(program.pid, "--leave-stopped", code=10)["error"]
        assert error["state"] == "untouched"
        assert "gpu-leave-stopped" in names(error)
        assert not sim.calls("lock")
        assert_goes_on(program)


def test_rounds_before_the_freeze_are_left_out(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """CRIU cannot look into a process that is on a GPU, so `--pre-copy auto` makes none, and says so."""
    with sim.start_program() as program:
        report = crcli.dump(program.pid, "--pre-copy", "auto", "--leave-running")
        assert report["rounds"] == []
        assert {"gpu-no-pre-copy", "pre-copy-left-out"} & names(report)
        assert_goes_on(program)


def test_a_dry_run_looks_and_touches_nothing(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """It names the processes, their GPUs and bytes, and counts these in its forecast."""
    with sim.start_program("--megabytes", "8") as program:
        report = crcli.dump(program.pid, "--dry-run")
        assert "gpu" in names(report)
        assert report["forecast"]["stored_bytes"] > 6 * MIB
        assert not sim.calls("lock")
        assert_goes_on(program)


def late_child(sim: SimulatedHost) -> str:
    """A process whose child begins to use CUDA once the file `go` is there, and prints `there`."""
    child = "import time; from cuda.bindings import driver; assert not int(driver.cuInit(0)[0]); " + (
        "print('there', flush=True); time.sleep(1000)"
    )
    return f"""
import subprocess, sys, time
from cuda.bindings import driver
assert not int(driver.cuInit(0)[0])
print("ready", flush=True)
while not __import__("os").path.exists({str(sim.folder / "go")!r}):
    time.sleep(0.01)
subprocess.Popen([sys.executable, "-c", {child!r}])
time.sleep(1000)
"""


def test_a_process_that_came_after_the_look_is_locked_too(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """A child that begins to use CUDA while the others are locked belongs to the tree."""
    with sim.start_program("-c", late_child(sim), program=sys.executable) as program:
        hang = sim.inject("lock", "hang", pid=program.pid)
        command = ("dump", str(program.pid), "--store", crcli.store, "--leave-running", "--json")
        with crcli.start(*command) as process:
            sim.wait_for("lock", "hang")
            (sim.folder / "go").touch()
            program.wait_for("there")
            hang.release()
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        locked = {one.pid for one in sim.calls("lock")}
        assert len(locked) == 2
        assert {sim.state(pid) for pid in locked} == {"running"}


def test_a_process_may_end_while_its_image_is_on_its_way(
    sim: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it runs again its end is its own, though the store fails, and nothing is left to be set right."""
    for name, value in (sim.environment | {"CRCLI_STATE_DIR": str(sim.folder / "state")}).items():
        monkeypatch.setenv(name, value)
    with sim.start_tree() as (root, family):
        evidence = gather(scan_tree(identify(root.pid)))
        dump = SimpleNamespace(
            watch=Stopwatch(Mock()),
            report=SimpleNamespace(frozen_ms=0.0, image="x@1"),
            interrupts=SimpleNamespace(past_return=lambda: None),
            reserve_for_gpus=lambda: None,
            published=False,
        )
        options = DumpOptions(pid=root.pid, store="none", outcome=Outcome.RUNNING)
        with DumpSide(evidence, options) as side:
            side.look()
            with pytest.raises(StoreError, match="no answer") as told, side.asleep(dump):  # type: ignore[arg-type]
                assert len(list((sim.folder / "state" / "gpu").iterdir())) == 3
                side.wake(dump)  # type: ignore[arg-type]
                assert list((sim.folder / "state" / "gpu").iterdir()) == []
                worker = next(one.pid for one in side.processes if one.pid != root.pid)
                os.kill(worker, signal.SIGTERM)
                wait_until(lambda: sim.state(worker) == "gone", "it does not end")
                raise StoreError("no answer")
        assert told.value.state is not TreeState.DEAD
        assert_goes_on(family[0])


def test_a_hand_that_cannot_be_had_is_a_failed_dump(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Killed twice in a row while the tree is locked: exit 11, and a third hand has woken it."""
    with sim.start_program("-c", late_child(sim), program=sys.executable) as program:
        hang = sim.inject("lock", "hang", pid=program.pid)
        command = ("dump", str(program.pid), "--store", crcli.store, "--leave-running", "--json")
        with crcli.start(*command) as process:
            sim.wait_for("lock", "hang")
            (sim.folder / "go").touch()
            program.wait_for("there")
            sim.inject("tid", "die", times=2)
            hang.release()
            out, err = process.communicate(timeout=60)
        assert process.returncode == 11, out + err
        assert json.loads(out)["error"]["state"] == "running"
        assert sim.state(program.pid) == "running"


def test_a_host_without_cuda_python_is_told_so(
    sim: SimulatedHost, crcli: GpuCrcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 40 with what to install; the tree is not touched."""
    (tmp_path / "without" / "cuda").mkdir(parents=True)
    (tmp_path / "without" / "cuda" / "__init__.py").write_text("raise ImportError('no cuda here')\n")
    with sim.start_program() as program:
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "without"))
        error = crcli.dump(program.pid, code=40)["error"]
        assert "cuda-python" in error["message"]
        assert "crcli[gpu]" in error["hint"]
        assert error["state"] == "untouched"
        assert_goes_on(program)


def test_a_tree_without_gpus_pays_nothing(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Nothing of the GPU side is imported for its dump and its restore, and no hand is started."""
    code = "import time; print('ready', flush=True); time.sleep(1000)"
    with sim.start_program("-c", code, program=sys.executable) as program:
        store = ("--store", crcli.store)
        imported = imported_by(crcli, "dump", str(program.pid), *store, "--name", "none", "--leave-running")
        tree = tree_of(program.pid)
        tree[0].kill()
        program.process.wait()
        imported |= imported_by(crcli, "restore", "none", *store)
        crcli.adopt(program.pid)
        assert not [one for one in imported if one.startswith(("cuda", "crcli.gpu", "crcli.pipeline.gpu"))]
        assert not sim.calls("init")


def test_cuda_is_never_loaded_into_crcli_itself(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Not for a dump, not for a restore: the hand alone has it."""
    with sim.start_program() as program:
        imported = imported_by(crcli, "dump", str(program.pid), "--store", crcli.store, "--leave-running")
        assert "crcli.pipeline.gpu" in imported
        assert not [name for name in imported if name.startswith("cuda")]
        assert_goes_on(program)


def test_a_lock_that_takes_too_long_leaves_the_tree_running(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Exit 11; who was locked before is unlocked, and the error says in what state each process is."""
    with sim.start_tree() as (root, family):
        pids = [process.pid for process in tree_of(root.pid)]
        sim.inject("lock", "error", NOT_READY, pid=pids[2])
        error = crcli.dump(root.pid, code=11)["error"]
        assert error["state"] == "running"
        assert "did not come to rest" in error["message"]
        assert states(error) == dict.fromkeys(pids, "running")
        assert not sim.calls("checkpoint")
        for one in family:
            assert_goes_on(one)


def test_no_lock_takes_all_the_time_until_the_deadline(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """One that does not come to rest is known while there is time: that, not the deadline, ends it."""
    with sim.start_program("--spin", "30000") as program:
        error = crcli.dump(program.pid, "--deadline", "9", code=11)["error"]
        assert error["state"] == "running"
        assert "did not come to rest" in error["message"]


def test_no_checkpoint_is_begun_that_the_deadline_does_not_leave_time_for(
    sim: SimulatedHost, crcli: GpuCrcli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not be taken back: too late is said before anything is locked."""
    for name, value in sim.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("crcli.pipeline.gpu.LINK_BYTES_PER_S", MIB / 60)
    with sim.start_program("--megabytes", "2") as program:
        with pytest.raises(TooLate, match="at least"):
            dump(DumpOptions(pid=program.pid, store=crcli.store, deadline_s=60.0))
        assert not sim.calls("lock")
        assert_goes_on(program)


def test_a_checkpoint_that_fails_is_undone_for_all(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Also for those that were checkpointed, which get their memory back."""
    with sim.start_tree() as (root, family):
        pids = [process.pid for process in tree_of(root.pid)]
        sim.inject("checkpoint", "error", OUT_OF_MEMORY, pid=pids[1])
        error = crcli.dump(root.pid, code=11)["error"]
        assert "the host has no memory" in error["message"]
        assert states(error) == dict.fromkeys(pids, "running")
        for one in family:
            assert_goes_on(one)


def test_a_lost_process_is_named_as_lost(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """FAILED is final: exit 12, and the state of the others is told."""
    with sim.start_tree() as (root, family):
        pids = [process.pid for process in tree_of(root.pid)]
        sim.inject("checkpoint", "fail", UNKNOWN, pid=pids[1])
        error = crcli.dump(root.pid, code=12)["error"]
        assert error["state"] == "dead"
        assert str(pids[1]) in error["message"]
        told = states(error)
        assert told.pop(pids[1]) in ("failed", "gone")
        assert set(told.values()) == {"running"}
        assert_goes_on(family[0])


def test_a_failure_of_criu_wakes_the_tree(sim: SimulatedHost, crcli: GpuCrcli, tmp_path: Path) -> None:
    """The store cannot be written while the tree stands frozen: it runs on, GPUs included."""
    with sim.start_program("--megabytes", "4") as program:
        hang = sim.inject("checkpoint", "hang")
        command = ("dump", str(program.pid), "--store", crcli.store, "--json")
        with crcli.start(*command) as process:
            sim.wait_for("checkpoint", "hang")
            packs = tmp_path / "store" / "packs"
            os.rename(tmp_path / "store", tmp_path / "away")
            (tmp_path / "store").write_text("")
            hang.release()
            out, err = process.communicate(timeout=60)
        assert process.returncode != 0, out + err
        assert not packs.exists()
        assert sim.state(program.pid) == "running"
        assert_goes_on(program)


@pytest.mark.parametrize("call", ["lock", "checkpoint"])
def test_an_interrupt_wakes_the_tree(sim: SimulatedHost, crcli: GpuCrcli, call: str) -> None:
    """It waits for the call that is under way, which cannot be taken back, then undoes it: exit 11."""
    with sim.start_program() as program:
        hang = sim.inject(call, "hang")
        with crcli.start("dump", str(program.pid), "--store", crcli.store, "--json") as process:
            sim.wait_for(call, "hang")
            process.send_signal(signal.SIGTERM)
            hang.release()
            out, err = process.communicate(timeout=60)
        assert process.returncode == 11, out + err
        assert sim.state(program.pid) == "running"
        assert_goes_on(program)


@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
@pytest.mark.parametrize("after", [False, True])
def test_a_killed_crcli_leaves_a_tree_that_runs(
    sim: SimulatedHost, crcli: GpuCrcli, call: str, after: bool
) -> None:
    """SIGKILL before and after every call: the hand wakes all by itself, and ends."""
    with sim.start_tree() as (root, family):
        pids = [process.pid for process in tree_of(root.pid)]
        hang = sim.inject(call, "hang", pid=pids[1], after=after)
        with crcli.start("dump", str(root.pid), "--store", crcli.store, "--leave-running") as process:
            hand = sim.wait_for(call, "hang").caller
            process.kill()
            process.wait()
            hang.release()
            for one in family:
                assert_goes_on(one)
            wait_until(lambda: has_ended(hand), "the hand stays")
        assert {sim.state(pid) for pid in pids} == {"running"}


def test_several_trees_in_one_call(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Each has an image of its own and its GPU back; the one that does not come to rest is its own affair."""
    with sim.start_program("--seed", "1") as first, sim.start_program("--seed", "2") as second:
        pids = [str(first.pid), str(second.pid)]
        options = ("--leave-running", "--store", crcli.store, "--json")
        assert crcli.run("dump", *pids, *options).json["done"] == 2
        sim.inject("lock", "error", NOT_READY, pid=first.pid)
        done = crcli.run("dump", *pids, *options, code=11).json
        assert done["done"] == 1
        assert "error" in done["dumps"][0]
        for program in (first, second):
            assert_goes_on(program)


def test_a_dump_waits_for_the_hand_of_one_that_was_killed(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """The tree is about to be woken, so it is no reason to refuse that it is not awake yet."""
    with sim.start_program() as program:
        hang = sim.inject("checkpoint", "hang")
        command = ("dump", str(program.pid), "--store", crcli.store, "--leave-running", "--json")
        with crcli.start(*command) as process:
            sim.wait_for("checkpoint", "hang")
            process.kill()
            process.wait()
        with crcli.start(*command) as process:
            wait_until(lambda: len({one.caller for one in sim.calls("state")}) > 1, "it does not look")
            hang.release()
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, out + err
        assert_goes_on(program)


def test_a_tree_that_is_woken_while_it_is_looked_at_is_awake(
    sim: SimulatedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver says asleep, the other hand wakes it and is gone: the driver is asked again."""
    for name, value in (sim.environment | {"CRCLI_STATE_DIR": str(sim.folder / "state")}).items():
        monkeypatch.setenv(name, value)
    with sim.start_program() as program:

        def survey_just_before(*arguments: Any) -> Survey:
            found = survey(*arguments)
            sim.call("Unlock", program.pid)
            return found

        monkeypatch.setattr("crcli.pipeline.gpu.survey", survey_just_before)
        evidence = gather(scan_tree(identify(program.pid)))
        with DumpSide(evidence, DumpOptions(pid=program.pid, store="none")) as side:
            assert sim.call("Lock", program.pid) == 0
            side.look()
            assert [process.state for process in side.processes] == [CudaState.RUNNING]
        assert_goes_on(program)


@pytest.mark.parametrize("call", ["lock", "checkpoint", "restore", "unlock"])
@pytest.mark.parametrize("after", [False, True])
def test_a_killed_hand_leaves_a_tree_that_runs(
    sim: SimulatedHost, crcli: GpuCrcli, call: str, after: bool
) -> None:
    """Another hand goes by what the driver says; from the restore on the image is taken all the same."""
    with sim.start_tree() as (root, family):
        pids = [process.pid for process in tree_of(root.pid)]
        sim.inject(call, "die", pid=pids[1], after=after)
        code = 11 if call in ("lock", "checkpoint") else 0
        crcli.dump(root.pid, "--leave-running", code=code)
        for one in family:
            assert_goes_on(one)
        assert {sim.state(pid) for pid in pids} == {"running"}


def test_one_that_cannot_be_woken_is_in_an_image_at_least(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """FAILED when it should get its memory back: exit 12 names the durable image, which restores it."""
    with sim.start_program("--megabytes", "4") as program:
        sim.inject("restore", "fail", UNKNOWN)
        tree = tree_of(program.pid)
        error = crcli.dump(program.pid, "--leave-running", "--name", "kept", code=12)["error"]
        assert error["state"] == "dead"
        assert "is durable, but" in error["message"]
        for process in tree:
            if process.is_running():
                process.kill()
        program.process.wait()
        restored = crcli.restore("kept", "--files", "host")
        assert sim.state(restored["host_pid"]) == "running"


def states(error: dict[str, object]) -> dict[int, str]:
    """What an error says of each process."""
    findings = error["findings"]
    assert isinstance(findings, list)
    told = [one["evidence"] for one in findings if one["name"] == "gpu-process"]
    return {one["pid"]: one["state"] for one in told}


def names(report: dict[str, object]) -> set[str]:
    """The names of a report's findings."""
    findings = report["findings"]
    assert isinstance(findings, list)
    return {one["name"] for one in findings}


def imported_by(crcli: GpuCrcli, *arguments: str) -> set[str]:
    """The modules that a command imports."""
    os.environ["PYTHONPROFILEIMPORTTIME"] = "1"
    try:
        lines = crcli.run(*arguments).err.splitlines()
    finally:
        del os.environ["PYTHONPROFILEIMPORTTIME"]
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True
