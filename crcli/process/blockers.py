"""What CRIU cannot take, or loses in silence: a dump must not begin.

The place in the source of CRIU 4.2.1 that refuses is named beside each. What is merely doubtful has no place
here: the trial restore finds it, and costs nothing but a moment.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from crcli.findings import Finding
from crcli.process.capabilities import (
    CAP_SETGID,
    CAP_SETPCAP,
    CAP_SETUID,
    all_capabilities,
    capability_names,
)
from crcli.process.evidence import MOST_EXTERNAL_TERMINALS, Evidence
from crcli.process.files import Kind, OpenFile
from crcli.process.identity import read_stat
from crcli.process.rings import LINK as RING
from crcli.process.tree import Process, tracer_label
from crcli.process.watches import Fate
from crcli.process.wording import (
    Check,
    Held,
    and_more,
    blocker,
    first_of,
    place,
    places,
    process_list,
    who,
)

SCHED_DEADLINE = 6
QUEUE_STATUS_SIZE = 80  # what reading a POSIX message queue gives: its state as text, always so long
MEM_MAJOR = 1  # /dev/null, /dev/zero, /dev/urandom…: reopened by path
TUN_DEVICE = os.makedev(10, 200)
AUTOFS_DEVICE = os.makedev(10, 235)
PIDFD_THREAD = os.O_EXCL
PLUGIN_DEVICES = ("/dev/kfd", "/dev/dri/", "/dev/nvidia")
"""Devices that a plug-in of CRIU may take, or that crcli's own GPU side judges (gpu/preflight.py)."""

DUMPABLE_ANON = frozenset(
    ("eventfd", "eventpoll", "inotify", "fanotify", "signalfd", "timerfd", "pidfd", "bpf-map")
)
"""The anonymous inodes for which CRIU has code (files.c); bpf-map depends on how it was built."""

NAMED_ANON = frozenset(("io_uring", "userfaultfd", "perf_event", "secretmem", "landlock-ruleset"))
"""Those that have a finding of their own."""

DUMPABLE_PROTOCOLS = frozenset(
    ("tcp", "udp", "unix", "", "UDP-Lite", "UDPLITEv6", "RAW", "RAWv6", "PING", "PINGv6", "NETLINK", "PACKET")
)
"""The protocols that CRIU takes (sockets.c, sk-inet.c), by crcli's or the kernel's name; empty: not known."""

SHAREABLE_NAMESPACES = frozenset(("net",))
"""The namespaces that a child may have for itself, provided that the root has left crcli's (CLONE_SUBNS).

Those of mounts are not: CRIU works inside the root's, wherever that is another than ours.
"""


def _anon_or_mapped(evidence: Evidence, name: str, path: str) -> list[Held]:
    """Return who has such an anonymous inode open, or still mapped after closing it."""
    return [*evidence.anon(name), *(one for one in evidence.mappings if one.path == path)]


def io_uring(evidence: Evidence) -> Iterator[Finding]:
    """io_uring: neither its descriptor nor its rings can be dumped (files.c, proc_parse.c)."""
    left = {(ring.pid, ring.fd) for ring in evidence.event_rings}
    unmapped = {(ring.pid, ring.ino) for ring in evidence.event_rings}
    if held := [
        one
        for one in _anon_or_mapped(evidence, "io_uring", RING)
        if (
            (one.pid, one.fd) not in left if isinstance(one, OpenFile) else (one.pid, one.ino) not in unmapped
        )
    ]:
        yield blocker(
            "io-uring",
            f"{who(evidence, held)} uses io_uring, whose queues live in the kernel and cannot be saved",
            places(evidence, held),
            "start the program without it: set the sysctl kernel.io_uring_disabled=2 before it starts; or "
            "try again: event loops of libuv (Node, uvloop) can be dumped once they wait for events",
        )


def userfaultfd(evidence: Evidence) -> Iterator[Finding]:
    """userfaultfd: no code in CRIU for a tree that has one itself."""
    if held := evidence.anon("userfaultfd"):
        yield blocker(
            "userfaultfd",
            f"{who(evidence, held)} handles its own page faults (userfaultfd), which cannot be saved",
            places(evidence, held),
            "wait until the program has closed it, or run it without (virtual machines: without post-copy)",
        )


