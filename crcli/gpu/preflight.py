"""What is known of a tree's GPU side before anything is touched.

A process may not survive an error inside the driver's checkpoint, so what is known to cause one is refused.
Each family of findings is one small function, named in the tuple at the end. What /proc does not show, and
the driver does not tell, goes unnoticed: memory shared by `cuIpcGetMemHandle` or
`cuMemExportToShareableHandle` (the kernel driver alone knows of it), NVML that was unloaded without
`nvmlShutdown` (NVIDIA/cuda-checkpoint 58), CUPTI (every PyTorch has it mapped).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from crcli.errors import HostLacks
from crcli.findings import Finding, gravest_first, note
from crcli.gpu.facts import CudaProcess, CudaState, Gpu, GpuHost
from crcli.gpu.inherited import DEVICE_PREFIX, forked_from
from crcli.gpu.managed import managed_bytes
from crcli.process.identity import read_proc
from crcli.process.memory_room import too_tight
from crcli.process.wording import (
    and_more,
    blocker,
    first_of,
    how_to_continue,
    places,
    process_list,
    who,
)
from crcli.records import Struct

if TYPE_CHECKING:
    from crcli.errors import CrcliError
    from crcli.gpu.hand import Hand
    from crcli.process.evidence import Evidence
    from crcli.process.files import FileId
    from crcli.process.tree import Process
    from crcli.process.wording import Held

OLDEST_DRIVER = {"aarch64": 595}
"""The first driver branch that checkpoints on an architecture; `OLDEST_DRIVER_ELSEWHERE` on all others."""

OLDEST_DRIVER_ELSEWHERE = 570
FIRST_WITH_IPC = 610
"""The first driver branch that checkpoints memory shared by CUDA's legacy IPC."""

_DRIVER_LIBRARY, _NVML_LIBRARY = "libcuda.so", "libnvidia-ml.so"
_UVM, _MIG_ACCESS, _MODESETTING = "/dev/nvidia-uvm", "/dev/nvidia-caps/", "/dev/nvidia-modeset"
_MPS_COMM = "nvidia-cuda-mps"  # nvidia-cuda-mps-control and -server, as the kernel cuts them off
_IPC_EVENTS, _NCCL_SEGMENT = "/dev/shm/cuda.shm.", "/dev/shm/nccl-"
_TOOLS = {
    "libcudadebugger.so": "a debugger (cuda-gdb)",
    "libToolsInjection": "a profiler (Nsight Systems)",
    "libcuda-injection.so": "a profiler (Nsight Compute)",
    "libsanitizer-collection.so": "a checker (compute-sanitizer)",
}
"""Libraries that NVIDIA's tools put into a program, and what they are."""

MIG_MINORS = "/proc/driver/nvidia-caps/mig-minors"
"""What each device file of /dev/nvidia-caps is for, by its number: `config 1`, `gpu0/gi1/access 12`."""

_MIB = 1 << 20


def candidates(evidence: Evidence) -> list[int]:
    """Return the pids that may use CUDA, in the tree's order: only those need to be asked about.

    Each has CUDA's driver library mapped, as every process that uses CUDA has in every state, or has one of
    NVIDIA's devices open or mapped. The library alone does not mean that CUDA was ever called.
    """
    found = set(holders(evidence)) | {one.pid for one in evidence.mappings if _is_library(one.path)}
    return [process.pid for process in evidence.tree.living if process.pid in found]


def holders(evidence: Evidence) -> dict[int, list[Held]]:
    """Return, by pid, the descriptors and mappings of NVIDIA's devices: CRIU can dump none of them."""
    held: list[Held] = [*evidence.devices, *evidence.device_mappings]
    found: dict[int, list[Held]] = {}
    for one in held:
        if one.path.startswith(DEVICE_PREFIX):
            found.setdefault(one.pid, []).append(one)
    return found


def _is_library(path: str, name: str = _DRIVER_LIBRARY) -> bool:
    return os.path.basename(path).startswith(name)


