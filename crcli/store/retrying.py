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

TELL_AFTER_S = 1.0
"""What is not over so long after the first attempt is said (seconds)."""

_LOOK_EVERY_S = 0.1
"""How often a pause that two may end looks whether the other did (seconds)."""


class Retrier:
    """Repeats operations whose failures pass.

    The pause after attempt n is drawn from 0 to `FIRST_PAUSE_S * 2**n` seconds, at most `LONGEST_PAUSE_S`:
    many clients that failed together do not come back together
    (https://aws.amazon.com/builders-library/timeouts-retries-and-backoff-with-jitter/).
    """

    def __init__(
        self,
        *,
        max_attempts: int | None = None,
        tell: Callable[[Exception, float], None] = lambda error, patience_s: None,
    ) -> None:
        """`tell` is told once of a failure that lasts, and for how many seconds it is worth trying again."""
        self.max_attempts = max_attempts
        self._tell = tell
        self._has_told = False
        self._stopped = threading.Event()

    def call(
        self,
        operation: Callable[[], Result],
        patience: Callable[[Exception], float],
        given_up: threading.Event | None = None,
    ) -> Result:
        """Return what `operation` returns; raise its last error once patience is over.

        `patience` says of an error for how many seconds, from the first attempt on, it is worth trying
        again: 0 for one that will not pass. `given_up` ends this call's patience, as `stop` ends every
        call's. KeyboardInterrupt, and whatever a signal handler raises, comes through at once.
        """
        began = time.monotonic()
        attempt = 0
        while True:
            try:
                return operation()
            except Exception as error:
                attempt += 1
                pause = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt))
                waited = time.monotonic() - began
                worth_s = patience(error)
                if attempt == self.max_attempts or waited + pause >= worth_s:
                    raise
                if waited + pause > TELL_AFTER_S and not self._has_told:
                    self._has_told = True
                    self._tell(error, worth_s)
                if self._is_stopped_within(pause, given_up):
                    raise

    def stop(self) -> None:
        """End all patience: whatever fails from now on is not tried again."""
        self._stopped.set()

    def _is_stopped_within(self, pause: float, given_up: threading.Event | None) -> bool:
        end = time.monotonic() + pause
        while not self._stopped.is_set() and not (given_up is not None and given_up.is_set()):
            left = end - time.monotonic()
            if left <= 0:
                return False
            (given_up or self._stopped).wait(left if given_up is None else min(left, _LOOK_EVERY_S))
        return True
