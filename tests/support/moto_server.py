"""moto's S3 in a process of its own: `python -m tests.support.moto_server CONDITIONS [CERT KEY]`.

Prints its port when it is ready. CONDITIONS says what becomes of `If-None-Match` on writes: `honoured`, as in
AWS; `ignored`, as by stores that never heard of it; `refused` with 501, as by stores that know their limits.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
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


class Handler(MotoRequestHandler):
    """Keeps connections open, as real servers do, and is quiet."""

    protocol_version = "HTTP/1.1"

    def log_request(self, *_: Any) -> None:
        """Say nothing."""


def main(conditions: str, tls: list[str]) -> None:
    """Serve until killed, or until whoever started us is gone."""
    app = Conditions(DomainDispatcherApplication(create_backend_app), conditions)
    context = (tls[0], tls[1]) if tls else None
    server = make_server("127.0.0.1", 0, app, threaded=True, ssl_context=context, request_handler=Handler)
    starter = os.getppid()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    while os.getppid() == starter:
        time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