class Scene(Struct, frozen=True):
    """A tree, the GPUs of its host, and those of its processes that CUDA's driver knows."""

    evidence: Evidence
    host: GpuHost
    processes: list[CudaProcess]

    @cached_property
    def holders(self) -> dict[int, list[Held]]:
        """Who holds NVIDIA's devices."""
        return holders(self.evidence)

    @cached_property
    def branch(self) -> int:
        """The driver's branch: 580 of "580.159.04"; 0 where it is not known."""
        branch = self.host.driver.partition(".")[0]
        return int(branch) if branch.isdecimal() else 0

    def process(self, one: CudaProcess) -> Process:
        """What /proc says of a process that uses CUDA."""
        return self.evidence.tree.process(one.pid)

    def gpus_of(self, one: CudaProcess) -> list[Gpu]:
        """The GPUs that a process uses: those that its memory is on, or whose devices it holds."""
        held = {place.path for place in self.holders.get(one.pid, ())}
        return [
            gpu for gpu in self.host.gpus if gpu.uuid in one.used or f"{DEVICE_PREFIX}{gpu.minor}" in held
        ]


Check = Callable[[Scene], Iterator[Finding]]
"""One family of findings."""


class Survey(Struct, frozen=True):
    """The GPU side of a tree, as CUDA tells it. `lacks` says why it cannot: then `host` is None."""

    host: GpuHost | None = None
    processes: tuple[CudaProcess, ...] = ()
    findings: tuple[Finding, ...] = ()
    lacks: HostLacks | None = None

    @property
    def used_bytes(self) -> int:
        """GPU memory in use by the tree, as far as it can be told."""
        return sum(one.used_bytes for one in self.processes)


def survey(evidence: Evidence, hand: Hand) -> Survey:
    """Ask about those who may use CUDA, and return what was found. Changes nothing.

    Call it where there are `candidates`; a hand's first answer takes up to 3 s.
    """
    try:
        host, processes = hand.host(), hand.find(candidates(evidence))
    except HostLacks as error:
        return Survey(findings=tuple(unasked_findings(evidence, error)), lacks=error)
    return Survey(host, tuple(processes), tuple(gpu_findings(evidence, host, processes)))


def gpu_findings(evidence: Evidence, host: GpuHost, processes: list[CudaProcess]) -> list[Finding]:
    """Return every finding about the GPU side of a tree, the gravest first.

    `processes` are those of `candidates` that CUDA's driver knows. Changes nothing.
    """
    scene = Scene(evidence, host, processes)
    return gravest_first(finding for check in CHECKS for finding in check(scene))


def unasked_findings(evidence: Evidence, reason: CrcliError) -> list[Finding]:
    """Return the findings about a tree whose processes CUDA could not be asked about, for this reason.

    A process that has only the library mapped cannot have used CUDA then, and is like any other.
    """
    held = [one for some in holders(evidence).values() for one in some]
    if not held:
        return []
    return [
        blocker(
            "gpu-unknown",
            f"{who(evidence, held)} uses {held[0].path}, and CUDA cannot be asked about it: {reason.message}",
            places(evidence, held),
            reason.hint or "`crcli doctor` says what this host lacks for GPUs",
        )
    ]


# --- what is known to break the driver's checkpoint --------------------------------------------------------


def driver(scene: Scene) -> Iterator[Finding]:
    """The checkpoint of CUDA came with driver 570, on ARM with 595 (NVIDIA/cuda-checkpoint 51)."""
    oldest = OLDEST_DRIVER.get(os.uname().machine, OLDEST_DRIVER_ELSEWHERE)
    if scene.processes and 0 < scene.branch < oldest:
        yield blocker(
            "gpu-driver",
            f"NVIDIA's driver {scene.host.driver} cannot save GPU memory on this architecture",
            {"driver": scene.host.driver, "needed": oldest},
            f"update the driver to {oldest} or newer, and start the program again",
        )


