"""Ctrl-C, SIGTERM, SIGHUP and a deadline as an exception that the stories can undo their work upon."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.wakeups import heard_at_once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


class Interrupted(BaseException):
    """A signal, or the deadline, ended the work. Raised once: later ones do not disturb the undoing."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__("stopped at its deadline" if number == signal.SIGALRM else f"interrupted by {name}")
        self.number = number


class Interrupts:
    """Says whether a signal may still interrupt."""

    def __init__(self, later: Callable[[int, FrameType | None], None] | None) -> None:
        self._raised = False
        self._past_return = False
        self._later = later
        self._instead: BaseException | None = None
        self._hurry: Callable[[], None] | None = None

    @property
    def are_over(self) -> bool:
        """Whether nothing can interrupt any more."""
        return self._raised or self._past_return

    def past_return(self, hurry: Callable[[], None] | None = None) -> None:
        """From here on the work is finished, or undone, whatever comes: signals are ignored, or `later`'s.

        They are told to `hurry` as well, which runs in a thread of its own.
        """
        self._hurry = hurry
        self._past_return = True

    def abort(self, error: BaseException) -> None:
        """From another thread: have the main thread raise `error`, as a signal would, if it still can."""
        self._instead = error
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._past_return:
            hurry, self._hurry = self._hurry, None
            if hurry is not None:  # not in the middle of whatever the main thread does, and holds locks for
                threading.Thread(target=hurry, name="hurry", daemon=True).start()
            if self._later is not None and self._instead is None:
                self._later(number, frame)
        elif not self._raised:
            self._raised = True
            raise self._instead or Interrupted(number)


FOR_PEOPLE = (signal.SIGINT, signal.SIGHUP)
_JOB_CONTROL = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
LONGEST_S = 1e9
"""Longer times count as this (seconds, 31 years): the kernel's timers take no more of them."""

_answers_first = False


def answer_first() -> None:
    """From here on in this process: what cannot be interrupted any more is also answered before we end.

    Without this a signal between the kill of a tree and the last line of output would end the command as if
    it had failed.
    """
    global _answers_first
    _answers_first = True


@contextmanager
def interruptible(
    deadline_s: float | None = None, later: Callable[[int, FrameType | None], None] | None = None
) -> Iterator[Interrupts]:
    """Within the block the first of the signals raises Interrupted; the old handlers come back after it.

    So does the passing of `deadline_s` seconds. `later` handles signals that come too late to interrupt.
    Job control is ignored meanwhile: with us stopped, a frozen tree would stay so.
    """
    interrupts = Interrupts(later)
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    with heard_at_once(), _handled_by(interrupts.handle, deadline_s, lambda: interrupts.are_over):
        yield interrupts


@contextmanager
def noted(note: Callable[[int], None], deadline_s: float | None = None) -> Iterator[None]:
    """Within the block the signals that would interrupt are only told to `note`; so is the deadline's.

    Job control is ignored, as in `interruptible`, and a second signal changes nothing.
    """
    with _handled_by(lambda number, _: note(number), deadline_s, lambda: True):
        yield


@contextmanager
def _handled_by(
    handle: Callable[[int, FrameType | None], None], deadline_s: float | None, are_over: Callable[[], bool]
) -> Iterator[None]:
    """Within the block these signals are handled so. `are_over` says at its end whether one that comes then
    is to be heard no more, where whoever has called us answers first."""
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
        if number not in FOR_PEOPLE or signal.getsignal(number) is not signal.SIG_IGN  # by nohup, or a &
    ]
    before = {number: signal.signal(number, handle) for number in numbers}
    stops = {number: signal.signal(number, signal.SIG_IGN) for number in _JOB_CONTROL}
    try:
        if deadline_s is not None:
            ring_in(deadline_s)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in stops.items():
            signal.signal(number, handler)
        is_mute = _answers_first and are_over()
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if is_mute and handler in _DEFAULTS else handler)


def ring_in(seconds: float) -> None:
    """Set the deadline of the block: SIGALRM comes then, in a moment where that is past."""
    signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 0.001), LONGEST_S))


def seconds_left() -> float | None:
    """Until the deadline of the block that is `interruptible`; None where there is none (any more)."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.getitimer(signal.ITIMER_REAL)[0] or None
