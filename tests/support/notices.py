"""Sources of notices, run as `Notices` runs them, with what they report."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from crcli.findings import Finding
from crcli.notice import Notice, Notices, Source

ENOUGH_S = 60.0
"""How long a test waits for what must come."""


class Reported(list[Finding]):
    """Findings that a source reports; `wait` returns once there is one."""

    def __init__(self) -> None:
        super().__init__()
        self.came = threading.Event()

    def __call__(self, finding: Finding) -> None:
        self.append(finding)
        self.came.set()

    def wait(self) -> Finding:
        """The first finding."""
        assert self.came.wait(ENOUGH_S), "nothing was reported"
        return self[0]


@contextmanager
def watching(*sources: Source) -> Iterator[Notices]:
    """Within the block the sources watch."""
    notices = Notices(["none"])
    notices.sources = list(sources)
    with notices:
        yield notices


def next_of(notices: Notices) -> Notice:
    """The next notice, which must come."""
    notice = notices.get(ENOUGH_S)
    assert notice is not None, f"no notice came; {notices.findings}"
    return notice


def handlers(numbers: Sequence[signal.Signals]) -> list[object]:
    """What this process does upon signals."""
    return [signal.getsignal(number) for number in numbers]


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        port: int = one.getsockname()[1]
        return port
