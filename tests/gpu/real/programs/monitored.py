"""A counter in GPU memory that asks NVML at each step, as loggers do. A step's value: all it was told."""

from __future__ import annotations

import sys

import pynvml
import torch
from progress import Progress, arguments


def main() -> None:
    """Count for as many steps as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    count = torch.zeros(1, dtype=torch.int64, device="cuda")
    pynvml.nvmlInit()
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)

    def told() -> str:
        total = pynvml.nvmlDeviceGetMemoryInfo(gpu).total
        pynvml.nvmlDeviceGetUtilizationRates(gpu)
        return f"{pynvml.nvmlDeviceGetUUID(gpu)}:{total}"

    progress = Progress(options, lambda: str(int(count.item())))
    progress.ready(torch.cuda.memory_allocated())
    for _ in range(options.steps):
        count += 1
        progress.step(f"{int(count.item())}:{told()}")
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
