"""What CUDA's driver means when it refuses a call of cuCheckpoint, and what can be done about it.

The results are those that its reference documents for each call, and those that were seen beside them. A
result that stands nowhere gets the sentence of `OTHERS`.
"""

from __future__ import annotations

from typing import NamedTuple


class Meaning(NamedTuple):
    """`text` goes on after the name of a process ("python (4711) …"); `remedy` is a sentence of its own."""

    text: str
    remedy: str


_DRIVER = "`crcli doctor` says what this host's driver can do"
_AGAIN = "try again; when it stays so, `nvidia-smi` and the kernel's log say how the GPU is"

BY_CALL: dict[tuple[str, str], Meaning] = {
    ("lock", "CUDA_ERROR_NOT_READY"): Meaning(
        "did not come to rest in time: work on the GPU was still under way",
        "try again when its kernels are shorter; who waits for whom on a GPU (NCCL) must be in one tree",
    ),
    ("lock", "CUDA_ERROR_ILLEGAL_STATE"): Meaning(
        "could not be locked: another has locked or checkpointed it",
        "`crcli doctor` says what state it is in; `crcli doctor --fix` wakes what nobody works on",
    ),
    ("checkpoint", "CUDA_ERROR_ILLEGAL_STATE"): Meaning(
        "could not be checkpointed: it was not locked any more",
        "keep cuda-checkpoint and others away from it",
    ),
    ("checkpoint", "CUDA_ERROR_OUT_OF_MEMORY"): Meaning(
        "could not be checkpointed: the host has no memory for what lies on the GPU",
        "free host memory, or raise the limit of its cgroup: it takes as much as it uses of the GPU",
    ),
    ("checkpoint", "CUDA_ERROR_NOT_SUPPORTED"): Meaning(
        "uses something of CUDA that the driver cannot checkpoint",
        "managed memory (UVM), MPS, MIG, and CUDA IPC before driver 610 are known to be so",
    ),
    ("restore", "CUDA_ERROR_ILLEGAL_STATE"): Meaning(
        "could not be given its GPU memory: it is not checkpointed",
        "`crcli doctor` says what state it is in",
    ),
    ("restore", "CUDA_ERROR_OUT_OF_MEMORY"): Meaning(
        "could not be given its GPU memory: the GPU has too little free",
        "end what else uses that GPU, or map to another with --gpu-map",
    ),
    ("restore", "CUDA_ERROR_INVALID_VALUE"): Meaning(
        "could not be given its GPU memory: the driver takes no such mapping, or knows no such process",
        "the mapping must hold every GPU of the image, and each must go to one of the same chip",
    ),
    ("restore", "CUDA_ERROR_INVALID_DEVICE"): Meaning(
        "could not be given its GPU memory: no such GPU is here", "map it to one that is, with --gpu-map"
    ),
    ("unlock", "CUDA_ERROR_ILLEGAL_STATE"): Meaning(
        "could not be unlocked: it was not locked", "`crcli doctor` says what state it is in"
    ),
}
"""By call and result: where the call says more than the result alone."""

BY_RESULT: dict[str, Meaning] = {
    "CUDA_ERROR_INVALID_VALUE": Meaning("is no process that CUDA's driver knows (any more)", _AGAIN),
    "CUDA_ERROR_NOT_INITIALIZED": Meaning(
        "has not initialised CUDA, or the driver is not loaded",
        f"persistence mode keeps the driver loaded; {_DRIVER}",
    ),
    "CUDA_ERROR_DEINITIALIZED": Meaning("is about to end: CUDA is shut down in it", "nothing"),
    "CUDA_ERROR_ILLEGAL_STATE": Meaning("is not in the state that the call needs", _AGAIN),
    "CUDA_ERROR_NOT_SUPPORTED": Meaning("cannot be checkpointed by this driver", _DRIVER),
    "CUDA_ERROR_NOT_FOUND": Meaning("cannot be checkpointed by this driver", _DRIVER),
    "CUDA_ERROR_NOT_READY": Meaning("was not ready", _AGAIN),
    "CUDA_ERROR_INVALID_CONTEXT": Meaning(
        "has no valid context on a GPU that the call needs", "see the program's own log for CUDA errors"
    ),
    "CUDA_ERROR_OUT_OF_MEMORY": Meaning("found too little memory", "free memory on the host and on the GPU"),
    "CUDA_ERROR_NOT_PERMITTED": Meaning(
        "may not be touched by us", "run crcli as root, in the same container as the process"
    ),
    "CUDA_ERROR_OPERATING_SYSTEM": Meaning("was refused by the kernel", "the kernel's log says more"),
    "CUDA_ERROR_NO_DEVICE": Meaning("finds no GPU here", _DRIVER),
    "CUDA_ERROR_DEVICE_UNAVAILABLE": Meaning(
        "finds its GPU in use by another", "the GPU's compute mode may be exclusive"
    ),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": Meaning(
        "has libraries of another version than the kernel's driver", "restart after an update of the driver"
    ),
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": Meaning("was recording a CUDA graph", "try again"),
    "CUDA_ERROR_TIMEOUT": Meaning("took too long", _AGAIN),
    "CUDA_ERROR_UNKNOWN": Meaning("failed within CUDA's driver", _AGAIN),
}

OURS: dict[str, Meaning] = {
    "TOOK_TOO_LONG": Meaning("has not answered CUDA's driver in time", _AGAIN),
    "FAILED": Meaning(
        "is lost: CUDA's driver calls its state FAILED, out of which nothing leads",
        "end it and start it again, or restore its last image",
    ),
    "NOT_CHECKPOINTED": Meaning(
        "is not checkpointed, as it was in the image", "use the image of another dump"
    ),
    "NOT_RUNNING": Meaning("does not run on its GPUs, though CUDA's driver refused nothing", _AGAIN),
    "DEVICE_LEFT": Meaning(
        "still has a device of NVIDIA's open (see /proc/PID/fd) though it was taken off its GPUs: NVML, or "
        "whatever else opened it, keeps it",
        "let the program call nvmlShutdown, or close what it has opened by itself, before the dump",
    ),
    "GONE": Meaning("has ended", ""),
    "HAND_LOST": Meaning(
        "is in a state that could not be told: the process that speaks with CUDA's driver was killed", _AGAIN
    ),
}
"""What is not said by the driver, in the words of the hand."""

OTHERS = Meaning("was refused by CUDA's driver", _AGAIN)


def meaning_of(call: str, result: str) -> Meaning:
    """What a result of this call (lock, checkpoint, restore, unlock, state) means, and its remedy."""
    return BY_CALL.get((call, result)) or BY_RESULT.get(result) or OURS.get(result) or OTHERS