def perf_event(evidence: Evidence) -> Iterator[Finding]:
    """perf_event_open: no code in CRIU."""
    if held := _anon_or_mapped(evidence, "perf_event", "anon_inode:[perf_event]"):
        yield blocker(
            "perf-event",
            f"{who(evidence, held)} measures performance counters, which cannot be saved",
            places(evidence, held),
            "stop the profiler inside the program first",
        )


def memfd_secret(evidence: Evidence) -> Iterator[Finding]:
    """memfd_secret: memory that even the kernel's own debugging cannot read."""
    if held := _anon_or_mapped(evidence, "secretmem", "/secretmem"):
        yield blocker(
            "memfd-secret",
            f"{who(evidence, held)} keeps memory that nobody else can read (memfd_secret)",
            places(evidence, held),
            "let the program give the secret memory back before the dump, or run it without",
        )


def landlock(evidence: Evidence) -> Iterator[Finding]:
    """A ruleset of Landlock, the one trace that such a sandbox leaves: CRIU brings nothing of it back."""
    if held := evidence.anon("landlock-ruleset"):
        yield blocker(
            "landlock",
            f"{who(evidence, held)} is a ruleset of Landlock; a sandbox that was made of it would be gone "
            "after "
            "a restore, without a word",
            places(evidence, held),
            "start the program without its Landlock sandbox, or let it close the ruleset if it laid none",
        )


def unsupported_files(evidence: Evidence) -> Iterator[Finding]:
    """Any other anonymous inode that CRIU's dump_unsupp_fd would refuse."""
    held = [
        file
        for file in evidence.files
        if file.kind is Kind.ANON and file.anon_name not in DUMPABLE_ANON | NAMED_ANON
    ]
    if held:
        yield blocker(
            "file-unsupported",
            f"{who(evidence, held)} is {held[0].target}, a kind of file that cannot be saved",
            places(evidence, held),
            "let the program close it before the dump",
        )


def eventfd_semaphores(evidence: Evidence) -> Iterator[Finding]:
    """An eventfd that counts down by one: CRIU restores one that a single read empties (eventfd.c)."""
    if held := [one for one in evidence.anon("eventfd") if one.info_field("eventfd-semaphore") == "1"]:
        yield blocker(
            "eventfd-semaphore",
            f"{who(evidence, held)} is an eventfd that serves as a semaphore (EFD_SEMAPHORE); CRIU would "
            "bring "
            "back an ordinary one, with which the program miscounts",
            places(evidence, held),
            "let the program close it before the dump, or use another kind of semaphore",
        )


def epoll_targets(evidence: Evidence) -> Iterator[Finding]:
    """An epoll that waits for a file which its process has closed and another has open (eventpoll.c)."""
    if held := evidence.epolls_astray:
        yield blocker(
            "epoll-closed",
            f"{who(evidence, held)} is an epoll that waits for a file which this process has closed and "
            "another "
            "still has open",
            places(evidence, held),
            "let the program take a file out of the epoll (EPOLL_CTL_DEL) before it closes it",
        )


def paths_only(evidence: Evidence) -> Iterator[Finding]:
    """A socket, FIFO or terminal that is only named (O_PATH): CRIU takes it for open, and asks it in vain."""
    kinds = (Kind.SOCKET, Kind.FIFO, Kind.TTY)
    if held := [file for file in evidence.files if file.path_only and file.kind in kinds]:
        yield blocker(
            "path-only",
            f"{who(evidence, held)} names the {held[0].kind.value} {held[0].path} without opening it "
            "(O_PATH)",
            places(evidence, held),
            "let the program close the descriptor before the dump",
        )


def message_queues(evidence: Evidence) -> Iterator[Finding]:
    """A POSIX message queue: it lies on a mount of the kernel's own, which CRIU does not find."""
    if held := [file for file in evidence.unreachable if _is_queue(file)]:
        yield blocker(
            "posix-mqueue",
            f"{who(evidence, held)} is the POSIX message queue {held[0].path}, which cannot be saved",
            places(evidence, held),
            "let the program close the queue before the dump, or use pipes or sockets instead",
        )


