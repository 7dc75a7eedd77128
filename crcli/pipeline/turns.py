"""One tree frozen at a time, among the dumps of one call.

A freeze is work for CRIU and for crcli on every core that they get. Two trees frozen together stand still
for twice as long; one after the other each only waits, running, for its turn.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

PATIENCE_S = 2.0
"""How long a dump waits for its turn (seconds). After that it goes ahead: who freezes a large tree, or
hangs, holds up nobody else."""

_STEP_S = 0.001


class Turn:
    """A turn that processes forked from one take by and by; the kernel gives back that of one that dies."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("crcli-turn")
        self._ours = False

    def take(self) -> None:
        """Return when it is our turn, or when PATIENCE_S have passed."""
        end = time.monotonic() + PATIENCE_S
        while not self._ours and time.monotonic() < end:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._ours = True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return
                time.sleep(_STEP_S)

    def give(self) -> None:
        """Let the next one have it; nothing, where it is not ours."""
        if self._ours:
            self._ours = False
            fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Free it."""
        os.close(self._fd)
