"""What stands in for things that led out of a tree: its terminal, pipes to others, unix peers.

A program that had a terminal or a pipe gets a new one, whose other side is read into a log (or thrown
away) by a small process of its own, the keeper, for as long as the program has it open. With
`Stdio.INHERIT` the other sides are kept by ourselves, who pass on what is typed and shown here; what was read
from a pipe is read from our own input.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

from crcli.errors import RestoreFailed
from crcli.findings import Finding, Severity
from crcli.job.relay import Relay
from crcli.pipeline.stages import Stdio
from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from crcli.pipeline.plan import OutsideLink

LOG_FOLDER = "/var/log/crcli"


class Replacements(Struct):
    """Descriptors that CRIU puts in place of external objects, by CRIU's name for each."""

    inherit: dict[str, int] = field(default_factory=dict)
    external: list[str] = field(default_factory=list)
    log: str = ""
    """Where output goes that went to a terminal or a pipe (empty: nothing did)."""

    terminals: dict[int, str] = field(default_factory=dict)
    """The paths of new terminals, by what the old one's number was (N of /dev/pts/N)."""

    relay: Relay = field(default_factory=Relay)
    """The other sides of what is passed on to ours."""
    kept: list[int] = field(default_factory=list)
    """The other sides of what writes into the log, until the keeper has them."""

    def findings(self) -> Iterator[Finding]:
        """Where the user finds what the tree writes from now on."""
        if self.log:
            yield Finding(
                "output-logged",
                Severity.NOTE,
                f"what went to a terminal or a pipe outside the tree now goes to {self.log}",
                {"path": self.log},
                action="appends to that file",
                remedy="`restore --wait --stdio inherit` shows it here instead",
            )

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
            replacements.inherit[link.inherit_key] = _socket(link, replacements)
        elif link.kind == "terminal":
            replacements.inherit[link.key] = _terminal(link, stdio, replacements)
        else:
            replacements.inherit[link.key] = _pipe(link, stdio, replacements)
    if replacements.kept:
        target = _target(stdio, title, replacements)
        _keep(replacements.kept, target)
        for fd in (target, *replacements.kept):
            os.close(fd)
    return replacements


def _terminal(link: OutsideLink, stdio: Stdio, replacements: Replacements) -> int:
    """A new terminal, its other side looked after; CRIU gives it the old one's settings and size.

    What was one terminal, open as /dev/tty and by its own name, is one again.
    """
    if path := replacements.terminals.get(link.terminal):
        return os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    master, slave = os.openpty()
    if link.terminal >= 0:
        replacements.terminals[link.terminal] = os.ttyname(slave)
    if stdio == Stdio.INHERIT:
        replacements.relay.masters.append(master)
        replacements.relay.repaints = True
    else:
        replacements.kept.append(master)
    return slave


def _pipe(link: OutsideLink, stdio: Stdio, replacements: Replacements) -> int:
    """A descriptor in place of a pipe: a pipe again, which unlike a file can be waited for (epoll)."""
    if stdio == Stdio.INHERIT and not link.writes:
        return os.dup(0)
    reads, writes = os.pipe()
    if stdio == Stdio.INHERIT:
        replacements.relay.outputs.append((reads, 2 if {fd for _, fd in link.descriptors} == {2} else 1))
        return writes
    if link.writes:
        replacements.kept.append(reads)
        return writes
    os.close(writes)
    return reads


def _socket(link: OutsideLink, replacements: Replacements) -> int:
    """A descriptor in place of a unix socket: what Node and others give to programs as output is one, too."""
    is_output = link.type == "stream" and not link.path and any(fd in (1, 2) for _, fd in link.descriptors)
    if not is_output:
        return _reconnect(link)
    ours, theirs = socket.socketpair()
    theirs.shutdown(socket.SHUT_WR)  # as input it is at its end
    replacements.kept.append(theirs.detach())
    ours.setblocking(link.waits)
    return ours.detach()


def _target(stdio: Stdio, title: str, replacements: Replacements) -> int:
    """Where the keeper writes to."""
    if stdio == Stdio.INHERIT:
        return os.dup(1)
    if stdio == Stdio.NULL:
        return os.open("/dev/null", os.O_WRONLY)
    return _open_log(title, replacements)


def _keep(sources: list[int], target: int) -> None:
    """Start the keeper, which moves what comes out of `sources` to `target` until all have ended."""
    subprocess.Popen(
        [sys.executable, "-P", "-S", "-E", "-c", _KEEPER, str(target), *map(str, sources)],
        pass_fds=(target, *sources),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


_KEEPER = """
import os, select, sys
target, *sources = map(int, sys.argv[1:])
poll = select.poll()
for source in sources:
    poll.register(source, select.POLLIN)
while sources:
    for source, _ in poll.poll():
        try:
            data = os.read(source, 65536)
        except OSError:
            data = b""
        if not data:
            poll.unregister(source)
            sources.remove(source)
        try:
            os.write(target, data)
        except OSError:
            pass
"""


def _open_log(title: str, replacements: Replacements) -> int:
    try:
        replacements.log = log_path(title)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(replacements.log, flags, 0o600)
    except OSError as error:
        raise RestoreFailed(
            f"the log for what the tree writes to a terminal or a pipe cannot be made: {error}",
            hint="$CRCLI_LOG_DIR names another folder, --stdio null throws it away",
        ) from error


def log_path(title: str) -> str:
    """The log of a restored tree, beside crcli's own; its folder exists on return."""
    folder = os.environ.get("CRCLI_LOG_DIR", LOG_FOLDER)
    os.makedirs(folder, 0o700, exist_ok=True)
    return f"{folder}/{title}.log"


_SOCKET_TYPES = {"dgram": socket.SOCK_DGRAM, "seqpacket": socket.SOCK_SEQPACKET}


def _reconnect(link: OutsideLink) -> int:
    """A connection to where the peer listens; where nobody does, one whose other end is closed."""
    fd = _connected(link.path, _SOCKET_TYPES.get(link.type, socket.SOCK_STREAM))
    os.set_blocking(fd, link.waits)
    return fd


def _connected(path: str, kind: int) -> int:
    if path:
        name = "\0" + path[1:] if path.startswith("@") else path
        peer = socket.socket(socket.AF_UNIX, kind)
        try:
            peer.connect(name)
            return peer.detach()
        except OSError:
            peer.close()
    ours, theirs = socket.socketpair(type=kind)
    theirs.close()
    return ours.detach()