def _is_queue(file: OpenFile) -> bool:
    return file.kind is Kind.REGULAR and file.size == QUEUE_STATUS_SIZE and file.path.count("/") == 1


def proc_of_outsiders(evidence: Evidence) -> Iterator[Finding]:
    """A file about a process outside (/proc/4711/stat): after a restore there may be another, or none."""
    held = [file for file in evidence.files if _is_about_outsider(evidence, file)]
    if held:
        yield blocker(
            "proc-outside",
            f"{who(evidence, held)} is {held[0].path}, about a process that is not in the tree",
            places(evidence, held),
            "let the program close the file before the dump, or dump a tree that holds both processes",
        )


def _is_about_outsider(evidence: Evidence, file: OpenFile) -> bool:
    """Whether it is in /proc/PID of a process that lives; of one that has ended CRIU makes a stand-in."""
    words = file.path.split("/")
    if len(words) < 3 or words[1] != "proc" or not words[2].isdecimal():
        return False
    mount = evidence.mounts.get(file.dev)
    if mount is None or mount.fstype != "proc" or "pid" in evidence.own_namespaces:
        return False
    pid = int(words[2])
    return pid != 1 and not _is_of_tree(evidence, pid)


def watches_lost(evidence: Evidence) -> Iterator[Finding]:
    """A watch on a file that CRIU will not find again (fsnotify.c: `Can't dump that handle`)."""
    if held := [watch for watch in evidence.watches if watch.fate is Fate.LOST]:
        first = held[0]
        fstype = evidence.mounts[first.id.dev].fstype if first.id.dev in evidence.mounts else "unknown"
        holders = [watch.holder for watch in held]
        yield blocker(
            "watch-lost",
            f"{who(evidence, holders)} watches a file (inode {first.id.ino}, on {fstype}) whose path the "
            "kernel "
            "does not tell, so that it could not be watched again",
            {
                "where": [
                    place(evidence, watch.holder) | {"inode": watch.id.ino, "device": watch.id.dev}
                    for watch in held
                ]
            },
            "let the program end its watches (inotify, fanotify) on /proc, /sys, and files that were deleted",
        )


def executables_in_memory(evidence: Evidence) -> Iterator[Finding]:
    """A program that was started from a memfd: CRIU finds no file of it (`No entry for reg-file-ID`)."""
    if held := [process for process in evidence.tree if process.exe.startswith("/memfd:")]:
        yield blocker(
            "executable-in-memory",
            f"{first_of(held)} was started from memory ({held[0].exe}), not from a file",
            process_list(held, "exe"),
            "start the program from a file",
        )


def deadline_scheduling(evidence: Evidence) -> Iterator[Finding]:
    """SCHED_DEADLINE: CRIU knows only priorities (`Inconsistent sched params received`)."""
    held = [
        process
        for process in evidence.tree.living
        if any(thread.policy & 0xFF == SCHED_DEADLINE for thread in process.thread_settings)
    ]
    if held:
        yield blocker(
            "sched-deadline",
            f"{first_of(held)} is scheduled by deadline (SCHED_DEADLINE), which cannot be given back",
            process_list(held),
            f"give it another policy for the dump: `chrt --other --pid 0 {held[0].pid}`",
        )


def uprobes(evidence: Evidence) -> Iterator[Finding]:
    """Probes in the code of a program (perf, bpftrace, an eBPF agent): CRIU refuses (`has uprobes vma`)."""
    if held := [mapping for mapping in evidence.mappings if mapping.path == "[uprobes]"]:
        yield blocker(
            "uprobes",
            f"{who(evidence, held)} has, or had, probes in its code (uprobes: perf, bpftrace, an eBPF "
            "agent); a "
            "copy without the prober would die of them",
            places(evidence, held),
            "start the program again while nothing probes it; ending the probe is not enough",
        )


