"""GPUs: whether their memory can be saved here, and which processes were left without theirs."""

from __future__ import annotations

import glob
import os
import re
from typing import TYPE_CHECKING, Any

from crcli.errors import CrcliError, HostLacks
from crcli.gpu.care import forget, neglected
from crcli.gpu.facts import CudaProcess, CudaState, GpuHost
from crcli.gpu.hand import Hand, Purpose
from crcli.guard.doctor.check import Check, note, passed, read
from crcli.process.identity import ProcessId, read_proc, read_stat
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ASLEEP = (CudaState.LOCKED, CudaState.CHECKPOINTED)
_OVER = (CudaState.RUNNING, CudaState.FAILED, CudaState.GONE)
"""Where there is nothing to wake: it runs, or nothing leads out of it."""

_DRIVER_LIBRARY = b"/libcuda.so"
_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
_GIB = 1 << 30


def gpus() -> list[str]:
    """The device files of NVIDIA GPUs."""
    return sorted(path for path in glob.glob("/dev/nvidia[0-9]*"))


def gpu_driver() -> str:
    """The version of NVIDIA's kernel driver; empty where there is none."""
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", read("/proc/driver/nvidia/version"))
    return found[1] if found else ""


def _gpus() -> Iterator[Check]:
    devices, driver = gpus(), gpu_driver()
    evidence: dict[str, Any] = {"devices": devices, "driver": driver}
    if not devices and not driver:
        yield passed("gpu", "no NVIDIA GPU here", **evidence)
        return
    try:
        with Hand(Purpose.DUMP) as hand:
            host = hand.host()
            checks = [
                _usable(host, evidence),
                *(_persistence(host) if _has_nvml(host) else _without_nvml()),
                *_huge_pages(),
                _custom_storage(host),
                *_asleep(hand),
            ]
    except HostLacks as error:
        says = f"{len(devices)} NVIDIA devices, and GPU memory cannot be saved: {error.message}"
        checks = [note("gpu", says, error.hint or "see `nvidia-smi`", **evidence)]
    yield from checks


def _usable(host: GpuHost, evidence: dict[str, Any]) -> Check:
    names = ", ".join(f"{one.name} ({one.memory_bytes / _GIB:.0f} GiB)" for one in host.gpus)
    api = f"{host.api // 1000}.{host.api % 1000 // 10}"
    says = f"GPU memory can be saved: {names or 'no GPU'}, driver {host.driver or 'unknown'}, CUDA {api}"
    evidence |= {"driver": host.driver, "api": host.api, "gpus": [one.as_json() for one in host.gpus]}
    if divided := [one for one in host.gpus if one.mig]:
        remedy = f"programs on divided GPUs (MIG) cannot be dumped; nvidia-smi -i {divided[0].index} -mig 0"
        return note("gpu", says, remedy, **evidence)
    return passed("gpu", says, **evidence)


def _has_nvml(host: GpuHost) -> bool:
    return all(one.free_bytes >= 0 for one in host.gpus)


def _without_nvml() -> Iterator[Check]:
    """What CUDA does not tell by itself counts as none, or off."""
    yield note(
        "gpu-nvml",
        "NVML cannot be asked: divided GPUs (MIG), full ones, and persistence mode are not noticed",
        "pip install nvidia-ml-py beside crcli; libnvidia-ml.so.1 comes with NVIDIA's driver",
    )


def _persistence(host: GpuHost) -> Iterator[Check]:
    off = [one.uuid for one in host.gpus if not one.persistence]
    if off:
        says = f"persistence mode is off for {len(off)} of {len(host.gpus)} GPUs"
        yield note(
            "gpu-persistence",
            says,
            "nvidia-smi -pm 1, or nvidia-persistenced: restores begin sooner",
            gpus=off,
        )
    else:
        yield passed("gpu-persistence", "the driver stays loaded while nobody uses a GPU", gpus=off)


def _huge_pages() -> Iterator[Check]:
    """The driver's checkpoint fills ordinary memory of the process: page by page, or 2 MiB at a time.

    A restore asks for huge pages itself, where the kernel gives any.
    """
    said = read(_HUGE_PAGES).strip()
    evidence = {"transparent_hugepage": said}
    if said and "[always]" not in said:
        yield note(
            "gpu-huge-pages",
            "ordinary memory gets small pages: GPU memory takes about 1.4 times as long to come to the host"
            + (", and to go back" if "[never]" in said else ""),
            f"echo always > {_HUGE_PAGES}, if the programs of this host take it well",
            **evidence,
        )
    else:
        yield passed("gpu-huge-pages", "GPU memory that comes to the host gets huge pages", **evidence)


