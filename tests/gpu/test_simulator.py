"""The simulator of tests/gpu/sim against what CUDA's driver is documented to do, through real cuda-python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.crcli import assert_goes_on, counted, end, reap, tree_of, wait_until
from tests.support.gpu_caller import Caller, calling
from tests.support.gpu_simulator import MIB, SimulatedGpu, SimulatedHost, gpu
from tests.support.raw_criu import raw_dump, raw_restore

SUCCESS, INVALID, ILLEGAL = "CUDA_SUCCESS", "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_ILLEGAL_STATE"
OTHERS = (gpu(7, minor=3), gpu(8, minor=5))
"""The GPUs of another host."""


@pytest.fixture
def driver(sim: SimulatedHost) -> Iterator[Caller]:
    """Another process that calls the driver."""
    with calling(sim) as caller:
        yield caller


def put_to_sleep(driver: Caller, *pids: int) -> None:
    """Have these processes locked and checkpointed."""
    for step in (driver.lock, driver.checkpoint):
        for pid in pids:
            assert step(pid) == SUCCESS


def wake(driver: Caller, *pids: int) -> None:
    """Have these checkpointed processes run again, where they were."""
    for step in (driver.restore, driver.unlock):
        for pid in pids:
            assert step(pid) == SUCCESS


def devices_of(pid: int) -> set[str]:
    """Return the device files that a process has open."""
    folder = f"/proc/{pid}/fd"
    paths = {os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}
    return {path for path in paths if path.startswith("/dev/nvidia")}


def device_memory_of(pid: int) -> list[tuple[str, str, bool]]:
    """Return range, permissions and whether it is a file's, of each mapping in the place of device memory."""
    words = (line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    return [(word[0], word[1], len(word) > 5) for word in words if word[0].startswith("a00")]


# The states.


def test_a_process_goes_through_all_states_and_counts_on(sim: SimulatedHost, driver: Caller) -> None:
    """Lock, checkpoint, restore and unlock lead from RUNNING to RUNNING, and the bytes are the same."""
    with sim.start_program("--megabytes", "2") as program:
        pid, states = program.pid, [driver.state(program.pid)]
        for step in (driver.lock, driver.checkpoint, driver.restore, driver.unlock):
            assert step(pid) == SUCCESS
            states.append(driver.state(pid))
        assert states == ["running", "locked", "checkpointed", "locked", "running"]
        assert_goes_on(program)


@pytest.mark.parametrize(
    ("steps", "state", "wrong"),
    [
        ((), "running", ("checkpoint", "restore", "unlock")),
        (("lock",), "locked", ("lock", "restore")),
        (("lock", "checkpoint"), "checkpointed", ("lock", "checkpoint", "unlock")),
        (("lock", "checkpoint", "restore"), "locked", ("lock", "restore")),
    ],
)
def test_a_call_that_the_state_does_not_allow_changes_nothing(
    sim: SimulatedHost, driver: Caller, steps: tuple[str, ...], state: str, wrong: tuple[str, ...]
) -> None:
    """Each call needs its state: in another it returns ILLEGAL_STATE, and the process stays as it is."""
    with sim.start_program() as program:
        for step in steps:
            assert getattr(driver, step)(program.pid) == SUCCESS
        for call in wrong:
            assert getattr(driver, call)(program.pid) == ILLEGAL
            assert driver.state(program.pid) == state


@pytest.mark.parametrize("call", ["tid", "state", "lock", "checkpoint", "restore", "unlock"])
def test_a_process_without_cuda_is_not_known(driver: Caller, call: str) -> None:
    """A process that never called cuInit, and a pid that nobody has, are an invalid value."""
    with subprocess.Popen(["sleep", "60"]) as other:
        assert getattr(driver, call)(other.pid) == INVALID
        other.kill()
    assert getattr(driver, call)(other.pid) == INVALID


def test_the_restore_thread_is_a_thread_of_the_process(sim: SimulatedHost, driver: Caller) -> None:
    """GetRestoreThreadId names a thread, the same in every state."""
    with sim.start_program() as program:
        tid = driver.tid(program.pid)
        assert tid in os.listdir(f"/proc/{program.pid}/task") and tid != str(program.pid)
        put_to_sleep(driver, program.pid)
        assert driver.tid(program.pid) == tid


def test_the_calls_of_a_locked_process_block(sim: SimulatedHost, driver: Caller) -> None:
    """While a process is locked it counts no further, although it runs."""
    with sim.start_program() as program:
        assert driver.lock(program.pid) == SUCCESS
        before = counted(program)[-1]
        with pytest.raises(AssertionError):
            wait_until(lambda: counted(program)[-1] > before + 1, "it stands still", seconds=0.3)
        assert driver.unlock(program.pid) == SUCCESS
        assert_goes_on(program)


def test_a_lock_waits_for_work_under_way(sim: SimulatedHost, driver: Caller) -> None:
    """Work on the GPU ends before the lock is there; one that lasts too long leaves the process running."""
    with sim.start_program("--spin", "700") as program:
        wait_until(lambda: len(counted(program)) > 1, "it does not count")
        assert driver.lock(program.pid, 50) == "CUDA_ERROR_NOT_READY"
        assert driver.state(program.pid) == "running"
        before = counted(program)[-1]
        wait_until(lambda: counted(program)[-1] > before, "it stands still")
        assert driver.lock(program.pid, 0) == SUCCESS


def test_a_process_that_failed_stays_so(sim: SimulatedHost, driver: Caller) -> None:
    """Nothing leads out of FAILED, and the program's own next call fails."""
    with sim.start_program("--patient") as program:
        assert driver.lock(program.pid) == SUCCESS
        sim.inject("checkpoint", "fail", 999)
        assert driver.checkpoint(program.pid) == "CUDA_ERROR_UNKNOWN"
        for call in (driver.lock, driver.checkpoint, driver.restore, driver.unlock):
            assert driver.state(program.pid) == "failed"
            assert call(program.pid) == ILLEGAL
        program.wait_for("failed CUDA_ERROR_UNKNOWN")


def test_a_stopped_process_serves_no_call(sim: SimulatedHost, driver: Caller) -> None:
    """A call blocks while its process is stopped, and is done when it goes on."""
    with sim.start_program() as program:
        program.process.send_signal(signal.SIGSTOP)
        driver.ask("lock", program.pid, 0)
        sim.wait_for("lock", "begin")
        assert sim.is_cuda(program.pid)
        assert not [call for call in sim.calls("lock") if call.what == "end"]
        program.process.send_signal(signal.SIGCONT)
        assert driver.answer() == SUCCESS


def test_a_call_ends_with_its_caller(sim: SimulatedHost) -> None:
    """What a killed caller asked of a stopped process is not done when it goes on."""
    with sim.start_program() as program:
        with calling(sim) as driver:
            program.process.send_signal(signal.SIGSTOP)
            driver.ask("lock", program.pid, 0)
            wait_until(lambda: any((sim.folder / "calls").glob("*[0-9a-f]" * 16)), "it does not ask")
        program.process.send_signal(signal.SIGCONT)
        assert sim.state(program.pid) == "running"
        assert_goes_on(program)


# Device memory.


def test_a_checkpoint_lets_go_of_the_devices(sim: SimulatedHost, driver: Caller) -> None:
    """Checkpointed, a process has no device open or mapped, and its bytes are in its own memory."""
    with sim.start_program("--megabytes", "4", "--gpu", "0", "--gpu", "1") as program:
        pid, nodes = program.pid, devices_of(program.pid)
        before = device_memory_of(pid)
        assert nodes == {"/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0", "/dev/nvidia1"}
        assert {(permissions, is_file) for _, permissions, is_file in before} == {("---s", True)}
        used = sim.in_use(0), sim.in_use(1)
        assert used == (5 * MIB + 4096, 5 * MIB)
        put_to_sleep(driver, pid)
        asleep = device_memory_of(pid)
        assert {(permissions, is_file) for _, permissions, is_file in asleep} == {("rw-p", False)}
        assert [where for where, *_ in asleep] == [where for where, *_ in before]
        assert devices_of(pid) == set() and (sim.in_use(0), sim.in_use(1)) == (0, 0)
        wake(driver, pid)
        assert devices_of(pid) == nodes and device_memory_of(pid) == before
        assert (sim.in_use(0), sim.in_use(1)) == used
        assert_goes_on(program)


def test_a_gpu_has_no_more_memory_than_it_has(sim: SimulatedHost) -> None:
    """Memory is shared by all processes of a GPU, and is free again when one is killed."""
    with sim.start_program("--megabytes", "40"):
        with sim.start_program("--megabytes", "40", ready="") as too_much:
            assert too_much.process.wait(20) == 3
            assert "CUDA_ERROR_OUT_OF_MEMORY" in too_much.output
        with sim.start_program("--megabytes", "40", "--gpu", "1") as elsewhere:
            assert_goes_on(elsewhere)
    with sim.start_program("--megabytes", "40") as afterwards:
        assert_goes_on(afterwards)


def test_a_restore_needs_the_memory(sim: SimulatedHost, driver: Caller) -> None:
    """Where another has taken the memory meanwhile a restore fails, and works once it is free."""
    with sim.start_program("--megabytes", "40") as program:
        put_to_sleep(driver, program.pid)
        with sim.start_program("--megabytes", "40"):
            assert driver.restore(program.pid) == "CUDA_ERROR_OUT_OF_MEMORY"
            assert driver.state(program.pid) == "checkpointed"
        wake(driver, program.pid)
        assert_goes_on(program)


def test_each_process_has_a_state_of_its_own(sim: SimulatedHost, driver: Caller) -> None:
    """One of two processes on a GPU is checkpointed while the other computes."""
    with sim.start_program() as one, sim.start_program("--seed", "2") as other:
        put_to_sleep(driver, one.pid)
        assert driver.state(other.pid) == "running"
        assert_goes_on(other)
        wake(driver, one.pid)
        assert_goes_on(one)


def test_managed_memory_cannot_be_checkpointed(sim: SimulatedHost, driver: Caller) -> None:
    """With managed memory, which is seen as a mapping of /dev/nvidia-uvm, a checkpoint is not supported."""
    with sim.start_program("--managed") as program:
        assert "/dev/nvidia-uvm" in Path(f"/proc/{program.pid}/maps").read_text()
        assert driver.lock(program.pid) == SUCCESS
        assert driver.checkpoint(program.pid) == "CUDA_ERROR_NOT_SUPPORTED"
        assert driver.unlock(program.pid) == SUCCESS
        assert_goes_on(program)


def test_a_divided_gpu_cannot_be_checkpointed(sim: SimulatedHost, driver: Caller) -> None:
    """With MIG a checkpoint is not supported."""
    sim.configure(gpu(1, mig=True))
    with sim.start_program() as program:
        assert driver.lock(program.pid) == SUCCESS
        assert driver.checkpoint(program.pid) == "CUDA_ERROR_NOT_SUPPORTED"


def test_a_forked_child_has_the_devices_and_no_cuda(sim: SimulatedHost, driver: Caller) -> None:
    """A child that was forked after cuInit holds the devices, and is no CUDA process."""
    with sim.start_program("--fork") as program:
        child = tree_of(program.pid)[1].pid
        assert driver.tid(child) == INVALID
        put_to_sleep(driver, program.pid)
        assert devices_of(child) and not devices_of(program.pid)


def test_what_nvml_holds_is_not_given_up(sim: SimulatedHost, driver: Caller) -> None:
    """A checkpoint does not close what NVML has opened in the same process."""
    with sim.start_program("--nvml") as program:
        put_to_sleep(driver, program.pid)
        assert "/dev/nvidiactl" in devices_of(program.pid)


def test_visible_devices_hide_the_others(sim: SimulatedHost) -> None:
    """CUDA_VISIBLE_DEVICES chooses by index or UUID what a program sees, and in which order."""
    with sim.start_program("--gpu", "0", CUDA_VISIBLE_DEVICES="1") as program:
        assert (sim.in_use(0), sim.in_use(1)) == (0, 2 * MIB + 4096)
        assert_goes_on(program)
    with sim.start_program("--gpu", "1", ready="", CUDA_VISIBLE_DEVICES=gpu(2).uuid) as program:
        assert program.process.wait(20) == 3
        assert "CUDA_ERROR_INVALID_DEVICE" in program.output


# On other GPUs.


@pytest.mark.parametrize(
    "mapping",
    [
        {gpu(1).uuid: gpu(8).uuid, gpu(2).uuid: gpu(7).uuid},
        {gpu(1).uuid: gpu(7).uuid, gpu(2).uuid: gpu(8).uuid},
    ],
)
def test_a_process_moves_to_other_gpus(sim: SimulatedHost, driver: Caller, mapping: dict[str, str]) -> None:
    """With a map its memory lies on the GPUs that the map names, at the same addresses."""
    with sim.start_program("--gpu", "1") as program:
        before = device_memory_of(program.pid)
        put_to_sleep(driver, program.pid)
        sim.configure(*OTHERS)
        assert driver.restore(program.pid, mapping) == SUCCESS
        assert driver.unlock(program.pid) == SUCCESS
        used = [one.uuid for number, one in enumerate(OTHERS) if sim.in_use(number)]
        assert used == [mapping[gpu(2).uuid]]
        assert device_memory_of(program.pid) == before
        assert devices_of(program.pid) == {
            "/dev/nvidiactl",
            "/dev/nvidia-uvm",
            "/dev/nvidia3",
            "/dev/nvidia5",
        }
        assert_goes_on(program)


def test_a_process_moves_between_the_gpus_of_a_host(sim: SimulatedHost, driver: Caller) -> None:
    """A map may exchange two GPUs, again and again."""
    exchange = {gpu(1).uuid: gpu(2).uuid, gpu(2).uuid: gpu(1).uuid}
    with sim.start_program("--gpu", "0") as program:
        for on_first in (False, True):
            put_to_sleep(driver, program.pid)
            assert driver.restore(program.pid, exchange) == SUCCESS
            assert driver.unlock(program.pid) == SUCCESS
            assert (sim.in_use(0) > 0, sim.in_use(1) > 0) == (on_first, not on_first)
        assert_goes_on(program)


@pytest.mark.parametrize(
    ("host", "mapping"),
    [
        (OTHERS, {}),
        (OTHERS, {1: 7}),
        (OTHERS, {1: 7, 2: 7}),
        (OTHERS, {1: 7, 2: 9}),
        ((gpu(7, name="Simulated A100", compute="8.0"), gpu(8)), {1: 7, 2: 8}),
        ((gpu(1), gpu(3)), {}),
    ],
    ids=[
        "no map",
        "one not mapped",
        "two to one",
        "to one that is not here",
        "another chip",
        "one is another",
    ],
)
def test_a_map_that_does_not_do_is_an_invalid_value(
    sim: SimulatedHost, driver: Caller, host: tuple[SimulatedGpu, ...], mapping: dict[int, int]
) -> None:
    """Every GPU that the process knew needs one of the same chip: else it stays checkpointed."""
    with sim.start_program() as program:
        put_to_sleep(driver, program.pid)
        sim.configure(*host)
        pairs = {gpu(old).uuid: gpu(new).uuid for old, new in mapping.items()}
        assert driver.restore(program.pid, pairs) == INVALID
        assert driver.state(program.pid) == "checkpointed"
        sim.configure(gpu(1), gpu(2))
        wake(driver, program.pid)
        assert_goes_on(program)


def test_a_driver_before_580_maps_nothing(sim: SimulatedHost, driver: Caller) -> None:
    """GPU pairs are an invalid value for a driver that does not know them."""
    with sim.start_program() as program:
        put_to_sleep(driver, program.pid)
        sim.configure(gpu(1), gpu(2), driver="570.86.15", api=12080)
        same = {one.uuid: one.uuid for one in sim.gpus}
        assert driver.restore(program.pid, same) == INVALID
        wake(driver, program.pid)


# The driver itself.


def test_a_driver_before_570_has_no_checkpoint(sim: SimulatedHost) -> None:
    """Its functions are not there, and cuda-python says so."""
    sim.configure(gpu(1), driver="550.54.15", api=12040)
    code = "from cuda.core.checkpoint import Process\nimport os\nProcess(os.getpid()).state"
    environment = os.environ | sim.environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "not supported by the installed NVIDIA driver" in done.stderr


@pytest.mark.parametrize(("api", "said"), [(13000, "not found"), (13040, "CUDA_ERROR_INVALID_VALUE")])
def test_custom_storage_is_completed_from_13_4_on(sim: SimulatedHost, api: int, said: str) -> None:
    """An older driver has no cuCheckpointOperationComplete; a newer has, with nothing to complete."""
    sim.configure(gpu(1), api=api)
    code = "from cuda.bindings import driver\nprint(driver.cuCheckpointOperationComplete(0))"
    environment = os.environ | sim.environment
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said in done.stdout + done.stderr


def test_cuda_core_drives_a_process(sim: SimulatedHost) -> None:
    """The higher of the two interfaces of cuda-python works on the simulator as well."""
    code = """
import sys
from cuda.bindings import driver
from cuda.core.checkpoint import Process
driver.cuInit(0)
process, seen = Process(int(sys.argv[1])), []
for step in (lambda: process.lock(1000), process.checkpoint, lambda: process.restore({}), process.unlock):
    step()
    seen.append(process.state)
print(*seen)
"""
    with sim.start_program() as program:
        argv = [sys.executable, "-c", code, str(program.pid)]
        environment = os.environ | sim.environment
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["locked", "checkpointed", "locked", "running"]
        assert_goes_on(program)


def test_a_restore_needs_a_driver_that_is_awake(sim: SimulatedHost) -> None:
    """Without cuInit a caller can restore only where persistence mode is on."""
    with sim.start_program() as program, calling(sim, init=False) as driver:
        put_to_sleep(driver, program.pid)
        assert driver.restore(program.pid) == "CUDA_ERROR_NOT_INITIALIZED"
        sim.configure(gpu(1, persistence=True), gpu(2, persistence=True))
        wake(driver, program.pid)


def test_no_gpu_is_no_device(sim: SimulatedHost) -> None:
    """On a host without GPUs cuInit fails."""
    sim.configure()
    with calling(sim, init=False) as driver:
        assert driver.init() == "CUDA_ERROR_NO_DEVICE"


def test_nvml_tells_what_is_configured(sim: SimulatedHost) -> None:
    """NVML gives driver, GPUs and who uses them, as far as it is told to."""
    code = """
import pynvml as nvml
nvml.nvmlInit()
print(nvml.nvmlSystemGetDriverVersion())
for index in range(nvml.nvmlDeviceGetCount()):
    one = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(one)
    print(
        nvml.nvmlDeviceGetName(one), nvml.nvmlDeviceGetUUID(one), nvml.nvmlDeviceGetMinorNumber(one),
        memory.total, memory.used, *nvml.nvmlDeviceGetCudaComputeCapability(one),
        nvml.nvmlDeviceGetPersistenceMode(one), nvml.nvmlDeviceGetMigMode(one)[0],
        *((two.pid, two.usedGpuMemory) for two in nvml.nvmlDeviceGetComputeRunningProcesses(one)))
"""

    def told() -> list[str]:
        argv, environment = [sys.executable, "-c", code], os.environ | sim.environment
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first, second = gpu(1), gpu(2, minor=4, memory_bytes=MIB, persistence=True, mig=True)
    sim.configure(first, second, driver="610.1")
    with sim.start_program("--megabytes", "3") as program:
        used = 4 * MIB + 4096
        assert told() == [
            "610.1",
            f"Simulated H100 {first.uuid} 0 {64 * MIB} {used} 9 0 0 0 ({program.pid}, {used})",
            f"Simulated H100 {second.uuid} 4 {MIB} 0 9 0 1 1",
        ]
        sim.configure(first, tells_processes=False)
        assert told()[1].endswith(f" {used} 9 0 0 0")


# Faults.


def test_a_fault_befalls_the_call_that_is_meant(sim: SimulatedHost, driver: Caller) -> None:
    """An error can be had at the N-th call for one process, before the call or after it was done."""
    with sim.start_program() as program, sim.start_program() as other:
        sim.inject("lock", "error", 999, pid=program.pid, skip=1)
        assert driver.lock(other.pid) == SUCCESS
        for result, state in ((SUCCESS, "locked"), ("CUDA_ERROR_UNKNOWN", "running"), (SUCCESS, "locked")):
            assert driver.lock(program.pid) == result
            assert driver.state(program.pid) == state
            driver.unlock(program.pid)
        assert driver.lock(program.pid) == SUCCESS
        sim.inject("checkpoint", "error", 304, after=True)
        assert driver.checkpoint(program.pid) == "CUDA_ERROR_OPERATING_SYSTEM"
        assert driver.state(program.pid) == "checkpointed"


def test_a_call_can_be_held_at_an_instant(sim: SimulatedHost, driver: Caller) -> None:
    """A call hangs before or after it is done until it is released, and other calls do not wait for it."""
    with sim.start_program() as program:
        for after, state in ((False, "running"), (True, "locked")):
            hang = sim.inject("lock", "hang", after=after)
            driver.ask("lock", program.pid, 0)
            sim.wait_for("lock", "hang", count=1 + after)
            assert sim.state(program.pid) == state
            hang.release()
            assert driver.answer() == SUCCESS
            assert driver.unlock(program.pid) == SUCCESS


def test_a_caller_can_be_killed_at_an_instant(sim: SimulatedHost) -> None:
    """A caller that dies in a call leaves the process as the call has left it."""
    with sim.start_program() as program, calling(sim) as driver:
        sim.inject("lock", "die", after=True)
        driver.ask("lock", program.pid, 0)
        assert driver.process.wait(10) == -signal.SIGKILL
        assert sim.state(program.pid) == "locked"


def test_cuinit_can_fail_and_can_take_long(sim: SimulatedHost) -> None:
    """A fault befalls cuInit as any other call; afterwards it can be tried again."""
    sim.inject("init", "error", 999)
    sim.inject("init", "delay", 20)
    with calling(sim, init=False) as driver:
        assert driver.init() == "CUDA_ERROR_UNKNOWN"
        assert driver.init() == SUCCESS


# With CRIU.


@pytest.mark.parametrize("steps", [(), ("lock",)], ids=["running", "locked"])
def test_criu_refuses_who_holds_a_gpu(
    sim: SimulatedHost, driver: Caller, tmp_path: Path, steps: tuple[str, ...]
) -> None:
    """CRIU cannot dump a process that is not checkpointed: it has devices open. It runs on."""
    folder = tmp_path / "image"
    folder.mkdir()
    with sim.start_program() as program:
        for step in steps:
            assert getattr(driver, step)(program.pid) == SUCCESS
        attempt = raw_dump(program.pid, folder)
        assert not attempt.success
        assert "Can't dump file" in attempt.log
        if steps:
            assert driver.unlock(program.pid) == SUCCESS
        assert_goes_on(program)


def move(
    sim: SimulatedHost, driver: Caller, tmp_path: Path, wake_up: Callable[[int], None], *options: str
) -> None:
    """Dump a counter by the plain sequence, restore it, and see that it counts on with the same bytes."""
    folder = tmp_path / "image"
    folder.mkdir()
    with sim.start_program("--megabytes", "4", *options) as program:
        put_to_sleep(driver, program.pid)
        dumped = tree_of(program.pid)
        attempt = raw_dump(program.pid, folder)
        assert attempt.success, attempt.log[-2000:]
        reap(dumped)
        attempt = raw_restore(folder)
        assert attempt.success, attempt.log[-2000:]
        restored = tree_of(program.pid)
        try:
            assert driver.state(program.pid) == "checkpointed"
            wake_up(program.pid)
            assert_goes_on(program)
        finally:
            end(restored)


def test_the_plain_sequence_brings_a_process_back(sim: SimulatedHost, driver: Caller, tmp_path: Path) -> None:
    """Lock, checkpoint, criu dump, criu restore, restore, unlock: the restored process counts on."""
    move(sim, driver, tmp_path, lambda pid: wake(driver, pid), "--gpu", "0", "--gpu", "1")


def test_the_plain_sequence_brings_a_process_to_another_host(
    sim: SimulatedHost, driver: Caller, tmp_path: Path
) -> None:
    """Restored where the GPUs have other UUIDs and minor numbers, with a map, it counts on."""

    def wake_up(pid: int) -> None:
        sim.configure(*OTHERS)
        assert driver.restore(pid) == INVALID
        assert driver.restore(pid, {gpu(1).uuid: gpu(8).uuid, gpu(2).uuid: gpu(7).uuid}) == SUCCESS
        assert driver.unlock(pid) == SUCCESS
        assert (sim.in_use(0), sim.in_use(1)) == (0, 5 * MIB + 4096)

    move(sim, driver, tmp_path, wake_up)


def test_a_process_that_criu_left_running_is_woken(
    sim: SimulatedHost, driver: Caller, tmp_path: Path
) -> None:
    """After a dump that leaves it running the original stays checkpointed until it is restored."""
    folder = tmp_path / "image"
    folder.mkdir()
    with sim.start_program() as program:
        put_to_sleep(driver, program.pid)
        attempt = raw_dump(program.pid, folder, leave_running=True)
        assert attempt.success, attempt.log[-2000:]
        assert driver.state(program.pid) == "checkpointed"
        wake(driver, program.pid)
        assert_goes_on(program)


def test_a_process_in_a_pid_namespace_is_known_by_our_pid(sim: SimulatedHost, driver: Caller) -> None:
    """A process that takes itself for another pid is found by the one under which the caller sees it."""
    counter = str(sim.libraries / "gpu_counter")
    with sim.start_program("--pid", "--fork", counter, program="/usr/bin/unshare") as program:
        pid = tree_of(program.pid)[1].pid
        assert driver.tid(pid) in os.listdir(f"/proc/{pid}/task")
        assert driver.tid(1) == INVALID
        put_to_sleep(driver, pid)
        wake(driver, pid)
        assert_goes_on(program)
