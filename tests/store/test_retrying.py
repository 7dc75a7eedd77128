"""When and for how long failures are tried again."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, NoReturn

import pytest

from crcli.store import retrying
from crcli.store.open import PATIENCE_S
from crcli.store.retrying import LONGEST_PAUSE_S, Retrier
from crcli.store.s3.client import CONNECT_TIMEOUT_S, SILENCE_S

if TYPE_CHECKING:
    from types import FrameType


class Flaky:
    """Fails `failures` times with ConnectionError, then returns "done"."""

    def __init__(self, failures: float) -> None:
        self.failures = failures
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionError(self.calls)
        return "done"


def test_a_passing_failure_is_survived() -> None:
    """The first success after passing failures is the result."""
    operation = Flaky(3)
    assert Retrier().call(operation, lambda _: 60) == "done"
    assert operation.calls == 4


def test_a_lasting_failure_is_raised_at_once() -> None:
    """An error that deserves no patience comes through on the first attempt."""
    operation = Flaky(1)
    with pytest.raises(ConnectionError):
        Retrier().call(operation, lambda _: 0)
    assert operation.calls == 1


def test_patience_ends() -> None:
    """The last error comes through when the time is over."""
    with pytest.raises(ConnectionError):
        Retrier().call(Flaky(float("inf")), lambda _: 0.5)


def test_what_lasts_is_told_once() -> None:
    """With the time that it is worth; what is over soon is not told at all."""
    told: list[tuple[str, float]] = []
    retrier = Retrier(tell=lambda error, patience_s: told.append((str(error), patience_s)))
    retrier.call(Flaky(1), lambda _: 60)
    assert told == []
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch, retrier, longest=True)
        for _ in range(2):
            with pytest.raises(ConnectionError):
                retrier.call(Flaky(float("inf")), lambda _: 20)
        assert clock.now > 20
    assert len(told) == 1 and told[0][1] == 20


class Clock:
    """A clock on which pauses pass at once, each as long as it can be or not at all."""

    def __init__(self, patch: pytest.MonkeyPatch, retrier: Retrier, longest: bool) -> None:
        self.now = 0.0
        patch.setattr(retrying.time, "monotonic", lambda: self.now)
        patch.setattr(retrying.random, "uniform", lambda low, high: high if longest else low)
        patch.setattr(retrier, "_is_stopped_within", self._pause)

    def _pause(self, seconds: float, _given_up: threading.Event | None) -> bool:
        self.now += seconds
        return False


NOTICE_S = 30.0
"""What GCP, and Azure at the least, gives as notice."""

TAKES = {"refuses": 0.05, "cannot be reached": CONNECT_TIMEOUT_S, "keeps silent": SILENCE_S}
"""How long a request to a store that fails for ever takes."""


@pytest.mark.parametrize("longest", [False, True], ids=["short pauses", "long pauses"])
@pytest.mark.parametrize("how", TAKES)
def test_a_store_that_fails_for_ever_is_told_of_in_time(how: str, longest: bool) -> None:
    """While who has had notice can do something yet. One that keeps silent is asked again, too: it may be one
    answer that was lost."""
    retrier, operation = Retrier(), Flaky(float("inf"))
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch, retrier, longest)

        def attempt() -> str:
            clock.now += TAKES[how]
            return operation()

        with pytest.raises(ConnectionError):
            retrier.call(attempt, lambda _: PATIENCE_S)
    assert clock.now <= NOTICE_S
    assert operation.calls > 1
    if how == "refuses":
        assert clock.now > PATIENCE_S - LONGEST_PAUSE_S - TAKES[how]


def test_attempts_can_be_bounded() -> None:
    """With max_attempts the last of so many errors comes through."""
    operation = Flaky(float("inf"))
    with pytest.raises(ConnectionError):
        Retrier(max_attempts=3).call(operation, lambda _: 60)
    assert operation.calls == 3


def test_pauses_grow_and_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are drawn from zero to twice as much each time, up to the longest: full jitter."""
    bounds: list[tuple[float, float]] = []

    def no_pause(low: float, high: float) -> float:
        bounds.append((low, high))
        return 0

    monkeypatch.setattr(retrying.random, "uniform", no_pause)
    Retrier().call(Flaky(9), lambda _: 60)
    assert bounds == [(0, 0.2), (0, 0.4), (0, 0.8), (0, 1.6), (0, 3.2), (0, 6.4), (0, 8), (0, 8), (0, 8)]


@pytest.mark.parametrize("how", ["stop", "given_up"])
def test_waiting_can_be_ended(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """stop ends every call's waiting, given_up one call's; the last error comes through."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 10_000)
    monkeypatch.setattr(retrying, "LONGEST_PAUSE_S", 10_000)
    monkeypatch.setattr(retrying.random, "uniform", lambda _, high: high)
    retrier, given_up = Retrier(), threading.Event()
    threading.Timer(0.1, retrier.stop if how == "stop" else given_up.set).start()
    with pytest.raises(ConnectionError):
        retrier.call(Flaky(float("inf")), lambda _: 100_000, None if how == "stop" else given_up)


def test_a_stopped_retrier_tries_once() -> None:
    """After stop an operation is still attempted, and not again."""
    retrier, operation = Retrier(), Flaky(float("inf"))
    retrier.stop()
    with pytest.raises(ConnectionError):
        retrier.call(operation, lambda _: 60, threading.Event())
    assert operation.calls == 1


def test_signals_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the waiting at once."""
    monkeypatch.setattr(retrying.random, "uniform", lambda _, high: 10_000)

    def interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            Retrier().call(Flaky(float("inf")), lambda _: 100_000)
    finally:
        signal.signal(signal.SIGALRM, before)
