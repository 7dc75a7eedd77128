"""Collects the evidence about a tree: asks /proc and the kernel, once, and decides nothing."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterable, KeysView
from typing import TypeVar

from crcli.process.evidence import (
    Database,
    DeletedFile,
    Evidence,
    ForeignNamespace,
    HeldLock,
    HeldSocket,
    NamedFile,
    Pipe,
    Relative,
    Terminal,
    Viewer,
)
from crcli.process.files import FileId, Kind, Lock, Mapping, OpenFile, mappings, mounts, open_files
from crcli.process.identity import read_proc, read_stat
from crcli.process.outside import Outside, Outsider
from crcli.process.sockets import Address, Socket, State, protocol_of, sockets_of
from crcli.process.tree import PID_GONE, Process, Tree, every_stat, read_namespaces

SQLITE_MAGIC = b"SQLite format 3\0"
SQLITE_SIBLINGS = ("-journal", "-wal", "-shm")
STUCK_AFTER_SECONDS = 0.5

T = TypeVar("T")
K = TypeVar("K")


def gather(tree: Tree) -> Evidence:
    """Return what can be seen of the tree now. Changes nothing; holds no descriptor afterwards."""
    viewer = _viewer()
    files = tuple(file for process in tree.living for file in open_files(process.pid))
    maps = tuple(mapping for process in tree.living for mapping in mappings(process.pid))
    mounted = mounts(tree.root.pid)
    table = _socket_table(tree, viewer, files)
    outside = Outside(tree)
    named = _named_files(files, maps)
    return Evidence(
        tree=tree,
        viewer=viewer,
        files=files,
        mappings=maps,
        mounts=mounted,
        terminals=_terminals(tree, files, outside),
        pipes=_pipes(files, outside),
        sockets=_sockets(files, table, outside),
        locks=_locks(files),
        deleted=_deleted(files, maps),
        named=named,
        databases=_databases(tree, named),
        foreign_namespaces=_foreign_namespaces(tree, viewer),
        relatives=_relatives(tree),
        prlimit_denied=_prlimit_denied(tree),
        stuck=_stuck(tree),
    )


def _viewer() -> Viewer:
    status = read_proc("/proc/self/status")
    line = next(line for line in status.splitlines() if line.startswith(b"CapEff:"))
    return Viewer(
        namespaces=read_namespaces(os.getpid()),
        cgroups=os.fsdecode(read_proc("/proc/self/cgroup")),
        cap_eff=int(line.split()[1], 16),
    )


# --- terminals, pipes, sockets -----------------------------------------------------------------------------


def _terminals(tree: Tree, files: tuple[OpenFile, ...], outside: Outside) -> tuple[Terminal, ...]:
    masters = {int(index) for file in files if (index := file.info_field("tty-index")) is not None}
    slaves = [file for file in files if file.kind is Kind.TTY and file.info_field("tty-index") is None]
    return tuple(
        _terminal(tree, holders, masters, outside)
        for holders in _grouped(slaves, lambda file: (file.rdev, file.dev)).values()
    )


def _terminal(tree: Tree, holders: list[OpenFile], masters: set[int], outside: Outside) -> Terminal:
    first = holders[0]
    index = _pts_index(first.rdev)
    inside = index in masters
    return Terminal(
        path=first.path,
        index=index,
        rdev=first.rdev,
        dev=first.dev,
        holders=tuple(holders),
        master_inside=inside,
        master=None if inside or index is None else outside.master_of(index),
        controls=tuple(process.pid for process in tree if process.tty_nr == _old_device(first.rdev)),
    )


def _pts_index(rdev: int) -> int | None:
    """Return N of /dev/pts/N: majors 136 to 143 with 256 minors each at first, one major with 2^20 now."""
    major, minor = os.major(rdev), os.minor(rdev)
    return (major - 136) * 256 + minor if 136 <= major <= 143 else None


def _old_device(rdev: int) -> int:
    """Return a device number as /proc/PID/stat writes tty_nr: minor bits 31-20 and 7-0, major 19-8."""
    major, minor = os.major(rdev), os.minor(rdev)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


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
    endpoints = {
        one.endpoints
        for inode, one in table.items()
        if one.protocol == "tcp" and (inode in held or inode < 0)
    }
    return tuple(
        _held_socket(
            table.get(inode) or _unlisted(holders[0]), holders, table, held.keys(), endpoints, outside
        )
        for inode, holders in held.items()
    )


def _held_socket(
    one: Socket,
    holders: list[OpenFile],
    table: dict[int, Socket],
    inodes: KeysView[int],
    endpoints: set[tuple[Address, Address]],
    outside: Outside,
) -> HeldSocket:
    if one.protocol == "tcp" and one.connected:
        return HeldSocket(one, tuple(holders), inside=(one.remote, one.local) in endpoints)
    if one.family != "unix" or not one.peer:
        return HeldSocket(one, tuple(holders), inside=None)
    inside = one.peer in inodes
    return HeldSocket(
        one,
        tuple(holders),
        inside=inside,
        peer=table.get(one.peer),
        outsiders=() if inside else outside.holders(f"socket:[{one.peer}]"),
    )


def _unlisted(file: OpenFile) -> Socket:
    """Return a socket that the kernel lists nowhere: not bound yet, or of a family without such a list."""
    protocol = protocol_of(file.pid, file.fd)
    return Socket(file.ino, protocol, protocol, "", State.CLOSE)


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
        _deleted_file(file, opened.get(file, []), mapped.get(file, []))
        for file in opened.keys() | mapped.keys()
    )


def _deleted_file(file: FileId, opened: list[OpenFile], mapped: list[Mapping]) -> DeletedFile:
    if opened:
        path, size, nlink = opened[0].path, opened[0].size, opened[0].nlink
    else:
        path, size, nlink = mapped[0].path, mapped[0].file_size, mapped[0].nlink
    return DeletedFile(path, file, size, nlink, tuple(opened), tuple(mapped))


def _named_files(files: tuple[OpenFile, ...], maps: tuple[Mapping, ...]) -> tuple[NamedFile, ...]:
    opened = _grouped((f for f in files if not f.deleted and f.kind is Kind.REGULAR), lambda f: f.path)
    mapped = _grouped((m for m in maps if not m.deleted and m.has_name), lambda m: m.path)
    found = (_named_file(path, opened.get(path, []), mapped.get(path, [])) for path in {**opened, **mapped})
    return tuple(file for file in found if file is not None)


def _named_file(path: str, opened: list[OpenFile], mapped: list[Mapping]) -> NamedFile | None:
    if opened:
        first = opened[0]
        return NamedFile(path, first.id, first.size, first.mode, tuple(opened), tuple(mapped))
    try:
        status = os.stat(f"/proc/{mapped[0].pid}/root{path}")
    except OSError:
        return None
    return NamedFile(
        path, FileId(status.st_dev, status.st_ino), status.st_size, status.st_mode, (), tuple(mapped)
    )


def _databases(tree: Tree, named: tuple[NamedFile, ...]) -> tuple[Database, ...]:
    found = (_database(tree, file) for file in named if file.open)
    return tuple(database for database in found if database is not None)


def _database(tree: Tree, file: NamedFile) -> Database | None:
    if file.path.endswith(SQLITE_SIBLINGS):
        return None
    seen_as = f"/proc/{file.open[0].pid}/root{file.path}"
    siblings = tuple(file.path + end for end in SQLITE_SIBLINGS if os.path.exists(seen_as + end))
    return Database(file.path, siblings) if siblings or _is_sqlite(seen_as) else None


def _is_sqlite(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.read(fd, len(SQLITE_MAGIC)) == SQLITE_MAGIC
    except OSError:
        return False
    finally:
        os.close(fd)


# --- processes ---------------------------------------------------------------------------------------------


def _foreign_namespaces(tree: Tree, viewer: Viewer) -> tuple[ForeignNamespace, ...]:
    return tuple(
        ForeignNamespace(process.pid, name, inode, ours=viewer.namespaces.get(name) == inode)
        for process in tree.living
        for name, inode in process.namespaces.items()
        if not name.endswith("_for_children") and inode != tree.root.namespaces.get(name)
    )


def _relatives(tree: Tree) -> tuple[Relative, ...]:
    """Return the processes outside that share a session which began inside the tree: daemonised children."""
    sessions = {process.sid for process in tree if process.sid in tree}
    if not sessions:
        return ()
    return tuple(
        Relative(stat.pid, stat.comm, "session")
        for stat in every_stat()
        if stat.sid in sessions and stat.pid not in tree and not stat.is_zombie
    )


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
    """Return the processes that wait in the kernel uninterruptibly, seen twice without a step between."""
    suspects = [process for process in tree if process.state == "D"]
    if not suspects:
        return ()
    before = {process.pid: _switches(process.pid) for process in suspects}
    time.sleep(STUCK_AFTER_SECONDS)
    return tuple(p for p in suspects if _still_waits(p) and _switches(p.pid) == before[p.pid])


def _still_waits(process: Process) -> bool:
    try:
        stat = read_stat(process.pid)
    except ProcessLookupError:
        return False
    return stat.state == "D" and stat.start_time == process.start


def _switches(pid: int) -> bytes:
    """Return the lines that count how often the process gave up a processor."""
    try:
        status = read_proc(f"/proc/{pid}/status")
    except PID_GONE:
        return b""
    return status[status.find(b"voluntary_ctxt_switches") :]


def _grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
