"""Signals and deadlines as exceptions: heard at once, whichever thread the kernel gave them to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from crcli import kernel
from crcli.pipeline.interrupts import Interrupted, interruptible, ring_in, seconds_left
from crcli.wakeups import heard_at_once

LONG_S = 60.0
"""After so long a wait ends by itself: the test has failed then."""


@contextmanager
def another_thread() -> Iterator[int]:
    """A thread that gets signals, and does nothing with them; its id."""
    over = threading.Event()
    thread = threading.Thread(target=over.wait)
    thread.start()
    try:
        assert thread.ident is not None
        yield thread.ident
    finally:
        over.set()
        thread.join()


@contextmanager
def sent(thread: int, number: int) -> Iterator[None]:
    """In a moment, when the main thread waits, the thread gets this signal."""
    timer = threading.Timer(0.2, signal.pthread_kill, (thread, number))
    timer.start()
    try:
        yield
    finally:
        timer.join()


@contextmanager
def interrupted() -> Iterator[pytest.ExceptionInfo[Interrupted]]:
    """The block waits, by `wait`, and is interrupted there, rather than when the wait is over."""
    over: list[bool] = []
    timer = threading.Timer(LONG_S, lambda: (over.append(True), lock.release()))
    lock.acquire()
    timer.start()
    try:
        with pytest.raises(Interrupted) as raised:
            yield raised
        assert not over
    finally:
        timer.cancel()
        timer.join()
        if not over:
            lock.release()


lock = threading.Lock()


def wait() -> None:
    """Wait in a way that no signal ends which another thread got."""
    with lock:
        pass


@pytest.mark.usefixtures("hang_ups_end_us")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM])
def test_a_signal_that_another_thread_got_interrupts(number: int) -> None:
    """As one would that the main thread got."""
    with another_thread() as thread, sent(thread, number), interrupted() as raised, interruptible():
        wait()
    assert raised.value.number == number


def test_one_that_came_before_the_wait_interrupts_it() -> None:
    """However shortly before: another thread may still be about to tell Python of it."""
    for _ in range(50):
        with another_thread() as thread, interrupted(), interruptible():
            signal.pthread_kill(thread, signal.SIGTERM)
            wait()


def test_a_deadline_comes_once() -> None:
    """Then no time is left, and nothing else is interrupted."""
    with interruptible(0.05):
        with interrupted():
            wait()
        assert seconds_left() is None
        ring_in(0.05)
        assert not threading.Event().wait(0.3)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_what_comes_too_late_is_told_once() -> None:
    """It is somebody else's by then."""
    told: list[int] = []
    with another_thread() as thread, interruptible(later=lambda number, _: told.append(number)) as interrupts:
        interrupts.past_return()
        with sent(thread, signal.SIGTERM):
            assert not threading.Event().wait(0.5)
    assert told == [signal.SIGTERM]


def test_nothing_is_left_of_it() -> None:
    """No thread, no descriptor, no handler; blocks may lie in each other."""
    before = os.listdir("/proc/self/fd"), threading.enumerate(), signal.getsignal(signal.SIGURG)
    with heard_at_once(), interruptible():
        assert len(threading.enumerate()) == len(before[1]) + 2
    assert (os.listdir("/proc/self/fd"), threading.enumerate(), signal.getsignal(signal.SIGURG)) == before


def test_a_process_that_was_forked_does_not_hold_up_its_end() -> None:
    """It has the descriptors as well."""
    with heard_at_once():
        if not (child := kernel.quiet_fork()):
            signal.pause()
            os._exit(0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_without_threads_signals_interrupt_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the main thread gets."""

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = os.listdir("/proc/self/fd")
    with pytest.raises(Interrupted), monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with interruptible():
            signal.raise_signal(signal.SIGTERM)
    assert os.listdir("/proc/self/fd") == before
