"""Holds managed memory (UVM) by CUDA's driver API, in blocks of these sizes; counts in the first of them."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from memory import DriverMemory
from progress import Progress, arguments


class ManagedMemory(DriverMemory):
    """Its blocks may be read and written by host and GPU."""

    def _allocate(self, size: int) -> Any:
        attach = self._driver.CUmemAttach_flags.CU_MEM_ATTACH_GLOBAL
        start = self._call("cuMemAllocManaged", size, attach)
        ctypes.memset(int(start), 0, size)
        self._blocks.append((start, size))
        return start


def main() -> None:
    """Count until killed."""
    parser = arguments(__doc__ or "", steps=1 << 30, pace=0.05)
    parser.add_argument("--mebibytes", type=int, nargs="+", default=[64])
    parser.add_argument("--with", dest="library", default="driver", help="driver, the only one")
    options = parser.parse_args()
    memory = ManagedMemory(options.device)
    for size in options.mebibytes:
        memory.zeros(size << 20)
    progress = Progress(options, lambda: "")
    progress.ready(memory.used())
    for _ in range(options.steps):
        memory.increment()
        progress.step(f"{memory.count()}:")
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
