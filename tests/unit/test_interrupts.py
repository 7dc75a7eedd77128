"""Deadlines as exceptions: one that the main thread did not hear of is told again."""

from __future__ import annotations

import signal
import time
from types import FrameType

import pytest

from crcli.pipeline.interrupts import Interrupted, interruptible, noted, seconds_left

LONG_S = 5.0


def lose_the_first() -> None:
    """Have the next SIGALRM be heard by nobody, as when the kernel gives it to another thread."""
    handler = signal.getsignal(signal.SIGALRM)

    def lose(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGALRM, handler)

    signal.signal(signal.SIGALRM, lose)


def test_a_deadline_that_was_lost_comes_again() -> None:
    """It interrupts what has no time left, once."""
    with interruptible(0.05):
        lose_the_first()
        with pytest.raises(Interrupted):
            time.sleep(LONG_S)
        assert seconds_left() is None
        time.sleep(0.3)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_one_that_is_only_noted_is_so_once() -> None:
    """Though it was lost at first."""
    heard: list[int] = []
    with noted(heard.append, 0.05):
        lose_the_first()
        time.sleep(0.5)
    assert heard == [signal.SIGALRM]
