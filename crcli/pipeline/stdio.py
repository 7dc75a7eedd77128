"""What stands in for things that led out of a tree: its terminal, pipes to others, unix peers."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crcli.pipeline.stages import Stdio

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.pipeline.plan import OutsideLink

LOG_FOLDER = "/var/log/crcli"


@dataclass
class Replacements:
    """Descriptors that CRIU puts in place of external objects, by CRIU's name for each."""

    inherit: dict[str, int] = field(default_factory=dict)
    external: list[str] = field(default_factory=list)
    log: str = ""
    """Where output goes that went to a terminal or a pipe (empty: nothing did)."""

    def close(self) -> None:
        """Close our copies."""
        for fd in set(self.inherit.values()):
            os.close(fd)
        self.inherit.clear()


def replace_links(links: Sequence[OutsideLink], stdio: Stdio, title: str) -> Replacements:
    """Open something for each link: what `stdio` asks for, or a new connection to a unix peer."""
    replacements = Replacements()
    for link in links:
        if link.external:
            replacements.external.append(link.key)
        if link.kind == "unix":
            replacements.inherit[link.key] = _reconnect(link)
        else:
            replacements.inherit[link.key] = _stream(link, stdio, title, replacements)
    return replacements


def _stream(link: OutsideLink, stdio: Stdio, title: str, replacements: Replacements) -> int:
    """A descriptor in place of a terminal or pipe."""
    if stdio == Stdio.INHERIT:
        numbers = {fd for _, fd in link.descriptors}
        ours = 0 if numbers == {0} or not link.writes else 2 if numbers == {2} else 1
        return os.dup(ours)
    if stdio == Stdio.NULL or not link.writes:
        return os.open("/dev/null", os.O_RDWR)
    replacements.log = log_path(title)
    return os.open(replacements.log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def log_path(title: str) -> str:
    """The log of a restored tree, beside crcli's own; its folder exists on return."""
    folder = os.environ.get("CRCLI_LOG_DIR", LOG_FOLDER)
    os.makedirs(folder, 0o700, exist_ok=True)
    return f"{folder}/{title}.log"


def _reconnect(link: OutsideLink) -> int:
    """A connection to where the peer listens; where nobody does, one whose other end is closed."""
    if link.path:
        name = "\0" + link.path[1:] if link.path.startswith("@") else link.path
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.connect(name)
            return peer.detach()
        except OSError:
            peer.close()
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()
