"""Signals as notices: taken in the main thread, told by a thread of the source's own.

A handler runs between any two instructions of the main thread, which may hold any lock. So it only puts the
signal where the source's thread finds it, into a queue that is made for this (SimpleQueue.put is reentrant).
"""

from __future__ import annotations

import signal
import threading
import time
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from crcli.notice.base import Notice, SignalSource, note

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from crcli.findings import Finding
    from crcli.notice.base import Source, Surroundings, Tell

LOOK_S = 0.2
"""How often a source that waits for something else looks whether it is to stop."""

NAMES = {
    f"sig{name}": signal.Signals[f"SIG{name.upper()}"]
    for name in ("term", "usr1", "usr2", "hup", "int", "quit", "pwr", "xcpu")
}
"""What `--notice` may name. Others mean something else to every program, or are ours (SIGALRM, SIGCHLD)."""


class OnSignal:
    """Tells of its signals; the time that is left is the grace time."""

    def __init__(
        self, name: str, signals: Sequence[signal.Signals], surroundings: Surroundings, says: str = ""
    ) -> None:
        self.name = name
        self.signals = tuple(signals)
        self._surroundings = surroundings
        self._says = says
        self._arrived: SimpleQueue[tuple[int, float]] = SimpleQueue()

    def caught(self, number: int, at: float) -> None:
        """Note a signal, in its handler."""
        self._arrived.put((number, at))

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        """Tell of each signal as it comes."""
        while not stopped.is_set():
            try:
                number, at = self._arrived.get(timeout=LOOK_S)
            except Empty:
                continue
            tell(self._notice(signal.Signals(number).name, at))

    def _notice(self, signal_name: str, at: float) -> Notice:
        says = f"{self._says} ({signal_name})" if self._says else signal_name
        return Notice(self.name, says, deadline=self._surroundings.deadline(at))


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The source of `--notice sigterm` and the like."""
    return [OnSignal(name, [NAMES[name]], surroundings)]


@contextmanager
def taken(
    sources: Sequence[Source], report: Callable[[Finding], None]
) -> Iterator[frozenset[signal.Signals]]:
    """Within the block the sources are told of their signals, which are unblocked; yields them.

    A signal that two sources want is told to the first. After the block handlers and mask are as before,
    but for handlers that somebody else has put in the place of ours meanwhile.
    """
    takers: dict[signal.Signals, SignalSource] = {}
    for source in sources:
        if isinstance(source, SignalSource):
            for number in source.signals:
                takers.setdefault(number, source)
    if threading.current_thread() is not threading.main_thread():
        for name in {taker.name for taker in takers.values()}:
            what = "cannot take signals: only the main thread can"
            report(note("notice-failed", name, what, "goes on without it"))
        yield frozenset()
        return

    def handle(number: int, frame: FrameType | None) -> None:
        takers[signal.Signals(number)].caught(number, time.monotonic())

    before = {number: signal.signal(number, handle) for number in takers}
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, takers)
    try:
        yield frozenset(takers)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)
