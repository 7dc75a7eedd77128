"""A network compiled by torch.compile, replayed as a CUDA graph. A step's value: a digest of what it gave.

Each step goes in with what the last one gave. Triton's kernels are built by worker processes of PyTorch's.
"""

from __future__ import annotations

import hashlib
import sys

import torch
from progress import Progress, arguments
from torch import Tensor, nn

_BATCH, _WIDTH = 64, 512


class Block(nn.Module):
    """A feed-forward part with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, state: Tensor) -> Tensor:
        """The state after this part."""
        return state + self.down(nn.functional.gelu(self.up(self.norm(state))))


def main() -> None:
    """Run for as many steps as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    torch.manual_seed(6)
    device = torch.device(options.device)
    network = nn.Sequential(*(Block() for _ in range(4)), nn.LayerNorm(_WIDTH)).to(device).eval()
    mode = "reduce-overhead" if options.device == "cuda" else "default"
    compiled = torch.compile(network, mode=mode)
    state = torch.randn(_BATCH, _WIDTH, device=device)

    def digest() -> str:
        return hashlib.blake2b(state.cpu().numpy().tobytes(), digest_size=16).hexdigest()

    progress = Progress(options, digest)
    with torch.inference_mode():
        for _ in range(3):  # compiled, warmed up, recorded
            compiled(state)
        progress.ready(torch.cuda.memory_allocated() if options.device == "cuda" else 0)
        for _ in range(options.steps):
            state = compiled(state).clone()
            progress.step(digest())
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
