"""What the tree will notice after a restore, or what will be missing."""

from __future__ import annotations

from collections.abc import Iterator

from crcli.findings import Finding, change, note
from crcli.process.capabilities import CAP_SYS_NICE, capability_names
from crcli.process.evidence import Evidence, HeldSocket
from crcli.process.watches import Fate
from crcli.process.wording import (
    Check,
    and_more,
    connections,
    first_of,
    outsider_list,
    place,
    places,
    process_list,
    who,
)

HTTPS_PORT = 443


def tcp_outside(evidence: Evidence) -> Iterator[Finding]:
    """Connections to outside: they cannot be moved, so they are closed unless asked otherwise."""
    if held := evidence.outside_tcp:
        first = held[0]
        yield change(
            "tcp-outside",
            f"{who(evidence, first.holders)} is connected to {_remote(first)}{and_more(held)}; after a "
            "restore "
            "the program sees such connections as closed, and requests under way on them fail",
            connections(evidence, held),
            "saves the connections; the restore decides, and by default closes those to outside",
            "nothing, if the program connects again and repeats its request, as most clients do; `crcli "
            "restore --tcp keep` keeps them where the address is "
            "still ours and the gap is short",
        )


def _remote(held: HeldSocket) -> str:
    """The other end, with what is spoken there where the port tells."""
    return str(held.socket.remote) + (" (HTTPS)" if held.socket.remote.port == HTTPS_PORT else "")


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


