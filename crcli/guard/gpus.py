"""GPUs: whether those of this host can take what the image holds of others.

What the image says of them is in its facts under `gpu` (FORMAT.md): the GPU side of the host of the dump, and
how much memory each process had on which GPU.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Any

from crcli.errors import HostLacks, ImageDamaged
from crcli.findings import Finding, Severity, change, note
from crcli.gpu.facts import Gpu, GpuHost
from crcli.gpu.mapping import MappingRefused, choose_mapping, describe
from crcli.guard.wording import blocker
from crcli.memory.extents import distinct_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from crcli.guard.here import Here
    from crcli.guard.needs import Needs
    from crcli.guard.wording import Check

DEVICES = "/dev"
_SHARED_DEVICES = ("nvidiactl", "nvidia-uvm")
_MAKE_DEVICES = "`nvidia-modprobe -u -c 0` makes device files; a container needs them passed in (--gpus all)"
_FIRST_WITH_MAPS = 580
_GIB = 1 << 30


def gpus(needs: Needs, here: Here) -> Iterator[Finding]:
    """GPUs for an image that holds GPU memory: as many as it needs, alike, with room and a driver for it."""
    recorded = needs.meta.get("gpu")
    if not recorded:
        yield from _mapped_in_vain(needs.asked.gpu_map)
        return
    check_facts(needs.meta)
    try:
        host = here.gpus
    except HostLacks as error:
        yield _unforceable(
            "gpu-missing",
            f"the image holds GPU memory, and CUDA cannot be used here: {error.message}",
            error.hint,
        )
        return
    findings, _ = gpu_guard(recorded, host, needs.asked.gpu_map)
    yield from findings
    if any(os.path.basename(file.opened.path) == f"libcuda.so.{_driver(recorded)}" for file in needs.files):
        yield from _same_library(_driver(recorded), host.driver)


def _mapped_in_vain(asked: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """GPUs to be mapped for an image that has none: scripts say the same of all images."""
    if asked:
        yield note(
            "gpu-map-unused",
            "the image holds no GPU memory, so --gpu-map maps nothing",
            {"map": [list(pair) for pair in asked]},
            "leaves it out",
            "leave out --gpu-map, or look with `crcli show` whether this is the image that is meant",
        )


def gpu_guard(
    recorded: Mapping[str, Any], here: GpuHost, asked: Sequence[tuple[str, str]] = ()
) -> tuple[list[Finding], dict[str, str]]:
    """Return the findings about the GPUs of an image and of this host, and which takes the place of which.

    `recorded` are the image's facts under `gpu`; `asked` pairs of GPUs as the user gave them. The mapping is
    by UUID, empty where each GPU is its own, or none can be told (then a finding says why). A driver that
    takes no mapping is given none where all GPUs in use stay.
    """
    old = GpuHost.from_json(recorded.get("host", {}))
    used = memory_used(recorded)
    wanted = {uuid for uuid, size in used.items() if size} or {gpu.uuid for gpu in old.gpus}
    try:
        mapping = choose_mapping(old, wanted, here, asked)
    except MappingRefused as error:
        return [*_older_driver(old, here), _unforceable("gpu-map", str(error), error.remedy)], {}
    pairs = [
        (gpu, new)
        for gpu in old.gpus
        if gpu.uuid in wanted
        for new in here.gpus
        if new.uuid == mapping.get(gpu.uuid, gpu.uuid)
    ]
    needs_map = any(gpu.uuid != new.uuid for gpu, new in pairs)
    if not needs_map and not _takes_maps(here):
        mapping = {}
    found = [
        *_older_driver(old, here, needs_map),
        *_other_chip(pairs),
        *_divided(pairs),
        *_too_full(pairs, used),
        *_without_devices(pairs),
        *_moved(pairs),
        *_not_kept(pairs),
    ]
    return found, mapping


def check_facts(meta: Mapping[str, Any]) -> None:
    """Raise ImageDamaged where an image's facts under `gpu` are not what FORMAT.md says."""
    recorded = meta.get("gpu")
    if not recorded:
        return
    try:
        for gpu in GpuHost.from_json(recorded["host"]).gpus:
            if not isinstance(gpu.uuid, str) or not isinstance(gpu.memory_bytes, int):
                raise ValueError(f"GPU {gpu.uuid}")
        members = [one["pid"] for one in meta.get("members", recorded["processes"])]
        for process in recorded["processes"]:
            if process["pid"] not in members:
                raise ValueError(f"process {process['pid']} is not in the tree")
            if not all(isinstance(size, int) and size >= 0 for size in process["used"].values()):
                raise ValueError(f"memory of process {process['pid']}")
            if not _are_runs(process.get("saved", [])):
                raise ValueError(f"saved memory of process {process['pid']}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImageDamaged(f"what the image says of its GPUs cannot be read: {error!r}") from error


def _are_runs(saved: Any) -> bool:
    """Whether these are runs of pages, ascending, as (first page, pages)."""
    end = 0
    for start, pages in saved:
        if not isinstance(start, int) or not isinstance(pages, int) or start < end or pages <= 0:
            return False
        end = start + pages
    return True


def memory_used(recorded: Mapping[str, Any]) -> dict[str, int]:
    """GPU memory that the image's processes had together, in bytes by the GPU's UUID."""
    used: dict[str, int] = {}
    for process in recorded.get("processes", ()):
        for uuid, size in process.get("used", {}).items():
            used[uuid] = used.get(uuid, 0) + int(size)
    return used


def host_memory(needs: Needs, here: Here) -> Iterator[Finding]:
    """GPU memory passes through the host's, also what was zeros in the image: the driver may fill them in."""
    on_gpus = sum(memory_used(needs.meta.get("gpu") or {}).values())
    if not on_gpus:
        return
    zeros, others = distinct_bytes(needs.manifest.spaces)
    needed = others + min(on_gpus, zeros)
    if others <= here.spare_memory < needed:  # without GPU memory it would fit: else `memory` has said it
        yield blocker(
            "gpu-host-memory",
            f"the tree, with its GPU memory on the way, needs {needed >> 20} MiB of this host's memory, and "
            f"{here.spare_memory >> 20} MiB are free",
            {"needed": needed, "free": here.spare_memory, "gpu": on_gpus},
            "free memory, or restore on a larger host",
        )


def _unforceable(name: str, message: str, remedy: str) -> Finding:
    """There is nothing to go on with."""
    return Finding(name, Severity.BLOCKER, message, {}, "starts nothing", remedy)


def _driver(recorded: Mapping[str, Any]) -> str:
    return str(recorded.get("host", {}).get("driver", ""))


def _branch(driver: str) -> int:
    branch = driver.partition(".")[0]
    return int(branch) if branch.isdecimal() else 0


def _takes_maps(here: GpuHost) -> bool:
    """Whether the driver can move memory to other GPUs, as far as it is known which one it is."""
    return not 0 < _branch(here.driver) < _FIRST_WITH_MAPS


def _older_driver(old: GpuHost, here: GpuHost, needs_map: bool = False) -> Iterator[Finding]:
    """A driver that is older than what wrote the GPU side of the image, or that cannot move it."""
    evidence = {
        "dumped": {"driver": old.driver, "api": old.api},
        "here": {"driver": here.driver, "api": here.api},
    }
    if 0 < _branch(here.driver) < _branch(old.driver) or here.api < old.api:
        yield blocker(
            "gpu-driver",
            f"NVIDIA's driver here ({here.driver or 'unknown'}, CUDA {_cuda(here.api)}) is older than that "
            f"of the dump ({old.driver or 'unknown'}, CUDA {_cuda(old.api)})",
            evidence,
            f"update the driver to {old.driver}, or restore on a host that has it",
        )
    elif needs_map and not _takes_maps(here):
        yield blocker(
            "gpu-driver",
            f"NVIDIA's driver {here.driver} cannot bring GPU memory back to another GPU than it was on",
            evidence,
            f"update the driver to {_FIRST_WITH_MAPS} or newer, or restore on the same GPU",
        )


def _same_library(dumped: str, here: str) -> Iterator[Finding]:
    """CUDA's library in the processes' memory goes with its own kernel driver only (`API mismatch`)."""
    if dumped and here and dumped != here:
        yield blocker(
            "gpu-driver-other",
            f"the tree's processes have the libraries of NVIDIA's driver {dumped} in memory, and the kernel "
            f"driver here is {here}, which serves no other version's",
            {"dumped": dumped, "here": here},
            f"restore on a host with driver {dumped}",
        )


def _cuda(api: int) -> str:
    return f"{api // 1000}.{api % 1000 // 10}"


def _other_chip(pairs: Sequence[tuple[Gpu, Gpu]]) -> Iterator[Finding]:
    for old, new in pairs:
        if (old.name, old.compute) != (new.name, new.compute):
            yield blocker(
                "gpu-chip",
                f"{describe(old)} of the image is to become {describe(new)}, another chip",
                {"dumped": old.as_json(), "here": new.as_json()},
                f"restore on a host with {old.name}",
            )


def _divided(pairs: Sequence[tuple[Gpu, Gpu]]) -> Iterator[Finding]:
    for _, new in pairs:
        if new.mig:
            yield blocker(
                "gpu-mig",
                f"{describe(new)} is divided (MIG), and GPU memory can be brought back to whole ones only",
                {"here": new.as_json()},
                f"nvidia-smi -i {new.index} -mig 0, or restore on another GPU (--gpu-map)",
            )


def _too_full(pairs: Sequence[tuple[Gpu, Gpu]], used: Mapping[str, int]) -> Iterator[Finding]:
    """A restore that runs out of GPU memory cannot be tried again (NVIDIA/cuda-checkpoint 44): look first."""
    for old, new in pairs:
        room = new.memory_bytes if new.free_bytes < 0 else new.free_bytes
        if (needed := used.get(old.uuid, 0)) > room:
            yield blocker(
                "gpu-memory",
                f"the tree needs {needed / _GIB:.1f} GiB on {describe(new)}, where {room / _GIB:.1f} GiB are "
                "free",
                {"gpu": new.uuid, "needed": needed, "free": room},
                "end what else uses this GPU (nvidia-smi lists it), or choose another with --gpu-map",
            )


def _without_devices(pairs: Sequence[tuple[Gpu, Gpu]]) -> Iterator[Finding]:
    names = [*_SHARED_DEVICES, *(f"nvidia{new.minor}" for _, new in pairs if new.minor >= 0)]
    absent = [f"{DEVICES}/{name}" for name in dict.fromkeys(names) if not _is_device(f"{DEVICES}/{name}")]
    if absent:
        yield blocker(
            "gpu-device",
            f"{absent[0]} is not here, or may not be opened",
            {"devices": absent},
            _MAKE_DEVICES,
        )


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode) and os.access(path, os.R_OK | os.W_OK)
    except OSError:
        return False


