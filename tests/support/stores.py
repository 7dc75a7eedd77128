"""Stores for tests: each call can be watched, held up, or be the last thing that a process does."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from crcli.store import ObjectInfo, Store

Around = Callable[[str], AbstractContextManager[None]]
"""Called with what is about to be done (`put images/a/b`); the call happens inside of what it gives."""

_PLAIN = ("put", "get", "get_range", "stat", "missing", "delete", "sweep")


class WatchedStore:
    """A store that lets `around` have its way with every call; commits of writers are calls too."""

    def __init__(self, inner: Store, around: Around) -> None:
        self._inner = inner
        self._around = around

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if name not in _PLAIN:
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            with self._around(f"{name} {arguments[0]}"):
                return found(*arguments, **options)

        return call

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """A listing is one call: what it gives is read at once."""
        with self._around(f"list {prefix}"):
            found = list(self._inner.list(prefix, after))
        return iter(found)

    def writer(self, key: str, *, if_absent: bool = False) -> Any:
        """Beginning an object and committing it are calls; writing to it is not."""
        with self._around(f"writer {key}"):
            inner = self._inner.writer(key, if_absent=if_absent)
        return _WatchedWriter(inner, key, self._around)


class _WatchedWriter:
    def __init__(self, inner: Any, key: str, around: Around) -> None:
        self._inner = inner
        self._key = key
        self._around = around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def commit(self) -> None:
        with self._around(f"commit {self._key}"):
            self._inner.commit()

    def __enter__(self) -> _WatchedWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._inner.abort()


def killed_at(number: int, work: Callable[[Around], object]) -> bool:
    """Do `work` in a process of its own that is killed before its call `number`; say whether it was."""
    child = os.fork()
    if child == 0:
        calls = iter(range(number))

        def around(_: str) -> AbstractContextManager[None]:
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return nullcontext()

        try:
            work(around)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"it failed by itself before call {number}"
    return status != 0


class Actor(threading.Thread):
    """Work on a store that goes on only as far as it is let: `advance(3)` lets it make three more calls."""

    def __init__(self, work: Callable[[Around], object]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._state = threading.Condition()
        self._permits = 0
        self._waiting = 0
        self._running = 0
        self._over = False
        self.calls: list[str] = []
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._work(self._around)
        except BaseException as error:
            self.error = error
        with self._state:
            self._over = True
            self._state.notify_all()

    @property
    def over(self) -> bool:
        """Whether the work is done, or has failed."""
        return self._over

    def advance(self, calls: int, seconds: float = 10.0) -> bool:
        """Let it make so many calls; return once it waits for the next, or has ended (False: neither yet)."""
        with self._state:
            self._permits += calls
            self._state.notify_all()
            return self._state.wait_for(self._at_rest, seconds)

    def finish(self, seconds: float = 10.0) -> bool:
        """Let it make all its calls; say whether it came to an end in time."""
        with self._state:
            self._permits = 1 << 30
            self._state.notify_all()
            return self._state.wait_for(lambda: self._over, seconds)

    def _at_rest(self) -> bool:
        return self._over or (self._permits == 0 and self._running == 0 and self._waiting > 0)

    @contextmanager
    def _around(self, what: str) -> Iterator[None]:
        with self._state:
            self._waiting += 1
            self._state.notify_all()
            self._state.wait_for(lambda: self._permits > 0)
            self._waiting -= 1
            self._permits -= 1
            self._running += 1
            self.calls.append(what)
        try:
            yield
        finally:
            with self._state:
                self._running -= 1
                self._state.notify_all()
