"""The thread that takes CRIU's pages in, beside the exchange of messages with CRIU."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

from crcli.criu.page_server import receive_pages

if TYPE_CHECKING:
    from crcli.memory.intake import Intake


class Receiver(threading.Thread):
    """Takes CRIU's pages into the intake."""

    def __init__(self, channel: socket.socket, intake: Intake) -> None:
        super().__init__(name="pages", daemon=True)
        self._channel = channel
        self._intake = intake
        self._failure: BaseException | None = None

    def run(self) -> None:
        """What the thread does."""
        try:
            receive_pages(self._channel, self._intake)
        except BaseException as error:
            self._failure = error
            self.hang_up()

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
