"""Counts in GPU memory, random bytes beside the counter. A step's value: the count, and the bytes' digest."""

from __future__ import annotations

import sys

from memory import digest, made, random_bytes
from progress import Progress, arguments


def main() -> None:
    """Count until killed."""
    parser = arguments(__doc__ or "", steps=1 << 30, pace=0.05)
    parser.add_argument("--with", dest="library", required=True, help="torch, cupy, driver or host")
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    memory = made(options.library, options.device)
    memory.put(random_bytes(options.seed, options.mebibytes << 20))
    progress = Progress(options, lambda: digest(memory, 1))
    progress.ready(memory.used())
    for _ in range(options.steps):
        memory.increment()
        progress.step(f"{memory.count()}:{digest(memory, 1)}")
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
