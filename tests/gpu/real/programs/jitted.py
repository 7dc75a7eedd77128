"""A kernel of Triton's own, built at run time, on one array. A step's value: its sum."""

from __future__ import annotations

import sys

import torch
import triton
import triton.language as tl
from progress import Progress, arguments

_SIZE, _BLOCK = 1 << 20, 1024


@triton.jit
def _mix(pointer, size, number, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    values = tl.load(pointer + offsets, mask=inside)
    tl.store(pointer + offsets, (values * 1103515245 + number) & 0x7FFFFFFF, mask=inside)


def main() -> None:
    """Run for as many steps as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    array = torch.arange(_SIZE, dtype=torch.int64, device="cuda")

    def step(number: int) -> str:
        _mix[(_SIZE // _BLOCK,)](array, _SIZE, number, BLOCK=_BLOCK)
        return str(int(array.sum().item()))

    progress = Progress(options, lambda: str(int(array.sum().item())))
    step(1)
    progress.ready(torch.cuda.memory_allocated())
    for number in range(options.steps):
        progress.step(step(number))
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