def seccomp_of_others(evidence: Evidence) -> Iterator[Finding]:
    """Another user's process, and seccomp: what helps CRIU with one forbids it the other (limits.py)."""
    filtered = [process for process in evidence.tree if process.seccomp]
    if filtered and evidence.prlimit_denied:
        other = evidence.prlimit_denied[0]
        yield blocker(
            "seccomp-other-user",
            f"{first_of(filtered)} has a seccomp filter, and {other.label} runs as another user (uid "
            f"{other.uids[0]}); without CAP_SYS_RESOURCE CRIU can save one or the other, not both",
            {
                "filtered": process_list(filtered)["processes"],
                "other_users": process_list(evidence.prlimit_denied, "uids")["processes"],
            },
            "run crcli with CAP_SYS_RESOURCE (docker run --cap-add SYS_RESOURCE), or start the program as "
            "the "
            "user who runs crcli or without its filter",
        )


def capabilities(evidence: Evidence) -> Iterator[Finding]:
    """Capabilities that CRIU could not give back here (restorer.c: `Unable to restore capabilities`)."""
    held = [process for process in evidence.tree.living if lacking_for(evidence, process)]
    if held:
        names = capability_names(lacking_for(evidence, held[0]))
        yield blocker(
            "capabilities",
            f"to bring {first_of(held)} back CRIU needs capabilities that crcli lacks here: "
            f"{', '.join(names)}",
            {
                "processes": [
                    {
                        "pid": process.pid,
                        "command": process.comm,
                        "lacking": capability_names(lacking_for(evidence, process)),
                    }
                    for process in held
                ]
            },
            "run crcli with these capabilities, or start the program without them "
            f"(`setpriv --bounding-set -{names[0].removeprefix('CAP_').lower()} COMMAND`)",
        )


def lacking_for(evidence: Evidence, process: Process) -> int:
    """Return, as bits, which capabilities a restore of this process needs and crcli does not have."""
    viewer, theirs = evidence.viewer, process.capabilities
    if _in_user_namespace(evidence, process):
        return 0
    needed = theirs.permitted | theirs.inheritable | theirs.effective | theirs.ambient
    if set(process.uids) != set(viewer.uids):
        needed |= 1 << CAP_SETUID
    if set(process.gids) != set(viewer.gids):
        needed |= 1 << CAP_SETGID
    if not process.no_new_privs and theirs.bounding != all_capabilities():
        needed |= 1 << CAP_SETPCAP
    return needed & ~viewer.capabilities.permitted


def _in_user_namespace(evidence: Evidence, process: Process) -> bool:
    """Whether what a process may is so in a user namespace only: it is refused, but not for that."""
    return "user" in evidence.own_namespaces or any(
        foreign.pid == process.pid and foreign.name == "user" for foreign in evidence.foreign_namespaces
    )


def user_namespace(evidence: Evidence) -> Iterator[Finding]:
    """A tree in a user namespace: CRIU needs all others with it, and crcli cannot set up its mounts."""
    if "user" in evidence.own_namespaces:
        yield blocker(
            "user-namespace",
            f"{evidence.root.label} lives in a user namespace of its own (rootless container, bubblewrap, "
            "`unshare --user`), which cannot be set up again from outside",
            process_list([evidence.root], "uids"),
            "run the program, or its container, without a user namespace",
        )


def mount_namespace(evidence: Evidence) -> Iterator[Finding]:
    """A tree with a root folder or an init of its own: CRIU needs to be told where to build it up again."""
    own = evidence.own_namespaces
    inner = "pid" in own and evidence.root.nspid[-1:] != (1,)  # for which there is another finding
    if "mnt" in own and "user" not in own and not evidence.entered and not inner:
        yield blocker(
            "mount-namespace",
            f"{evidence.root.label} lives in a mount namespace of its own (a container), which cannot be "
            "built "
            "up again from outside",
            {"namespaces": own, "mounts": list(evidence.own_mounts)},
            "run crcli inside the container, and dump the program there",
        )


