"""The metadata services of three clouds, as they answer according to their documentation, on loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from crcli.notice.azure import LOCKS

Reply = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""

NOT_FOUND: Reply = (404, {}, b"")


class Request:
    """What came in."""

    def __init__(self, method: str, target: str, headers: Any, body: bytes) -> None:
        parts = urlsplit(target)
        self.method, self.path, self.headers, self.body = method, parts.path, headers, body
        self.query = {name: values[0] for name, values in parse_qs(parts.query).items()}


class Service:
    """A server whose answers are `reply`'s, or, while `broken` is set, that reply instead.

    `date` replaces the Date header ("" leaves it out). `asked` holds every request; `wait_for` waits for
    some of a kind.
    """

    def __init__(self) -> None:
        self.broken: Reply | None = None
        self.date: str | None = None
        self.asked: list[Request] = []
        self.changed = threading.Condition()
        self.closed = False
        self.port = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def reply(self, request: Request) -> Reply:
        """The answer, to be given by each service."""
        raise NotImplementedError

    def handle(self, request: Request) -> Reply:
        """Note a request, and answer it."""
        with self.changed:
            self.asked.append(request)
            self.changed.notify_all()
        return self.broken or self.reply(request)

    def wait_for(self, wanted: Callable[[Request], bool], times: int = 1) -> None:
        """Return when so many requests, from now on, were of the wanted kind."""
        with self.changed:
            begin = len(self.asked)
            found = self.changed.wait_for(lambda: sum(map(wanted, self.asked[begin:])) >= times, 60)
        assert found, "the service was not asked"

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[None]:
        """Serve within the block."""
        service = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, headers, content = service.handle(
                    Request(self.command, self.path, self.headers, body)
                )
                self.send_response_only(status)
                if service.date != "":
                    self.send_header("Date", service.date or self.date_time_string())
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = answer

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that has gone: one that was stopped does not wait for its answer."""

        server = Server(("127.0.0.1", port), Handler)
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            with self.changed:
                self.closed = True
                self.changed.notify_all()
            server.shutdown()
            thread.join()
            server.server_close()


class Aws(Service):
    """IMDSv2: a token for a PUT, everything else only with one. `items` are the categories that exist."""

    def __init__(self, *, tokens: bool = True) -> None:
        super().__init__()
        self.tokens = tokens
        self.valid: set[str] = set()
        self.items: dict[str, str] = {}

    def interrupt(self, time: str, action: str = "terminate") -> None:
        """Two minutes before the end."""
        self.items["spot/instance-action"] = json.dumps({"action": action, "time": time})

    def recommend(self, time: str) -> None:
        """The instance is at elevated risk."""
        self.items["events/recommendations/rebalance"] = json.dumps({"noticeTime": time})

    def reply(self, request: Request) -> Reply:
        if request.path == "/latest/api/token":
            if not self.tokens:
                return NOT_FOUND
            if request.method != "PUT" or not 1 <= int(request.headers[f"{TOKEN}-ttl-seconds"]) <= 21600:
                return 400, {}, b""
            token = f"token-{len(self.asked)}=="
            self.valid.add(token)
            return 200, {}, token.encode()
        if self.tokens and request.headers.get(TOKEN) not in self.valid:
            return 401, {}, b""
        item = self.items.get(request.path.removeprefix("/latest/meta-data/"))
        return NOT_FOUND if item is None else (200, {"Content-Type": "application/json"}, item.encode())


TOKEN = "X-aws-ec2-metadata-token"


class Gcp(Service):
    """Compute Engine: keys of the instance with ETags, and answers held back until a key changes."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.waits = True

    def set(self, key: str, value: str) -> None:
        """Change a key."""
        with self.changed:
            self.keys[key] = value
            self.changed.notify_all()

    def reply(self, request: Request) -> Reply:
        if request.headers.get("Metadata-Flavor") != "Google":
            return 403, {}, b""
        key = request.path.removeprefix("/computeMetadata/v1/instance/")
        if key not in self.keys:
            return NOT_FOUND
        with self.changed:
            if self.waits and request.query.get("wait_for_change") == "true":
                last = request.query["last_etag"]
                self.changed.wait_for(
                    lambda: self.etag(key) != last or self.closed or self.broken is not None,
                    float(request.query["timeout_sec"]),
                )
            headers = {"Metadata-Flavor": "Google", "ETag": self.etag(key)}
            return 200, headers, self.keys[key].encode()

    def etag(self, key: str) -> str:
        """Of the present value."""
        return f"{sum(self.keys[key].encode()) * 2654435761 % (1 << 64):x}"


class Azure(Service):
    """Scheduled Events: a document; a POST of StartRequests takes an event out of it."""

    def __init__(self, vm: str = "vm-1") -> None:
        super().__init__()
        self.vm = vm
        self.events: list[Any] = []
        self.started: list[str] = []

    @contextmanager
    def serving(self, port: int = 0) -> Iterator[None]:
        """Serve within the block; then nobody needs the lock that those share who ask here."""
        with super().serving(port):
            try:
                yield
            finally:
                Path(f"{LOCKS}/azure-127.0.0.1:{self.port}.lock").unlink(missing_ok=True)

    def schedule(self, event_id: str, kind: str, resources: list[str] | None = None, **more: Any) -> None:
        """Announce an event, to this VM where no others are named."""
        self.events.append(
            {
                "EventId": event_id,
                "EventStatus": "Scheduled",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": [self.vm] if resources is None else resources,
                "NotBefore": "Thu, 22 Jul 2021 04:50:17 GMT",
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
                **more,
            }
        )

    def reply(self, request: Request) -> Reply:
        if request.headers.get("Metadata") != "true" or "api-version" not in request.query:
            return 400, {}, b'{"error": "Bad request"}'
        if request.path == "/metadata/instance/compute/name":
            return 200, {"Content-Type": "text/plain"}, self.vm.encode()
        if request.path != "/metadata/scheduledevents":
            return NOT_FOUND
        if request.method == "POST":
            ids = [one["EventId"] for one in json.loads(request.body)["StartRequests"]]
            self.started += ids
            self.events = [event for event in self.events if event["EventId"] not in ids]
            return 200, {}, b""
        return 200, {}, json.dumps({"DocumentIncarnation": 1, "Events": self.events}).encode()
