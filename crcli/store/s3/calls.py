"""Calls that block until the store answers, made in threads of their own, so that whoever waits can leave.

Whoever is in a client's call leaves it when that returns: obstore lets no signal through, nor does the
looking up of a name, and no other thread can end what botocore waits for. A store that took a request and
keeps silent would hold up for half a minute whoever has to end within seconds, as a preemption hook does. So
the call is left where it is, and who waited for it goes on. It costs a request less than 0.1 ms.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from crcli import waiting
from crcli.errors import StoreUnreachable

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

LAST_S = 1.0
"""How long a store that was given up may take for an answer (seconds): one that lives needs less, to forget
an upload for instance. Of one that did not answer within it nothing more is asked."""


class Calls:
    """The calls of one store, from whatever thread."""

    def __init__(self, waits_for: str = "the store") -> None:
        """`waits_for` is said of a first call that takes longer than others do in all."""
        self._waits_for = waits_for
        self._has_answered = self._has_told = False
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._idle: list[_Caller] = []
        self._under_way: set[_Call[Any]] = set()
        self._is_given_up = self._is_silent = self._is_closed = False

    def make(self, function: Callable[[], Result]) -> Result:
        """Return what `function` returns, or raise what it raises; StoreUnreachable where a store that was
        given up keeps silent: what it was asked for may be done all the same.

        What a signal handler raises comes through at once, and the call is left alone then.
        """
        call = _Call(function)
        try:
            return self._wait(call) if self._hand_over(call) else function()
        finally:
            with self._lock:
                self._under_way.discard(call)

    def give_up(self) -> None:
        """From now on wait for LAST_S at most, for what is under way as for each call to come; once that was
        in vain, not at all."""
        with self._lock:
            if not self._is_given_up:
                self._is_given_up = True
                for call in self._under_way:
                    call.bell.put(None)

    def close(self) -> None:
        """End the threads, but for those that still wait for an answer."""
        with self._lock:
            self._see_fork()
            self._is_closed = True
            callers, self._idle = self._idle, []
        for caller in callers:
            caller.end()

    def _hand_over(self, call: _Call[Any]) -> bool:
        """Have a thread make the call; say whether there is one to be had."""
        with self._lock:
            self._see_fork()
            if self._is_silent:
                raise _not_waited_for()
            caller = self._idle.pop() if self._idle else None
            self._under_way.add(call)
        if caller is None:
            caller = _Caller(self._may_rest)
            try:
                caller.start()
            except RuntimeError:  # there are as many threads as there may be
                return False
        caller.calls.put(call)
        return True

    def _see_fork(self) -> None:
        """A process that was forked has none of our threads."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._idle.clear()
            self._under_way.clear()

    def _may_rest(self, caller: _Caller) -> bool:
        """Whether a thread is to wait for another call."""
        with self._lock:
            if not self._is_closed:
                self._idle.append(caller)
            return not self._is_closed

    def _wait(self, call: _Call[Result]) -> Result:
        while not call.is_done:
            was_given_up = self._is_given_up
            try:
                call.bell.get(timeout=LAST_S)  # not for ever: a signal that another thread got wakes nobody
            except queue.Empty:
                if was_given_up:
                    self._is_silent = True
                    raise _not_waited_for() from None
                if not self._has_answered and not self._has_told:
                    self._has_told = True
                    waiting.say(f"waiting for {self._waits_for}")
        self._has_answered = True
        return call.result()


class _Call(Generic[Result]):
    """One call. Its bell rings when it is done, and when its store is given up before."""

    def __init__(self, function: Callable[[], Result]) -> None:
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.is_done = False
        self._function = function
        self._results: list[Result] = []
        self._error: BaseException | None = None

    def make(self) -> None:
        try:
            self._results.append(self._function())
        except BaseException as error:  # raised by `result`, to who waits
            self._error = error

    def result(self) -> Result:
        error, self._error = self._error, None  # else it and its traceback would keep each other
        try:
            if error is not None:
                raise error
            return self._results.pop()
        finally:
            del error


class _Caller(threading.Thread):
    """A thread that makes one call after another. One that never returns keeps no command from its end."""

    def __init__(self, may_rest: Callable[[_Caller], bool]) -> None:
        super().__init__(name="s3-call", daemon=True)
        self.calls: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        self._may_rest = may_rest

    def run(self) -> None:
        """As any thread."""
        rests = True
        while rests and (call := self.calls.get()) is not None:
            call.make()
            rests = self._may_rest(self)  # before who waits makes another
            call.is_done = True
            call.bell.put(None)
            del call  # with what it brought

    def end(self) -> None:
        """Return when it has ended, which rests."""
        self.calls.put(None)
        self.join()


def _not_waited_for() -> StoreUnreachable:
    return StoreUnreachable(
        "the store did not answer, and is not waited for any more",
        hint="It may do what it was asked for all the same. Check the network and --endpoint-url.",
    )
