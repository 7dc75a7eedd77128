"""Bytes written whole, to a file or to the memory of a process."""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.memory.buffers import address_of

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_PARTS = 1024
"""So many parts the kernel takes at once."""


def write_all(fd: int, piece: memoryview, at: int) -> None:
    """pwrite(2) until all of `piece` is written; ProcessLookupError when it is a process's that has ended."""
    while piece:
        done = os.pwrite(fd, piece, at)
        if not done:  # the kernel says no more of it
            raise ProcessLookupError(errno.ESRCH, "the process ended whose memory was to be written")
        piece = piece[done:]
        at += done


def write_scattered(pid: int, memory: int, raw: memoryview, parts: Sequence[tuple[int, int, int]]) -> None:
    """Write parts of `raw` into a process that stands still: where each begins, where it goes, how large it
    is (bytes). Hundreds take one call.

    What the program has made read-only, and all where the host allows no such call, goes through its
    `/proc/PID/mem`, the descriptor `memory`. ProcessLookupError when it has ended.
    """
    with address_of(raw) as address:
        while parts:
            some = parts[:_MOST_PARTS]
            try:
                done = kernel.write_scattered(pid, address, some)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    for begin, at, size in parts:
                        write_all(memory, raw[begin : begin + size], at)
                    return
                done = 0
            whole = bisect_right([*accumulate(size for _, _, size in some)], done)
            if whole < len(some):
                begin, at, size = some[whole]
                write_all(memory, raw[begin : begin + size], at)
                whole += 1
            parts = parts[whole:]
