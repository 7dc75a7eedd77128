"""Collects the evidence about a tree: asks /proc and the kernel, once, and decides nothing."""

from __future__ import annotations

import os
import resource
import stat
import time
from collections.abc import Callable, Iterable
from functools import cache
from typing import TypeVar

from crcli import kernel
from crcli.errors import PreflightRefused
from crcli.process import notify
from crcli.process.asking import (
    joined_groups,
    multicast_groups,
    netlink_groups,
    path_of_socket,
    rewrites,
    terminal_device,
    unread_bytes,
)
from crcli.process.epolls import epolls_astray
from crcli.process.evidence import (
    CONTROLLING_TTY,
    MEMORY_FILE_SYSTEMS,
    MOST_EXTERNAL_TERMINALS,
    PSEUDO_FILE_SYSTEMS,
    Database,
    DeletedFile,
    Evidence,
    ForeignNamespace,
    HeldLock,
    HeldSocket,
    Membership,
    NamedFile,
    Pipe,
    RenamedSocket,
    SharedMemory,
    Terminal,
    Unaccepted,
    UnreadTerminal,
    Viewer,
)
from crcli.process.files import (
    FileId,
    Kind,
    Lock,
    Mapping,
    Mount,
    OpenFile,
    leased_inodes,
    mappings,
    mounts,
    open_files,
)
from crcli.process.identity import Stat, read_proc
from crcli.process.maps import flagged_areas
from crcli.process.outside import Outside, Outsider
from crcli.process.relatives import relatives
from crcli.process.rings import event_rings
from crcli.process.settings import read_limits
from crcli.process.sharing import sharing_memory, threads_apart
from crcli.process.sockets import Address, Socket, sockets_of, unlisted_socket, unread_netlink
from crcli.process.sysv import SysvObject, sysv_objects
from crcli.process.tree import PID_GONE, Process, Tree, every_stat, read_process
from crcli.process.watches import watches

SQLITE_MAGIC = b"SQLite format 3\0"
SQLITE_SMALLEST_PAGE = 512
SQLITE_SIBLINGS = ("-journal", "-wal", "-shm")
STUCK_AFTER_SECONDS = 0.5
CORKED_AFTER_SECONDS = 0.05
NETLINK_GROUPS = 32
"""How many multicast groups of netlink CRIU has room for (sk-netlink.c)."""

_FIRST_OF_SHELLS = 10
"""Descriptors from here on are for shells themselves; scripts name those below (POSIX)."""

_BOARD = f"/memfd:{notify.NAME}"
PAGER_COMMS = ("crcli-pager", "crcli-keeper")
"""The name of the processes that fill memory in after a lazy restore (pipeline.pager.COMM)."""


T = TypeVar("T")
K = TypeVar("K")


def gather(tree: Tree) -> Evidence:
    """Return what can be seen of the tree now. Changes nothing; holds no descriptor afterwards.

    Raises PreflightRefused when the kernel does not let crcli look.
    """
    try:
        return _gather(tree)
    except PermissionError as error:
        raise PreflightRefused(
            f"the kernel does not let crcli look into {error.filename}",
            hint="run crcli as root" if os.geteuid() else "crcli needs CAP_SYS_PTRACE, which root lacks here",
        ) from error


