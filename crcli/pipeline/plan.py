"""From what was seen of a tree to how it is dumped: no option is ever asked of the user."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from crcli.criu.options import DumpPlan
from crcli.pipeline.stages import Outcome
from crcli.records import Struct, asdict, fields_of

if TYPE_CHECKING:
    from crcli.process.evidence import Evidence, HeldSocket

NO_LOCK = "none"
"""A `network_lock` of those who need none."""


class OutsideLink(Struct, frozen=True):
    """Something of the tree's that leads out of it, and must be put in place again on restore.

    `kind` is "terminal", "pipe" or "unix"; `key` is CRIU's name for it; `external` says whether CRIU has to
    be told of it at the dump already; `path` is where a unix peer listens, `type` its socket's type, `waits`
    whether the tree's end blocks; `writes`/`reads` say which ends the tree holds; `descriptors` are
    (pid, fd); `terminal` is N of /dev/pts/N (-1: another kind), also behind /dev/tty.
    """

    kind: str
    key: str
    external: bool
    path: str = ""
    type: str = ""
    waits: bool = True
    reads: bool = True
    writes: bool = True
    descriptors: tuple[tuple[int, int], ...] = ()
    terminal: int = -1

    @property
    def inherit_key(self) -> str:
        """CRIU's name for it when something is put in its place: that of a unix socket is another there."""
        return self.key.replace("unix[", "socket:[", 1)

    def as_json(self) -> dict[str, Any]:
        """As it stands in the manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> OutsideLink:
        """Read one back."""
        known = {name: data[name] for name in fields_of(cls) if name in data}
        known["descriptors"] = tuple((int(pid), int(fd)) for pid, fd in known.get("descriptors", ()))
        return cls(**known)


def outside_links(evidence: Evidence) -> tuple[OutsideLink, ...]:
    """Everything of the tree that leads to a process outside of it, TCP aside."""
    links = [
        OutsideLink(
            "terminal",
            terminal.criu_key,
            external=True,
            path=terminal.path,
            descriptors=tuple((file.pid, file.fd) for file in terminal.holders),
            terminal=-1 if terminal.index is None else terminal.index,
        )
        for terminal in evidence.outside_terminals
        if terminal.master is not None or terminal.index is None  # else it is hung up: CRIU knows those
    ]
    links += [
        OutsideLink(
            "pipe",
            pipe.criu_key,
            external=False,
            reads=bool(pipe.readers),
            writes=bool(pipe.writers),
            descriptors=tuple((file.pid, file.fd) for file in pipe.holders),
        )
        for pipe in evidence.outside_pipes
        if not pipe.path
    ]
    links += [_unix_link(held) for held in evidence.outside_unix if not _reopened_by_criu(held)]
    return tuple(links)


def _reopened_by_criu(held: HeldSocket) -> bool:
    """Whether it is a datagram socket whose peer has a name: CRIU connects such a one again by itself."""
    return held.socket.type == "dgram" and held.peer is not None and bool(held.peer.path)


def _unix_link(held: HeldSocket) -> OutsideLink:
    return OutsideLink(
        "unix",
        held.criu_key,
        external=True,
        path=held.peer.path if held.peer is not None else "",
        type=held.socket.type,
        waits=not any(file.flags & os.O_NONBLOCK for file in held.holders),
        descriptors=tuple((file.pid, file.fd) for file in held.holders),
    )


def make_plan(
    evidence: Evidence, links: tuple[OutsideLink, ...], outcome: Outcome, *, careful: bool
) -> DumpPlan:
    """Decide how CRIU is to take this tree.

    To let packets through again takes 10 ms, in which a tree that is left running stands still: without a TCP
    socket they are not held back, unless `careful`.
    """
    from crcli.process.watches import Fate  # not for a restore, which has links as well

    ours = evidence.viewer.cgroups
    return DumpPlan(
        pid=evidence.root.nspid[-1] if evidence.entered else evidence.root.pid,
        enter=evidence.root.pid if evidence.entered else 0,
        shell_job=bool(evidence.foreign_sessions),
        manage_cgroups=any(process.cgroups != ours for process in evidence.tree.living),
        network_lock=network_lock() if careful or _may_connect(evidence) else NO_LOCK,
        external=tuple(
            dict.fromkeys(
                [
                    *(link.key for link in links if link.external),
                    *(terminal.criu_key for terminal in evidence.reopened_terminals),
                ]
            )
        ),
        ghost_bytes=evidence.ghost_bytes + (64 << 20),
        watched=tuple(watch.path for watch in evidence.watches if watch.fate is Fate.SEARCHED),
        leave_running=outcome == Outcome.RUNNING,
        leave_stopped=outcome == Outcome.STOPPED,
    )


def _may_connect(evidence: Evidence) -> bool:
    """Whether the tree has a TCP socket, or one of which nobody can say what it is."""
    return any(held.socket.protocol in ("tcp", "") for held in evidence.sockets)


def network_lock() -> str:
    """How CRIU can hold packets back on this host: nftables, iptables, or not at all."""
    if os.path.isdir("/proc/sys/net/netfilter"):
        return "nftables"
    paths = (*os.environ.get("PATH", "").split(":"), "/usr/sbin", "/sbin")
    if any(os.access(f"{path}/iptables-restore", os.X_OK) for path in paths):
        return "iptables"
    return "nftables"