def failed(scene: Scene) -> Iterator[Finding]:
    """FAILED is final: the driver has given the process up, in an earlier checkpoint."""
    if held := [scene.process(one) for one in scene.processes if one.state is CudaState.FAILED]:
        yield blocker(
            "gpu-failed",
            f"CUDA's driver has given {first_of(held)} up (state FAILED), which it never takes back",
            process_list(held),
            "end the process and start it again, or from an older image; its GPU memory is lost",
        )


def not_running(scene: Scene) -> Iterator[Finding]:
    """A process that somebody has locked or checkpointed: another dump, or one that was cut off."""
    usual = (CudaState.RUNNING, CudaState.FAILED, CudaState.GONE, CudaState.SILENT)
    if held := [one for one in scene.processes if one.state not in usual]:
        processes = [scene.process(one) for one in held]
        yield blocker(
            "gpu-state",
            f"CUDA of {first_of(processes)} is {held[0].state} by somebody else's doing",
            {
                "processes": [
                    {"pid": one.pid, "command": scene.process(one).comm, "state": one.state.value}
                    for one in held
                ]
            },
            "when no other dump is under way, `crcli doctor --fix` lets it go on",
        )


def silent(scene: Scene) -> Iterator[Finding]:
    """A process that stands still: the driver works through one of its threads, which must run."""
    if held := [scene.process(one) for one in scene.processes if one.state is CudaState.SILENT]:
        yield blocker(
            "gpu-silent",
            f"CUDA's driver asks {first_of(held)} in vain: "
            + ("it is stopped" if held[0].is_stopped else "its threads do not run"),
            process_list(held, "state"),
            f"let it run for the dump ({how_to_continue(held)}), or thaw its cgroup",
        )


def managed(scene: Scene) -> Iterator[Finding]:
    """Managed memory (UVM): the driver's checkpoint stops at it, and the process may not survive."""
    mapped = {one.pid for one in scene.evidence.mappings if one.path == _UVM}
    sizes = {one.pid: managed_bytes(one.pid) for one in scene.processes if one.pid in mapped}
    if held := [scene.evidence.tree.process(pid) for pid, size in sizes.items() if size]:
        yield blocker(
            "gpu-managed",
            f"{first_of(held)} uses managed memory (cudaMallocManaged, UVM), {_amount(sizes[held[0].pid])}, "
            "which NVIDIA's driver cannot save",
            {
                "processes": [
                    {"pid": one.pid, "command": one.comm, "managed_bytes": sizes[one.pid]} for one in held
                ]
            },
            "start the program without it (CuPy: no malloc_managed; RAPIDS: no managed pool; bitsandbytes: "
            "no paged optimizer)",
        )


def mps(scene: Scene) -> Iterator[Finding]:
    """Clients of MPS share one context that belongs to a server outside; the driver's checkpoint has none."""
    tree = scene.evidence.tree
    clients = {
        file.pid
        for one in scene.evidence.outside_unix
        if any(outsider.comm.startswith(_MPS_COMM) for outsider in one.outsiders)
        for file in one.holders
    }
    clients |= {one.pid for one in tree.living if one.comm.startswith(_MPS_COMM)}
    if held := [one for one in tree.living if one.pid in clients]:
        yield blocker(
            "gpu-mps",
            f"{first_of(held)} shares its GPU through MPS, which NVIDIA's driver cannot save",
            process_list(held),
            "start the program while nvidia-cuda-mps-control does not run, or with CUDA_MPS_PIPE_DIRECTORY "
            "set to an empty folder",
        )


def mig(scene: Scene) -> Iterator[Finding]:
    """Part of a GPU that is divided: the driver's checkpoint fails (NVIDIA/cuda-checkpoint 42)."""
    divided = [
        one
        for one in scene.processes
        if any(gpu.mig for gpu in scene.gpus_of(one))
        or any(_is_part(place.path) for place in scene.holders.get(one.pid, ()))
    ]
    if held := [scene.process(one) for one in divided]:
        yield blocker(
            "gpu-mig",
            f"{first_of(held)} uses a part of a divided GPU (MIG), which NVIDIA's driver cannot save",
            process_list(held),
            "run the program on a GPU that is not divided",
        )


