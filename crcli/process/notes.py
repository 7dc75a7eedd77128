"""What is worth knowing: crcli takes care of it by itself."""

from __future__ import annotations

from collections.abc import Iterator

from crcli.findings import Finding, note
from crcli.process.evidence import Evidence
from crcli.process.files import Kind, OpenFile
from crcli.process.watches import Fate
from crcli.process.wording import (
    Check,
    Held,
    and_more,
    connections,
    count,
    file_list,
    first_of,
    how_to_continue,
    place,
    places,
    process_list,
    who,
)


def tcp_inside(evidence: Evidence) -> Iterator[Finding]:
    """Connections with both ends in the tree live on."""
    if held := evidence.inside_tcp:
        yield note(
            "tcp-inside",
            f"{count(held, 'end')} of TCP connections inside the tree will live on",
            connections(evidence, held),
            "saves them with what is in flight",
        )


def tcp_listening(evidence: Evidence) -> Iterator[Finding]:
    """Ports that must be free where the tree is restored."""
    if held := evidence.listeners:
        addresses = list(dict.fromkeys(str(one.socket.local) for one in held))
        yield note(
            "tcp-listening",
            f"{who(evidence, held[0].holders)} listens on {', '.join(addresses)}, which must be free where "
            "it is restored",
            {"addresses": addresses},
            "opens the ports again on restore",
        )


def unix_renamed(evidence: Evidence) -> Iterator[Finding]:
    """A unix socket whose file was renamed since, as HAProxy does: CRIU would bind it to its first name."""
    if held := [one for one in evidence.renamed_sockets if one.is_findable]:
        files = [file for one in held for file in one.socket.holders]
        yield note(
            "socket-renamed",
            f"{who(evidence, files)} is a unix socket that was bound to {held[0].socket.socket.path} and "
            f"renamed to {held[0].path}",
            places(evidence, files) | {"paths": [one.path for one in held]},
            "binds it to today's name on restore",
        )


def terminals_reopened(evidence: Evidence) -> Iterator[Finding]:
    """/dev/tty in a terminal that the tree itself drives: an interactive dash, a pager or editor in tmux."""
    held = [file for terminal in evidence.reopened_terminals for file in terminal.holders]
    if held:
        yield note(
            "terminal-reopened",
            f"{who(evidence, held)} has /dev/tty open, which is a terminal that the tree itself drives",
            places(evidence, held),
            "opens that terminal by its own name (/dev/pts/N) on restore",
        )


def locks(evidence: Evidence) -> Iterator[Finding]:
    """File locks: taken again on restore, which waits if somebody else has them."""
    if held := evidence.locks:
        first = held[0]
        yield note(
            "file-locks",
            f"{who(evidence, [first.file])} holds a lock on {first.file.path}{and_more(held)}",
            {
                "locks": [
                    place(evidence, one.file) | {"kind": one.lock.kind, "mode": one.lock.mode} for one in held
                ]
            },
            "saves the locks and takes them again on restore",
        )


def deleted_files(evidence: Evidence) -> Iterator[Finding]:
    """Open files without a name: their content travels in the image."""
    held = [file for file in evidence.deleted if not file.needs_link_remap]
    if held:
        yield note(
            "deleted-files",
            f"{count(held, 'deleted file')} still in use ({held[0].path}{and_more(held)}), "
            f"{evidence.ghost_bytes} bytes in all",
            {"files": [{"path": file.path, "bytes": file.size} for file in held]},
            "stores their content in the image",
        )


def link_remaps(evidence: Evidence) -> Iterator[Finding]:
    """Files deleted under one name and kept under another: glibc's semaphores, spooled mail."""
    held = [file for file in evidence.deleted if file.needs_link_remap]
    if held:
        yield note(
            "link-remap",
            f"{count(held, 'file')} in use under a name that was deleted, with another name left "
            f"({held[0].path}{and_more(held)}); POSIX semaphores are such files",
            {"files": [{"path": file.path, "bytes": file.size, "links": file.nlink} for file in held]},
            "gives each a temporary name beside it, and stores that file in the image",
        )


def files_in_memory(evidence: Evidence) -> Iterator[Finding]:
    """Files on tmpfs: CRIU expects to find them again, and on another host they are not there."""
    if held := evidence.in_memory_files:
        yield note(
            "tmpfs-files",
            f"{count(held, 'file')} on a file system in memory in use ({held[0].path}{and_more(held)})",
            file_list(held),
            "stores their content in the image",
        )


