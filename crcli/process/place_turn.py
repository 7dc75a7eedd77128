"""Whose turn it is, of all restores on a host, to take places that only one tree can have.

Whether a port, a name or a file is free is seen before CRIU takes it. A second restore that looks in between
sees it free as well: two trees listen on one port then (CRIU lets them), or both restores fail.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING

from blake3 import blake3

from crcli.process.host_turn import open_ours

if TYPE_CHECKING:
    from collections.abc import Iterable

LIMIT_S = 30.0
"""How long a turn is waited for (seconds). Then a restore goes on: that ends in an error, not a loss."""

_STEP_S = 0.005

_LOCK = struct.Struct("=hh4xqqi4x")  # struct flock


class PlaceTurn:
    """Our turn at some places (words for them), once `take` has said so, until `end`.

    Each place is a byte of one file of ours, locked in ascending order, so that nobody waits in a circle.
    What we fork has the locks too: should we be killed, our turn ends when whoever clears away after us does.
    """

    def __init__(self, places: Iterable[str]) -> None:
        self._left = sorted({_byte(place) for place in places}, reverse=True)
        self._fd = open_ours("places")

    def take(self, wait_s: float = 0.0) -> bool:
        """Take what others do not have within so long (seconds); whether that is all."""
        end = time.monotonic() + wait_s
        while self._left and self._fd >= 0:
            if self._lock(fcntl.F_WRLCK, self._left[-1], 1):
                self._left.pop()
            elif time.monotonic() < end:
                time.sleep(_STEP_S)
            else:
                return False
        return True

    def end(self) -> None:
        """Let others go on; the second time nothing happens."""
        if self._fd >= 0:
            self._lock(fcntl.F_UNLCK, 0, 0)  # also for what we have forked meanwhile
            os.close(self._fd)
            self._fd = -1

    def _lock(self, kind: int, start: int, length: int) -> bool:
        """Whether the kernel has done so, or never will for anybody."""
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, start, length, 0))
        except (BlockingIOError, PermissionError):
            return False
        except OSError:
            return True
        return True


def _byte(place: str) -> int:
    return int.from_bytes(blake3(os.fsencode(place)).digest(7), "little")
