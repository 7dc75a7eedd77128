"""What this host has now, for a restore to compare with."""

from __future__ import annotations

import os

from crcli.process.sockets import sockets_of


def established_here() -> set[tuple[str, str]]:
    """The (local, remote) ends of all TCP connections of this network namespace, as "address:port"."""
    return {
        (str(found.local), str(found.remote))
        for found in sockets_of(os.getpid(), same_netns=True).values()
        if found.protocol == "tcp" and found.connected
    }
