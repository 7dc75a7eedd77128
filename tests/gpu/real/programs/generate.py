"""A small transformer that generates tokens, with a cache in GPU memory. A step's value: the token.

Weights and sampling are seeded, so an uninterrupted run on the same GPU gives the same tokens.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass

import torch
from progress import Progress, arguments
from torch import Tensor
from torch.nn import functional

_VOCABULARY, _WIDTH, _LAYERS, _HEADS, _POSITIONS = 1024, 512, 6, 8, 4096


@dataclass
class Layer:
    """One block: attention over the cache, and a feed-forward part."""

    attention: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor

    @classmethod
    def random(cls, device: torch.device, generator: torch.Generator) -> Layer:
        """A layer with random weights and an empty cache."""

        def weight(*shape: int) -> Tensor:
            drawn = torch.randn(*shape, generator=generator) / shape[0] ** 0.5
            return drawn.to(device, torch.bfloat16)

        def cache() -> Tensor:
            shape = (_HEADS, _POSITIONS, _WIDTH // _HEADS)
            return torch.zeros(shape, dtype=torch.bfloat16, device=device)

        return cls(
            weight(_WIDTH, 3 * _WIDTH), weight(_WIDTH, _WIDTH),
            weight(_WIDTH, 4 * _WIDTH), weight(4 * _WIDTH, _WIDTH),
            cache(), cache(),
        )  # fmt: skip

    def forward(self, state: Tensor, position: int) -> Tensor:
        """The state after this layer; the keys and values of this position are in the cache."""
        query, key, value = (
            part.view(_HEADS, 1, -1) for part in (_normed(state) @ self.attention).chunk(3, dim=-1)
        )
        self.keys[:, position : position + 1] = key
        self.values[:, position : position + 1] = value
        known_keys, known_values = self.keys[:, : position + 1], self.values[:, : position + 1]
        scores = (query @ known_keys.transpose(1, 2)).float() / (_WIDTH // _HEADS) ** 0.5
        seen = scores.softmax(dim=-1).to(torch.bfloat16) @ known_values
        state = state + seen.reshape(1, _WIDTH) @ self.out
        return state + functional.gelu(_normed(state) @ self.up) @ self.down


class Model:
    """The transformer, its cache, and the state of its sampling."""

    def __init__(self, device: torch.device) -> None:
        drawn = torch.Generator().manual_seed(1)
        self.tokens = torch.randn(_VOCABULARY, _WIDTH, generator=drawn).to(device, torch.bfloat16)
        self.positions = torch.randn(_POSITIONS, _WIDTH, generator=drawn).to(device, torch.bfloat16)
        self.layers = [Layer.random(device, drawn) for _ in range(_LAYERS)]
        self.sampling = torch.Generator(device).manual_seed(2)

    def next_token(self, token: int, position: int) -> int:
        """Sample what follows this token, at this position."""
        state = (self.tokens[token] + self.positions[position]).view(1, _WIDTH)
        for layer in self.layers:
            state = layer.forward(state, position)
        chances = (_normed(state) @ self.tokens.T).float().div(_WIDTH**0.5).softmax(dim=-1)
        draw = torch.empty_like(chances).exponential_(1, generator=self.sampling)
        return int((chances / draw).argmax().item())

    def digest(self) -> str:
        """Of weights and cache."""
        found = hashlib.blake2b(digest_size=16)
        for layer in self.layers:
            for tensor in vars(layer).values():
                found.update(tensor.flatten().view(torch.uint8).cpu().numpy().data)
        return found.hexdigest()


def _normed(state: Tensor) -> Tensor:
    return functional.layer_norm(state, (_WIDTH,))


@torch.inference_mode()
def main() -> None:
    """Generate as many tokens as asked, or as there are positions."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    torch.use_deterministic_algorithms(True)
    model = Model(torch.device(options.device))
    progress = Progress(options, model.digest)
    token = model.next_token(0, 0)
    progress.ready(torch.cuda.memory_allocated() if options.device == "cuda" else 0)
    for position in range(1, min(options.steps + 1, _POSITIONS)):
        token = model.next_token(token, position)
        progress.step(str(token))
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