def _moved(pairs: Sequence[tuple[Gpu, Gpu]]) -> Iterator[Finding]:
    """What CUDA has told the program of its GPU is not told again (NVIDIA/cuda-checkpoint 48)."""
    moved = [(old, new) for old, new in pairs if old.uuid != new.uuid]
    if moved:
        old, new = moved[0]
        yield change(
            "gpu-moved",
            f"GPU memory goes to another GPU: {old.uuid} becomes {new.uuid}"
            + (f" (and {len(moved) - 1} more)" if len(moved) > 1 else ""),
            {"map": {old.uuid: new.uuid for old, new in moved}},
            "has NVIDIA's driver move it",
            "what a program has noted of its GPU (its PCI address above all) stays that of the old one: NCCL "
            "and NVML may not find it when they are started afterwards",
        )


def _not_kept(pairs: Sequence[tuple[Gpu, Gpu]]) -> Iterator[Finding]:
    if asleep := [new for _, new in pairs if not new.persistence]:
        yield note(
            "gpu-persistence",
            f"persistence mode is off for {describe(asleep[0])}",
            {"gpus": [gpu.uuid for gpu in asleep]},
            "keeps the driver loaded by itself while it works",
            "nvidia-smi -pm 1, or nvidia-persistenced",
        )


GPUS: tuple[Check, ...] = (gpus, host_memory)