def _gather(tree: Tree) -> Evidence:
    viewer = _viewer()
    files = tuple(file for process in tree.living for file in open_files(process.pid))
    maps = tuple(mapping for process in tree.living for mapping in mappings(process.pid))
    all_mounts = mounts(tree.root.pid)
    mounts_by_device = {mount.dev: mount for mount in reversed(all_mounts)}
    table = _socket_table(tree, viewer, files)
    outside = Outside(tree)
    named = _named_files(files, maps, mounts_by_device)
    sockets = _sockets(files, table, outside)
    terminals = _terminals(tree, files, outside)
    everybody = tuple(every_stat())
    return Evidence(
        tree=tree,
        viewer=viewer,
        files=files,
        mappings=maps,
        mounts=mounts_by_device,
        terminals=terminals,
        pipes=_pipes(files, outside),
        sockets=sockets,
        locks=_locks(files),
        deleted=_deleted(files, maps),
        named=named,
        databases=_databases(named),
        device_mappings=_device_mappings(maps),
        event_rings=event_rings(files),
        unreachable=_unreachable(tree, viewer, files),
        foreign_namespaces=_foreign_namespaces(tree, viewer),
        threads_apart=threads_apart(tree),
        sharing_memory=sharing_memory(tree, everybody),
        relatives=relatives(tree, everybody),
        prlimit_denied=_prlimit_denied(tree),
        stuck=_stuck(tree),
        locked_when_touched=tuple(process for process in tree.living if _locks_when_touched(process)),
        unfilled=_unfilled(tree, everybody),
        watches=watches(files, tree.root.pid, all_mounts, _likely_paths(tree, files)),
        shared_memory=_shared_memory(files, maps, mounts_by_device, outside),
        sysv_objects=_sysv_objects(tree, viewer),
        memberships=_memberships(tree, sockets),
        unaccepted_unix=_unaccepted_unix(sockets, table),
        renamed_sockets=_renamed_sockets(tree, viewer, sockets),
        netlink_unread=_netlink_unread(tree, sockets),
        netlink_beyond=_netlink_beyond(sockets),
        events_unread=tuple(file for file in files if file.anon_name == "inotify" and unread_bytes(file)),
        terminals_unread=_terminals_unread(files, terminals),
        epolls_astray=epolls_astray(files),
        corked=_corked(tree, viewer, files, sockets),
        own_mounts=_own_mounts(tree, viewer, all_mounts),
        limits_above=_limits_above(tree, viewer),
        timers=_timers(tree),
        is_rooted_here=_is_rooted_here(tree),
    )


def _sees_all(tree: Tree) -> int:
    """The pid of a process that sees all of the root's mount namespace, as far as one is known.

    A root in a chroot does not; its parent may, as the first process of a namespace does that a tree was
    restored in.
    """
    parent = read_process(tree.root.ppid) if tree.root.root != "/" else None
    is_inside = parent is not None and parent.namespaces.get("mnt") == tree.root.namespaces.get("mnt")
    return parent.pid if parent is not None and is_inside and parent.root == "/" else tree.root.pid


def _is_rooted_here(tree: Tree) -> bool:
    """Whether the root's mount namespace has our root folder; what cannot be looked at counts as ours."""
    try:
        theirs, ours = os.stat(f"/proc/{_sees_all(tree)}/root/"), os.stat("/")
    except OSError:
        return True
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def _viewer() -> Viewer:
    ourselves = read_process(os.getpid())
    assert ourselves is not None
    return Viewer(
        namespaces=ourselves.namespaces,
        cgroups=ourselves.cgroups,
        cap_eff=ourselves.cap_eff,
        capabilities=ourselves.capabilities,
        no_new_privs=ourselves.no_new_privs,
        uids=ourselves.uids,
        gids=ourselves.gids,
        hard_limits=tuple(hard for _, hard in read_limits(os.getpid())),
        usual_cpus=frozenset((ourselves.cpus, _cpus_of_init())),
    )


def _cpus_of_init() -> str:
    try:
        return _status_line(read_proc("/proc/1/status"), b"Cpus_allowed_list")
    except OSError:
        return ""


def _status_line(status: bytes, key: bytes) -> str:
    start = status.index(b"\n" + key + b":") + len(key) + 2
    return status[start : status.index(b"\n", start)].decode().strip()


# --- terminals, pipes, sockets -----------------------------------------------------------------------------


def _terminals(tree: Tree, files: tuple[OpenFile, ...], outside: Outside) -> tuple[Terminal, ...]:
    masters = {int(index) for file in files if (index := file.info_field("tty-index")) is not None}
    slaves = (file for file in files if file.kind is Kind.TTY and file.info_field("tty-index") is None)
    by_device = _grouped(slaves, lambda file: (file.rdev, file.dev, _terminal_device(file)))
    return tuple(
        _terminal(tree, holders, device, masters, outside) for (*_, device), holders in by_device.items()
    )


def _terminals_unread(
    files: tuple[OpenFile, ...], terminals: tuple[Terminal, ...]
) -> tuple[UnreadTerminal, ...]:
    """Return what CRIU loses, or writes a second time into a terminal that rewrites what passes through."""
    masters = _grouped(
        (file for file in files if file.info_field("tty-index") is not None),
        lambda file: int(file.info_field("tty-index") or 0),
    )
    inside = {terminal.index: terminal for terminal in terminals if terminal.master_inside}
    found = []
    for index, (master, *_) in masters.items():
        slaves = inside[index].holders[:1] if index in inside else ()
        for holder in (master, *slaves):
            size = unread_bytes(holder)
            if size and (not slaves or rewrites(holder)):
                found.append(UnreadTerminal(holder, size, is_over=not slaves))
    return tuple(found)


