"""A training loop of JAX, its memory taken in advance as JAX does. A step's value: the bits of its loss."""

from __future__ import annotations

import hashlib
import os
import struct
import sys

from progress import Progress, arguments

_BATCH, _IN, _WIDTH = 128, 256, 512
_PART_OF_THE_GPU = "0.05"  # a GPU's usual 0.75 would only make it slower


def main() -> None:
    """Train for as many steps as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _PART_OF_THE_GPU)
    os.environ["JAX_PLATFORMS"] = options.device
    os.environ["XLA_FLAGS"] = "--xla_gpu_deterministic_ops=true"
    import jax
    import jax.numpy as np
    import numpy

    def loss_of(weights: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(inputs @ weights["up"])
        return np.mean((hidden @ weights["down"] - np.roll(inputs, 1, axis=-1)) ** 2)

    @jax.jit
    def step(
        weights: dict[str, jax.Array], key: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
        key, drawn = jax.random.split(key)
        loss, slopes = jax.value_and_grad(loss_of)(weights, jax.random.normal(drawn, (_BATCH, _IN)))
        return {name: weights[name] - 0.05 * slopes[name] for name in weights}, key, loss

    up, down, key = jax.random.split(jax.random.key(9), 3)
    weights = {
        "up": jax.random.normal(up, (_IN, _WIDTH)) / _IN**0.5,
        "down": jax.random.normal(down, (_WIDTH, _IN)) / _WIDTH**0.5,
    }

    def digest() -> str:
        found = hashlib.blake2b(digest_size=16)
        for name in sorted(weights):
            found.update(numpy.asarray(weights[name]).tobytes())
        return found.hexdigest()

    progress = Progress(options, digest)
    step(weights, key)[2].block_until_ready()
    progress.ready(0)
    for _ in range(options.steps):
        weights, key, loss = step(weights, key)
        progress.step(struct.pack("<f", float(loss)).hex())
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
