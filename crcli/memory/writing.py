"""Bytes written whole, to a file or to the memory of a process."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.memory.buffers import address_of
from crcli.memory.scattered import copy_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.memory.scattered import Part


def write_all(fd: int, piece: memoryview, at: int) -> None:
    """pwrite(2) until all of `piece` is written; ProcessLookupError when it is a process's that has ended."""
    while piece:
        done = os.pwrite(fd, piece, at)
        if not done:  # the kernel says no more of it
            raise ProcessLookupError(errno.ESRCH, "the process ended whose memory was to be written")
        piece = piece[done:]
        at += done


def write_scattered(pid: int, memory: int, raw: memoryview, parts: Sequence[Part]) -> None:
    """Write parts of `raw` into a process that stands still: where each begins, where it goes, how large it
    is (bytes). Hundreds take one call.

    What the program has made read-only, and all where the host allows no such call, goes through its
    `/proc/PID/mem`, the descriptor `memory`. ProcessLookupError when it has ended.
    """
    with address_of(raw) as address:
        copy_parts(
            parts,
            lambda some: kernel.write_scattered(pid, address, some),
            lambda part: write_all(memory, raw[part[0] : part[0] + part[2]], part[1]),
        )