def _terminal(
    tree: Tree, holders: list[OpenFile], device: int, masters: set[int], outside: Outside
) -> Terminal:
    first = holders[0]
    index = _pts_index(device)
    inside = index in masters
    return Terminal(
        path=first.path,
        index=index,
        rdev=first.rdev,
        dev=first.dev,
        holders=tuple(holders),
        master_inside=inside,
        master=None if inside or index is None else outside.master_of(index),
        opens=_opens(holders),
        inner_shells=tuple(file for file in holders if _is_inner_shell(tree, file, holders)),
    )


def _opens(holders: list[OpenFile]) -> int:
    """How often a terminal was opened; more than CRIU takes is all the same."""
    if len(holders) <= MOST_EXTERNAL_TERMINALS:
        return len(holders)
    different: list[OpenFile] = []
    for file in holders:
        if len(different) <= MOST_EXTERNAL_TERMINALS and not any(_is_same(file, one) for one in different):
            different.append(file)
    return len(different)


def _is_inner_shell(tree: Tree, file: OpenFile, holders: list[OpenFile]) -> bool:
    """Whether it is the descriptor through which a shell below another shell controls its jobs.

    A shell that it forks for a part of a command has the same open file, and controls none.
    """
    leader = tree.process(file.pid).sid
    if file.rdev != CONTROLLING_TTY or file.fd < _FIRST_OF_SHELLS or leader == file.pid:
        return False
    return not any(one.pid == leader and _is_same(file, one) for one in holders)


def _is_same(one: OpenFile, other: OpenFile) -> bool:
    try:
        return kernel.is_same_open_file(one.pid, one.fd, other.pid, other.fd)
    except OSError:
        return False  # not to be known here, or closed meanwhile


def _terminal_device(file: OpenFile) -> int:
    """Return which terminal it really is: /dev/tty stands for the one that controlled whoever opened it."""
    return terminal_device(file.pid, file.fd) if file.rdev == CONTROLLING_TTY else file.rdev


def _pts_index(rdev: int) -> int | None:
    """Return N of /dev/pts/N: majors 136 to 143 with 256 minors each at first, one major with 2^20 now."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (major - 136) * 256 + minor if 136 <= major <= 143 else None


def _pipes(files: tuple[OpenFile, ...], outside: Outside) -> tuple[Pipe, ...]:
    held = (file for file in files if file.kind in (Kind.PIPE, Kind.FIFO))
    return tuple(_pipe(holders, outside) for holders in _grouped(held, lambda file: file.id).values())


def _pipe(holders: list[OpenFile], outside: Outside) -> Pipe:
    first = holders[0]
    readers = tuple(file for file in holders if file.readable)
    writers = tuple(file for file in holders if file.writable)
    outsiders: tuple[Outsider, ...] = ()
    if bool(readers) != bool(writers):
        outsiders = tuple(
            outsider
            for outsider in outside.holders(first.target)
            if (outsider.readable and not readers) or (outsider.writable and not writers)
        )
    path = first.path if first.kind is Kind.FIFO else ""
    return Pipe(first.id, path, readers, writers, outsiders)


def _socket_table(tree: Tree, viewer: Viewer, files: tuple[OpenFile, ...]) -> dict[int, Socket]:
    """Return the sockets of the root's network namespace, when the tree has any socket at all."""
    if not any(file.kind is Kind.SOCKET for file in files):
        return {}
    same = tree.root.namespaces.get("net") == viewer.namespaces.get("net")
    return sockets_of(tree.root.pid, same_netns=same)


def _sockets(
    files: tuple[OpenFile, ...], table: dict[int, Socket], outside: Outside
) -> tuple[HeldSocket, ...]:
    held = _grouped((file for file in files if file.kind is Kind.SOCKET), lambda file: file.ino)
    sockets = {inode: table.get(inode) or _unlisted(holders[0]) for inode, holders in held.items()}
    tcp_ends = {one.endpoints for one in sockets.values() if one.protocol == "tcp"}
    found = []
    for inode, one in sockets.items():
        inside = _leads_inside(one, sockets, tcp_ends)
        leads_out = one.family == "unix" and inside is False
        outsiders = outside.holders(f"socket:[{one.peer}]") if leads_out else ()
        found.append(HeldSocket(one, tuple(held[inode]), inside, table.get(one.peer), outsiders))
    return tuple(found)


