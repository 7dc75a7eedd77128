"""Where CRIU hands over a restored tree's missing memory: the socket of its own lazy-pages daemon.

We stand in that daemon's place. CRIU connects to `lazy-pages.socket` in the folder that it works in, and
every process sends its pid and, as one more message of one byte, its userfaultfd descriptor; a zombie sends
its negative pid alone, be it before or after all others. At the end CRIU sends one number more, and fails if
it cannot (criu/uffd.c upstream).
"""

from __future__ import annotations

import os
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME = "lazy-pages.socket"
_PID = struct.Struct("i")


def listen_in(listener: socket.socket, folder_fd: int) -> None:
    """Make a new unix stream socket the one that a CRIU working in `folder_fd` finds."""
    listener.bind(f"/proc/self/fd/{folder_fd}/{_NAME}")
    listener.listen(1)


def receive_memories(channel: socket.socket, count: int) -> Iterator[tuple[int, int]]:
    """The (pid inside, descriptor) of `count` processes, each as it comes. Raises ConnectionError."""
    while count:
        (pid,) = _PID.unpack(_exactly(channel, _PID.size))
        if pid > 0:
            _, fds, _, _ = socket.recv_fds(channel, 1, 1)
            if len(fds) != 1:
                raise ConnectionError("CRIU sent no descriptor")
            os.set_inheritable(fds[0], False)
            yield pid, fds[0]
            count -= 1


def wait_for_end(channel: socket.socket) -> None:
    """Return when CRIU has told that it has finished, or has failed; all living processes were received."""
    try:
        while _PID.unpack(_exactly(channel, _PID.size))[0] < 0:
            pass  # a zombie
    except ConnectionError:
        pass


def _exactly(channel: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (more := channel.recv(size - len(found))):
            raise ConnectionError("CRIU went away")
        found += more
    return found
