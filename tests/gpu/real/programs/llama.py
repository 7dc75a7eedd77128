"""A small Llama of transformers that generates tokens, with its own cache. A step's value: the token."""

from __future__ import annotations

import hashlib
import sys

import torch
from progress import Progress, arguments
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

_VOCABULARY = 2048


def main() -> None:
    """Generate as many tokens as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.02).parse_args()
    torch.manual_seed(7)
    device = torch.device(options.device)
    shape = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(shape).to(device, torch.bfloat16).eval()
    cache = DynamicCache(config=shape)
    sampling = torch.Generator(device).manual_seed(8)

    def digest() -> str:
        found = hashlib.blake2b(digest_size=16)
        for parameter in model.parameters():
            found.update(parameter.detach().flatten().view(torch.uint8).cpu().numpy().data)
        return found.hexdigest()

    progress = Progress(options, digest)
    token = torch.tensor([[1]], device=device)
    with torch.inference_mode():
        model(token, use_cache=False)
        progress.ready(torch.cuda.memory_allocated() if options.device == "cuda" else 0)
        for _ in range(options.steps):
            logits = model(token, past_key_values=cache, use_cache=True).logits[:, -1].float()
            token = torch.multinomial(logits.softmax(-1), 1, generator=sampling)
            progress.step(str(int(token.item())))
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
