"""Writes a file of safetensors with random bf16 weights: whole and durable, or not at all."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from memory import random_bytes

_TENSOR = 128 << 20
"""The size of one tensor (bytes); the last may be smaller."""


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--with", dest="library", required=True, help="torch, or anything else: random bytes")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    header, places = _header(options.bytes)
    partial = f"{options.file}.partial"
    with open(partial, "wb") as file, ThreadPoolExecutor(8) as threads:
        file.write(header)
        file.flush()
        written = [
            threads.submit(_write, file.fileno(), data, len(header) + start)
            for (start, _), data in zip(places, _random(places, options.library, options.device), strict=True)
        ]
        for one in written:
            one.result()
        os.fsync(file.fileno())
    os.rename(partial, options.file)


def _header(size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The head of a safetensors file, and where each tensor lies behind it (from, to)."""
    places = [(start, min(start + _TENSOR, size)) for start in range(0, size, _TENSOR)]
    table = {
        f"layers.{number}.weight": {
            "dtype": "BF16",
            "shape": [(end - start) // 2],
            "data_offsets": [start, end],
        }
        for number, (start, end) in enumerate(places)
    }
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


def _random(places: list[tuple[int, int]], library: str, device: str) -> Iterator[Any]:
    """Weights as a trained model has them: bf16, normally distributed. Without PyTorch, random bytes."""
    if library != "torch":
        yield from (random_bytes(start, end - start) for start, end in places)
        return
    import torch

    drawn = torch.Generator(device).manual_seed(5)
    for start, end in places:
        values = torch.randn((end - start) // 2, generator=drawn, device=device, dtype=torch.bfloat16)
        yield values.mul_(0.02).view(torch.uint8).cpu().numpy().data


def _write(fd: int, data: Any, place: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(fd, view, place)
        view, place = view[count:], place + count


if __name__ == "__main__":
    sys.exit(main())
