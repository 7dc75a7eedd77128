"""moto's S3 in a process of its own: `python -m tests.support.moto_server CONDITIONS ADDRESS [CERT KEY]`.

Prints its port when it is ready. CONDITIONS says what becomes of `If-None-Match` on writes: `honoured`, as in
AWS; `ignored`, as by stores that never heard of it; `refused` with 501, as by stores that know their limits.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from flask import has_request_context, request
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import FakeKey
from werkzeug.serving import make_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

NOT_IMPLEMENTED = b"<Error><Code>NotImplemented</Code><Message>a header is not implemented</Message></Error>"


class Conditions:
    """A WSGI application that loses, or refuses, the condition of a write on its way to `app`."""

    def __init__(self, app: Any, conditions: str) -> None:
        self.app = app
        self.conditions = conditions

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and "HTTP_IF_NONE_MATCH" in environ:
            if self.conditions == "refused":
                start_response("501 Not Implemented", [("Content-Length", str(len(NOT_IMPLEMENTED)))])
                return [NOT_IMPLEMENTED]
            if self.conditions == "ignored":
                del environ["HTTP_IF_NONE_MATCH"]
        answer: Iterable[bytes] = self.app(environ, start_response)
        return answer


def serve_ranges_alone() -> None:
    """Have a request for a range of a large object cost that range: moto reads the whole object for each.

    Without this, fetching an object piece by piece takes time that grows with the square of its size, as with
    no real store.
    """
    whole = FakeKey.value.fget

    def value(key: Any) -> Any:
        spooled = key._value_buffer
        if not (has_request_context() and request.method == "GET" and "Range" in request.headers):
            return whole(key)
        with key.lock:
            if not spooled._rolled:
                return spooled._file.getvalue()
            spooled.flush()
            return mmap.mmap(spooled.fileno(), 0, access=mmap.ACCESS_READ)

    FakeKey.value = FakeKey.value.getter(value)


class Handler(MotoRequestHandler):
    """Keeps connections open, as real servers do, and is quiet."""

    protocol_version = "HTTP/1.1"

    def log_request(self, *_: Any) -> None:
        """Say nothing."""


def main(conditions: str, address: str, tls: list[str]) -> None:
    """Serve until killed, or until whoever started us is gone."""
    serve_ranges_alone()
    app = Conditions(DomainDispatcherApplication(create_backend_app), conditions)
    context = (tls[0], tls[1]) if tls else None
    server = make_server(address, 0, app, threaded=True, ssl_context=context, request_handler=Handler)
    starter = os.getppid()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    while os.getppid() == starter:
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
