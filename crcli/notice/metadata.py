"""Metadata services: small HTTP servers of the vendors on a link-local address.

They are asked directly (never by way of a proxy, never following a redirection), with a short limit on the
connection, and in such a way that waiting for an answer ends when the source is to stop.
"""

from __future__ import annotations

import http.client
import json
import select
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from crcli.errors import UsageError
from crcli.notice.signals import LOOK_S
from crcli.records import Struct

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping

LINK_LOCAL = "http://169.254.169.254"

CONNECT_S = 1.0
ANSWER_S = 3.0
_MOST_BYTES = 256 << 10
_MISSES = 3
"""So many times in a row without a useful answer are worth a word."""


class ServiceSilent(Exception):
    """The service gave no useful answer; it is asked again."""


class Answer(Struct, frozen=True):
    """What a service answered; `at` is the `time.monotonic()` when its first byte came."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    at: float

    def text(self) -> str:
        """The body of an answer of 200; raises ServiceSilent for any other."""
        if self.status != 200:
            raise ServiceSilent(f"the service answers {self.status}")
        return self.body.decode("utf-8", "replace").strip()

    def json(self) -> dict[str, Any]:
        """The JSON object that an answer of 200 holds; raises ServiceSilent for anything else."""
        try:
            found = json.loads(self.text())
        except (ValueError, RecursionError) as error:
            raise ServiceSilent("the service answers something that is not JSON") from error
        if not isinstance(found, dict):
            raise ServiceSilent("the service answers JSON that is not an object")
        return found

    def deadline(self, when: str) -> float | None:
        """Where a time that the service names lies on the clock of `time.monotonic()`; None for no time.

        Our wall clock may be wrong by any amount, so the service's own counts, which its answer bears. That
        is cut to whole seconds: what was cut off would be given twice, so a second is taken back.
        """
        then = epoch_of(when)
        if then is None:
            return None
        now = epoch_of(self.headers.get("Date") or "")
        left = then - time.time() if now is None else then - now - 1.0
        return self.at + left


def epoch_of(when: str) -> float | None:
    """Seconds of the epoch of a time as HTTP or ISO 8601 writes it, in UTC where it names no zone."""
    from datetime import UTC, datetime

    for parse in (datetime.fromisoformat, parsedate_to_datetime):
        try:
            found = parse(when)
            return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    return None


class Metadata:
    """A service at an endpoint, `http://HOST[:PORT][/PREFIX]`. A connection serves one request."""

    def __init__(self, endpoint: str, variable: str = "") -> None:
        try:
            parts = urlsplit(endpoint)
            self._port = parts.port or 80
        except ValueError:
            parts = urlsplit("")
        if parts.scheme != "http" or not parts.hostname:
            raise UsageError(f"{variable or 'the endpoint'} must be an http:// URL, not {endpoint!r}")
        self._host = parts.hostname
        self._prefix = parts.path.rstrip("/")

    @property
    def address(self) -> str:
        """Where it is, HOST:PORT."""
        return f"{self._host}:{self._port}"

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        stopped: threading.Event | None = None,
        patience_s: float = ANSWER_S,
    ) -> Answer:
        """Return the answer, whatever its status; raise ServiceSilent where none came within the limits."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.request(method, self._prefix + path, body, dict(headers or {}))
            _wait(connection, stopped, patience_s)
            at = time.monotonic()
            connection.sock.settimeout(ANSWER_S)
            response = connection.getresponse()
            return Answer(response.status, _body(response, at + ANSWER_S), dict(response.headers), at)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ServiceSilent(f"the service does not answer: {error or type(error).__name__}") from error
        finally:
            connection.close()


def _wait(connection: http.client.HTTPConnection, stopped: threading.Event | None, patience_s: float) -> None:
    """Wait for the answer's first byte."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    until = time.monotonic() + patience_s
    while not poll.poll(LOOK_S * 1000):
        if time.monotonic() > until or (stopped is not None and stopped.is_set()):
            raise TimeoutError("no answer in time")


def _body(response: http.client.HTTPResponse, until: float) -> bytes:
    """The whole body, which is small and comes soon."""
    found = b""
    while part := response.read1(65536):
        found += part
        if len(found) > _MOST_BYTES:
            raise ValueError("the answer is too long")
        if time.monotonic() > until:
            raise TimeoutError("the answer is too slow")
    return found


def keep_looking(
    look: Callable[[], None], every_s: float, stopped: threading.Event, silent: Callable[[str], None]
) -> None:
    """Call `look` at this interval until `stopped`; tell `silent` once per time that it finds no answer."""
    missed = 0
    while not stopped.is_set():
        try:
            look()
            missed = 0
        except ServiceSilent as error:
            missed += 1
            if missed == _MISSES and not stopped.is_set():
                silent(str(error))
        stopped.wait(every_s)