def corked(evidence: Evidence) -> Iterator[Finding]:
    """A UDP socket that holds back what was sent (sk-inet.c: `Can't dump corked dgram socket`)."""
    if held := [file for one in evidence.corked for file in one.holders]:
        yield blocker(
            "udp-corked",
            f"{who(evidence, held)} is a UDP socket that holds back what was sent (UDP_CORK, MSG_MORE)",
            places(evidence, held),
            "try again when the program has sent the datagram",
        )


def netlink_unread(evidence: Evidence) -> Iterator[Finding]:
    """Messages of the kernel that nobody has read (sk-netlink.c: `The socket has data to read`)."""
    holders = [
        file
        for one in evidence.sockets
        if one.socket.inode in evidence.netlink_unread
        for file in one.holders
    ]
    if holders:
        yield blocker(
            "netlink-unread",
            f"{who(evidence, holders)} is a netlink socket with messages that were not read, which cannot be "
            "saved",
            places(evidence, holders),
            "try again when the program has read them",
        )


def netlink_groups(evidence: Evidence) -> Iterator[Finding]:
    """A netlink socket in a group beyond the 32nd (sk-netlink.c: `has more than 32 groups`)."""
    if held := [file for one in evidence.netlink_beyond for file in one.holders]:
        yield blocker(
            "netlink-groups",
            f"{who(evidence, held)} is a netlink socket that listens to a group above the 32 that CRIU saves",
            places(evidence, held),
            "let the program close the socket before the dump, or leave the group (NETLINK_DROP_MEMBERSHIP)",
        )


def unix_renamed(evidence: Evidence) -> Iterator[Finding]:
    """A unix socket that was bound by a relative path and then renamed (sk-unix.c: `Unable too cut`)."""
    if held := [one for one in evidence.renamed_sockets if not one.is_findable]:
        files = [file for one in held for file in one.socket.holders]
        yield blocker(
            "unix-renamed",
            f"{who(evidence, files)} is a unix socket that was bound to {held[0].socket.socket.path} and "
            f"renamed to {held[0].path}; it could not be bound again",
            places(evidence, files) | {"paths": [one.path for one in held]},
            "give the file its first name back for the dump, or have the program bind the socket to an "
            "absolute path",
        )


def unix_unaccepted(evidence: Evidence) -> Iterator[Finding]:
    """Connections that wait at a unix listener, closed again or with something to read (sk-unix.c)."""
    if held := [one for one in evidence.unaccepted_unix if one.closed or one.unread]:
        files = [file for one in held for file in one.listener.holders]
        yield blocker(
            "unix-unaccepted",
            f"{who(evidence, files)} listens on {held[0].listener.socket.path}, where connections wait that "
            "were "
            "used before anybody accepted them",
            places(evidence, files) | {"closed": held[0].closed, "unread": held[0].unread},
            "try again when the program has accepted them",
        )


def unreachable_files(evidence: Evidence) -> Iterator[Finding]:
    """Files on a mount outside of the tree's mount namespaces (files-reg.c: `Can't lookup mount`)."""
    if held := [file for file in evidence.unreachable if not _is_queue(file)]:
        yield blocker(
            "file-unreachable",
            f"{who(evidence, held)} is {held[0].path} on a mount that the tree does not see any more (opened "
            "before it got a mount namespace of its own, or unmounted since)",
            places(evidence, held),
            "give the program its standard streams from inside its mount namespace",
        )


def devices(evidence: Evidence) -> Iterator[Finding]:
    """Device files: CRIU knows /dev/null and its kin, terminals, autofs, and tun in a network namespace."""
    held: list[Held] = [
        *(file for file in evidence.devices if _is_unsupported_device(file)),
        *(mapping for mapping in evidence.device_mappings if not _has_plugin(mapping.path)),
    ]
    if held:
        yield blocker(
            "device",
            f"{who(evidence, held)} uses the device {held[0].path}, whose state is not in memory",
            places(evidence, held),
            "let the program close the device before the dump",
        )