def _is_part(path: str) -> bool:
    """Whether a device gives access to a part of a divided GPU.

    Two of its kind are on every host: who may divide GPUs, and watch them, opens those. NVML does, as root.
    """
    return path.startswith(_MIG_ACCESS) and path not in _mig_rights()


def _mig_rights() -> set[str]:
    try:
        words = [line.split() for line in read_proc(MIG_MINORS).decode(errors="replace").splitlines()]
    except OSError:
        words = [["config", "1"], ["monitor", "2"]]  # as they have always been
    return {f"{_MIG_ACCESS}nvidia-cap{one[1]}" for one in words if one[:1] in (["config"], ["monitor"])}


def shared(scene: Scene) -> Iterator[Finding]:
    """GPU memory shared between processes (CUDA IPC), as far as it leaves traces: its events, and NCCL's own.

    NCCL's ranks wait for each other inside kernels, so they cannot always be locked one after the other.
    """
    maps = [one for one in scene.evidence.mappings if one.path.startswith((_IPC_EVENTS, _NCCL_SEGMENT))]
    sharers: dict[FileId, set[int]] = {}
    for one in maps:
        sharers.setdefault(one.id, set()).add(one.pid)
    events = [one for one in maps if one.path.startswith(_IPC_EVENTS) and scene.branch < FIRST_WITH_IPC]
    if events:
        yield blocker(
            "gpu-ipc",
            f"{who(scene.evidence, events)} shares GPU memory with another process (CUDA IPC), which "
            f"NVIDIA's driver {scene.host.driver} cannot save",
            places(scene.evidence, events),
            f"update the driver to {FIRST_WITH_IPC} or newer, or let the processes share no GPU memory",
        )
    ranks = [
        one
        for one in maps
        if one.path.startswith(_NCCL_SEGMENT) and len(sharers[one.id]) > 1 and not _has_no_peers(one.pid)
    ]
    if ranks:
        yield blocker(
            "gpu-nccl",
            f"{who(scene.evidence, ranks)} talks to other processes through NCCL, which maps their GPU "
            "memory; NVIDIA's driver cannot save that",
            places(scene.evidence, ranks),
            "start all ranks with NCCL_P2P_DISABLE=1 in their environment, or end the communicators "
            "(destroy_process_group) for the time of the dump",
        )


def _has_no_peers(pid: int) -> bool:
    """Whether a process was started so that NCCL maps nobody's GPU memory."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return b"NCCL_P2P_DISABLE=1" in file.read().split(b"\0")
    except OSError:
        return False


def tools(scene: Scene) -> Iterator[Finding]:
    """A debugger or profiler inside the process: the driver's checkpoint knows none (cuda-checkpoint 15)."""
    users = {one.pid for one in scene.processes}
    for library, tool in _TOOLS.items():
        held = [one for one in scene.evidence.mappings if one.pid in users and _is_library(one.path, library)]
        if held:
            yield blocker(
                "gpu-tool",
                f"{who(scene.evidence, held)} runs under {tool}, with which its GPU memory cannot be saved",
                places(scene.evidence, held),
                "start the program without the tool",
            )


def graphics(scene: Scene) -> Iterator[Finding]:
    """OpenGL and Vulkan: the driver's checkpoint is CUDA's alone, and leaves what they hold."""
    held = [one for some in scene.holders.values() for one in some if one.path == _MODESETTING]
    if held:
        yield blocker(
            "gpu-graphics",
            f"{who(scene.evidence, held)} uses OpenGL or Vulkan ({_MODESETTING}), whose side of the GPU "
            "cannot be saved",
            places(scene.evidence, held),
            "let the program render without the GPU, or close its graphics before the dump",
        )


