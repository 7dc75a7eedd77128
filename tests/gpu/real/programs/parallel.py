"""DistributedDataParallel over NCCL, alone in its group. A step's value: the bits of its loss."""

from __future__ import annotations

import hashlib
import struct
import sys

import torch
import torch.distributed as dist
from progress import Progress, arguments
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Train for as many steps as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    torch.manual_seed(12)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    model = DistributedDataParallel(nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    drawn = torch.Generator("cuda").manual_seed(13)

    def digest() -> str:
        found = hashlib.blake2b(digest_size=16)
        for parameter in model.parameters():
            found.update(parameter.detach().cpu().numpy().tobytes())
        return found.hexdigest()

    def step() -> float:
        inputs = torch.randn(64, 256, device="cuda", generator=drawn)
        loss = nn.functional.mse_loss(model(inputs), inputs.roll(1, -1))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        dist.all_reduce(loss.detach())
        return float(loss.item())

    progress = Progress(options, digest)
    step()
    progress.ready(torch.cuda.memory_allocated())
    for _ in range(options.steps):
        progress.step(struct.pack("<f", step()).hex())
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
