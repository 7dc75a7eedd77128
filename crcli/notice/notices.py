"""Runs sources beside each other, takes the signals that they want, and hands out what they say."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

from crcli.notice.base import Notice, Surroundings, Urgency, grace_of, note
from crcli.notice.choose import choose
from crcli.notice.signals import taken
from crcli.records import replace
from crcli.wakeups import forget_wakeups, woken_by_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from crcli.findings import Finding
    from crcli.notice.base import Source

_JOIN_S = 1.0
"""How long leaving waits for sources; one that is still in a system call then is a daemon thread."""


class Notices:
    """From entry to exit every source watches; `get` returns what they say, in the order they said it.

    `specs` is what `--notice` says (none is `auto`); one that nobody knows raises UsageError here, before
    anything has begun. `grace_s` is how long there is after a notice that does not say so itself (default:
    $CRCLI_GRACE). `found` is told, from any thread, what went wrong with a source; `findings` keeps it.

    `fd` is for whoever waits for other things too: readable while there is a notice, and from a signal on
    until `get` is next called. Python runs a signal's handler in the main thread only, and the kernel may
    give the signal to another (one that is just being started, say), or to the main thread right before it
    waits: neither ends that wait. Whoever waits in the main thread, for any signal, waits for `fd` too.

    Enter and leave in the main thread: signals can be taken nowhere else.
    """

    def __init__(
        self,
        specs: Sequence[str] = (),
        grace_s: float | None = None,
        *,
        found: Callable[[Finding], None] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.findings: list[Finding] = []
        self.fd = -1
        self.signals: frozenset[signal.Signals] = frozenset()
        self._found = found
        environ = os.environ if environ is None else environ
        surroundings = Surroundings(grace_of(grace_s, environ), environ, self._report)
        self.sources: list[Source] = choose(specs, surroundings)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._waiting: deque[Notice] = deque()
        self._told = -1
        """Readable while there is a notice."""
        self._wakeups = -1
        """Readable when a signal has come."""
        self._unsaved: list[Notice] = []
        self._exit = ExitStack()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._told = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            undo.callback(self._close)
            self._wakeups = undo.enter_context(woken_by_signals())
            either = undo.enter_context(select.epoll())
            for fd in (self._told, self._wakeups):
                either.register(fd, select.EPOLLIN)
            self.fd = either.fileno()
            self.signals = undo.enter_context(taken(self.sources, self._report))
            undo.callback(self._stop)
            for source in self.sources:
                self._start(source)
            self._exit = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def get(self, timeout_s: float | None = None) -> Notice | None:
        """Return the next notice, waiting for one if need be; None when `timeout_s` have passed."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        while True:
            forget_wakeups(self._wakeups)
            try:
                os.eventfd_read(self._told)
                return self._waiting.popleft()
            except BlockingIOError:
                pass
            left_ms = None if until is None else (until - time.monotonic()) * 1000
            if left_ms is not None and left_ms <= 0:
                return None
            poll.poll(left_ms)

    def deafen(self) -> None:
        """From here on, also after the block, the signals that were notices are ignored.

        For whoever has done his work and has yet to say how it ended: killed in that moment, a job that has
        ended would be taken for one that was interrupted, and be run once more.
        """
        for number in self.signals:
            signal.signal(number, signal.SIG_IGN)

    def waiting(self, urgency: Urgency) -> Notice | None:
        """The first such notice that `get` has still to return, if there is one; it stays to be returned."""
        with self._lock:
            return next((notice for notice in self._waiting if notice.urgency is urgency), None)

    def _start(self, source: Source) -> None:
        thread = threading.Thread(
            target=self._watch, args=(source,), name=f"notice-{source.name}", daemon=True
        )
        thread.start()
        self._threads.append(thread)

    def _watch(self, source: Source) -> None:
        """The life of a source's thread."""
        # They are for the main thread, and whatever a source waits in is not to be interrupted.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            source.watch(self._tell, self._stopped)
        except (Exception, SystemExit) as error:
            if not self._stopped.is_set():
                what = f"failed: {type(error).__name__}: {error}"
                self._report(note("notice-failed", source.name, what, "goes on without it"))

    def _tell(self, notice: Notice) -> None:
        with self._lock:
            if self._told < 0:
                return
            if notice.urgency is Urgency.LEAVE:
                self._unsaved.append(notice)
                notice = replace(notice, on_saved=self._saved)
            self._waiting.append(notice)
            os.eventfd_write(self._told, 1)

    def _saved(self) -> None:
        """Tell everybody who gave notice, not only whom the dump was for: several often say the same."""
        with self._lock:
            waiting, self._unsaved = self._unsaved, []
        for notice in waiting:
            try:
                notice.on_saved()
            except Exception as error:
                what = f"could not be told that the job is saved: {error}"
                self._report(note("notice-unanswered", notice.source, what, "goes on"))

    def _report(self, finding: Finding) -> None:
        self.findings.append(finding)
        if self._found is not None:
            try:
                self._found(finding)
            except Exception:  # a terminal that has gone is no reason to stop listening
                pass

    def _stop(self) -> None:
        self._stopped.set()
        until = time.monotonic() + _JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _close(self) -> None:
        with self._lock:
            told, self._told, self.fd = self._told, -1, -1
        os.close(told)
