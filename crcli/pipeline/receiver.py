"""The thread that takes CRIU's pages in, beside the exchange of messages with CRIU."""

from __future__ import annotations

import fcntl
import socket
import termios
import time
from typing import TYPE_CHECKING

from crcli.criu.page_server import receive_pages
from crcli.threads import Worker

if TYPE_CHECKING:
    from crcli.memory.intake import Intake


class Receiver(Worker):
    """Takes CRIU's pages into the intake."""

    def __init__(self, channel: socket.socket, intake: Intake) -> None:
        super().__init__(self._take, name="pages")
        self._channel = channel
        self._intake = intake
        self._failure: BaseException | None = None
        self._moved_at = time.monotonic()

    def _take(self) -> None:
        try:
            receive_pages(self._channel, self._intake, self._moved)
        except BaseException as error:
            self._failure = error
            self.hang_up()

    def _moved(self) -> None:
        self._moved_at = time.monotonic()

    def idle_since(self) -> float:
        """Since when CRIU has sent nothing (monotonic clock): since now, while it is we who take nothing."""
        try:
            waiting = fcntl.ioctl(self._channel, termios.FIONREAD, bytes(4))
        except OSError:
            return self._moved_at
        return time.monotonic() if any(waiting) and self.is_alive() else self._moved_at

    def hang_up(self) -> None:
        """Take no more: CRIU fails at its next page, and lets the tree go."""
        try:
            self._channel.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended already

    def end(self) -> None:
        """Take no more, and let go of everything: whatever it writes into may be closed afterwards."""
        self.hang_up()
        super().join()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the last page is here; raise what went wrong."""
        super().join(timeout)
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise what it has died of, if it has."""
        if self._failure is not None:
            raise self._failure