def databases(evidence: Evidence) -> Iterator[Finding]:
    """SQLite: database and journal belong together, and the locks that guard them are gone after the kill."""
    if held := evidence.databases:
        yield note(
            "sqlite",
            f"{held[0].path}{and_more(held)} is an SQLite database in use",
            {"databases": [{"path": one.path, "siblings": list(one.siblings)} for one in held]},
            "stores the database with its journal as they are at the frozen instant",
            "let nobody else write to the database between dump and restore",
        )


def written_files(evidence: Evidence) -> Iterator[Finding]:
    """Files open for writing: they must look the same on restore."""
    if held := evidence.written_files:
        yield note(
            "files-written",
            f"{count(held, 'file')} open for writing ({held[0].path}{and_more(held)})",
            file_list(held),
            "stores their content in the image, up to a limit",
        )


def sessions(evidence: Evidence) -> Iterator[Finding]:
    """A root started by a shell: its session or process group has a leader that stays behind."""
    if held := evidence.foreign_sessions:
        yield note(
            "session-outside",
            f"{first_of(held)} belongs to a session or process group that began outside the tree",
            process_list(held, "sid", "pgid"),
            "treats the tree as a job of a shell",
        )


def own_namespaces(evidence: Evidence) -> Iterator[Finding]:
    """A tree in namespaces of its own: they are saved with it."""
    if own := evidence.own_namespaces:
        yield note(
            "namespaces",
            f"{evidence.root.label} lives in namespaces of its own: {', '.join(own)}",
            {"namespaces": own},
            "saves them with the tree",
        )


def other_users(evidence: Evidence) -> Iterator[Finding]:
    """Processes whose limits the kernel will not show: without CAP_SYS_RESOURCE CRIU fails on those."""
    if held := evidence.prlimit_denied:
        yield note(
            "other-user",
            f"{first_of(held)} runs as another user (uid {held[0].uids[0]}); crcli lacks CAP_SYS_RESOURCE",
            process_list(held, "uids"),
            "reads the limits of such processes from /proc instead",
        )


def cpu_affinity(evidence: Evidence) -> Iterator[Finding]:
    """Processor affinity: CRIU does not save it, so we do, thread by thread."""
    if held := evidence.pinned:
        yield note(
            "cpu-affinity",
            f"{first_of(held)} is bound to processors {held[0].cpus}; CRIU does not save that",
            process_list(held, "cpus"),
            "binds each restored thread to the same processors, as far as they are there",
        )


def thread_settings(evidence: Evidence) -> Iterator[Finding]:
    """Input/output priority and timer slack: CRIU does not save them, so we do."""
    kept = evidence.settings_to_keep.items()
    pids = [pid for pid, ones in kept if any(own.keys() - {"cpus"} for _, own in ones)]
    if held := [evidence.tree.process(pid) for pid in pids]:
        yield note(
            "thread-settings",
            f"{first_of(held)} has an input/output priority or a timer slack of its own, which CRIU does not "
            "save",
            process_list(held),
            "gives each restored thread its own again",
        )


def zombies(evidence: Evidence) -> Iterator[Finding]:
    """Children that have ended and were not waited for: their exit codes wait on."""
    if held := [process for process in evidence.tree if process.is_zombie]:
        yield note(
            "zombie",
            f"{first_of(held)} has ended, and its parent has not asked for its exit code yet",
            process_list(held),
            "keeps the exit code for the parent",
        )


def timers(evidence: Evidence) -> Iterator[Finding]:
    """Timers: they go on from where they stood, and do not notice the time between."""
    held = [file for file in evidence.anon("timerfd") if _is_armed(file)]
    pids = sorted({file.pid for file in held} | set(evidence.timers))
    if pids:
        yield note(
            "timers",
            f"{first_of([evidence.tree.process(pid) for pid in pids])} has timers",
            {"posix_timers": evidence.timers, **places(evidence, held)},
            "lets them go on from where they stand; only those for a time of day notice the time between",
        )


def _is_armed(timer: OpenFile) -> bool:
    """Whether a timerfd will expire, or has done so, as one that repeats and was not read since."""
    return any(timer.info_field(name) != "(0, 0)" for name in ("it_value", "it_interval"))