def terminals_lost(evidence: Evidence) -> Iterator[Finding]:
    """Processes in a session that another one leads: only that one can be given its terminal again."""
    if held := evidence.jobs_in_terminals:
        yield change(
            "terminal-jobs",
            f"{first_of(held)} runs in a terminal, as a job of another process; restored, it goes on there "
            "and keys reach it, but it cannot open /dev/tty, nor give the terminal to jobs of its own",
            process_list(held),
            "gives the terminal back to the first process of each session",
            "nothing, unless it is a shell itself or asks for passwords: leave inner shells before the dump",
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


def unix_unaccepted(evidence: Evidence) -> Iterator[Finding]:
    """Connections from outside that wait at a unix listener: CRIU skips them, as it does those of TCP."""
    held = [one for one in evidence.unaccepted_unix if one.outside and not one.closed and not one.unread]
    if held:
        files = [file for one in held for file in one.listener.holders]
        yield change(
            "unix-in-flight",
            f"{who(evidence, files)} listens on {held[0].listener.socket.path}, where connections from "
            "outside "
            "wait; they will be dropped",
            places(evidence, files),
            "skips connections that nobody has accepted yet",
            "nothing, if the other side tries again",
        )


def udp_unread(evidence: Evidence) -> Iterator[Finding]:
    """Datagrams that nobody has read: CRIU saves those of unix sockets, but not of UDP."""
    if held := [one for one in evidence.sockets if one.socket.protocol == "udp" and one.socket.queued]:
        files = [file for one in held for file in one.holders]
        yield change(
            "udp-unread",
            f"{who(evidence, files)} has UDP datagrams that it has not read yet; they will be dropped",
            places(evidence, files) | {"sockets": [str(one.socket.local) for one in held]},
            "drops them, as a network may",
            "nothing, if the protocol repeats what is lost",
        )


def multicast(evidence: Evidence) -> Iterator[Finding]:
    """Multicast groups that a socket has joined: CRIU does not save that."""
    if held := evidence.memberships:
        files = [file for one in held for file in one.socket.holders]
        yield change(
            "multicast",
            f"{who(evidence, files)} listens to the multicast group {held[0].groups[0]}{and_more(held)}; "
            "after a "
            "restore it hears nothing more of it",
            places(evidence, files) | {"groups": sorted({group for one in held for group in one.groups})},
            "restores the socket without its groups",
            "let the program join again after a restore (services found by mDNS, clusters), or start it "
            "again",
        )


def shared_memory(evidence: Evidence) -> Iterator[Finding]:
    """Memory shared with processes outside: each side goes on with a copy of its own."""
    if held := evidence.shared_memory:
        first = held[0]
        yield change(
            "memory-shared-outside",
            f"{who(evidence, first.holders)} shares memory ({first.label}) with {first.outsiders[0].label}"
            f"{and_more(first.outsiders)}, outside the tree; after a restore each has its own",
            {
                "memory": [
                    {
                        "path": one.path,
                        "outsiders": outsider_list(one.outsiders),
                        **places(evidence, one.holders),
                    }
                    for one in held
                ]
            },
            "saves the memory with the tree",
            f"dump a tree that holds {first.outsiders[0].label} too",
        )


def sysv_ipc(evidence: Evidence) -> Iterator[Finding]:
    """System V semaphores and queues of the host: they stay, and on another host they are not there."""
    if held := evidence.sysv_objects:
        first = held[0]
        yield change(
            "sysv-ipc",
            f"{evidence.label(first.pid)} uses System V {first.kind} of the host (id "
            f"{first.id}){and_more(held)}, "
            "which stay behind",
            {"objects": [{"kind": one.kind, "key": one.key, "id": one.id, "pid": one.pid} for one in held]},
            "leaves them as they are: a restore on this host finds them again",
            "to take them along, start the program in an IPC namespace of its own: `unshare --ipc COMMAND`",
        )


def watches_nameless(evidence: Evidence) -> Iterator[Finding]:
    """Watches on deleted files: CRIU puts the file back, watches it and deletes it, which ends the watch."""
    if held := [watch.holder for watch in evidence.watches if watch.fate is Fate.NAMELESS]:
        yield change(
            "watch-deleted",
            f"{who(evidence, held)} watches a file that was deleted; the watch will end",
            places(evidence, held),
            "tells the program of the file's deletion once more",
            "nothing, if the program copes with watches that end",
        )


def events_unread(evidence: Evidence) -> Iterator[Finding]:
    """Events of inotify that nobody has read: `inotify events will be dropped`."""
    if held := evidence.events_unread:
        yield change(
            "events-unread",
            f"{who(evidence, held)} has events of watched files that it has not read yet; they will be "
            "dropped",
            places(evidence, held),
            "restores the watches without them",
            "try again when the program has read them",
        )


def terminals_unread(evidence: Evidence) -> Iterator[Finding]:
    """What waits in terminals of the tree's own: CRIU takes it out and writes it in again, or not at all."""
    if held := evidence.terminals_unread:
        first = held[0]
        yield change(
            "terminal-unread",
            f"{who(evidence, [one.holder for one in held])} drives a terminal or runs in one, where "
            f"{first.size} bytes wait to be read; "
            + (
                "they will be gone, as the program that wrote them has ended"
                if first.is_over
                else "they pass through it once more, and may be echoed, or broken into lines, twice"
            ),
            {"where": [place(evidence, one.holder) | {"bytes": one.size} for one in held]},
            "leaves them out" if first.is_over else "has CRIU write them into the terminal again",
            "try again when the program has read them",
        )


def mounts_left_behind(evidence: Evidence) -> Iterator[Finding]:
    """A tree that sees other mounts than we do, on top of our root: it comes back without them."""
    if evidence.entered and "pid" not in evidence.own_namespaces:
        own = evidence.own_mounts
        yield change(
            "mounts-left-behind",
            f"{evidence.root.label} lives in a mount namespace of its own; it comes back in the one of the "
            "host "
            + (
                f"and sees other files under {', '.join(own[:3])}{and_more(own[2:])}"
                if own
                else "(same mounts)"
            ),
            {"mounts": list(own)},
            "works inside the namespace; the trial shows whether all files are found outside",
            "mount the same at the same places before the restore (systemd: leave out PrivateTmp= and the "
            "like)"
            if own
            else "",
        )


def locked_when_touched(evidence: Evidence) -> Iterator[Finding]:
    """MLOCK_ONFAULT: CRIU locks such memory at once, and all of it, which brings all of it in."""
    if held := evidence.locked_when_touched:
        yield change(
            "memory-locked-whole",
            f"{first_of(held)} has memory that is locked as it is touched (MLOCK_ONFAULT); it will be "
            "locked, and there, as a whole",
            process_list(held, "locked_bytes"),
            "locks it all: what was never touched takes memory too",
            "see that the host of the restore has so much to spare",
        )


def limits(evidence: Evidence) -> Iterator[Finding]:
    """Hard limits above ours: without CAP_SYS_RESOURCE CRIU cannot raise them, and lowers them silently."""
    if held := evidence.limits_above:
        yield change(
            "limits",
            f"{first_of(held)} has resource limits above those of crcli, which lacks CAP_SYS_RESOURCE; they "
            "will "
            "be lowered to crcli's",
            process_list(held),
            "restores what it may",
            "raise the limits of crcli's own shell or service before the restore (`ulimit -Hn`, "
            "LimitNOFILE=)",
        )


def priorities(evidence: Evidence) -> Iterator[Finding]:
    """Priorities above the ordinary: without CAP_SYS_NICE they are lost."""
    held = [
        process
        for process in evidence.tree.living
        if any(thread.is_real_time or thread.nice < 0 for thread in process.thread_settings)
    ]
    if held and not evidence.viewer.may(CAP_SYS_NICE):
        yield change(
            "priority",
            f"{first_of(held)} runs with a priority above the ordinary; crcli lacks CAP_SYS_NICE to give it "
            "back",
            process_list(held),
            "restores it with the ordinary one",
            "run crcli with CAP_SYS_NICE",
        )


def bounding_sets(evidence: Evidence) -> Iterator[Finding]:
    """Capabilities that a later set-user-ID program could have had: a restore cannot go beyond its own."""
    ours = evidence.viewer.capabilities.bounding
    held = [process for process in evidence.tree.living if process.capabilities.bounding & ~ours]
    if held and "user" not in evidence.own_namespaces:
        lost = capability_names(held[0].capabilities.bounding & ~ours)
        yield change(
            "capability-bounds",
            f"{first_of(held)} could gain capabilities that crcli cannot pass on: {', '.join(lost)}",
            process_list(held),
            "restores the others",
            "run crcli with these capabilities, if programs that the tree starts need them (sudo, ping)",
        )


def new_privileges(evidence: Evidence) -> Iterator[Finding]:
    """crcli under no_new_privs: what it restores is so too."""
    held = [process for process in evidence.tree.living if not process.no_new_privs]
    if held and evidence.viewer.no_new_privs:
        yield change(
            "no-new-privs",
            "crcli runs under no_new_privs, and so will what it restores: sudo and other set-user-ID "
            "programs "
            f"stop working for {first_of(held)}",
            process_list(held),
            "",
            "run crcli without no_new_privs (docker: leave out --security-opt no-new-privileges)",
        )


def personalities(evidence: Evidence) -> Iterator[Finding]:
    """Personalities (setarch, gdb): CRIU does not save them."""
    if held := [process for process in evidence.tree.living if process.personality]:
        yield change(
            "personality",
            f"{first_of(held)} runs with a personality ({held[0].personality:#x}: setarch, no address "
            "randomisation); programs that it starts after a restore do not inherit it",
            process_list(held, "personality"),
            "keeps the memory where it is",
            "nothing, unless programs that it starts depend on it",
        )


CHANGES: tuple[Check, ...] = (
    tcp_outside,
    tcp_in_flight,
    unix_outside,
    pipes_outside,
    terminals_outside,
    terminals_lost,
    relatives,
    unix_unaccepted,
    udp_unread,
    multicast,
    shared_memory,
    sysv_ipc,
    watches_nameless,
    events_unread,
    terminals_unread,
    mounts_left_behind,
    locked_when_touched,
    limits,
    priorities,
    bounding_sets,
    new_privileges,
    personalities,
)