def _unlisted(file: OpenFile) -> Socket:
    return unlisted_socket(file.ino, file.pid, file.fd)


def _leads_inside(
    one: Socket, sockets: dict[int, Socket], tcp_ends: set[tuple[Address, Address]]
) -> bool | None:
    """Return whether a socket's other end is in the tree; None when it has none."""
    if one.protocol == "tcp" and one.connected:
        return (one.remote, one.local) in tcp_ends
    if one.family == "unix" and one.peer:
        return one.peer in sockets
    return None


def _memberships(tree: Tree, sockets: tuple[HeldSocket, ...]) -> tuple[Membership, ...]:
    """Return the UDP sockets that have joined multicast groups, of which CRIU knows nothing."""
    udp = [held for held in sockets if held.socket.protocol == "udp"]
    groups = multicast_groups(tree.root.pid) if udp else ()
    found = (Membership(held, joined_groups(held.holders[0], groups)) for held in udp)
    return tuple(membership for membership in found if membership.groups)


def _unaccepted_unix(sockets: tuple[HeldSocket, ...], table: dict[int, Socket]) -> tuple[Unaccepted, ...]:
    inside = {held.socket.inode for held in sockets}
    return tuple(
        Unaccepted(
            listener=held,
            closed=sum(client not in table for client in held.socket.waiting),
            unread=sum(client in table and table[client].unsent > 0 for client in held.socket.waiting),
            outside=sum(client in table and client not in inside for client in held.socket.waiting),
        )
        for held in sockets
        if held.socket.waiting
    )


def _netlink_unread(tree: Tree, sockets: tuple[HeldSocket, ...]) -> frozenset[int]:
    ours = {held.socket.inode for held in sockets if held.socket.protocol == "NETLINK"}
    return unread_netlink(tree.root.pid) & ours if ours else frozenset()


def _netlink_beyond(sockets: tuple[HeldSocket, ...]) -> tuple[HeldSocket, ...]:
    return tuple(
        held
        for held in sockets
        if held.socket.protocol == "NETLINK"
        and any(group > NETLINK_GROUPS for group in netlink_groups(held.holders[0]))
    )


def _renamed_sockets(
    tree: Tree, viewer: Viewer, sockets: tuple[HeldSocket, ...]
) -> tuple[RenamedSocket, ...]:
    """Return the unix sockets whose file has another name by now than the one that they were bound to.

    HAProxy makes its socket under a temporary name and renames it, as others do. Of a relative name only the
    end is known. What is bound in another root or mount namespace than ours is not looked at.
    """
    here = {
        process.pid
        for process in tree.living
        if process.root == "/" and process.namespaces.get("mnt") == viewer.namespaces.get("mnt")
    }
    found = []
    for held in sockets:
        bound = held.socket.path if held.socket.family == "unix" else ""
        if bound and not bound.startswith("@") and held.holders[0].pid in here:
            now = path_of_socket(held.holders[0])
            if now and not now.endswith(" (deleted)") and not _is_bound_there(bound, now):
                found.append(RenamedSocket(held, now))
    return tuple(found)


def _is_bound_there(bound: str, now: str) -> bool:
    """Whether a socket's file lies where it was bound, by links and mounts as well."""
    if not bound.startswith("/"):
        return os.path.normpath(f"/{now}").endswith(f"/{os.path.basename(bound)}")
    try:
        return os.path.samefile(bound, now)
    except OSError:
        return False


def _corked(
    tree: Tree, viewer: Viewer, files: tuple[OpenFile, ...], sockets: tuple[HeldSocket, ...]
) -> tuple[HeldSocket, ...]:
    """Return the UDP sockets that hold back what was sent (UDP_CORK): not what is just on its way out."""
    suspects = [held for held in sockets if held.socket.protocol == "udp" and held.socket.unsent]
    if not suspects:
        return ()
    time.sleep(CORKED_AFTER_SECONDS)
    later = _socket_table(tree, viewer, files)
    return tuple(held for held in suspects if (now := later.get(held.socket.inode)) and now.unsent)


# --- files -------------------------------------------------------------------------------------------------