def shells_in_shells(evidence: Evidence) -> Iterator[Finding]:
    """A dash below another shell: only the first gets its terminal back, and dash starts nothing without."""
    held = [file for terminal in evidence.reopened_terminals for file in terminal.inner_shells]
    if held:
        yield blocker(
            "terminal-inner-shell",
            f"{who(evidence, held)} controls jobs through /dev/tty below another shell, in a terminal that "
            "the tree itself drives: restored, it could start no program",
            places(evidence, held),
            "leave the inner shell (`exit`), start it with `exec`, or use bash instead of dash",
        )


def external_terminals(evidence: Evidence) -> Iterator[Finding]:
    """`Too many external terminals` (tty.c)."""
    external = (*evidence.outside_terminals, *evidence.reopened_terminals)
    opens = sum(terminal.opens for terminal in external)
    if opens > MOST_EXTERNAL_TERMINALS:
        held = [file for terminal in external for file in terminal.holders]
        yield blocker(
            "terminals-many",
            f"{who(evidence, held)} have /dev/tty or terminals outside the tree open, more than the "
            f"{MOST_EXTERNAL_TERMINALS} that CRIU takes",
            places(evidence, held),
            "end some of these programs, dump the tree in parts, or use bash instead of dash",
        )


def _is_unsupported_device(file: OpenFile) -> bool:
    if file.rdev in (TUN_DEVICE, AUTOFS_DEVICE) or _has_plugin(file.path):
        return False
    return os.major(file.rdev) != MEM_MAJOR


def _has_plugin(path: str) -> bool:
    return path.startswith(PLUGIN_DEVICES)


def tun(evidence: Evidence) -> Iterator[Finding]:
    """A tun device: `Net namespace is required to dump tun link` (tun.c)."""
    held = [file for file in evidence.devices if file.rdev == TUN_DEVICE]
    if held and "net" not in evidence.own_namespaces:
        yield blocker(
            "tun",
            f"{who(evidence, held)} drives a network interface of this host (/dev/net/tun)",
            places(evidence, held),
            "run the whole program in a network namespace of its own (a container, `unshare --net`)",
        )


def pidfds(evidence: Evidence) -> Iterator[Finding]:
    """A pidfd of a process that is not in the tree, or of a single thread (pidfd.c)."""
    held = [file for file in evidence.anon("pidfd") if _points_outside(evidence, file)]
    if held:
        yield blocker(
            "pidfd-outside",
            f"{who(evidence, held)} is a pidfd of process {held[0].info_field('Pid')}, which is not in "
            "the tree (or of a single thread), and could not be found again",
            places(evidence, held),
            "dump a tree that holds both processes, or let the program close the pidfd",
        )


def _points_outside(evidence: Evidence, file: OpenFile) -> bool:
    pid = int(file.info_field("Pid") or -1)
    return (pid > 0 and not _is_of_tree(evidence, pid)) or bool(file.flags & PIDFD_THREAD)


def _is_of_tree(evidence: Evidence, pid: int) -> bool:
    """Whether a process is in the tree, or has been born into it since; one that has ended is not outside."""
    while pid > 1 and pid not in evidence.tree:
        try:
            pid = read_stat(pid).ppid
        except ProcessLookupError:
            return True
    return pid in evidence.tree


def packet_pipes(evidence: Evidence) -> Iterator[Finding]:
    """A pipe in packet mode (pipes.c); autofs makes such pipes, and CRIU knows those."""
    if any(mount.fstype == "autofs" for mount in evidence.mounts.values()):
        return
    held = [file for file in evidence.files if file.kind is Kind.PIPE and file.flags & os.O_DIRECT]
    if held:
        yield blocker(
            "pipe-packets",
            f"{who(evidence, held)} is a pipe in packet mode (O_DIRECT), whose borders cannot be saved",
            places(evidence, held),
            "let the program close the pipe before the dump",
        )


def socket_protocols(evidence: Evidence) -> Iterator[Finding]:
    """A socket of a family or protocol that CRIU does not know; Go servers listen with MPTCP by default."""
    held = [one for one in evidence.sockets if one.socket.protocol not in DUMPABLE_PROTOCOLS]
    if held:
        files = [file for one in held for file in one.holders]
        protocol = held[0].socket.protocol
        yield blocker(
            "socket-unsupported",
            f"{who(evidence, files)} is a socket of the protocol {protocol}, which cannot be saved",
            places(evidence, files) | {"protocols": sorted({one.socket.protocol for one in held})},
            "for a Go program start it with GODEBUG=multipathtcp=0"
            if protocol.startswith("MPTCP")
            else "let the program close the socket before the dump",
        )


