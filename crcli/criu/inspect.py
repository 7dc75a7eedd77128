"""What CRIU's images say that a restore will need of the host, as plain values that a guard can compare.

Nothing here looks at the host.
"""

from __future__ import annotations

import fcntl
import os
import socket
from typing import TYPE_CHECKING, Any

from crcli.criu import messages
from crcli.criu.images import ImageFile, mapped_ids, read_files, remapped_ids, text_of
from crcli.criu.needs import InetSocket, LockedFile, OpenedFile, Rights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from crcli.criu.images import ImageFolder

_NAMESPACES = {
    "netns-": "net",
    "mountpoints-": "mnt",
    "ipcns-": "ipc",
    "utsns-": "uts",
    "userns-": "user",
    "pidns-": "pid",
    "timens-": "time",
}
"""The images that a namespace of the tree's own leaves, by the beginning of their names.

CRIU gives every tree a time namespace, so that its clocks go on from where they were.
"""

_WITH_PORTS = (socket.IPPROTO_TCP, socket.IPPROTO_UDP)
_TCP_STATES = {7: "bound", 10: "listening"}
OUTSIDE_SOCKET = 1
_POSIX, _FLOCK, _OPEN_FILE = 1, 2, 1024
"""The kernel's FL_POSIX, FL_FLOCK and FL_OFDLCK."""


def opened_files(images: ImageFolder) -> list[OpenedFile]:
    """Every file that CRIU opens by name, one record for each path: not deleted ones, not external ones."""
    gone, mapped = remapped_ids(images), mapped_ids(images)
    entries: dict[str, list[Any]] = {}
    for entry in read_files(images).entries:
        if entry.type == messages.fd_types.REG and entry.id not in gone and not entry.reg.ext:
            entries.setdefault(text_of(entry.reg.name), []).append(entry)
    return [
        _opened_file(path, same, mapped.isdisjoint(entry.id for entry in same))
        for path, same in sorted(entries.items())
    ]


def _opened_file(path: str, entries: list[Any], only_open: bool) -> OpenedFile:
    first = entries[0].reg
    words = next((entry.reg.build_id for entry in entries if entry.reg.build_id), ())
    return OpenedFile(
        path=path,
        size=first.size if first.HasField("size") else None,
        mode=first.mode if first.HasField("mode") else None,
        build_id=b"".join(word.to_bytes(4, "little") for word in words).hex(),
        mapped=not only_open,
        writes=any(writes_anywhere(entry.reg.flags) for entry in entries),
        appends=only_open and all(_appends_only(entry.reg.flags) for entry in entries),
    )


def watched_paths(images: ImageFolder) -> list[str]:
    """The paths at which CRIU looks for what the tree watches (inotify, fanotify), but for whole mounts."""
    found: set[str] = set()
    for entry in read_files(images).entries:
        if entry.type == messages.fd_types.INOTIFY:
            handles = [watch.f_handle for watch in entry.ify.wd]
        elif entry.type == messages.fd_types.FANOTIFY:
            handles = [mark.ie.f_handle for mark in entry.ffy.mark if mark.HasField("ie")]
        else:
            continue
        found.update(text_of(handle.path) for handle in handles if handle.path)
    return sorted(found)


def writes_anywhere(flags: int) -> bool:
    """Whether a file that was opened with these flags can be written other than at its end."""
    return bool(flags & os.O_ACCMODE) and not flags & os.O_APPEND


def _appends_only(flags: int) -> bool:
    return flags & os.O_ACCMODE == os.O_WRONLY and bool(flags & os.O_APPEND)


def inet_sockets(images: ImageFolder) -> Iterator[InetSocket]:
    """The tree's TCP and UDP sockets that have a local port."""
    for entry in read_files(images).entries:
        sock = entry.isk
        if entry.type != messages.fd_types.INETSK or not sock.src_port or sock.proto not in _WITH_PORTS:
            continue
        yield inet_socket(sock)


def inet_socket(sock: Any) -> InetSocket:
    """What a restore needs for one TCP or UDP socket (an `inet_sk_entry`)."""
    tcp = sock.proto == socket.IPPROTO_TCP
    connected = sock.dst_port != 0
    return InetSocket(
        protocol="tcp" if tcp else "udp",
        family=sock.family,
        host=_host(sock.src_addr),
        port=sock.src_port,
        remote=(_host(sock.dst_addr), sock.dst_port),
        state=_TCP_STATES.get(sock.state, "connected") if tcp else "connected" if connected else "bound",
        reuse_address=sock.opts.reuseaddr,
        reuse_port=sock.opts.so_reuseport,
        only_v6=sock.v6only,
        free_bind=sock.ip_opts.freebind,
        device=sock.ifname,
    )


