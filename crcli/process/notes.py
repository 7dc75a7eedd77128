"""What is worth knowing: crcli takes care of it by itself."""

from __future__ import annotations

from collections.abc import Iterator

from crcli.findings import Finding
from crcli.process.evidence import Evidence
from crcli.process.wording import (
    Check,
    Held,
    and_more,
    connections,
    count,
    file_list,
    first_of,
    note,
    place,
    places,
    process_list,
    who,
)

GPU_DEVICES = "/dev/nvidia"


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


def stopped(evidence: Evidence) -> Iterator[Finding]:
    """Stopped processes come back stopped."""
    if held := evidence.stopped:
        yield note(
            "stopped",
            f"{first_of(held)} is stopped, and will be when it comes back",
            process_list(held),
            "keeps the state",
            f"`kill -CONT {held[0].pid}` continues it",
        )


def gpus(evidence: Evidence) -> Iterator[Finding]:
    """Devices of NVIDIA: the GPU side of crcli takes care of those."""
    held: list[Held] = [
        *(file for file in evidence.devices if file.path.startswith(GPU_DEVICES)),
        *(mapping for mapping in evidence.device_mappings if mapping.path.startswith(GPU_DEVICES)),
    ]
    if held:
        yield note(
            "gpu",
            f"{who(evidence, held)} uses {held[0].path}",
            places(evidence, held),
            "leaves GPU memory alone: what the trial cannot restore is refused",
        )


NOTES: tuple[Check, ...] = (
    tcp_inside,
    tcp_listening,
    locks,
    deleted_files,
    link_remaps,
    files_in_memory,
    databases,
    written_files,
    sessions,
    own_namespaces,
    other_users,
    stopped,
    gpus,
)
