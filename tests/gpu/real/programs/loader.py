"""A training loop whose batches are loaded by worker processes. A step's value: the bits of its loss.

The workers are forked when the process has used CUDA already, as those of most training jobs are: they
inherit its GPU devices, which they have no use for, and read examples in pinned memory, which is a mapping of
such a device. A thread of PyTorch's puts batches into pinned memory.
"""

from __future__ import annotations

import hashlib
import struct
import sys

import torch
from progress import Progress, arguments
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

_BATCH, _IN, _WIDTH, _OUT = 64, 256, 512, 64
_WORKERS = 2


class Examples(Dataset[Tensor]):
    """As many examples as anybody asks for, each the same every time: a few known ones, and noise."""

    def __init__(self, pinned: bool) -> None:
        known = torch.randn(1024, _IN, generator=torch.Generator().manual_seed(6))
        self._known = known.pin_memory() if pinned else known

    def __len__(self) -> int:
        return 1 << 24

    def __getitem__(self, index: int) -> Tensor:
        noise = torch.randn(_IN, generator=torch.Generator().manual_seed(index))
        return self._known[index % len(self._known)] + noise


def main() -> None:
    """Train for as many steps as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(5)
    device = torch.device(options.device)
    model = nn.Sequential(nn.Linear(_IN, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, _OUT)).to(device)
    teacher = torch.randn(_IN, _OUT, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    has_gpu = options.device == "cuda"
    loader = DataLoader(
        Examples(has_gpu),
        batch_size=_BATCH,
        num_workers=_WORKERS,
        pin_memory=has_gpu,
        multiprocessing_context="fork",
    )

    def digest() -> str:
        found = hashlib.blake2b(digest_size=16)
        for parameter in model.parameters():
            found.update(parameter.detach().cpu().numpy().tobytes())
        return found.hexdigest()

    def step(batch: Tensor) -> float:
        inputs = batch.to(device, non_blocking=True)
        loss = nn.functional.mse_loss(model(inputs), inputs @ teacher)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    progress = Progress(options, digest)
    batches = iter(loader)
    first = next(batches)  # the workers are there
    progress.ready(torch.cuda.memory_allocated() if has_gpu else 0)
    progress.step(struct.pack("<f", step(first)).hex())
    for _ in range(options.steps - 1):
        progress.step(struct.pack("<f", step(next(batches))).hex())
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
