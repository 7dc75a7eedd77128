"""What the dumps of one call share: whose turn it is to be frozen, and the way to the store.

One tree is frozen at a time. A freeze is work for CRIU and for crcli on every core that they get: two trees
frozen together stand still for twice as long, one after the other each only waits, running, for its turn.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from typing import TYPE_CHECKING

from crcli.image.cached import open_cached
from crcli.pipeline.interrupts import Interrupted

if TYPE_CHECKING:
    from crcli.gpu.hand import Hand
    from crcli.pipeline.stages import DumpOptions
    from crcli.store.base import Store

PATIENCE_S = 2.0
"""How long a dump waits for its turn (seconds). After that it goes ahead: who freezes a large tree, or
hangs, holds up nobody else."""

_STEP_S = 0.001


class Turn:
    """A turn that processes forked from one take by and by; the kernel gives back that of one that dies."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("crcli-turn")

    def take(self) -> None:
        """Return when it is our turn, or when PATIENCE_S have passed."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return
                time.sleep(_STEP_S)

    def give(self) -> None:
        """Let the next one have it; nothing, where it is not ours."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Free it."""
        os.close(self._fd)


class Shared:
    """What one process keeps from one dump to the next, and the turn that it shares with others.

    For a dump by itself this holds nothing, and its turn comes at once. `at_once` dumps share this host, and
    are done for the process `caller`. `keeps_hand` says whether another dump of a tree with GPUs may follow:
    the process that speaks with CUDA's driver, which takes seconds to start, is kept for that one.
    """

    def __init__(
        self, turn: Turn | None = None, at_once: int = 1, caller: int = 0, keeps_hand: bool = False
    ) -> None:
        self.turn = turn
        self.at_once = at_once
        self.caller = caller
        self._store: Store | None = None
        self._keeps_hand = keeps_hand
        self._hand: Hand | None = None

    def take_hand(self) -> Hand | None:
        """The hand that was kept, if there is one."""
        hand, self._hand = self._hand, None
        return hand

    def keep_hand(self, hand: Hand) -> None:
        """Keep a hand that has nothing to do for the next dump, or end it."""
        if self._keeps_hand:
            self._hand = hand
        else:
            hand.close()

    def open_store(self, options: DumpOptions) -> Store:
        """Open the store that the options name, which are the same each time; whoever opens it closes it."""
        if self._store is None:
            self._store = open_cached(options.store, endpoint_url=options.endpoint_url)
        else:
            self._store = self._store.reopened()
        return self._store

    def forget_store(self) -> None:
        """Have the next dump open the store anew."""
        self._store = None

    def see_caller(self) -> None:
        """Raise Interrupted when nobody is left who wants the dump: the signal that tells so may have come
        before the dump listened."""
        if self.caller and os.getppid() != self.caller:
            raise Interrupted(signal.SIGTERM)

    def take_turn(self) -> None:
        """Return when this dump may freeze its tree."""
        if self.turn is not None:
            self.turn.take()

    def end_turn(self) -> None:
        """Let another freeze its tree; safe to call again."""
        if self.turn is not None:
            self.turn.give()
