"""An HTTP hook: whoever can POST can give notice.

A POST (to any path) is answered at once, with 202; its body may be `{"reason": TEXT, "seconds": NUMBER,
"urgency": "leave" | "risk"}`. A GET tells the state: `{"state": "watching" | "told" | "saved"}`. Who is not
on this host is refused, but for networks named with `allow=`; so is a web browser, which would let any page
post.
"""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from crcli.errors import UsageError
from crcli.notice.base import Notice, Urgency, seconds
from crcli.notice.signals import LOOK_S

if TYPE_CHECKING:
    import threading

    from crcli.notice.base import Source, Surroundings, Tell

    Network = IPv4Network | IPv6Network

_MOST_BYTES = 64 << 10
_LOOPBACK = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


class HttpHook:
    """Listens while it watches. `state` is what a GET is told."""

    name = "http"

    def __init__(
        self, address: tuple[str, int], allowed: tuple[Network, ...], surroundings: Surroundings
    ) -> None:
        self.address = address
        self.state = "watching"
        self._allowed = (*_LOOPBACK, *allowed)
        self._surroundings = surroundings

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        """Answer until stopped. An address that is taken is an OSError."""
        import socket

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
            daemon_threads = True
            block_on_close = False
            timeout = LOOK_S
            hook, tell_notice = self, staticmethod(tell)

            def server_bind(self) -> None:
                TCPServer.server_bind(self)  # HTTPServer's asks the network for our name
                self.server_name, self.server_port = self.socket.getsockname()[:2]

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that went away in the middle; the job's terminal is not ours."""

        with Server(self.address, _Handler) as server:
            while not stopped.is_set():
                server.handle_request()

    def admits(self, peer: str) -> bool:
        """Whether this address may give notice."""
        address = ip_address(peer.partition("%")[0])
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return any(address in network for network in self._allowed)

    def notice(self, body: bytes) -> Notice:
        """What a POST says; raises ValueError for what it should not."""
        said: Any = json.loads(body) if body.strip() else {}
        if not isinstance(said, dict):
            raise ValueError("the body is to be a JSON object")
        left_s = seconds(said.get("seconds"))
        if said.get("seconds") is not None and left_s is None:
            raise ValueError("seconds is to be a number, 0 or more")
        deadline = self._surroundings.deadline() if left_s is None else time.monotonic() + left_s
        reason = str(said.get("reason") or "told by HTTP")[:200]
        return Notice(self.name, reason, Urgency(said.get("urgency", "leave")), deadline, self._saved)

    def _saved(self) -> None:
        self.state = "saved"


class _Handler(BaseHTTPRequestHandler):
    timeout = 5  # seconds for a whole request to come
    server: Any
    server_version, sys_version = "crcli", ""

    def do_GET(self) -> None:
        if self._is_welcome():
            self._answer(200, {"state": self.server.hook.state})

    def do_POST(self) -> None:
        if not self._is_welcome():
            return
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal() or int(length) > _MOST_BYTES:
            self._answer(413, {"error": "the body needs a Content-Length, of 64 KiB at most"})
            return
        try:
            notice = self.server.hook.notice(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            self._answer(400, {"error": str(error)})
            return
        if notice.urgency is Urgency.LEAVE:
            self.server.hook.state = "told"
        self.server.tell_notice(notice)
        self._answer(202, {"state": self.server.hook.state})

    def _is_welcome(self) -> bool:
        if self.server.hook.admits(self.client_address[0]) and "Origin" not in self.headers:
            return True
        self._answer(403, {"error": "only from this host, and not from a browser"})
        return False

    def _answer(self, status: int, said: dict[str, str]) -> None:
        body = json.dumps(said).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The source of `--notice http:HOST:PORT[,allow=NET]`; HOST is an address, by default loopback's."""
    where, *options = argument.split(",")
    host, _, port = where.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    try:
        if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError("a port is a number from 1 to 65535")
        ip_address(host)
        allowed = tuple(ip_network(option.removeprefix("allow=")) for option in options)
    except ValueError as error:
        raise UsageError(
            f"--notice http:{argument} makes no sense: {error}",
            hint="it looks like http:127.0.0.1:8080, or http:0.0.0.0:8080,allow=10.0.0.0/8",
        ) from error
    return [HttpHook((host, int(port)), allowed, surroundings)]
