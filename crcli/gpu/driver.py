"""The seam to CUDA's driver and NVML, through cuda-python and nvidia-ml-py: nothing foreign is seen above it.

Only the hand's own process imports this module (see `worker`). The functions of `cuda.bindings.driver` return
(CUresult, …) and never raise on an error of CUDA; a missing libcuda, or a function that this driver does not
have, is a RuntimeError. `cuda.core.checkpoint` is the same a level higher: it costs another import, and of a
refusal it keeps the text and not the code, by which we decide.
"""

from __future__ import annotations

import ctypes
import re
import threading
from typing import TYPE_CHECKING, Any

from crcli.gpu.facts import CudaState, Gpu, GpuHost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_API_WITH_CHECKPOINT = 12_080
_API_WITH_CUSTOM_STORAGE = 13_040
_INSTALL = "pip install 'crcli[gpu]', or cuda-python 13 and nvidia-ml-py beside crcli"
_NAME_LIMIT = 256


class CudaRefused(Exception):
    """CUDA's driver refused a call, with this CUresult by name."""

    def __init__(self, call: str, result: str) -> None:
        super().__init__(f"{call}: {result}")
        self.call = call
        self.result = result


class CudaLacks(Exception):
    """Something that all of this needs is not here."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Driver:
    """CUDA's driver, initialised. Its calls may be made from several threads, and block."""

    def __init__(self) -> None:
        """Import cuda-python and call cuInit: up to 2.7 s. Raises CudaLacks."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise CudaLacks(f"cuda-python cannot be imported: {error}", _INSTALL) from error
        self._driver: Any = driver
        self._nvml = _Nvml()  # while cuInit takes its time
        try:
            self._begin()
        except RuntimeError as error:
            hint = "install NVIDIA's driver, 570 or later"
            raise CudaLacks(f"CUDA's driver cannot be used: {error}", hint) from error

    def _begin(self) -> None:
        try:
            self._call("init", self._driver.cuInit, 0)
        except CudaRefused as error:
            raise CudaLacks(f"CUDA cannot be initialised here: {error.result}", "see `nvidia-smi`") from error
        self.api = int(self._call("version", self._driver.cuDriverGetVersion))
        if self.api < _API_WITH_CHECKPOINT or not hasattr(self._driver, "cuCheckpointProcessLock"):
            raise CudaLacks(
                f"CUDA {self.api // 1000}.{self.api % 1000 // 10} of this host's driver or of cuda-python "
                "cannot checkpoint processes",
                "it takes NVIDIA's driver 570 (CUDA 12.8) or later, and a cuda-python of its age",
            )

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the driver returned beside its result. Raises CudaRefused."""
        try:
            result, *values = function(*arguments)
        except RuntimeError as error:
            if name == "init":
                raise
            raise CudaRefused(name, "CUDA_ERROR_NOT_FOUND") from error  # not in this driver
        if int(result):
            raise CudaRefused(name, getattr(result, "name", str(int(result))))
        return values[0] if values else None

    # What this host has.

    def host(self) -> GpuHost:
        """The GPUs and the driver, by NVML where it can be had."""
        gpus = tuple(self._nvml.gpus()) or tuple(self._gpus())
        has_complete = hasattr(self._driver, "cuCheckpointOperationComplete")
        custom_storage = self.api >= _API_WITH_CUSTOM_STORAGE and has_complete
        return GpuHost(self._nvml.driver_version(), self.api, gpus, custom_storage)

    def _gpus(self) -> Iterator[Gpu]:
        """The GPUs by CUDA itself, which does not tell all."""
        driver = self._driver
        kinds = driver.CUdevice_attribute
        for index in range(int(self._call("count", driver.cuDeviceGetCount))):
            device = self._call("device", driver.cuDeviceGet, index)

            def attribute(kind: Any, device: Any = device) -> int:
                return int(self._call("attribute", driver.cuDeviceGetAttribute, kind, device))

            major = attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)
            minor = attribute(kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
            name = bytes(self._call("name", driver.cuDeviceGetName, _NAME_LIMIT, device))
            yield Gpu(
                uuid=_uuid_text(bytes(self._call("uuid", driver.cuDeviceGetUuid, device).bytes)),
                name=name.split(b"\0", 1)[0].decode(errors="replace"),
                index=index,
                minor=-1,
                memory_bytes=int(self._call("memory", driver.cuDeviceTotalMem, device)),
                compute=f"{major}.{minor}",
            )

    # The calls of cuCheckpoint.

    def restore_tid(self, pid: int) -> int | None:
        """The thread by which the driver restores a process; None: it is no CUDA process."""
        try:
            return int(self._call("find", self._driver.cuCheckpointProcessGetRestoreThreadId, pid)) or None
        except CudaRefused:
            return None

    def state(self, pid: int) -> CudaState:
        """What the driver says of a process now."""
        state = self._call("state", self._driver.cuCheckpointProcessGetState, pid)
        return CudaState(getattr(state, "name", "").removeprefix("CU_PROCESS_STATE_").lower())

    def lock(self, pid: int, limit_s: float) -> None:
        """The process is LOCKED: its calls of CUDA wait, and nothing of it runs on a GPU."""
        arguments = self._driver.CUcheckpointLockArgs()
        arguments.timeoutMs = max(1, round(limit_s * 1000))
        self._call("lock", self._driver.cuCheckpointProcessLock, pid, arguments)

    def checkpoint(self, pid: int) -> None:
        """The process is CHECKPOINTED: its GPU memory lies in its own, and it holds no GPU any more."""
        self._call("checkpoint", self._driver.cuCheckpointProcessCheckpoint, pid, None)

    def restore(self, pid: int, mapping: Mapping[str, str]) -> None:
        """The process is LOCKED: its GPU memory lies on GPUs again, by this mapping of UUIDs."""
        arguments, kept = self._restore_arguments(mapping)
        self._call("restore", self._driver.cuCheckpointProcessRestore, pid, arguments)
        del kept

    def unlock(self, pid: int) -> None:
        """The process is RUNNING."""
        self._call("unlock", self._driver.cuCheckpointProcessUnlock, pid, None)

    def _restore_arguments(self, mapping: Mapping[str, str]) -> tuple[Any, list[Any]]:
        """The arguments, and what must live for as long as they do."""
        if not mapping:
            return None, []
        kept: list[Any] = []

        def uuid(text: str) -> Any:
            kept.append(ctypes.create_string_buffer(_uuid_bytes(text), 16))
            return self._driver.CUuuid(ctypes.addressof(kept[-1]))

        pairs = []
        for old, new in mapping.items():
            pair = self._driver.CUcheckpointGpuPair()
            pair.oldUuid, pair.newUuid = uuid(old), uuid(new)
            pairs.append(pair)
        arguments = self._driver.CUcheckpointRestoreArgs()
        arguments.gpuPairs = pairs
        arguments.gpuPairsCount = len(pairs)
        return arguments, [*kept, *pairs]

    def used(self) -> dict[int, dict[str, int]]:
        """GPU memory in use, as far as NVML tells: by pid, in bytes by the GPU's UUID."""
        return self._nvml.used()


class _Nvml:
    """NVML, where it is: it knows what CUDA does not tell, and is not needed for anything.

    It is NVIDIA's own nvidia-ml-py, which is imported in a tenth of the time of `cuda.bindings.nvml` (0.3 s).
    """

    def __init__(self) -> None:
        """Begin; whoever asks first waits."""
        self._nvml: Any = None
        self._beginning = threading.Thread(target=self._begin, daemon=True)
        self._beginning.start()

    def _begin(self) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception:  # it is not here, not willing, or of another age: some are no Python 3 at all
            return
        self._nvml = pynvml

    def _ask(self, name: str, default: Any, *arguments: Any) -> Any:
        """What a function of NVML says; the default where it cannot. Texts are str, of old versions too."""
        self._beginning.join()
        if self._nvml is None:
            return default
        try:
            said = getattr(self._nvml, f"nvml{name}")(*arguments)
        except Exception:  # not willing, or of another age than the driver: not all of it is an NVMLError
            return default
        return said.decode(errors="replace") if isinstance(said, bytes) else said

    def driver_version(self) -> str:
        """As "580.159.04"; by the kernel's own word where NVML is not here, and empty without either."""
        return str(self._ask("SystemGetDriverVersion", "")) or _version_by_kernel()

    def _handles(self) -> Iterator[tuple[int, Any]]:
        for index in range(int(self._ask("DeviceGetCount", 0))):
            if handle := self._ask("DeviceGetHandleByIndex", None, index):
                yield index, handle

    def gpus(self) -> Iterator[Gpu]:
        """The GPUs, in the order of their PCI addresses."""
        for index, handle in self._handles():
            uuid = self._ask("DeviceGetUUID", "", handle)
            memory = self._ask("DeviceGetMemoryInfo", None, handle)
            if not uuid or memory is None:
                return
            yield Gpu(
                uuid=str(uuid),
                name=str(self._ask("DeviceGetName", "", handle)),
                index=index,
                minor=int(self._ask("DeviceGetMinorNumber", -1, handle)),
                memory_bytes=int(memory.total),
                compute=".".join(map(str, self._ask("DeviceGetCudaComputeCapability", (), handle))),
                persistence=bool(self._ask("DeviceGetPersistenceMode", 0, handle)),
                mig=bool(self._ask("DeviceGetMigMode", (0, 0), handle)[0]),
                free_bytes=int(memory.free),
            )

    def used(self) -> dict[int, dict[str, int]]:
        """See Driver."""
        found: dict[int, dict[str, int]] = {}
        for _, handle in self._handles():
            uuid = str(self._ask("DeviceGetUUID", "", handle))
            for one in self._ask("DeviceGetComputeRunningProcesses", (), handle):
                if size := one.usedGpuMemory or 0:  # None where it does not know (some containers)
                    used = found.setdefault(int(one.pid), {})
                    used[uuid] = used.get(uuid, 0) + int(size)
        return found


def _version_by_kernel() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", file.read())
    except OSError:
        return ""
    return found[1] if found else ""


def _uuid_text(raw: bytes) -> str:
    text = raw.hex()
    return "GPU-" + "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _uuid_bytes(text: str) -> bytes:
    """The bytes of a UUID as NVIDIA's tools print it. Raises CudaRefused for what is none, as a MIG's."""
    try:
        raw = bytes.fromhex(text.removeprefix("GPU-").replace("-", ""))
    except ValueError:
        raw = b""
    if len(raw) != 16:
        raise CudaRefused("restore", "CUDA_ERROR_INVALID_DEVICE")
    return raw