def without_cuda(scene: Scene) -> Iterator[Finding]:
    """NVIDIA's devices in a process that CUDA's driver does not know: they would stay, and stop CRIU.

    Two kinds: what asks NVML only (a monitor), and what a fork has inherited, as a worker of PyTorch's
    DataLoader has (NVIDIA/cuda-checkpoint 28). Of one that CUDA knows, NVML's are closed too (from 570).
    """
    known = {one.pid for one in scene.processes}
    strangers = {pid: held for pid, held in scene.holders.items() if pid not in known}
    heirs = {pid for pid in strangers if forked_from(pid, known)}
    if held := [one for pid in strangers if pid in heirs for one in strangers[pid]]:
        children = [scene.evidence.tree.process(pid) for pid in strangers if pid in heirs]
        yield note(
            "gpu-inherited-left",
            f"{first_of(children)} has GPU devices from a fork: CUDA cannot use them there, and they "
            "cannot be saved",
            places(scene.evidence, held),
            "takes them from the process, which goes on without them, and with a copy of the pinned memory "
            "that it shared",
        )
        yield from _room_for_copies(scene, children)
    monitors = {pid for pid in strangers if pid not in heirs and _asks_nvml_only(scene, pid, known)}
    if held := [one for pid in strangers if pid in monitors for one in strangers[pid]]:
        yield blocker(
            "gpu-nvml",
            f"{who(scene.evidence, held)} is {held[0].path}, open through NVML in a process that does not "
            "use CUDA: NVIDIA's driver would not close it for the dump",
            places(scene.evidence, held),
            "let the process call nvmlShutdown (or end it) before the dump: pynvml, nvidia-smi, monitors",
        )
    others = [pid for pid in strangers if pid not in heirs | monitors]
    if held := [one for pid in others for one in strangers[pid]]:
        yield blocker(
            "gpu-inherited",
            f"{who(scene.evidence, held)} is {held[0].path}, in a process that does not use CUDA itself: "
            "most likely a child of one which does, or did",
            places(scene.evidence, held),
            "start such children afresh, not by a fork (PyTorch: DataLoader(multiprocessing_context="
            "'spawn' or 'forkserver'); Python: multiprocessing.set_start_method), or before the first use of "
            "CUDA",
        )


def _room_for_copies(scene: Scene, heirs: Sequence[Process]) -> Iterator[Finding]:
    """What such children have mapped of devices, as pinned memory, becomes memory of their own."""
    sizes = Counter[int]()
    for one in scene.evidence.device_mappings:
        sizes[one.pid] += one.bytes if one.path.startswith(DEVICE_PREFIX) else 0
    wanted = Counter[str]()
    for process in heirs:
        wanted[process.cgroups] += sizes[process.pid]
    if tight := too_tight(wanted):
        room, needed = tight
        yield blocker(
            "gpu-inherited",
            f"{first_of(heirs)} has pinned memory from a fork, {_amount(needed)} in all, of which each would "
            f"have a copy, and {room.label} has {_amount(room.free)} left",
            {"needed": needed, "free": room.free, "cgroup": room.place},
            "free memory or raise the cgroup's limit, or start such children afresh (PyTorch: DataLoader("
            "multiprocessing_context='spawn'))",
        )


def _asks_nvml_only(scene: Scene, pid: int, known: set[int]) -> bool:
    """Whether a process has NVML for itself: a fork of one that uses CUDA has all of its libraries mapped."""
    if not any(one.pid == pid and _is_library(one.path, _NVML_LIBRARY) for one in scene.evidence.mappings):
        return False
    process = scene.evidence.tree.process(pid)
    parent = process.ppid
    while parent in scene.evidence.tree:
        above = scene.evidence.tree.process(parent)
        if parent in known and above.exe == process.exe:
            return False
        parent = above.ppid
    return True


_WITH_TABLES = 1.05
"""How much the host's memory has to take for that of GPUs, page tables and staging included."""


