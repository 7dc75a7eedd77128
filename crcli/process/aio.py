"""Reads and writes that programs have begun with io_submit(2) (libaio), and that end without them.

The kernel goes on with these while a process stands still: it writes what it reads into the memory, and notes
each end in a ring that the process has mapped. CRIU saves the ring, but not what has not ended: restored, a
program would wait for it for ever. How many are under way the kernel does not tell; that some end is to be
seen by the ring.
"""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from crcli.process.maps import areas

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NAME = "/[aio]"
"""What a ring is called where it is mapped."""

_TAIL = struct.Struct("=12xI")
"""struct aio_ring of the kernel, as far as to the place of the next end that it notes."""

QUIET_S, LONG_QUIET_S = 0.02, 0.3
"""When nothing has ended for so long (seconds), nothing is under way: a disk answers sooner, and one that is
kept busy, or is far away, sooner than the second."""

_STEP_S = 0.001


class Rings:
    """The rings of processes that stand still."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._places = [place for pid in pids for place in _places(pid)]
        self._seen = self._tails()

    def settle(self, limit_s: float, quiet_s: float = QUIET_S) -> bool:
        """Wait until nothing has ended for `quiet_s`, but not beyond `limit_s`; say whether that came."""
        end = time.monotonic() + limit_s
        since = time.monotonic()
        while self._places and time.monotonic() < since + quiet_s:
            time.sleep(_STEP_S)
            if self.have_moved():
                self._seen = self._tails()
                since = time.monotonic()
            if since > end:
                return False
        return True

    def have_moved(self) -> bool:
        """Whether something has ended since it was waited for."""
        return bool(self._places) and self._tails() != self._seen

    def _tails(self) -> list[int]:
        return [_tail(*place) for place in self._places]


def _places(pid: int) -> Iterator[tuple[int, int]]:
    try:
        for area in areas(pid, holding=NAME.encode()):
            if area.name.startswith(NAME.encode()):
                yield pid, area.start
    except OSError:  # it was killed
        return


def _tail(pid: int, address: int) -> int:
    """How many ends were noted in a ring, as far as it has room; -1 where it is gone."""
    try:
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        (tail,) = _TAIL.unpack(os.pread(memory, _TAIL.size, address))
    except (OSError, struct.error):
        return -1
    finally:
        os.close(memory)
    return int(tail)
