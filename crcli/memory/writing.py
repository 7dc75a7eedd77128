"""Bytes written whole, to a file or to the memory of a process."""

from __future__ import annotations

import errno
import os


def write_all(fd: int, piece: memoryview, at: int) -> None:
    """pwrite(2) until all of `piece` is written; ProcessLookupError when it is a process's that has ended."""
    while piece:
        done = os.pwrite(fd, piece, at)
        if not done:  # the kernel says no more of it
            raise ProcessLookupError(errno.ESRCH, "the process ended whose memory was to be written")
        piece = piece[done:]
        at += done
