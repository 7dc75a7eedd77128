"""What is known of a tree's GPU side before anything is touched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crcli.process.evidence import Evidence

DEVICE_PREFIX = "/dev/nvidia"
"""How the device files of NVIDIA's kernel driver begin: nvidia0, nvidiactl, nvidia-uvm, nvidia-caps/…"""

_DRIVER_LIBRARY = "libcuda.so"


def candidates(evidence: Evidence) -> list[int]:
    """Return the pids that may use CUDA, in the tree's order: only those need to be asked about.

    Each has CUDA's driver library mapped, as every process that uses CUDA has in every state, or has one of
    NVIDIA's devices open or mapped. The library alone does not mean that CUDA was ever called.
    """
    found = {file.pid for file in evidence.devices if file.path.startswith(DEVICE_PREFIX)}
    found |= {one.pid for one in evidence.device_mappings if one.path.startswith(DEVICE_PREFIX)}
    found |= {one.pid for one in evidence.mappings if os.path.basename(one.path).startswith(_DRIVER_LIBRARY)}
    return [process.pid for process in evidence.tree.living if process.pid in found]