def seccomp(evidence: Evidence) -> Iterator[Finding]:
    """Filters of system calls (sandboxes of browsers, containers, systemd)."""
    if held := [process for process in evidence.tree.living if process.seccomp]:
        yield note(
            "seccomp",
            f"{first_of(held)} runs under seccomp",
            process_list(held, "seccomp"),
            "saves the filters, and lays them again before the program goes on",
        )


def security_modules(evidence: Evidence) -> Iterator[Finding]:
    """Profiles of AppArmor, labels of SELinux: the host of the restore must know them."""
    if held := [process for process in evidence.tree.living if is_confined(process.lsm)]:
        yield note(
            "lsm-profile",
            f"{first_of(held)} is confined by a security module ({held[0].lsm})",
            process_list(held, "lsm"),
            "saves the name of the profile, and puts the restored process under it",
            "load the same profile where it is restored",
        )


def is_confined(label: str) -> bool:
    """Whether a label means anything: neither AppArmor's `unconfined` nor SELinux's unconfined domains."""
    return bool(label) and not label.startswith("unconfined") and ":unconfined_t:" not in f"{label}:"


def event_rings(evidence: Evidence) -> Iterator[Finding]:
    """The io_uring of libuv's event loops: no ring can be saved, but they do without."""
    if rings := evidence.event_rings:
        pids = list(dict.fromkeys(ring.pid for ring in rings))
        yield note(
            "io-uring-left",
            f"{evidence.label(pids[0])}{and_more(pids)} has event loops (libuv) that use io_uring, which "
            "cannot be saved",
            {"where": [{"pid": ring.pid, "fd": ring.fd, "epoll": ring.epoll} for ring in rings]},
            "has them go on without it, as where the kernel has none",
        )


def huge_pages(evidence: Evidence) -> Iterator[Finding]:
    """Memory in huge pages of its own: they must be free where it is restored, and for the trial here."""
    if held := [process for process in evidence.tree.living if process.huge_bytes]:
        yield note(
            "huge-pages",
            f"{first_of(held)} has {sum(process.huge_bytes for process in held)} bytes in huge pages",
            process_list(held, "huge_bytes"),
            "saves them like other memory",
            "as many huge pages must be free where it is restored, and here for the trial: "
            "/proc/sys/vm/nr_hugepages",
        )


def remote_files(evidence: Evidence) -> Iterator[Finding]:
    """Files on the network or FUSE, open, mapped or as a working folder."""
    files: list[Held] = []
    for named in evidence.remote_files:
        files += [*named.open, *named.mapped]
    files += [file for file in evidence.files if file.kind is Kind.DIRECTORY and evidence.is_remote(file.dev)]
    folders = evidence.remote_folders
    if files or folders:
        first = who(evidence, files) if files else first_of(folders)
        path = files[0].path if files else folders[0].cwd
        yield note(
            "remote-files",
            f"{first} uses {path}, which a server or a program outside keeps (network, FUSE)",
            places(evidence, files) | process_list(folders, "cwd"),
            "leaves the files where they are",
            "mount the same at the same place where it is restored",
        )


def watches_searched(evidence: Evidence) -> Iterator[Finding]:
    """Watches that CRIU could not find by itself, as on overlay file systems: we have looked for the path."""
    if held := [watch for watch in evidence.watches if watch.fate is Fate.SEARCHED]:
        yield note(
            "watch-searched",
            f"{who(evidence, [watch.holder for watch in held])} watches {held[0].path}, on a file system "
            "that "
            "does not tell the path",
            {"paths": sorted({watch.path for watch in held})},
            "has looked for the path, and tells CRIU",
        )


def stopped(evidence: Evidence) -> Iterator[Finding]:
    """Stopped processes come back stopped."""
    if held := evidence.stopped:
        yield note(
            "stopped",
            f"{first_of(held)} is stopped, and will be when it comes back",
            process_list(held),
            "keeps the state",
            how_to_continue(held),
        )


NOTES: tuple[Check, ...] = (
    tcp_inside,
    tcp_listening,
    unix_renamed,
    terminals_reopened,
    locks,
    deleted_files,
    link_remaps,
    files_in_memory,
    databases,
    written_files,
    sessions,
    own_namespaces,
    other_users,
    cpu_affinity,
    thread_settings,
    zombies,
    timers,
    seccomp,
    security_modules,
    event_rings,
    huge_pages,
    remote_files,
    watches_searched,
    stopped,
)