def host_memory(scene: Scene) -> Iterator[Finding]:
    """GPU memory becomes memory of the process itself, within its cgroup's limit, while it is saved.

    Where nobody knows how much a tree has, it is taken to be all that is in use on the GPUs.
    """
    running = [one for one in scene.processes if one.state is CudaState.RUNNING]
    sizes = {one.pid: one.used_bytes for one in running}
    if running and not any(sizes.values()):
        sizes[running[0].pid] = sum(
            gpu.memory_bytes - gpu.free_bytes for gpu in scene.host.gpus if gpu.free_bytes >= 0
        )
    wanted: dict[str, int] = {}
    for one in running:
        cgroups = scene.process(one).cgroups
        wanted[cgroups] = wanted.get(cgroups, 0) + round(sizes[one.pid] * _WITH_TABLES)
    if tight := too_tight(wanted):
        room, needed = tight
        yield blocker(
            "gpu-host-memory",
            f"{_amount(needed)} of GPU memory would have to lie in the host's memory for the dump, and "
            f"{room.label} has {_amount(room.free)} left",
            {"needed": needed, "free": room.free, "cgroup": room.place},
            "free memory or raise the cgroup's limit, or let the program give GPU memory back that it does "
            "not need (torch.cuda.empty_cache())",
        )


# --- what is worth knowing ---------------------------------------------------------------------------------


def in_use(scene: Scene) -> Iterator[Finding]:
    """Which processes use CUDA, on which GPUs, and how much memory they have there."""
    if not scene.processes:
        return
    users = [scene.process(one) for one in scene.processes]
    gpus = {gpu.uuid: gpu for one in scene.processes for gpu in scene.gpus_of(one)}
    used = sum(one.used_bytes for one in scene.processes)
    kinds = Counter(gpu.name for gpu in gpus.values())
    names = ", ".join(f"{number} × {name}" if number > 1 else name for name, number in kinds.items())
    yield note(
        "gpu",
        f"{first_of(users)} uses CUDA on {names or 'a GPU'}, {_amount(used)} of GPU memory in use",
        {
            "processes": [_process_json(scene, one) for one in scene.processes],
            "gpus": [gpu.as_json() for gpu in gpus.values()],
            "memory_bytes": used,
            "driver": scene.host.driver,
        },
        "takes the GPU memory along",
    )


def _process_json(scene: Scene, one: CudaProcess) -> dict[str, Any]:
    return {
        "pid": one.pid,
        "command": scene.process(one).comm,
        "state": one.state.value,
        "used": dict(one.used),
        "memory_bytes": one.used_bytes,
    }


def amount_unknown(scene: Scene) -> Iterator[Finding]:
    """NVML tells pids of the host's pid namespace: in a container it often tells none."""
    running = [one for one in scene.processes if one.state is CudaState.RUNNING]
    if held := [scene.process(one) for one in running if not one.used_bytes]:
        yield note(
            "gpu-amount-unknown",
            f"how much GPU memory {first_of(held)} uses cannot be told (NVML does not know the pid, as in "
            "containers)",
            process_list(held),
            "takes it to be all that is in use on the GPUs: the host's memory must be enough for that",
            "run crcli in the host's pid namespace (docker run --pid=host), or leave enough memory free",
        )


def persistence(scene: Scene) -> Iterator[Finding]:
    """Without persistence mode the driver lets go of a GPU that nobody uses, and loading it takes seconds."""
    gpus = {gpu.uuid: gpu for one in scene.processes for gpu in scene.gpus_of(one) if not gpu.persistence}
    if gpus:
        first = next(iter(gpus.values()))
        yield note(
            "gpu-persistence",
            f"persistence mode is off for {first.name} ({first.uuid}){and_more(list(gpus))}",
            {"gpus": list(gpus)},
            "keeps the driver loaded by itself while it works",
            "nvidia-smi -pm 1, or nvidia-persistenced",
        )


def _amount(size: int) -> str:
    return f"{size / _MIB:,.0f} MiB".replace(",", " ")


CHECKS: tuple[Check, ...] = (
    driver,
    failed,
    not_running,
    silent,
    managed,
    mps,
    mig,
    shared,
    tools,
    graphics,
    without_cuda,
    host_memory,
    in_use,
    amount_unknown,
    persistence,
)