def _locks(files: tuple[OpenFile, ...]) -> tuple[HeldLock, ...]:
    seen: dict[tuple[int, FileId, Lock], HeldLock] = {}
    for file in files:
        for lock in file.locks:
            seen.setdefault((file.pid, file.id, lock), HeldLock(file, lock))
    return tuple(seen.values())


def _deleted(files: tuple[OpenFile, ...], maps: tuple[Mapping, ...]) -> tuple[DeletedFile, ...]:
    opened = _grouped((f for f in files if f.deleted and f.kind is Kind.REGULAR), lambda f: f.id)
    mapped = _grouped((m for m in maps if m.deleted and m.has_name), lambda m: m.id)
    return tuple(
        _deleted_file(file, opened.get(file, []), mapped.get(file, [])) for file in {**opened, **mapped}
    )


def _deleted_file(file: FileId, opened: list[OpenFile], mapped: list[Mapping]) -> DeletedFile:
    if opened:
        path, size, nlink = opened[0].path, opened[0].size, opened[0].nlink
    else:
        path, size, nlink = mapped[0].path, mapped[0].file_size, mapped[0].nlink
    return DeletedFile(path, file, size, nlink, tuple(opened), tuple(mapped))


def _named_files(
    files: tuple[OpenFile, ...], maps: tuple[Mapping, ...], mounts_by_device: dict[int, Mount]
) -> tuple[NamedFile, ...]:
    """Return the files with content of their own; those of /proc, /sys and the like are questions."""
    opened = _grouped((f for f in files if not f.deleted and f.kind is Kind.REGULAR), lambda f: f.path)
    mapped = _grouped((m for m in maps if not m.deleted and m.has_name), lambda m: m.path)
    found = (_named_file(path, opened.get(path, []), mapped.get(path, [])) for path in {**opened, **mapped})
    pseudo = {dev for dev, mount in mounts_by_device.items() if mount.fstype in PSEUDO_FILE_SYSTEMS}
    return tuple(file for file in found if file is not None and file.id.dev not in pseudo)


def _named_file(path: str, opened: list[OpenFile], mapped: list[Mapping]) -> NamedFile | None:
    if opened:
        first = opened[0]
        return NamedFile(path, first.id, first.size, first.mode, tuple(opened), tuple(mapped))
    status = _stat_inside(mapped[0].pid, path)
    if status is None or not stat.S_ISREG(status.st_mode):
        return None
    file = FileId(status.st_dev, status.st_ino)
    return NamedFile(path, file, status.st_size, status.st_mode, (), tuple(mapped))


def _stat_inside(pid: int, path: str) -> os.stat_result | None:
    """Return what lies under a path as the process sees it; None when nothing does."""
    try:
        return os.stat(f"/proc/{pid}/root{path}")
    except OSError:
        return None


def _shared_memory(
    files: tuple[OpenFile, ...],
    maps: tuple[Mapping, ...],
    mounts_by_device: dict[int, Mount],
    outside: Outside,
) -> tuple[SharedMemory, ...]:
    """Return the memory, with a name in it or without, that processes outside have mapped or open as well."""
    in_memory = {dev for dev, mount in mounts_by_device.items() if mount.fstype in MEMORY_FILE_SYSTEMS}
    held: dict[FileId, list[OpenFile | Mapping]] = {}
    for file in files:
        if file.path == _BOARD:
            continue  # shared with us, while a dump is announced
        if file.kind is Kind.MEMFD or (file.kind is Kind.REGULAR and file.dev in in_memory):
            held.setdefault(file.id, []).append(file)
    for mapping in maps:
        nameless = mapping.is_anonymous_shared or mapping.is_memfd
        if mapping.shared and (nameless or mapping.dev in in_memory) and mapping.path != _BOARD:
            held.setdefault(mapping.id, []).append(mapping)
    if not held:
        return ()
    targets = {one.target for ones in held.values() for one in ones if isinstance(one, OpenFile)}
    targets |= {one.path for ones in held.values() for one in ones}
    sharers = outside.sharers(held.keys(), targets)
    return tuple(
        SharedMemory(ones[0].path, tuple(ones), sharers[id_]) for id_, ones in held.items() if id_ in sharers
    )


def _likely_paths(tree: Tree, files: tuple[OpenFile, ...]) -> list[str]:
    """Return the folders that the tree uses: what it watches for changes is seldom far. Browsers watch what
    is to be set for all: names, certificates, the time zone."""
    folders = ["/etc", "/usr/share/zoneinfo"]
    folders += [process.cwd for process in tree.living]
    folders += [file.path for file in files if file.kind in (Kind.REGULAR, Kind.DIRECTORY)]
    folders += [process.exe for process in tree.living]
    return folders


