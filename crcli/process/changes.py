"""What the tree will notice after a restore, or what will be missing."""

from __future__ import annotations

from collections.abc import Iterator

from crcli.findings import Finding
from crcli.process.evidence import Evidence, HeldSocket
from crcli.process.wording import (
    Check,
    and_more,
    change,
    connections,
    first_of,
    note,
    outsider_list,
    places,
    process_list,
    who,
)


def tcp_outside(evidence: Evidence) -> Iterator[Finding]:
    """Connections to outside: they cannot be moved, so they are closed unless asked otherwise."""
    if held := evidence.outside_tcp:
        first = held[0]
        yield change(
            "tcp-outside",
            f"{who(evidence, first.holders)} is connected to {first.socket.remote}{and_more(held)}; after a "
            "restore the program sees such connections as closed",
            connections(evidence, held),
            "saves the connections; the restore decides, and by default closes those to outside",
            "nothing, if the program reconnects; `crcli restore --tcp keep` keeps them where the address is "
            "still ours and the gap is short",
        )


def tcp_in_flight(evidence: Evidence) -> Iterator[Finding]:
    """Connections that are neither open nor accepted: CRIU skips them."""
    if held := evidence.in_flight_tcp:
        first = held[0]
        yield change(
            "tcp-in-flight",
            f"{who(evidence, first.holders)} has connections that are being opened "
            f"({first.socket.local}{and_more(held)}); they will be dropped",
            connections(evidence, held),
            "skips connections that nobody has accepted yet",
            "nothing, if the other side tries again",
        )


def unix_outside(evidence: Evidence) -> Iterator[Finding]:
    """Unix sockets whose other end is a process outside (D-Bus, the journal, docker.sock, X)."""
    for one in evidence.outside_unix:
        named_datagram = one.socket.type == "dgram" and one.peer is not None and one.peer.path
        make = note if named_datagram else change
        yield make(
            "unix-datagram-outside" if named_datagram else "unix-outside",
            f"{who(evidence, one.holders)} is connected to {_other_end(one)}, outside the tree"
            + ("" if named_datagram else "; the connection cannot be saved"),
            places(evidence, one.holders)
            | {
                "inode": one.socket.inode,
                "peer_inode": one.socket.peer,
                "peer_path": one.peer.path if one.peer else "",
                "peer_processes": outsider_list(one.outsiders),
            },
            "connects to the same path again on restore"
            if one.peer and one.peer.path
            else "gives the restored program a closed connection",
            ""
            if named_datagram
            else "dump a tree that holds both processes, or let the program close the connection before",
        )


def _other_end(one: HeldSocket) -> str:
    path = one.peer.path if one.peer and one.peer.path else one.socket.path
    owner = one.outsiders[0].label if one.outsiders else "an unknown process"
    return f"{owner} through {path}" if path else owner


def pipes_outside(evidence: Evidence) -> Iterator[Finding]:
    """Pipes whose other end is outside: CRIU saves half a pipe without a word; the program gets EPIPE."""
    for pipe in evidence.outside_pipes:
        other = pipe.outsiders[0]
        direction = "writes into" if pipe.writers else "reads from"
        yield change(
            "fifo-outside" if pipe.path else "pipe-outside",
            f"{who(evidence, pipe.holders)} {direction} {pipe.path or 'a pipe'} whose other end belongs to "
            f"{other.label}{and_more(pipe.outsiders)}, outside the tree",
            places(evidence, pipe.holders)
            | {"pipe": pipe.path or pipe.criu_key, "other_end": outsider_list(pipe.outsiders)},
            "opens the path again on restore"
            if pipe.path
            else "gives the restored program a log, this terminal or /dev/null instead (restore --stdio)",
            f"dump a tree that holds {other.label} too, such as the shell that started the pipeline",
        )


def terminals_outside(evidence: Evidence) -> Iterator[Finding]:
    """Terminals that somebody outside drives: a shell's, ssh's, a terminal window's."""
    for terminal in evidence.outside_terminals:
        masters = [terminal.master] if terminal.master else []
        driver = f", driven by {masters[0].label}" if masters else ""
        yield change(
            "terminal-outside",
            f"{who(evidence, terminal.holders)} uses the terminal {terminal.path}{driver}; it stays here",
            places(evidence, terminal.holders)
            | {
                "terminal": terminal.path,
                "driver": outsider_list(masters),
            },
            "saves the terminal's settings; the restore puts another in its place (restore --stdio)",
            "`crcli restore --stdio inherit` continues in the terminal where it is called",
        )


def relatives(evidence: Evidence) -> Iterator[Finding]:
    """Daemonised children: no longer in the tree, so not in the image, and alive beside the copy."""
    if held := evidence.relatives:
        yield change(
            "relative-outside",
            f"{held[0].comm} ({held[0].pid}){and_more(held)} was started by this tree and has left it (a "
            "daemon); it will not be in the image",
            {"processes": [{"pid": r.pid, "command": r.comm, "reason": r.reason} for r in held]},
            "leaves it alone",
            "start the program under a parent that keeps its daemons (`crcli run`), or end the daemon first",
        )


def cpu_affinity(evidence: Evidence) -> Iterator[Finding]:
    """Processor affinity: CRIU does not save it."""
    if held := evidence.pinned:
        yield change(
            "cpu-affinity",
            f"{first_of(held)} is bound to processors {held[0].cpus}; CRIU does not save that",
            process_list(held, "cpus"),
            "binds all threads of the restored process to the same list",
            "where single threads had lists of their own: `taskset --cpu-list --pid LIST TID`",
        )


CHANGES: tuple[Check, ...] = (
    tcp_outside,
    tcp_in_flight,
    unix_outside,
    pipes_outside,
    terminals_outside,
    relatives,
    cpu_affinity,
)