def sysv_shm(evidence: Evidence) -> Iterator[Finding]:
    """System V shared memory outside an IPC namespace (check_sysvipc_map_dump in cr-dump.c)."""
    held = [mapping for mapping in evidence.mappings if mapping.is_sysv]
    if held and "ipc" not in evidence.own_namespaces:
        yield blocker(
            "sysv-shm",
            f"{who(evidence, held)} uses System V shared memory that it shares with the whole host",
            places(evidence, held),
            "start the program in an IPC namespace of its own: `unshare --ipc COMMAND` (not "
            "below `crcli run`; `crcli watch` keeps it as well)",
        )


def traced(evidence: Evidence) -> Iterator[Finding]:
    """A tracer anywhere: the kernel gives a process to one at a time, and CRIU needs to be it."""
    held = [process for process in evidence.tree if process.tracer]
    if held:
        tracer = tracer_label(held[0].tracer)
        yield blocker(
            "traced",
            f"{first_of(held)} is traced by {tracer}, and only one tracer can hold a process",
            process_list(held, "tracer"),
            f"end {tracer} (a debugger, strace, or another dump), then try again",
        )


def nested_namespaces(evidence: Evidence) -> Iterator[Finding]:
    """A child in a namespace that is not the root's (generate_ns_id in namespaces.c, pstree.c).

    A network namespace of its own is the treacherous one: CRIU dumps it without a word, and cannot restore.
    """
    own = evidence.own_namespaces
    held = [
        foreign
        for foreign in evidence.foreign_namespaces
        if foreign.name not in SHAREABLE_NAMESPACES or foreign.name not in own
    ]
    if held:
        first = evidence.tree.process(held[0].pid)
        kinds = ", ".join(foreign.name for foreign in held if foreign.pid == first.pid)
        yield blocker(
            "namespace-nested",
            f"{first.label} lives in other namespaces than the root ({kinds}); such a sandbox inside "
            "the tree could not be restored",
            {"namespaces": [{"pid": one.pid, "namespace": one.name} for one in held]},
            "wait until the sandboxed child has ended, or start the program without its sandbox; whether the "
            f"child could be dumped by itself, `crcli check {first.pid}` says",
        )


def threads_apart(evidence: Evidence) -> Iterator[Finding]:
    """A thread that has left what its process shares: CRIU asks the first thread only, and says nothing."""
    if held := evidence.threads_apart:
        first = held[0]
        yield blocker(
            "thread-apart",
            f"{evidence.label(first.pid)} has a thread ({first.tid}) with {first.what} of its own"
            f"{and_more(held)}; after a restore it would have those of the other threads",
            {"threads": [{"pid": one.pid, "tid": one.tid, "apart": one.what} for one in held]},
            "wait until that thread has ended, or have the program do such work (unshare, setns) in a "
            "process of its own",
        )


def memory_in_common(evidence: Evidence) -> Iterator[Finding]:
    """Two processes with one memory, by clone(2) with CLONE_VM (kcmp-ids.c: `Can't make VM id`).

    Of one that is not in the tree CRIU knows nothing: it would write on into what is being saved.
    """
    if held := evidence.sharing_memory:
        first = held[0]
        outside = "" if first.pid in evidence.tree else ", outside the tree"
        yield blocker(
            "memory-in-common",
            f"{first.process.label} has one memory with {first.comm} ({first.pid}){outside}, without being a "
            "thread of it (CLONE_VM)",
            {
                "processes": [
                    {"pid": one.process.pid, "command": one.process.comm, "with": one.pid} for one in held
                ]
            },
            "wait until one of them has ended or started another program, or have them be threads instead",
        )


