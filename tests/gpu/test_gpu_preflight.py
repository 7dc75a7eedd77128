"""What is known to break CUDA's checkpoint is found before anything is touched, and no more is refused."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crcli.errors import HostLacks
from crcli.findings import Finding, Severity
from crcli.gpu.facts import CudaProcess, CudaState, Gpu, GpuHost
from crcli.gpu.preflight import candidates, gpu_findings, holders, unasked_findings
from crcli.process.evidence import Evidence
from crcli.process.gather import gather
from crcli.process.identity import identify
from crcli.process.tree import child_pids, refuse_bad_target, scan_tree
from crcli.records import replace
from tests.support.gpu_simulator import GpuCrcli, SimulatedHost, gpu
from tests.support.programs import Program, spawn_python, then_wait

MIB = 1 << 20
H100 = Gpu("GPU-1", "H100", 0, 0, 80 << 30, "9.0", persistence=True)
HOST = GpuHost("580.95.05", 13000, (H100,))


def look(pid: int) -> Evidence:
    """Return the evidence about the tree of a pid, as a dump gathers it."""
    return gather(scan_tree(refuse_bad_target(pid)))


def cuda(pid: int, state: CudaState = CudaState.RUNNING, used: int = MIB) -> CudaProcess:
    """A process as CUDA's driver would describe it."""
    return CudaProcess(pid, identify(pid).start_time, pid, state, {H100.uuid: used} if used else {})


def found(evidence: Evidence, processes: Sequence[CudaProcess], host: GpuHost = HOST) -> dict[str, Finding]:
    """Return the findings about the GPU side of a tree, by name."""
    return {one.name: one for one in gpu_findings(evidence, host, list(processes))}


def blockers(findings: dict[str, Finding]) -> list[str]:
    """Return the names of those that stop a dump, after asserting that each says what to do."""
    stopping = [one for one in findings.values() if one.severity == Severity.BLOCKER]
    assert all(one.remedy and one.evidence for one in stopping)
    return [one.name for one in stopping]


def check(crcli: GpuCrcli, pid: int, code: int = 0) -> dict[str, dict[str, Any]]:
    """Return what `crcli check PID` finds, by name."""
    report = crcli.run("check", str(pid), "--store", crcli.store, "--json", code=code).json
    return {one["name"]: one for one in report["findings"]}


# --- through the command, over the simulator ---------------------------------------------------------------