def _own_mounts(tree: Tree, viewer: Viewer, seen: tuple[Mount, ...]) -> tuple[str, ...]:
    """Return where a tree in a mount namespace of its own sees another file system than we do."""
    if tree.root.namespaces.get("mnt") == viewer.namespaces.get("mnt"):
        return ()
    ours = {mount.point: (mount.dev, mount.root) for mount in mounts(os.getpid())}
    theirs = {mount.point: (mount.dev, mount.root) for mount in seen}
    return tuple(point for point in {**theirs, **ours} if ours.get(point) != theirs.get(point))


def _device_mappings(maps: tuple[Mapping, ...]) -> tuple[Mapping, ...]:
    """Return the mappings of device memory; a private /dev/zero is plain memory, so it is left out."""
    return tuple(
        mapping
        for mapping in maps
        if mapping.path.startswith("/dev/")
        and not mapping.deleted
        and mapping.path != "/dev/zero"
        and (status := _stat_inside(mapping.pid, mapping.path)) is not None
        and not stat.S_ISREG(status.st_mode)
    )


def _databases(named: tuple[NamedFile, ...]) -> tuple[Database, ...]:
    leased = cache(leased_inodes)  # only where needed: for /proc/locks the kernel waits for every processor
    found = (_database(file, leased) for file in named if file.open)
    return tuple(database for database in found if database is not None)


def _database(file: NamedFile, leased: Callable[[], frozenset[int]]) -> Database | None:
    if file.path.endswith(SQLITE_SIBLINGS) or file.size % SQLITE_SMALLEST_PAGE:
        return None
    seen_as = f"/proc/{file.open[0].pid}/root{file.path}"
    siblings = tuple(file.path + end for end in SQLITE_SIBLINGS if os.path.exists(seen_as + end))
    if not siblings and (not file.size or file.id.ino in leased() or not _is_sqlite(seen_as)):
        return None
    return Database(file.path, FileId(file.open[0].dev, file.open[0].ino), siblings)


def _is_sqlite(path: str) -> bool:
    """Whether the file begins like a database; looking leaves no trace, not even a time of access."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOATIME)
    except OSError:
        return False
    try:
        return os.read(fd, len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return False
    finally:
        os.close(fd)


def _unreachable(tree: Tree, viewer: Viewer, files: tuple[OpenFile, ...]) -> tuple[OpenFile, ...]:
    """Return the files with a path whose mount CRIU will not find: it looks where the tree's processes live.

    A process in another mount namespace can still hold what it, or its parent, had opened before. A process
    in a chroot is shown only what lies below, so each root is asked, and we are when we see the same mounts.
    """
    viewpoints: dict[tuple[int | None, str], list[int]] = {}
    for process in tree.living:
        viewpoints.setdefault((process.namespaces.get("mnt"), process.root), []).append(process.pid)
    if any(namespace == viewer.namespaces.get("mnt") for namespace, _ in viewpoints):
        viewpoints[viewer.namespaces["mnt"], ""] = [os.getpid()]
    viewpoints.setdefault((tree.root.namespaces.get("mnt"), "/"), [_sees_all(tree)])
    seen = {mount.mnt_id for pids in viewpoints.values() for mount in _mounts_of_any(pids)}
    with_path = (Kind.REGULAR, Kind.DIRECTORY, Kind.FIFO, Kind.DEVICE)
    return tuple(file for file in files if file.kind in with_path and file.mnt_id not in seen)


def _mounts_of_any(pids: list[int]) -> tuple[Mount, ...]:
    """Return the mounts that these processes see, asking one that has not ended meanwhile."""
    return next((found for pid in pids if (found := mounts(pid))), ())


# --- processes ---------------------------------------------------------------------------------------------


def _foreign_namespaces(tree: Tree, viewer: Viewer) -> tuple[ForeignNamespace, ...]:
    """Return each namespace that is not the root's; children may be born into another one of time."""
    return tuple(
        ForeignNamespace(process.pid, name, inode, ours=viewer.namespaces.get(name) == inode)
        for process in tree.living
        for name, inode in process.namespaces.items()
        if name != "pid_for_children"
        and inode != tree.root.namespaces.get(name.removesuffix("_for_children"))
    )


