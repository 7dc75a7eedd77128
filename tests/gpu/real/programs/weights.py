"""An inference worker's memory: weights from a file of safetensors, and an empty cache for keys and values.

A step's value is the count. All memory is hashed when asked for a digest.
"""

from __future__ import annotations

import json
import mmap
import sys

from memory import Memory, TorchMemory, digest, made
from progress import Progress, arguments

_BLOCK = 128 << 20
"""The cache is allocated in blocks of this size (bytes)."""


def main() -> None:
    """Load the weights, allocate the cache, and count until killed."""
    parser = arguments(__doc__ or "", steps=1 << 30, pace=0.02)
    parser.add_argument("--with", dest="library", required=True, help="torch, driver or host")
    parser.add_argument("--file", required=True)
    parser.add_argument("--cache", type=int, default=0, help="bytes of the empty cache")
    options = parser.parse_args()
    memory = made(options.library, options.device)
    _load(options.file, memory)
    for at in range(0, options.cache, _BLOCK):
        memory.zeros(min(_BLOCK, options.cache - at))
    progress = Progress(options, lambda: digest(memory, 1))
    progress.ready(memory.used())
    for _ in range(options.steps):
        memory.increment()
        progress.step(str(memory.count()))
    progress.done()


def _load(path: str, memory: Memory) -> None:
    """Its tensors are in GPU memory, by safetensors' own loader where that is PyTorch's."""
    if isinstance(memory, TorchMemory):
        from safetensors import safe_open

        with safe_open(path, "pt", device=str(memory.device)) as file:
            memory.blocks += [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        end_of_header = 8 + int.from_bytes(data[:8], "little")
        table = json.loads(data[8:end_of_header])
        for one in table.values():
            start, end = (end_of_header + at for at in one["data_offsets"])
            memory.put(data[start:end])


if __name__ == "__main__":
    sys.exit(main())