def test_a_tree_that_uses_gpus_is_described(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Its processes, their GPUs and memory are told, persistence is a word, and nothing stands in the way."""
    with sim.start_tree() as (root, _):
        findings = check(crcli, root.pid)
        assert not [name for name, one in findings.items() if one["severity"] == "blocker"]
        processes = findings["gpu"]["evidence"]["processes"]
        assert [one["pid"] for one in processes] == [root.pid, *child_pids(root.pid)]
        assert findings["gpu"]["evidence"]["memory_bytes"] == sim.in_use(0) + sim.in_use(1)
        assert [len(one["used"]) for one in processes] == [1, 1, 2]
        assert "uses CUDA on 2 × Simulated H100" in findings["gpu"]["message"]
        assert {one["state"] for one in processes} == {"running"}
        assert set(findings["gpu-persistence"]["evidence"]["gpus"]) == {one.uuid for one in sim.gpus}
        assert "device" not in findings and sim.calls("lock") == []


def test_the_forecast_counts_memory_of_gpus(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """What lies on GPUs will be stored, as far as anybody can tell before."""
    with sim.start_program("--megabytes", "1") as small, sim.start_program("--megabytes", "40") as large:
        options = ("--store", crcli.store, "--json")
        reports = [crcli.run("check", str(one.pid), *options).json for one in (small, large)]
        sizes = [one["forecast"]["stored_bytes"] for one in reports]
        assert sizes[1] - sizes[0] > 25 * MIB


def test_a_library_alone_is_no_gpu(crcli: GpuCrcli, sim: SimulatedHost) -> None:
    """A program that has CUDA's library mapped and never called it is like any other, without CUDA too."""
    library = f"import ctypes; lib = ctypes.CDLL({str(sim.libraries / 'libcuda.so.1')!r})"
    with spawn_python(then_wait(library)) as program:
        assert candidates(look(program.pid)) == [program.pid]
        assert not any(name.startswith("gpu") for name in check(crcli, program.pid))
        (sim.folder / "host").unlink()
        assert not any(name.startswith("gpu") for name in check(crcli, program.pid))


def test_gpus_that_nobody_can_be_asked_about_are_refused(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """A driver that is too old for the checkpoint, or none that answers: the devices would stop CRIU."""
    with sim.start_program() as program:
        sim.configure(gpu(1), driver="550.54.15", api=12040)
        refused = check(crcli, program.pid, code=10)["gpu-unknown"]
        assert "12.4" in refused["message"] and "570" in refused["remedy"]
        assert "/dev/nvidiactl" in {one["path"] for one in refused["evidence"]["where"]}


def test_managed_memory_is_refused(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """It is told from what every process has mapped of UVM, with its size."""
    with sim.start_program("--managed", "--megabytes", "3") as program:
        refused = check(crcli, program.pid, code=10)["gpu-managed"]
        assert "cudaMallocManaged" in refused["message"]
        assert refused["evidence"]["processes"][0]["managed_bytes"] >= 3 * MIB


def test_devices_that_a_fork_inherited_will_be_taken(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """A child that only sleeps holds what its parent opened, as a worker of PyTorch's DataLoader does."""
    with sim.start_program("--fork") as program:
        told = check(crcli, program.pid)["gpu-inherited-left"]
        (child,) = child_pids(program.pid)
        assert {one["pid"] for one in told["evidence"]["where"]} == {child}
        assert holders(look(program.pid))[child]


def test_nvml_beside_cuda_is_no_reason_to_refuse(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """From 570 on the driver closes what NVML has open in a process that uses CUDA."""
    with sim.start_program("--nvml") as program:
        assert not [name for name, one in check(crcli, program.pid).items() if one["severity"] == "blocker"]


def test_a_device_that_the_driver_does_not_close_is_named(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """It cannot be told beforehand: the dump fails before CRIU is asked, and the process has its GPU back."""
    code = """
    import ctypes, os
    assert ctypes.CDLL('libcuda.so.1').cuInit(0) == 0
    left = os.open('/dev/nvidiactl', os.O_RDWR)
    """
    with spawn_python(then_wait(code), env=os.environ | sim.environment) as program:
        error = crcli.dump(program.pid, code=11)["error"]
        assert "still has a device of NVIDIA's open" in error["message"] and "nvmlShutdown" in error["hint"]
        assert (error["state"], sim.state(program.pid)) == ("running", "running")


def test_a_dump_that_is_refused_touches_nothing(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """What `check` finds stops a dump as well, before anything is locked."""
    with sim.start_program("--managed") as program:
        error = crcli.dump(program.pid, code=10)["error"]
        assert "gpu-managed" in {one["name"] for one in error["findings"]}
        assert error["state"] == "untouched" and error["hint"]
        assert sim.calls("lock") == [] and sim.state(program.pid) == "running"


def test_nvml_alone_is_refused(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """A monitor has devices open that nobody would close for a dump."""
    monitor = "import ctypes, os; n = ctypes.CDLL('libnvidia-ml.so.1'); assert n.nvmlInit_v2() == 0"
    if_unused = "; held = os.open('/dev/nvidiactl', os.O_RDWR)"
    environment = os.environ | sim.environment
    with spawn_python(then_wait(monitor + if_unused), env=environment) as program:
        refused = check(crcli, program.pid, code=10)["gpu-nvml"]
        assert "nvmlShutdown" in refused["remedy"]


@pytest.mark.parametrize(
    ("steps", "state"), [(("Lock",), "locked"), (("Lock", "Checkpoint"), "checkpointed")]
)
def test_what_somebody_has_put_to_sleep_is_refused(
    steps: tuple[str, ...], state: str, sim: SimulatedHost, crcli: GpuCrcli
) -> None:
    """Locked or checkpointed by another: the remedy is named, and the state."""
    with sim.start_program() as program:
        assert [sim.call(step, program.pid) for step in steps] == [0] * len(steps)
        refused = check(crcli, program.pid, code=10)["gpu-state"]
        assert state in refused["message"] and "doctor --fix" in refused["remedy"]
        assert refused["evidence"]["processes"] == [
            {"pid": program.pid, "command": "gpu_counter", "state": state}
        ]


def test_what_the_driver_has_given_up_is_refused(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """FAILED is never called anything else."""
    code = "import ctypes; cuda = ctypes.CDLL('libcuda.so.1'); assert cuda.cuInit(0) == 0"
    with spawn_python(then_wait(code), env=os.environ | sim.environment) as program:
        sim.inject("lock", "fail")
        sim.call("Lock", program.pid)
        assert sim.state(program.pid) == "failed"
        assert "never" in check(crcli, program.pid, code=10)["gpu-failed"]["message"]


def test_a_process_that_stands_still_is_refused(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """The driver asks a stopped process in vain: that is told, and it is not waited for long."""
    with sim.start_program() as program:
        os.kill(program.pid, signal.SIGSTOP)
        refused = check(crcli, program.pid, code=10)["gpu-silent"]
        assert "it is stopped" in refused["message"] and "kill -CONT" in refused["remedy"]
        os.kill(program.pid, signal.SIGCONT)
        assert "gpu-silent" not in check(crcli, program.pid)


def test_a_divided_gpu_is_refused(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """MIG: NVML says so of the GPU, and the driver could not."""
    sim.configure(gpu(1, mig=True), gpu(2))
    with sim.start_program() as divided:
        assert "MIG" in check(crcli, divided.pid, code=10)["gpu-mig"]["message"]


def test_an_unknown_amount_is_said(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """In a container NVML may not tell who uses how much: then nobody checks the host's memory for it."""
    sim.configure(gpu(1, persistence=True), tells_processes=False)
    with sim.start_program() as program:
        findings = check(crcli, program.pid)
        assert "--pid=host" in findings["gpu-amount-unknown"]["remedy"]
        assert "gpu-persistence" not in findings
        assert findings["gpu"]["evidence"]["gpus"][0]["uuid"] == gpu(1).uuid


# --- the rules themselves, on real processes ---------------------------------------------------------------


@pytest.fixture(params=["/dev/nvidia0", "/dev/nvidiactl"])
def device(request: pytest.FixtureRequest, gpu_nodes: None) -> str:
    """A device of NVIDIA's."""
    return str(request.param)


def test_a_device_is_held_by_its_holder(device: str) -> None:
    """Whoever has one open is a candidate; where CUDA cannot be asked it is refused, with the reason."""
    with spawn_python(then_wait(f"f = open({device!r}, 'r+b', buffering=0)")) as program:
        evidence = look(program.pid)
        assert candidates(evidence) == list(holders(evidence)) == [program.pid]
        (refused,) = unasked_findings(evidence, HostLacks("no cuda-python", hint="install it"))
        assert (refused.name, refused.remedy) == ("gpu-unknown", "install it")
        assert blockers(found(evidence, [])) == ["gpu-inherited"]
        assert blockers(found(evidence, [cuda(program.pid)])) == []


def test_a_tool_that_a_cuda_process_started_is_a_monitor(gpu_nodes: None, tmp_path: Path) -> None:
    """`nvidia-smi` below a trainer is told from a fork of the trainer, which has NVML mapped as well."""
    library = tmp_path / "libnvidia-ml.so.580.95.05"
    library.write_bytes(bytes(4096))
    holding = f"""
import mmap, os
library = mmap.mmap(os.open({str(library)!r}, os.O_RDONLY), 4096, prot=mmap.PROT_READ)
os.set_inheritable(os.open('/dev/nvidiactl', os.O_RDWR), False)
"""
    tool = then_wait(holding)
    fork = f"{holding}\nif os.fork() == 0:\n    print('ready')\n    import time; time.sleep(600)\nos.wait()"
    with spawn_python(fork) as trainer:
        told = found(look(trainer.pid), [cuda(trainer.pid)])
        assert not blockers(told) and told["gpu-inherited-left"].evidence
    with spawn_python(tool) as monitor:
        assert blockers(found(look(monitor.pid), [])) == ["gpu-nvml"]


def test_pinned_memory_that_forks_have_must_fit(gpu_nodes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them gets a copy: where there is no room for all they are refused."""
    code = """
import mmap, os, time
device = os.open('/dev/nvidia-uvm', os.O_RDWR)
pinned = mmap.mmap(device, 1 << 20, flags=mmap.MAP_PRIVATE)
for _ in range(3):
    if os.fork() == 0:
        time.sleep(600)
print('ready')
os.wait()
"""
    with spawn_python(code) as trainer:
        evidence = look(trainer.pid)
        assert not blockers(found(evidence, [cuda(trainer.pid)]))
        monkeypatch.setattr("crcli.process.memory_room.available", lambda: 3 * MIB - 1)
        refused = found(evidence, [cuda(trainer.pid)])
        assert blockers(refused) == ["gpu-inherited"]
        assert refused["gpu-inherited"].evidence["needed"] == 3 * MIB


def test_a_device_that_a_fork_opened_by_itself_is_refused(gpu_nodes: None) -> None:
    """It has a use for that one, though it has the number of one that its parent has."""
    code = """
import os, time
inherited = os.open('/dev/nvidiactl', os.O_RDWR)
if os.fork() == 0:
    os.dup2(os.open('/dev/nvidiactl', os.O_RDWR), inherited)
    print('ready')
    time.sleep(600)
os.wait()
"""
    with spawn_python(code) as trainer:
        assert blockers(found(look(trainer.pid), [cuda(trainer.pid)])) == ["gpu-inherited"]


@pytest.mark.parametrize(
    ("library", "named"),
    [
        ("libcudadebugger.so.1", "cuda-gdb"),
        ("libToolsInjection64.so", "Nsight Systems"),
        ("libsanitizer-collection.so", "compute-sanitizer"),
    ],
)
def test_tools_are_told_by_their_libraries(library: str, named: str, tmp_path: Path) -> None:
    """What a debugger or profiler has put into a CUDA process is named; CUPTI alone is in every PyTorch."""
    with mapping(tmp_path / library) as program:
        evidence = look(program.pid)
        findings = found(evidence, [cuda(program.pid)])
        assert blockers(findings) == ["gpu-tool"] and named in findings["gpu-tool"].message
    with mapping(tmp_path / "libcupti.so.13") as program:
        assert blockers(found(look(program.pid), [cuda(program.pid)])) == []


@contextmanager
def mapping(path: Path, then: str = "") -> Iterator[Program]:
    """A program that has this file mapped and shared, and does something more."""
    path.write_bytes(bytes(4096))
    code = f"import mmap, os, socket\nm = mmap.mmap(os.open({str(path)!r}, os.O_RDWR), 4096)\n{then}"
    with spawn_python(then_wait(code)) as program:
        yield program


@pytest.fixture
def shared_memory() -> Iterator[Callable[[str], Path]]:
    """Files in /dev/shm, removed afterwards."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(Path("/dev/shm") / f"{name}{os.getpid():x}")
        return made[-1]

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def test_events_of_cuda_ipc_are_refused_below_610(shared_memory: Callable[[str], Path]) -> None:
    """They are the one trace that CUDA IPC leaves; from driver 610 on it is supported."""
    with mapping(shared_memory("cuda.shm.0.")) as program:
        evidence, process = look(program.pid), cuda(program.pid)
        assert blockers(found(evidence, [process])) == ["gpu-ipc"]
        assert blockers(found(evidence, [process], GpuHost("610.57.04", 13030, (H100,)))) == []


def test_ranks_of_nccl_are_refused_unless_they_share_nothing(shared_memory: Callable[[str], Path]) -> None:
    """Two processes with one of NCCL's segments may have each other's GPU memory mapped as well."""
    path = shared_memory("nccl-")
    fork = "import time\nif os.fork() == 0:\n    print('forked'); time.sleep(600)"
    with mapping(path, fork) as program:
        program.wait_for("forked")
        evidence = look(program.pid)
        processes = [cuda(one.pid) for one in evidence.tree]
        refused = found(evidence, processes)
        assert blockers(refused) == ["gpu-nccl"]
        assert "NCCL_P2P_DISABLE=1" in refused["gpu-nccl"].remedy
    with mapping(path) as alone:
        assert blockers(found(look(alone.pid), [cuda(alone.pid)])) == []


def test_of_unknown_gpu_memory_the_worst_is_taken() -> None:
    """Where NVML names no process, all that is in use on the GPUs has to fit into the host's memory."""
    with spawn_python(then_wait()) as program:
        evidence = look(program.pid)
        for in_use, stops in ((1 << 50, ["gpu-host-memory"]), (0, [])):
            one = replace(H100, memory_bytes=in_use + (80 << 30), free_bytes=80 << 30)
            host = replace(HOST, gpus=(one,))
            assert blockers(found(evidence, [cuda(program.pid, used=0)], host)) == stops


@pytest.mark.parametrize(
    ("comm", "stops"), [("nvidia-cuda-mps-server", ["gpu-mps"]), ("dbus-daemon", [])], ids=["mps", "other"]
)
def test_a_client_of_mps_is_refused(comm: str, stops: list[str], tmp_path: Path) -> None:
    """It is told by its connection to the server, which is called so."""
    path = str(tmp_path / "control")
    server = f"""
import ctypes, socket
ctypes.CDLL(None).prctl(15, {comm.encode()!r})
listener = socket.socket(socket.AF_UNIX)
listener.bind({path!r})
listener.listen()
print("ready")
held, _ = listener.accept()
listener.accept()
"""
    client = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({path!r})"
    with spawn_python(server), spawn_python(then_wait(client)) as program:
        assert blockers(found(look(program.pid), [cuda(program.pid)])) == stops


def test_gpu_memory_must_fit_into_the_hosts() -> None:
    """More than this host has left is refused, with both numbers; of one asleep it lies there already."""
    with spawn_python(then_wait()) as program:
        evidence = look(program.pid)
        refused = found(evidence, [cuda(program.pid, used=1 << 50)])
        assert blockers(refused) == ["gpu-host-memory"]
        assert refused["gpu-host-memory"].evidence["needed"] == round(1.05 * (1 << 50))
        assert re.search(r"1 127 428 915 MiB .* this host has \d", refused["gpu-host-memory"].message)
        asleep = found(evidence, [cuda(program.pid, CudaState.CHECKPOINTED, 1 << 50)])
        assert blockers(asleep) == ["gpu-state"]


def test_an_old_driver_is_refused() -> None:
    """The checkpoint came with 570."""
    with spawn_python(then_wait()) as program:
        evidence = look(program.pid)
        old = GpuHost("565.57.01", 12070, (H100,))
        assert blockers(found(evidence, [cuda(program.pid)], old)) == ["gpu-driver"]
        assert found(evidence, [], old) == {}


def test_a_tree_without_cuda_has_nothing_to_say() -> None:
    """No process that uses CUDA, no device: no finding, whatever the host has."""
    with spawn_python(then_wait("import socket; a, b = socket.socketpair()")) as program:
        assert gpu_findings(look(program.pid), HOST, []) == []
