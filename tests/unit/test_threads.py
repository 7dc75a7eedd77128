"""Threads that are waited for while signals interrupt the waiting."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from crcli.image.index import KnownChunks
from crcli.pipeline.knowing import Knowing
from crcli.store.file import FileStore
from crcli.threads import Worker, start_workers


class _Interrupted(Exception):
    pass


@pytest.fixture
def interrupting() -> Iterator[None]:
    """SIGALRM raises _Interrupted, again and again, until the first was raised."""

    def ring(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise _Interrupted

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupted_wait_is_no_end(interrupting: None) -> None:
    """The thread is known to work on, and the next wait lasts until it has ended."""
    may_end, done = threading.Event(), []
    worker = Worker(lambda: (may_end.wait(), done.append(1)))
    assert not worker.is_alive()
    worker.start()
    with pytest.raises(_Interrupted):
        worker.join()
    assert worker.is_alive()
    worker.join(0.01)
    assert worker.is_alive()
    may_end.set()
    worker.join()
    assert done and not worker.is_alive()
    worker.join()


def test_nothing_is_asked_of_a_store_after_an_interrupted_wait(interrupting: None) -> None:
    """What it has is read in a thread: whoever closes the store waits for that, interrupted or not."""
    may_end, done = threading.Event(), []

    def read(_: object) -> KnownChunks:
        may_end.wait()
        done.append(1)
        raise MemoryError

    knowing = Knowing(FileStore("/nowhere"), read)
    knowing.start()
    with pytest.raises(_Interrupted):
        knowing.finish()
    threading.Timer(0.2, may_end.set).start()
    knowing.end()
    assert done


def test_one_that_fails_has_ended() -> None:
    """Whatever it raises."""
    worker = Worker(divmod, (1, 0), name="fails")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", lambda _: None)
        worker.start()
        worker.join()
    assert not worker.is_alive()


def test_one_that_was_not_started_cannot_be_waited_for() -> None:
    """It would never end."""
    with pytest.raises(RuntimeError):
        Worker(print).join()


def test_those_begun_are_ended_when_no_more_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is left at work for somebody who does not come to be."""
    start, may_end, begun = threading.Thread.start, threading.Event(), []

    def start_two(thread: threading.Thread) -> None:
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        start(thread)

    def end() -> None:
        may_end.set()
        for worker in begun:
            worker.join()

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="new thread"):
        start_workers(begun, 3, may_end.wait, "some", end)
    assert [worker.name for worker in begun] == ["some-0", "some-1"]
    assert not any(worker.is_alive() for worker in begun)