def session_outside_pid_namespace(evidence: Evidence) -> Iterator[Finding]:
    """A pid namespace whose init never called setsid (cr-dump.c: `session leader … is outside`)."""
    if "pid" not in evidence.own_namespaces:
        return
    held = [process for process in evidence.tree if process.nssid and process.nssid[-1] == 0]
    if held:
        yield blocker(
            "session-outside-pid-namespace",
            f"{first_of(held)} is in a session that began outside of its pid namespace",
            process_list(held),
            "start the namespace's first process with setsid: `unshare --pid --fork setsid COMMAND`",
        )


def pid_namespace_without_init(evidence: Evidence) -> Iterator[Finding]:
    """A root that is not process 1 of its pid namespace (dump_namespaces in namespaces.c)."""
    root = evidence.root
    if "pid" in evidence.own_namespaces and root.nspid[-1:] != (1,) and not evidence.entered:
        yield blocker(
            "pid-namespace-without-init",
            f"{root.label} lives in a pid namespace (a container) and is not its first process",
            process_list([root]),
            "dump the namespace's first process, and with it the whole container",
        )


def root_elsewhere(evidence: Evidence) -> Iterator[Finding]:
    """A tree that CRIU must enter, in namespaces that have no CRIU in them, nor what a trial needs."""
    if evidence.entered and not evidence.is_rooted_here:
        remedy = (
            "a tree that was restored with --root cannot be dumped: restore its image without, and dump that"
        )
        if evidence.root.root != "/":
            remedy = "dump the first process of these namespaces, and with it all that lives there"
        yield blocker(
            "root-elsewhere",
            f"{evidence.root.label} has another root folder than this host, in namespaces that it is not the "
            "first process of",
            process_list([evidence.root]),
            remedy,
        )


def stuck(evidence: Evidence) -> Iterator[Finding]:
    """Tasks in uninterruptible sleep (vfork parents are such), or frozen: CRIU waits for them in vain."""
    if held := evidence.stuck:
        yield blocker(
            "uninterruptible",
            f"{first_of(held)} waits in the kernel and cannot be interrupted (a slow disk or network file "
            "system, a child of vfork that has not started its program yet, or a frozen cgroup)",
            process_list(held),
            "try again when the operation is over, or the cgroup thawed; `cat /proc/PID/wchan` says what it "
            "waits for",
        )


def unfilled(evidence: Evidence) -> Iterator[Finding]:
    """Memory that a lazy restore has not brought yet: CRIU would take the missing pages for zeros."""
    if held := evidence.unfilled:
        yield blocker(
            "memory-missing",
            f"the memory of {first_of(held)} is still being fetched, after `crcli restore --lazy`",
            process_list(held),
            "wait until the process called crcli-pager has ended; with the store away it cannot",
        )


def leader_exited(evidence: Evidence) -> Iterator[Finding]:
    """A process whose first thread has ended while others run: `Zombies with threads are not supported`."""
    if held := [process for process in evidence.tree if process.leader_exited]:
        yield blocker(
            "leader-exited",
            f"the main thread of {first_of(held)} has ended while others run on, which cannot be saved",
            process_list(held),
            "let the main thread wait for the others instead of calling pthread_exit",
        )


BLOCKERS: tuple[Check, ...] = (
    user_namespace,  # first: what else is found of a sandbox follows from it, and its remedy would not help
    mount_namespace,
    nested_namespaces,
    io_uring,
    userfaultfd,
    perf_event,
    memfd_secret,
    landlock,
    unsupported_files,
    eventfd_semaphores,
    epoll_targets,
    paths_only,
    message_queues,
    proc_of_outsiders,
    watches_lost,
    unreachable_files,
    devices,
    shells_in_shells,
    external_terminals,
    tun,
    pidfds,
    packet_pipes,
    socket_protocols,
    corked,
    netlink_unread,
    netlink_groups,
    unix_renamed,
    unix_unaccepted,
    sysv_shm,
    traced,
    uprobes,
    executables_in_memory,
    deadline_scheduling,
    seccomp_of_others,
    capabilities,
    threads_apart,
    memory_in_common,
    session_outside_pid_namespace,
    pid_namespace_without_init,
    root_elsewhere,
    stuck,
    unfilled,
    leader_exited,
)
