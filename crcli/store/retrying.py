"""The one place that tries again: exponential backoff with full jitter, bounded by time, interruptible.

Client libraries below have their own retries switched off, so that attempts are not multiplied and a
deadline means what it says.
"""

from __future__ import annotations

import random
import threading
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 8.0


class Retrier:
    """Repeats operations whose failures pass, for up to `patience_s` seconds each.

    The pause before attempt n is drawn from 0 to `FIRST_PAUSE_S * 2**n` seconds, at most `LONGEST_PAUSE_S`
    (https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/). `max_attempts` bounds
    the number of attempts as well, if it is given.
    """

    def __init__(self, patience_s: float, *, max_attempts: int | None = None) -> None:
        self.patience_s = patience_s
        self.max_attempts = max_attempts
        self._stopped = threading.Event()

    def call(
        self,
        operation: Callable[[], Result],
        passes: Callable[[Exception], bool],
        *,
        patience_s: float | None = None,
        given_up: threading.Event | None = None,
    ) -> Result:
        """Return what `operation` returns; raise its last error once it will not pass or patience is over.

        `passes` says of an error whether trying again can help. `given_up` ends this call's patience early,
        as `stop` does for every call.
        """
        deadline = time.monotonic() + (self.patience_s if patience_s is None else patience_s)
        stop = given_up or self._stopped
        attempt = 0
        while True:
            try:
                return operation()
            except Exception as error:
                attempt += 1
                pause = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt))
                if not passes(error) or attempt == self.max_attempts or time.monotonic() + pause > deadline:
                    raise
                if self._stopped.is_set() or stop.wait(pause):
                    raise

    def stop(self) -> None:
        """End all patience: whatever fails from now on is not tried again."""
        self._stopped.set()
