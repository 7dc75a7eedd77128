"""What is known of GPUs and of the processes that use them. No CUDA is needed to read this module."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any

from crcli.records import Struct, asdict, field, fields_of

if TYPE_CHECKING:
    from collections.abc import Mapping


class CudaState(StrEnum):
    """What CUDA's driver says of a process (CUprocessState, by its names).

    RUNNING -lock-> LOCKED -checkpoint-> CHECKPOINTED -restore-> LOCKED -unlock-> RUNNING. Nothing leads out
    of FAILED. CHECKPOINTING and RESTORING are seen with custom storage only (CUDA 13.4). Two are ours. GONE:
    the process has ended, or the driver does not know it. SILENT: the driver asks it in vain, for its threads
    stand still (stopped, or frozen by a cgroup).
    """

    RUNNING = "running"
    LOCKED = "locked"
    CHECKPOINTED = "checkpointed"
    FAILED = "failed"
    CHECKPOINTING = "checkpointing"
    RESTORING = "restoring"
    GONE = "gone"
    SILENT = "silent"


class Gpu(Struct, frozen=True):
    """One GPU of a host. `uuid` as NVIDIA's tools print it ("GPU-…"), `minor` the number of /dev/nvidiaN.

    `compute` is the compute capability ("9.0"). `persistence` says whether the driver keeps it initialised
    while nobody uses it. `mig` says whether it is divided (MIG). `free_bytes` was free when it was asked; -1
    where NVML does not tell.
    """

    uuid: str
    name: str
    index: int
    minor: int
    memory_bytes: int
    compute: str
    persistence: bool = False
    mig: bool = False
    free_bytes: int = -1

    def as_json(self) -> dict[str, Any]:
        """As it stands in a manifest, and in reports."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Gpu:
        """Read one back; what a later crcli added is left out."""
        return cls(**{name: data[name] for name in fields_of(cls) if name in data})


class CudaProcess(Struct, frozen=True):
    """A process that CUDA's driver knows.

    `pid` and `restore_tid` are this host's; `used` is the memory that it has on each GPU (bytes by UUID), as
    far as NVML tells: in some containers it does not.
    """

    pid: int
    start_time: int
    restore_tid: int
    state: CudaState
    used: Mapping[str, int] = field(default_factory=dict)

    @property
    def used_bytes(self) -> int:
        """GPU memory in use, all GPUs together."""
        return sum(self.used.values())


class GpuHost(Struct, frozen=True):
    """The GPU side of a host: `driver` as "580.159.04", `api` the CUDA version of the driver (13000: 13.0).

    `custom_storage` says whether the driver can hand checkpointed bytes to us (CUDA 13.4).
    """

    driver: str
    api: int
    gpus: tuple[Gpu, ...]
    custom_storage: bool = False

    def as_json(self) -> dict[str, Any]:
        """As it stands in a manifest, and in reports."""
        return {**asdict(self), "gpus": [gpu.as_json() for gpu in self.gpus]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GpuHost:
        """Read one back."""
        gpus = tuple(Gpu.from_json(one) for one in data.get("gpus", ()))
        driver, api = str(data.get("driver", "")), int(data.get("api", 0))
        return cls(driver, api, gpus, bool(data.get("custom_storage")))
