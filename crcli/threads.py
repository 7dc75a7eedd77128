"""Threads that a story waits for while signals may end it: they are said to have ended once they have."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Worker(threading.Thread):
    """A daemon thread whose `join` and `is_alive` tell the truth, also after an interrupted `join`.

    When a signal handler raises, Python before 3.13 takes the thread for ended that was being waited for
    (https://github.com/python/cpython/issues/90882): who then closes a file has it write into another.
    """

    def __init__(
        self, target: Callable[..., object], args: Iterable[Any] = (), name: str | None = None
    ) -> None:
        super().__init__(target=target, args=args, name=name, daemon=True)
        self._is_over = False
        self._running = threading.Lock()
        self._running.acquire()

    def run(self) -> None:
        """As any thread."""
        try:
            super().run()
        finally:
            self._is_over = True  # before the lock: who gets that may be interrupted before he gives it back
            self._running.release()

    def join(self, timeout: float | None = None) -> None:
        """Return when it has ended, or so many seconds have passed."""
        if self.ident is None:
            raise RuntimeError("this thread was not started")
        if not self._is_over and self._running.acquire(timeout=-1 if timeout is None else timeout):
            self._running.release()

    def is_alive(self) -> bool:
        """Whether it was started, and has not ended."""
        return self.ident is not None and not self._is_over


def start_workers(
    into: list[Worker], count: int, work: Callable[[], object], name: str, end: Callable[[], object]
) -> None:
    """Add so many threads to the list, `name-0` and so on, that do this work.

    Where no more threads can be had, those of the list are ended, by `end`, and RuntimeError is raised.
    """
    try:
        for number in range(count):
            worker = Worker(work, name=f"{name}-{number}")
            worker.start()
            into.append(worker)
    except RuntimeError:
        end()
        raise