def _sysv_objects(tree: Tree, viewer: Viewer) -> tuple[SysvObject, ...]:
    """Return the semaphores and queues of the host that the tree has used; its own it takes along."""
    if tree.root.namespaces.get("ipc") != viewer.namespaces.get("ipc"):
        return ()
    return sysv_objects(tree.pids)


def _limits_above(tree: Tree, viewer: Viewer) -> tuple[Process, ...]:
    """Return the processes with a hard limit above ours, which CRIU would lower without a word."""
    if not viewer.lacks_sys_resource:
        return ()
    return tuple(process for process in tree.living if _has_limit_above(process.pid, viewer.hard_limits))


def _has_limit_above(pid: int, ours: tuple[int, ...]) -> bool:
    try:
        return any(hard > limit for (_, hard), limit in zip(read_limits(pid), ours, strict=False))
    except OSError:
        return False


def _locks_when_touched(process: Process) -> bool:
    """Whether a page of it is locked only once it is touched: `lf` among the flags of a mapping in smaps.

    The kernel walks all page tables for that file, so it is read for those alone that lock any memory.
    """
    if not process.locked_bytes:
        return False
    try:
        return next(flagged_areas(process.pid, b"lf"), None) is not None
    except OSError:
        return False


def _timers(tree: Tree) -> dict[int, int]:
    """Return how many POSIX timers each process has, by pid; those with none are left out."""
    found = {}
    for process in tree.living:
        try:
            found[process.pid] = read_proc(f"/proc/{process.pid}/timers").count(b"ClockID:")
        except OSError:
            continue
    return {pid: number for pid, number in found.items() if number}


def _prlimit_denied(tree: Tree) -> tuple[Process, ...]:
    return tuple(process for process in tree.living if not _may_read_limits(process.pid))


def _may_read_limits(pid: int) -> bool:
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE)
    except PermissionError:
        return False
    except OSError:
        return True
    return True


def _stuck(tree: Tree) -> tuple[Process, ...]:
    """Return the processes with a thread that waits in the kernel uninterruptibly, and has for a while, and
    those whose cgroup is frozen (in version 1 they wait so too)."""
    stuck = _frozen(tree)
    suspects = [(process.pid, tid) for process in tree for tid in process.uninterruptible]
    before = {suspect: _standstill(*suspect) for suspect in suspects}
    if suspects:
        time.sleep(STUCK_AFTER_SECONDS)
    stuck |= {pid for pid, tid in suspects if before[pid, tid] == _standstill(pid, tid) != b""}
    return tuple(process for process in tree if process.pid in stuck)


def _frozen(tree: Tree) -> set[int]:
    """The processes whose cgroup of version 2 is frozen; the root of a hierarchy cannot be."""
    groups = {process.pid: _unified_group(process) for process in tree.living}
    below = set(groups.values()) - {"/"}
    roots = [mount.point for mount in mounts(os.getpid()) if mount.fstype == "cgroup2"] if below else []
    frozen = {group for group in below if any(_is_frozen(f"{root}{group}") for root in roots)}
    return {pid for pid, group in groups.items() if group in frozen}


def _unified_group(process: Process) -> str:
    lines = process.cgroups.splitlines()
    return next((line[3:] for line in lines if line.startswith("0::")), "/")


def _is_frozen(folder: str) -> bool:
    try:
        return b"frozen 1" in read_proc(f"{folder}/cgroup.events")
    except OSError:
        return False


def _unfilled(tree: Tree, everybody: Iterable[Stat]) -> tuple[Process, ...]:
    """The processes that a lazy restore has not given all of their memory yet.

    Their mappings carry the flag `um`. Reading the flags takes a while, so it is done only where a pager is.
    """
    if not any(stat.comm in PAGER_COMMS for stat in everybody):
        return ()
    return tuple(process for process in tree.living if _has_missing_pages(process.pid))


def _has_missing_pages(pid: int) -> bool:
    try:
        return next(flagged_areas(pid, b"um"), None) is not None
    except PID_GONE:
        return False


def _standstill(pid: int, tid: int) -> bytes:
    """Return what changes whenever a waiting thread gets a processor; empty when it waits no more."""
    try:
        status = read_proc(f"/proc/{pid}/task/{tid}/status")
    except PID_GONE:
        return b""
    return status[status.find(b"voluntary_ctxt_switches") :] if b"\nState:\tD" in status else b""


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
