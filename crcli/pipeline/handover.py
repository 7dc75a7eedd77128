"""The memory of a restored process, handed over by CRIU to be filled in before the process runs.

With userfaultfd(2) the kernel puts pages where there are none, in two thirds of the time that writing into
/proc/PID/mem takes: that clears each page before it is written, and copies what is written twice. CRIU hands
memory over as it does to its lazy-pages daemon.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from crcli.criu.lazy_socket import listen_in, receive_memories
from crcli.memory.extents import SpaceKey, SpaceKind
from crcli.memory.userfault import Userfault

if TYPE_CHECKING:
    from collections.abc import Mapping

_LIMIT_S = 10.0


class Handover:
    """Where CRIU hands over the memory of the one process that it restores."""

    def __init__(self, folder_fd: int) -> None:
        """Have a CRIU that works in this folder find us."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listen_in(self._listener, folder_fd)
        self._channel: socket.socket | None = None
        self._memories: dict[SpaceKey, Userfault] = {}

    def take(self) -> Mapping[SpaceKey, Userfault]:
        """The memory: CRIU has restored the process, and holds it. Raises OSError when it did not come."""
        self._listener.settimeout(_LIMIT_S)
        self._channel, _ = self._listener.accept()
        self._channel.settimeout(_LIMIT_S)
        for pid, fd in receive_memories(self._channel, 1):
            self._memories[SpaceKey(SpaceKind.PROCESS, pid)] = Userfault(fd)
        return self._memories

    def let_go(self) -> None:
        """What was not filled in is zero from now on."""
        for memory in self._memories.values():
            memory.close()

    def close(self) -> None:
        """Let go of everything. CRIU has ended: it fails if it cannot tell that it has finished."""
        self.let_go()
        for one in (self._listener, self._channel):
            if one is not None:
                one.close()