def _host(words: Iterable[int]) -> str:
    raw = b"".join(word.to_bytes(4, "little") for word in words)
    if len(raw) == 4:
        return socket.inet_ntop(socket.AF_INET, raw)
    return socket.inet_ntop(socket.AF_INET6, raw) if len(raw) == 16 else ""


def unix_names(images: ImageFolder) -> list[str]:
    """The names that unix sockets of the tree are bound to: paths, and abstract names with an '@' before."""
    found = set()
    for entry in read_files(images).entries:
        sock = entry.usk
        if entry.type != messages.fd_types.UNIXSK or sock.uflags & OUTSIDE_SOCKET or sock.deleted:
            continue
        if sock.name[:1] == b"\0":
            found.add("@" + os.fsdecode(sock.name[1:]))
        elif sock.name:
            found.add(os.path.join(text_of(sock.name_dir) or "/", os.fsdecode(sock.name.rstrip(b"\0"))))
    return sorted(found)


def joined_inside(images: ImageFolder) -> set[str]:
    """What the tree has both ends of, by CRIU's names: unix sockets with their peers, and pipes."""
    entries = read_files(images).entries
    peers = {
        entry.usk.ino: entry.usk.peer
        for entry in entries
        if entry.type == messages.fd_types.UNIXSK and not entry.usk.uflags & OUTSIDE_SOCKET
    }
    ends: dict[int, set[int]] = {}
    for entry in entries:
        if entry.type == messages.fd_types.PIPE:
            ends.setdefault(entry.pipe.pipe_id, set()).add(entry.pipe.flags & os.O_ACCMODE)
    sockets = {f"unix[{inode}]" for inode, peer in peers.items() if peer in peers}
    return sockets | {f"pipe:[{pipe}]" for pipe, modes in ends.items() if modes >= {os.O_RDONLY, os.O_WRONLY}}


def locked_files(images: ImageFolder) -> list[LockedFile]:
    """The locks that CRIU takes again when it restores, but for those on deleted files."""
    if "filelocks.img" not in images.names():
        return []
    gone = remapped_ids(images)
    files = [file for file in read_files(images).entries if file.type == messages.fd_types.REG]
    paths = {file.id: text_of(file.reg.name) for file in files if file.id not in gone and not file.reg.ext}
    found: dict[LockedFile, None] = {}
    for entry in ImageFile.parse(images.read("filelocks.img"), messages.file_lock_entry).entries:
        kobj = ImageFile.parse(images.read(f"ids-{entry.pid}.img"), messages.task_kobj_ids_entry).entries[0]
        opened = ImageFile.parse(images.read(f"fdinfo-{kobj.files_id}.img"), messages.fdinfo_entry).entries
        path = next((paths.get(one.id, "") for one in opened if one.fd == entry.fd), "")
        if path and entry.flag & (_FLOCK | _POSIX | _OPEN_FILE):
            is_whole = bool(entry.flag & _FLOCK)
            span = (0, 0) if is_whole else (entry.start, entry.len)
            found[LockedFile(path, is_whole, entry.type == fcntl.F_WRLCK, *span)] = None
    return list(found)


def cpu_words(images: ImageFolder) -> tuple[int, ...]:
    """The words in which CRIU describes the CPU of the dump (x86; empty elsewhere, or if it wrote none)."""
    if "cpuinfo.img" not in images.names():
        return ()
    entry = ImageFile.parse(images.read("cpuinfo.img"), messages.cpuinfo_entry).entries[0]
    return tuple(entry.x86_entry[0].capability) if entry.x86_entry else ()


def rights(images: ImageFolder) -> Rights:
    """Users, groups and capabilities of all threads of the tree."""
    users, groups, capabilities = set(), set(), 0
    for name in images.names():
        if name.startswith("core-"):
            core = ImageFile.parse(images.read(name), messages.core_entry).entries[0]
            if core.HasField("thread_core") and core.thread_core.HasField("creds"):
                creds = core.thread_core.creds
                users |= {creds.uid, creds.euid, creds.suid}
                groups |= {creds.gid, creds.egid, creds.sgid}
                capabilities |= _bits(creds.cap_prm) | _bits(creds.cap_eff) | _bits(creds.cap_inh)
    return Rights(frozenset(users), frozenset(groups), capabilities)


def _bits(words: Iterable[int]) -> int:
    return sum(word << 32 * place for place, word in enumerate(words))


def own_namespaces(names: Iterable[str]) -> frozenset[str]:
    """Which namespaces the tree brings along, from the names of its images."""
    return frozenset(kind for name in names for start, kind in _NAMESPACES.items() if name.startswith(start))
