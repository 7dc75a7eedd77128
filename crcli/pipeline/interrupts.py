"""Ctrl-C, SIGTERM and SIGHUP as an exception that the stories can undo their work upon."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


class Interrupted(BaseException):
    """A signal asked crcli to end. Raised once: later signals do not disturb the undoing."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class Interrupts:
    """Says whether a signal may still interrupt."""

    def __init__(self) -> None:
        self._raised = False

    def past_return(self) -> None:
        """From here on the work is finished whatever comes: signals are ignored."""
        self._raised = True

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if not self._raised:
            self._raised = True
            raise Interrupted(number)


@contextmanager
def interruptible() -> Iterator[Interrupts]:
    """Within the block the first of the signals raises Interrupted; the old handlers come back after it."""
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupts.handle) for number in numbers}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
