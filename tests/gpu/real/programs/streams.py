"""Copies and products on streams of their own, through pinned memory. A step's value: a digest.

Something is always under way: a step's data go to the GPU, are worked on there, and come back, ordered by
events alone; the host reads what came back two steps ago.
"""

from __future__ import annotations

import hashlib
import sys
from collections import deque

import torch
from progress import Progress, arguments

_SIDE, _ON_THE_WAY = 1024, 2


def main() -> None:
    """Run for as many steps as asked."""
    options = arguments(__doc__ or "", steps=400, pace=0.0).parse_args()
    torch.manual_seed(10)
    there, work, back = (torch.cuda.Stream() for _ in range(3))
    factor = (torch.randn(_SIDE, _SIDE) / _SIDE**0.5).cuda()
    given = [torch.randn(_SIDE, _SIDE).pin_memory() for _ in range(8)]
    result = torch.zeros(_SIDE, _SIDE, device="cuda")
    taken = [torch.empty(_SIDE, _SIDE).pin_memory() for _ in range(_ON_THE_WAY + 1)]
    torch.cuda.synchronize()

    def digest() -> str:
        torch.cuda.synchronize()
        return hashlib.blake2b(result.cpu().numpy().tobytes(), digest_size=16).hexdigest()

    progress = Progress(options, digest)
    progress.ready(torch.cuda.memory_allocated())
    pending: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
    for number in range(options.steps + _ON_THE_WAY):
        with torch.cuda.stream(there):
            arrived = given[number % len(given)].to("cuda", non_blocking=True)
        work.wait_stream(there)
        arrived.record_stream(work)
        with torch.cuda.stream(work):
            for _ in range(20):
                result = torch.tanh(result @ factor + arrived)
        back.wait_stream(work)
        result.record_stream(back)
        target = taken[number % len(taken)]
        with torch.cuda.stream(back):
            target.copy_(result, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        pending.append((done, target))
        if len(pending) > _ON_THE_WAY:
            event, values = pending.popleft()
            event.synchronize()
            progress.step(hashlib.blake2b(values.numpy().tobytes(), digest_size=16).hexdigest())
    progress.done()


if __name__ == "__main__":
    sys.exit(main())