def _custom_storage(host: GpuHost) -> Check:
    says = "can" if host.custom_storage else "cannot yet (CUDA 13.4 can)"
    return passed(
        "gpu-custom-storage",
        f"the driver {says} hand GPU memory over without a copy in the process",
        available=host.custom_storage,
    )


def _asleep(hand: Hand) -> Iterator[Check]:
    """CUDA processes that somebody has locked or checkpointed: a dump under way, a killed one, or others."""
    left = set(neglected())
    found = hand.find(_who_may_use_cuda())
    ours = [one for one in found if one.state not in _OVER and ProcessId(one.pid, one.start_time) in left]
    asleep = [one for one in found if one.state in _ASLEEP or one in ours]
    evidence = {
        "left": [_json(one) for one in ours],
        "others": [_json(one) for one in asleep if one not in ours],
    }
    if ours:
        yield note(
            "gpu-asleep",
            f"killed crcli commands have left CUDA asleep in {_listed(ours)}",
            "`crcli doctor --fix` wakes it",
            **evidence,
        )
    elif asleep:
        yield note(
            "gpu-asleep",
            f"CUDA is asleep in {_listed(asleep)}: a dump is under way, or another program has done it",
            "when nobody works on it: `cuda-checkpoint --toggle --pid PID` wakes it",
            **evidence,
        )
    else:
        yield passed("gpu-asleep", "CUDA is awake in all processes", **evidence)


def _listed(processes: list[CudaProcess]) -> str:
    return ", ".join(f"{_label(one.pid)}, {one.state}" for one in processes)


def _label(pid: int) -> str:
    try:
        return f"{read_stat(pid).comm} ({pid})"
    except ProcessLookupError:
        return f"process {pid}"


def _json(process: CudaProcess) -> dict[str, Any]:
    return {"pid": process.pid, "state": process.state.value}


def _who_may_use_cuda() -> list[int]:
    """The processes of this host, but our own, that have CUDA's driver library mapped."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                if _DRIVER_LIBRARY in read_proc(f"/proc/{name}/maps"):
                    found.append(int(name))
            except OSError:
                continue
    return found


_NOT_NOW = "its threads stand still, or the driver is at work on it: let it run, then try again"


class Woken(Struct, frozen=True):
    """A process whose CUDA was left asleep, and what it is in now. `error` says why it could not be woken."""

    pid: int
    state: CudaState
    error: str = ""

    @property
    def sentence(self) -> str:
        """The same for people."""
        says = f"could not be woken: {self.error}" if self.error else "is awake again"
        return f"CUDA of {_label(self.pid)} {says}"

    def as_json(self) -> dict[str, Any]:
        """As `crcli doctor --json` prints it."""
        return {"pid": self.pid, "state": self.state.value, "error": self.error}


def wake() -> list[Woken]:
    """Wake CUDA of every process that killed commands have left asleep; return what became of each.

    What another program has put to sleep, or a dump that is under way, is left alone.
    """
    left = neglected()
    if not left:
        return []
    with Hand(Purpose.DUMP) as hand:
        try:
            found = {ProcessId(one.pid, one.start_time): one for one in hand.find(one.pid for one in left)}
        except HostLacks as error:
            return [Woken(one.pid, CudaState.GONE, error.message) for one in left]
        asleep = [found[one] for one in left if one in found and found[one].state not in _OVER]
        woken = [_wake(hand, one) for one in asleep]
        if not any(one.error for one in woken):
            hand.settled()  # else it goes on to try without us
    for one in left:
        if one not in found or found[one].state in _OVER:
            forget(one)
    return woken


def _wake(hand: Hand, process: CudaProcess) -> Woken:
    if process.state not in _ASLEEP:
        return Woken(process.pid, process.state, _NOT_NOW)
    try:
        if process.state is CudaState.CHECKPOINTED:
            hand.restore([process.pid], {})
        hand.unlock([process.pid])
    except CrcliError as error:
        (now,) = hand.find([process.pid]) or [process]
        return Woken(process.pid, now.state, error.message)
    return Woken(process.pid, CudaState.RUNNING)


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (_gpus,)
