"""What the two sides of the hand say to each other: one JSON object for each datagram.

    {"id", "op", "processes": [[pid, start_time, move_s], …], "limit_s", "map", "feeder"}     asked
    {"id", …}                                                              answered, in any order

`move_s` is how long the driver may take to move that process's GPU memory, which counts from the end of the
process `feeder` (0: none) that still brings it. An answer holds `states` (by pid) and `failures` ({pid, call,
result}), or `lacks` and `hint`, or `bug`; beside a failure, `others` are those that another has put to sleep,
who are not ours to wake.
"""

from __future__ import annotations

from enum import StrEnum

MESSAGE_LIMIT = 1 << 20
COMM = "crcli-gpu"
"""What the hand is called in ps, and found by."""

LOCK_LIMIT_S = 10.0
"""How long a process may take to come to rest on its GPUs (seconds)."""

LINK_BYTES_PER_S = 25e9
"""What the link of one GPU to its host's memory carries at best: PCIe 4 with 16 lanes."""

PATIENCE_S = 600.0
"""How long the hand tries to wake a process that the driver does not let it wake (seconds)."""

_SLOWEST_BYTES_PER_S, _ALWAYS_S = 200e6, 30.0


class Purpose(StrEnum):
    """What a hand sets right by itself when nobody is left to tell it.

    After a DUMP the processes get their GPU memory back and run on. After a RESTORE that was not finished
    they are checkpointed again, so that nothing holds a GPU, and killed.
    """

    DUMP = "dump"
    RESTORE = "restore"


def move_limit_s(size: int) -> float:
    """How long it may take to move so many bytes between a GPU and the host (seconds)."""
    return _ALWAYS_S + size / _SLOWEST_BYTES_PER_S
