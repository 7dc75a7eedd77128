"""A training loop. A step's value: the bits of its loss, which an uninterrupted run gives too.

Batches are drawn on the GPU by a seeded generator, dropout by PyTorch's own: both states must come back.
"""

from __future__ import annotations

import hashlib
import struct
import sys

import torch
from progress import Progress, arguments
from torch import nn

_BATCH, _IN, _WIDTH, _OUT = 128, 512, 1024, 128


def main() -> None:
    """Train for as many steps as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(3)
    device = torch.device(options.device)
    model = nn.Sequential(
        nn.Linear(_IN, _WIDTH), nn.GELU(), nn.Dropout(0.1),
        nn.Linear(_WIDTH, _WIDTH), nn.GELU(), nn.Dropout(0.1),
        nn.Linear(_WIDTH, _OUT),
    ).to(device)  # fmt: skip
    teacher = torch.randn(_IN, _OUT).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.Generator(device).manual_seed(4)

    def digest() -> str:
        found = hashlib.blake2b(digest_size=16)
        for tensor in (*model.parameters(), *_tensors_of(optimizer)):
            found.update(tensor.detach().cpu().numpy().tobytes())
        return found.hexdigest()

    def step() -> float:
        inputs = torch.randn(_BATCH, _IN, device=device, generator=batches)
        loss = nn.functional.mse_loss(model(inputs), inputs @ teacher)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.item())

    progress = Progress(options, digest)
    progress.ready(torch.cuda.memory_allocated() if options.device == "cuda" else 0)
    for _ in range(options.steps):
        progress.step(struct.pack("<f", step()).hex())
    progress.done()


def _tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]


if __name__ == "__main__":
    sys.exit(main())
