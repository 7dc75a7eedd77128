"""An HTTP proxy on loopback that breaks what passes through it, on request.

    with FaultyProxy(server) as proxy:
        proxy.inject(answer(503, "SlowDown"), method="PUT", times=2)
        store = open_store(server.url("x"), endpoint_url=proxy.endpoint_url)

Everything else is handed on unchanged, Host and signature included, to the server behind it.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from tests.support.s3servers import S3Server

SLOW_S = 60


@dataclass
class Exchange:
    """One request on its way through the proxy, for a fault to act on."""

    handler: BaseHTTPRequestHandler
    upstream: tuple[str, int]

    def read_body(self) -> bytes:
        """Take the request's body from the client."""
        return self.handler.rfile.read(int(self.handler.headers.get("Content-Length") or 0))

    def forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        """Send the request on; return the answer and its body."""
        connection = http.client.HTTPConnection(*self.upstream, timeout=SLOW_S)
        try:
            connection.putrequest(self.handler.command, self.handler.path, True, True)
            for name, value in self.handler.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Connection", "close")
            connection.endheaders(body)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def answer(self, response: http.client.HTTPResponse, body: bytes, sent: int | None = None) -> None:
        """Hand the answer to the client: headers, and of the body the first `sent` bytes (None: all)."""
        self.handler.send_response_only(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.handler.send_header(name, value)
        self.handler.send_header("Content-Length", response.getheader("Content-Length") or str(len(body)))
        self.handler.end_headers()
        self.handler.wfile.write(body[:sent])

    def reset(self) -> None:
        """Cut the client's connection with RST."""
        self.handler.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.connection.close()


def pass_on(exchange: Exchange) -> None:
    """No fault."""
    exchange.answer(*exchange.forward(exchange.read_body()))


def answer(status: int, code: str) -> Callable[[Exchange], None]:
    """The store refuses with `status` and the S3 error `code`, and does nothing."""

    def fault(exchange: Exchange) -> None:
        exchange.read_body()
        body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
        exchange.handler.send_response_only(status)
        exchange.handler.send_header("Content-Length", str(len(body)))
        exchange.handler.end_headers()
        if exchange.handler.command != "HEAD":
            exchange.handler.wfile.write(body)

    return fault


def web_page(exchange: Exchange, status: int = 200) -> None:
    """Something else answers in the store's place: its console, or the login of a network."""
    exchange.read_body()
    page = b"<html><body>Please log in</body></html>"
    exchange.handler.send_response_only(status)
    exchange.handler.send_header("Content-Length", str(len(page)))
    exchange.handler.end_headers()
    if exchange.handler.command != "HEAD":
        exchange.handler.wfile.write(page)


def send_elsewhere(exchange: Exchange) -> None:
    """The store redirects to another address, where there is a web page."""
    exchange.read_body()
    if exchange.handler.path == "/elsewhere":
        web_page(exchange)
        return
    exchange.handler.send_response_only(302)
    exchange.handler.send_header("Location", f"http://{exchange.handler.headers['Host']}/elsewhere")
    exchange.handler.send_header("Content-Length", "0")
    exchange.handler.end_headers()


def reset_midway(exchange: Exchange) -> None:
    """The connection breaks while the request is being sent."""
    exchange.handler.rfile.read(int(exchange.handler.headers.get("Content-Length") or 0) // 2)
    exchange.reset()


def lose_answer(exchange: Exchange) -> None:
    """The store does what it is asked, and the connection breaks before it can say so."""
    exchange.forward(exchange.read_body())
    exchange.reset()


def swallow_answer(exchange: Exchange) -> None:
    """The store does what it is asked, and its answer never comes; the connection stays."""
    exchange.forward(exchange.read_body())
    while exchange.handler.connection.recv(1):  # until the client has gone
        pass
    exchange.handler.close_connection = True


def truncate_answer(exchange: Exchange) -> None:
    """The connection ends in the middle of the answer's body, as if that were all."""
    response, body = exchange.forward(exchange.read_body())
    exchange.answer(response, body, len(body) // 2)
    exchange.handler.close_connection = True


def damage_request(exchange: Exchange) -> None:
    """A byte of the request's body changes on the way."""
    body = bytearray(exchange.read_body())
    body[len(body) // 2] ^= 1
    exchange.answer(*exchange.forward(bytes(body)))


def hold_until(released: threading.Event) -> Callable[[Exchange], None]:
    """The store does not answer before `released` is set."""

    def fault(exchange: Exchange) -> None:
        body = exchange.read_body()
        released.wait(SLOW_S)
        exchange.answer(*exchange.forward(body))

    return fault


class Trickle:
    """A fault: the store answers for ever, a byte now and then, so that no client's patience ends by itself.

    `begun` is set once a request waits for the end of such an answer; the first `but` requests are passed on.
    """

    _EVERY_S = 0.2

    def __init__(self, but: int = 0) -> None:
        self.begun = threading.Event()
        self._but = but
        self._lock = threading.Lock()

    def __call__(self, exchange: Exchange) -> None:
        """Answer so, until the client has gone."""
        with self._lock:
            self._but -= 1
            is_spared = self._but >= 0
        if is_spared:
            pass_on(exchange)
            return
        exchange.read_body()
        exchange.handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-slow: ")
        self.begun.set()
        while True:
            exchange.handler.wfile.write(b".")
            time.sleep(self._EVERY_S)


class Throttle:
    """A fault: all requests together bring so many bytes a second, as over a slow line."""

    _PIECE = 64 << 10

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def __call__(self, exchange: Exchange) -> None:
        """Take the body slowly, and hand it on."""
        left = int(exchange.handler.headers.get("Content-Length") or 0)
        body = bytearray()
        while left and (piece := exchange.handler.rfile.read(min(left, self._PIECE))):
            body += piece
            left -= len(piece)
            time.sleep(max(0.0, self._turn(len(piece)) - time.monotonic()))
        exchange.answer(*exchange.forward(bytes(body)))

    def _turn(self, size: int) -> float:
        """When so many bytes, of one request, have passed."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self._rate
            return self._free_at


@dataclass
class Rule:
    """A fault, the requests that it is for, and how many of them it will still hit."""

    fault: Callable[[Exchange], None]
    method: str
    containing: str
    times: float

    def fits(self, line: str) -> bool:
        """Whether the request `METHOD PATH` is to be broken."""
        return self.times > 0 and line.startswith(self.method) and self.containing in line


class FaultyProxy:
    """Listens on a random port until closed. `requests` lists `METHOD PATH` of everything that came.

    `address` is one of this host's; other than on loopback, machines of a test can reach it too.
    """

    def __init__(self, server: S3Server, address: str = "127.0.0.1") -> None:
        parts = urlsplit(server.endpoint_url)
        upstream = (str(parts.hostname), int(parts.port or 80))
        self.requests: list[str] = []
        self._rules: list[Rule] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                """Read a request and let the fault that is due for it, or none, deal with it."""
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    self.close_connection = True
                    return
                try:
                    proxy._fault_for(f"{self.command} {self.path}")(Exchange(self, upstream))
                except OSError:
                    self.close_connection = True  # the client has gone

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                """A connection that we broke ourselves is no news."""

        self._address = address
        self._server = Server((address, 0), Handler)
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    @property
    def endpoint_url(self) -> str:
        """Where the proxy listens."""
        return f"http://{self._address}:{self._server.server_port}"

    def inject(
        self, fault: Callable[[Exchange], None], *, method: str = "", containing: str = "", times: float = 1
    ) -> None:
        """Break the next `times` requests of `method` whose path contains `containing`."""
        with self._lock:
            self._rules.append(Rule(fault, method, containing, times))

    def forgive(self) -> None:
        """Forget the faults that have not come yet."""
        with self._lock:
            self._rules.clear()

    @property
    def waiting(self) -> bool:
        """Whether some fault has not come yet."""
        with self._lock:
            return any(rule.times > 0 for rule in self._rules)

    def count(self, method: str, containing: str = "") -> int:
        """How many such requests came."""
        return sum(line.startswith(method) and containing in line for line in self.requests)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()

    def _fault_for(self, line: str) -> Callable[[Exchange], None]:
        with self._lock:
            self.requests.append(line)
            for rule in self._rules:
                if rule.fits(line):
                    rule.times -= 1
                    return rule.fault
        return pass_on

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
