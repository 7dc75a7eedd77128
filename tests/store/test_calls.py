"""Calls of a store's clients, which whoever waits for them can leave."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, NoReturn

import pytest

from crcli.errors import StoreUnreachable
from crcli.store.s3 import calls as calls_module
from crcli.store.s3.calls import Calls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

LIMIT_S = 60


class Hanging:
    """A call that does not return before it is let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        self.let_go.wait()
        return "done"


class Waiting(threading.Thread):
    """Somebody who waits for a call."""

    def __init__(self, calls: Calls, call: Hanging) -> None:
        super().__init__(daemon=True)
        self.result = ""
        self.error: Exception | None = None
        self._calls = calls
        self._call = call
        self.start()

    def run(self) -> None:
        """Wait for it."""
        try:
            self.result = self._calls.make(self._call)
        except StoreUnreachable as error:
            self.error = error

    def end(self) -> None:
        """See it end."""
        self.join(LIMIT_S)
        assert not self.is_alive()


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    """A call that hangs as long as the test lasts, unless that lets it go."""
    call = Hanging()
    yield call
    call.let_go.set()


def test_what_a_call_returns_or_raises_comes_through() -> None:
    """As if it had been made by who waits."""
    calls = Calls()
    assert calls.make(lambda: 17) == 17
    with pytest.raises(ZeroDivisionError):
        calls.make(lambda: 1 // 0)
    calls.close()


def test_a_call_that_hangs_is_left_when_the_store_is_given_up(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits goes on, and nothing more is asked of a store that kept silent."""
    monkeypatch.setattr(calls_module, "LAST_S", 0.1)
    calls, asked = Calls(), list[int]()
    waiting = Waiting(calls, hanging)
    assert hanging.begun.wait(LIMIT_S)
    calls.give_up()
    waiting.end()
    assert waiting.error is not None
    with pytest.raises(StoreUnreachable):
        calls.make(lambda: asked.append(1))
    assert not asked and not hanging.let_go.is_set()
    calls.close()


def test_a_store_that_answers_is_heard_after_it_was_given_up(
    hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is under way, and what is begun then, has its moment."""
    monkeypatch.setattr(calls_module, "LAST_S", LIMIT_S)
    calls = Calls()
    waiting = Waiting(calls, hanging)
    assert hanging.begun.wait(LIMIT_S)
    calls.give_up()
    calls.give_up()
    hanging.let_go.set()
    waiting.end()
    assert waiting.result == "done"
    assert calls.make(lambda: 17) == 17
    calls.close()


def test_a_signal_is_not_kept_waiting(hanging: Hanging) -> None:
    """What its handler raises comes through while the call goes on."""

    def interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    calls = Calls()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            calls.make(hanging)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert calls.make(lambda: 17) == 17
    calls.close()


def test_one_thread_makes_one_call_after_another() -> None:
    """Threads are kept for the next call, and have ended when the store is closed."""
    before = set(threading.enumerate())
    calls = Calls()
    assert len({calls.make(threading.get_ident) for _ in range(50)}) == 1
    calls.close()
    assert set(threading.enumerate()) <= before
    assert calls.make(lambda: 17) == 17


def test_without_threads_calls_are_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no more threads can be had, who waits makes the call."""

    def refuse(_caller: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(calls_module._Caller, "start", refuse)
    assert Calls().make(threading.get_ident) == threading.get_ident()


def test_a_forked_process_has_threads_of_its_own() -> None:
    """It does not hand its calls to threads that only its parent has."""
    calls = Calls()
    calls.make(lambda: 17)
    if (pid := os.fork()) == 0:
        os._exit(0 if calls.make(lambda: 18) == 18 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    calls.close()
