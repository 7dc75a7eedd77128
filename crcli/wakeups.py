"""Signals that are heard at once, whatever the main thread waits in.

Python runs the handler of a signal in the main thread only. But the kernel may give a signal to any thread
(to another while the main thread starts one, or has one to take already), or to the main thread right before
it waits: neither ends that wait. What ends it for sure is a descriptor into which Python writes at each
signal, in whichever thread (signal.set_wakeup_fd).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from crcli.threads import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

_PIPE_BYTES = 1 << 16
"""What a pipe holds."""

_BELL = signal.SIGURG
"""What the main thread is rung by: it does nothing by default, and nobody else here uses it."""

_AGAIN_S = 0.05
"""How soon a main thread that has not heard it is rung again (seconds)."""


@contextmanager
def heard_at_once() -> Iterator[None]:
    """Within the block a signal that has a handler of Python's ends what the main thread waits in: a thread
    rings until it was heard.

    Not where it is entered in another thread, or no thread is to be had: signals are heard then when the main
    thread next wakes.
    """
    bell = _Bell() if threading.current_thread() is threading.main_thread() else None
    if bell is None or not bell.can_start():
        yield
        return
    before = signal.signal(_BELL, bell.hear)
    try:
        with _written_into(bell.hole):
            yield
    finally:
        bell.end()
        signal.signal(_BELL, before)


class _Bell(Worker):
    """Rings the main thread at each signal of which it reads a byte, until one ring was heard: whatever came
    before that has been heard as well."""

    def __init__(self) -> None:
        super().__init__(self._work, name="bell")
        self._said, self.hole = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.hole, False)
        self._is_heard = self._may_end = False

    def can_start(self) -> bool:
        """Start it, if a thread is to be had."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self.start()  # it blocks all signals, as we do now
        except RuntimeError:
            self._close()
            return False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return True

    def hear(self, *_: object) -> None:
        """The handler of the ring."""
        self._is_heard = True

    def end(self) -> None:
        """Return when it rings no more."""
        self._may_end = True
        with suppress(BlockingIOError):  # it is full, so that there is something to read
            os.write(self.hole, b"\0")  # nobody's number: who was forked meanwhile keeps the pipe open
        self.join()
        self._close()

    def _work(self) -> None:
        while not self._may_end:
            if os.read(self._said, _PIPE_BYTES).strip(bytes((_BELL,))):
                self._ring()

    def _ring(self) -> None:
        self._is_heard = False
        while not self._is_heard and not self._may_end:
            signal.pthread_kill(threading.main_thread().ident or 0, _BELL)
            time.sleep(_AGAIN_S)

    def _close(self) -> None:
        os.close(self._said)
        os.close(self.hole)


@contextmanager
def woken_by_signals() -> Iterator[int]:
    """Within the block a descriptor is readable once a signal has come that has a handler of Python's; yields
    it. For who waits in the main thread for other descriptors too.

    Where signals cannot be taken (not in the main thread) it never is.
    """
    heard, said = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if threading.current_thread() is not threading.main_thread():
            yield heard
            return
        with _written_into(said):
            yield heard
    finally:
        os.close(heard)
        os.close(said)


@contextmanager
def _written_into(fd: int) -> Iterator[None]:
    """Within the block Python writes the number of each signal into this descriptor, from its C handler."""
    before = signal.set_wakeup_fd(fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        if (now := signal.set_wakeup_fd(before)) != fd:
            signal.set_wakeup_fd(now)  # somebody else has put his there meanwhile


def forget_wakeups(fd: int) -> None:
    """Have the descriptor be readable for signals only that come from now on."""
    try:
        os.read(fd, _PIPE_BYTES)
    except BlockingIOError:
        pass
