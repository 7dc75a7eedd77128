"""CRIU's images made ready for a restore: the memory that CRIU reads itself, and edits for this place."""

from __future__ import annotations

import itertools
import os
import stat
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from crcli.criu import messages
from crcli.criu.images import (
    ImageFile,
    create_pages,
    holders_of,
    mapped_ids,
    pagemap_name,
    pages_name,
    read_files,
    remapped_ids,
    text_of,
    unnamed_ids,
    write_pagemap,
)
from crcli.criu.inspect import inet_socket, writes_anywhere
from crcli.criu.options import PARENT_LINK
from crcli.memory.extents import PAGE, Extent, SpaceKey
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from crcli.criu.needs import InetSocket
    from crcli.criu.workspace import Workspace
    from crcli.memory.huge import Runs
    from crcli.memory.replay import Inherited

_TCP, _UDP = 6, 17
_PROTOCOLS = {_TCP: "tcp", _UDP: "udp"}
_TCP_CLOSE, _TCP_LISTEN = 7, 10
_PSEUDO_TERMINAL, _EXTERNAL_TERMINAL = 1, 5
_MASTERS = 5
"""The major device number of /dev/ptmx."""
_REACH = 32
"""How far CRIU looks for the number of a terminal, from the lowest that is free."""
_OUTSIDE_SOCKET = 1
_NO_NETWORK_LOCK = 2
_MADV_HUGEPAGE = 14
_ORDINARY = 1 << 0 | 1 << 9
"""VMA_AREA_REGULAR and VMA_ANON_PRIVATE: private memory of no file."""
_ESTABLISHED_STATES = frozenset((1, 2, 3, 4, 5, 6, 8, 9, 11))


@contextmanager
def laid_out_memory(
    images: Workspace,
    early: Mapping[SpaceKey, list[Extent]],
    inherited: Mapping[SpaceKey, Inherited] | None = None,
) -> Iterator[Mapping[SpaceKey, tuple[int, dict[int, int]]]]:
    """Write pagemaps, and page files of zeros, that hold the `early` extents.

    What a process has `inherited` stands in its parent's page file: CRIU reads it there, as it reads pages
    that were not written to since a pre-dump. Of fifty children of one process, 7 MiB each, only what they
    have changed is written here.

    Gives for each space a descriptor of its page file and the map from an extent's first page to its offset
    in that file (bytes), for whoever writes what is not zero.
    """
    places: dict[SpaceKey, tuple[int, dict[int, int]]] = {}
    inherited = inherited or {}
    try:
        for pages_id, (space, extents) in enumerate(early.items(), start=1):
            offsets: dict[int, int] = {}
            at = 0
            for extent in extents:
                offsets[extent.start] = at
                at += extent.pages * PAGE
            runs = inherited[space].runs if space in inherited else ()
            write_pagemap(images, space, pages_id, ((e.start, e.pages) for e in extents), runs)
            places[space] = (create_pages(images, pages_id, at // PAGE), offsets)
        if inherited:
            _show_parents(images, early, inherited)
        yield places
    finally:
        for fd, _ in places.values():
            os.close(fd)


def _show_parents(
    images: Workspace, early: Iterable[SpaceKey], inherited: Mapping[SpaceKey, Inherited]
) -> None:
    """Have CRIU find, under the names of those who inherit, the pagemaps and page files of their parents."""
    ids = {space: pages_id for pages_id, space in enumerate(early, start=1)}
    with images.folder(PARENT_LINK) as folder:
        for parent in {parent for parent, _ in inherited.values()}:
            folder.link_from(images, pages_name(ids[parent]))
        for child, (parent, _) in inherited.items():
            folder.link_from(images, pagemap_name(parent), pagemap_name(child))


def ask_for_huge_pages(images: Workspace, pid: int, runs: Runs) -> Runs:
    """Have CRIU ask the kernel for huge pages (MADV_HUGEPAGE) in these runs of pages of a process.

    Only private memory of no file is given them; its mappings are divided where a run begins or ends. Returns
    the runs for which it is done.
    """
    from crcli.memory.huge import Runs  # for trees with GPUs

    image = ImageFile.parse(images.read(f"mm-{pid}.img"), messages.mm_entry)
    (mm,) = image.entries
    done: list[tuple[int, int]] = []
    count = len(mm.vmas)
    for vma in mm.vmas[:count]:
        asked = runs if vma.status & _ORDINARY == _ORDINARY else Runs()
        for start, end, is_asked in asked.divide(vma.start // PAGE, vma.end // PAGE):
            part = mm.vmas.add()
            part.CopyFrom(vma)
            part.start, part.end = start * PAGE, end * PAGE
            if is_asked:
                part.madv |= 1 << _MADV_HUGEPAGE
                done.append((start, end - start))
    if done:
        del mm.vmas[:count]
        images.write(f"mm-{pid}.img", image.encode())
    return Runs(done)


def has_connections(images: Workspace) -> bool:
    """Whether the tree has TCP connections: with somebody outside, or inside of it."""
    return any(
        entry.isk.proto == _TCP and entry.isk.state in _ESTABLISHED_STATES
        for entry in read_files(images).entries
        if entry.type == messages.fd_types.INETSK
    )


def close_outside_connections(images: Workspace, here: Collection[tuple[str, str]]) -> list[tuple[str, str]]:
    """Turn established TCP connections whose other end is lost into closed sockets.

    Connections inside the tree stay as they are, and so do those whose other end is a socket of this host
    that still waits, and does not talk to the original: `here` are the (local, remote) ends of all its
    connections, as "address:port". Returns the ends of the closed ones. The program sees ECONNRESET or EOF
    on its next use, and reconnects.
    """
    files = read_files(images)
    sockets = [entry.isk for entry in files.entries if entry.type == messages.fd_types.INETSK]
    sockets = [sock for sock in sockets if sock.proto == _TCP]
    ends = {(_address(s.src_addr, s.src_port), _address(s.dst_addr, s.dst_port)) for s in sockets}
    closed: list[tuple[str, str]] = []
    for sock in sockets:
        if sock.state not in _ESTABLISHED_STATES:
            continue
        local, remote = _address(sock.src_addr, sock.src_port), _address(sock.dst_addr, sock.dst_port)
        mine, theirs = (_text(local), _text(remote)), (_text(remote), _text(local))
        if (remote, local) in ends or (theirs in here and mine not in here):
            continue
        sock.src_port = sock.dst_port = 0
        sock.state = _TCP_CLOSE
        closed.append(mine)
    if closed:
        images.write("files.img", files.encode())
    return closed


class BoundSocket(Struct, frozen=True):
    """A TCP or UDP socket of the image with a port and no other end: it listens, or could.

    `protocol` is tcp or udp, `host` an address as text. `only_v6`: an IPv6 socket that takes no IPv4.
    """

    protocol: str
    host: str
    port: int
    only_v6: bool

    @property
    def is_open_to_all(self) -> bool:
        """Whether it listens on every address."""
        return self.host in ("0.0.0.0", "::")


def bound_sockets(images: Workspace) -> list[BoundSocket]:
    """The sockets of the image that wait at a port, each as often as there are sockets."""
    return [_bound(sock) for sock in _inet_sockets(read_files(images)) if _waits_at_a_port(sock)]


def move_ports(images: Workspace, ports: Mapping[int, int]) -> None:
    """Have sockets that wait at a port of `ports` wait at its new one, and what is connected to them inside.

    Connections whose other end is in the tree too get the new port at both ends, so that they stay unique
    where another tree has the same. Those to outside keep theirs: the other side knows no other.
    """
    files = read_files(images)
    sockets = _inet_sockets(files)
    moved = [_bound(sock) for sock in sockets if _waits_at_a_port(sock) and sock.src_port in ports]
    ends = {(sock.proto, *_ends(sock)) for sock in sockets}

    def moves(protocol: int, host: bytes, port: int) -> bool:
        where = _text((host, port)).rpartition(":")[0].strip("[]")
        return any(
            (one.protocol, one.port) == (_PROTOCOLS[protocol], port)
            and (one.host == where or one.is_open_to_all)
            for one in moved
        )

    for sock in sockets:
        local, remote = _ends(sock)
        alone, inside = _waits_at_a_port(sock), (sock.proto, remote, local) in ends
        if (alone or inside or sock.proto == _UDP) and moves(sock.proto, *local):
            sock.src_port = ports[local[1]]
        to_itself = inside or (sock.proto == _UDP and _is_local(remote[0], ends))
        if to_itself and moves(sock.proto, *remote):
            sock.dst_port = ports[remote[1]]
    images.write("files.img", files.encode())


def free_lost_addresses(images: Workspace, is_here: Callable[[InetSocket], bool]) -> None:
    """Let UDP sockets that are connected to outside send from an address of this host.

    Theirs was the old host's, and the kernel's choice. `is_here` says whether a socket's address is ours.
    """
    files = read_files(images)
    entries = [sock for sock in _inet_sockets(files) if sock.src_port]
    sockets = [inet_socket(sock) for sock in entries]
    lost = [
        sock
        for sock, one in zip(entries, sockets, strict=True)
        if one.may_have_another_address(sockets) and not is_here(one)
    ]
    for sock in lost:
        sock.src_addr[:] = [0] * len(sock.src_addr)
    if lost:
        images.write("files.img", files.encode())


def forget_devices(images: Workspace) -> None:
    """Bind no socket to a network interface, for a network that has none."""
    files = read_files(images)
    bound = [e.isk for e in files.entries if e.type == messages.fd_types.INETSK]
    bound = [sock for sock in bound if sock.opts.so_bound_dev]
    for sock in bound:
        sock.opts.ClearField("so_bound_dev")
    if bound:
        images.write("files.img", files.encode())


def _inet_sockets(files: ImageFile) -> list[Any]:
    return [e.isk for e in files.entries if e.type == messages.fd_types.INETSK and e.isk.proto in _PROTOCOLS]


def _waits_at_a_port(sock: Any) -> bool:
    """Whether it is bound and has no other end; a TCP socket may be about to listen, or does."""
    is_free = sock.proto == _UDP or sock.state in (_TCP_LISTEN, _TCP_CLOSE)
    return bool(is_free and sock.src_port and not sock.dst_port)


def _bound(sock: Any) -> BoundSocket:
    host, _, port = _text(_address(sock.src_addr, sock.src_port)).rpartition(":")
    return BoundSocket(_PROTOCOLS[sock.proto], host.strip("[]"), int(port), bool(sock.v6only))


def _is_local(host: bytes, ends: Iterable[tuple[int, tuple[bytes, int], tuple[bytes, int]]]) -> bool:
    """Whether an address is of the host that the tree was on, as far as the image tells."""
    return host[:1] == b"\x7f" or host == bytes(15) + b"\1" or any(host == local[0] for _, local, _ in ends)


def _ends(sock: Any) -> tuple[tuple[bytes, int], tuple[bytes, int]]:
    return _address(sock.src_addr, sock.src_port), _address(sock.dst_addr, sock.dst_port)


def _address(words: Iterable[int], port: int) -> tuple[bytes, int]:
    raw = b"".join(word.to_bytes(4, "little") for word in words)
    if len(raw) == 16 and raw.startswith(bytes(10) + b"\xff\xff"):
        raw = raw[12:]  # an IPv4 address in IPv6 clothes: the peer may wear none
    return raw, port


def _text(address: tuple[bytes, int]) -> str:
    from ipaddress import ip_address

    raw, port = address
    host = str(ip_address(raw)) if len(raw) in (4, 16) else raw.hex()
    return f"[{host}]:{port}" if len(raw) == 16 else f"{host}:{port}"


def mend_connections(images: Workspace) -> None:
    """Put right what keeps CRIU from restoring a busy TCP connection.

    A window update may lie beyond what the kernel accepts back: about one dump in a hundred records a
    `snd_wl1` past `rcv_nxt + rcv_wnd`, and restoring it fails with "Unable to set window parameters". The
    value only says how fresh the window is: the last sequence received is as good.

    Data that was not sent yet CRIU really sends while it restores. Where the other end is restored a moment
    later, and no filter holds the packets back, the answer is a reset (EPIPE). So all data counts as sent and
    not acknowledged: the kernel sends it again by itself.
    """
    for name in images.names():
        if not name.startswith("tcp-stream-"):
            continue
        data = images.read(name)
        (size,) = struct.unpack_from("<I", data, 8)
        entry = messages.tcp_stream_entry.FromString(data[12 : 12 + size])
        beyond = (entry.snd_wl1 - entry.inq_seq - entry.rcv_wnd) & 0xFFFF_FFFF
        if entry.HasField("snd_wl1") and 0 < beyond < 1 << 31:
            entry.snd_wl1 = entry.inq_seq
        entry.unsq_len = 0
        body = entry.SerializeToString()
        images.write(name, data[:8] + struct.pack("<I", len(body)) + body + data[12 + size :])


def forget_foreign_sessions(images: Workspace, members: Collection[int]) -> None:
    """Let a terminal that controlled a session outside of the tree control none: its leader is not here."""
    if "tty-info.img" not in images.names():
        return
    info = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry)
    for entry in info.entries:
        if entry.type == _EXTERNAL_TERMINAL and entry.sid not in members:
            entry.sid = entry.pgrp = 0
    images.write("tty-info.img", info.encode())


def forget_control_of_devices(images: Workspace) -> None:
    """Let no terminal of the host's own (console, serial line) control a session.

    When the leader of that session ends, as it does after a trial, the kernel hangs the terminal up, for the
    original as well.
    """
    if "tty-info.img" not in images.names():
        return
    info = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry)
    for entry in info.entries:
        if entry.type not in (_PSEUDO_TERMINAL, _EXTERNAL_TERMINAL):
            entry.sid = entry.pgrp = 0
    images.write("tty-info.img", info.encode())


def keep_orphans(images: Workspace) -> None:
    """Have processes whose session has no leader any more, such as daemons, be of their parent's session.

    CRIU makes a leader for them, which ends at once: that gives them another parent, outside of the tree
    unless its root is the first process of a pid namespace.
    """
    tree = ImageFile.parse(images.read("pstree.img"), messages.pstree_entry)
    root, *others = tree.entries
    if root.pid == 1:
        return
    pids = {entry.pid for entry in tree.entries}
    sessions = {root.pid: root.sid}
    moved = False
    for entry in others:  # parents come before their children
        parents = sessions.get(entry.ppid, root.sid)
        if entry.sid not in pids and entry.sid != parents:
            entry.sid = parents
            moved = True
        sessions[entry.pid] = entry.sid
    if moved:
        images.write("pstree.img", tree.encode())


def move_terminals(
    images: Workspace, free_here: Callable[[Collection[int]], Sequence[int]], spared: int = 0
) -> None:
    """Give pseudo-terminals numbers (N of /dev/pts/N) that CRIU can get for them, the same where possible.

    The `spared` lowest free numbers are left to others, where CRIU gets at what is above them. `free_here`
    says which numbers new ones would get, ascending, as many as there could be need for.
    """
    if "tty-info.img" not in images.names():
        return
    info = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry)
    pairs = [entry for entry in info.entries if entry.type == _PSEUDO_TERMINAL]
    ours = {entry.pty.index for entry in pairs}
    moved = _numbers_to_change(sorted(ours), free_here(ours), spared) if ours else {}
    slaves: dict[int, int] = {}
    for entry in pairs:
        if entry.pty.index in moved:
            entry.pty.index = moved[entry.pty.index]
            if os.major(entry.rdev) != _MASTERS:
                entry.rdev = os.makedev(os.major(entry.rdev), entry.pty.index)
                slaves[entry.id] = entry.pty.index
    if moved:
        images.write("tty-info.img", info.encode())
        _rename_terminals(images, slaves)


def _numbers_to_change(ours: Sequence[int], free: Sequence[int], spared: int) -> dict[int, int]:
    """New numbers for those of `ours` that CRIU cannot get, when it takes one after the other.

    The kernel hands out the lowest: CRIU opens terminals until it has the number that it wants, but gives
    up at once when that is far above the first.
    """
    in_reach = sum(number - free[0] < _REACH for number in free)
    left = list(free[max(0, min(spared, in_reach - len(ours))) :])
    moved: dict[int, int] = {}
    for number in ours:
        if number in left and number - (free if spared else left)[0] < _REACH:
            left.remove(number)
        elif others := [other for other in left if other not in ours]:
            moved[number] = others[0]
            left.remove(others[0])
    return moved


def _rename_terminals(images: Workspace, slaves: Mapping[int, int]) -> None:
    """Have the files of these terminals (ids of `tty_info_entry`) be named after their new numbers."""
    files = read_files(images)
    ttys = [entry.tty for entry in files.entries if entry.type == messages.fd_types.TTY]
    names = {tty.regf_id: f"/dev/pts/{slaves[tty.tty_info_id]}" for tty in ttys if tty.tty_info_id in slaves}
    for entry in files.entries:
        if entry.type == messages.fd_types.REG and entry.id in names:
            entry.reg.name = names[entry.id]
    images.write("files.img", files.encode())


def hung_up_terminals(images: Workspace) -> list[tuple[int, int]]:
    """The masters of terminals that nobody has open any more, each as (pid inside the tree, descriptor)."""
    if "tty-info.img" not in images.names():
        return []
    entries = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry).entries
    pairs = [entry for entry in entries if entry.type == _PSEUDO_TERMINAL]
    used = {entry.pty.index for entry in pairs if os.major(entry.rdev) != _MASTERS}
    left = {entry.id for entry in pairs if entry.pty.index not in used}
    files = [e.tty for e in read_files(images).entries if e.type == messages.fd_types.TTY] if left else []
    masters = {tty.id for tty in files if tty.tty_info_id in left}
    return holders_of(images, masters)


def forget_death_of_parent(images: Workspace, root: int) -> int:
    """Let the root live on when its parent ends; return the signal that it was to get then (0: none)."""
    core = ImageFile.parse(images.read(f"core-{root}.img"), messages.core_entry)
    thread = core.entries[0].thread_core
    number = int(thread.pdeath_sig)
    if number:
        thread.ClearField("pdeath_sig")
        images.write(f"core-{root}.img", core.encode())
    return number


def forget_network_lock(images: Workspace) -> None:
    """Let CRIU look for no packet filter table where there is none: to find none takes the kernel 10 ms.

    A tree that brings its network namespace along is left as it is: CRIU locks that one anew while it works.
    """
    if any(name.startswith("netns-") for name in images.names()):
        return
    inventory = ImageFile.parse(images.read("inventory.img"), messages.inventory_entry)
    inventory.entries[0].network_lock_method = _NO_NETWORK_LOCK
    images.write("inventory.img", inventory.encode())


def regular_files(images: Workspace) -> list[tuple[str, int, int, int | None]]:
    """Every regular file that the tree has open or mapped: (path, flags, mode, size at the dump).

    Deleted ones are left out: what lies under their paths now, if anything, is another file.
    """
    remapped = remapped_ids(images)
    return [
        (text_of(e.reg.name), e.reg.flags, e.reg.mode, e.reg.size if e.reg.HasField("size") else None)
        for e in read_files(images).entries
        if e.type == messages.fd_types.REG and e.id not in remapped
    ]


def named_files(images: Workspace) -> list[dict[str, Any]]:
    """The files that CRIU opens by name on restore, by path: not deleted ones, not external ones.

    Each with its size (bytes), mode, and build-id in hexadecimal where it has one.
    """
    remapped = remapped_ids(images)
    found: dict[str, dict[str, Any]] = {}
    for entry in read_files(images).entries:
        if entry.type == messages.fd_types.REG and entry.id not in remapped and not entry.reg.ext:
            words = b"".join(word.to_bytes(4, "little") for word in entry.reg.build_id)
            path = text_of(entry.reg.name)
            found[path] = {
                "path": path,
                "size": entry.reg.size,
                "mode": entry.reg.mode,
                "build_id": words.hex(),
            }
    return [found[path] for path in sorted(found)]


def forget_sizes(images: Workspace, paths: Collection[str] | None = None) -> None:
    """Let CRIU open these files (None: all) whatever their size: their content was compared, or may grow."""
    if paths is not None and not paths:
        return
    files = read_files(images)
    for entry in files.entries:
        if entry.type == messages.fd_types.REG and (paths is None or text_of(entry.reg.name) in paths):
            entry.reg.ClearField("size")
    images.write("files.img", files.encode())


def forget_files(images: Workspace, paths: Collection[str], here: Callable[[str], str]) -> None:
    """Let CRIU open these files whatever they are now: the user takes the blame.

    `here` says where on this host a path of the tree lies; `paths` are such places.
    """
    files = read_files(images)
    for entry in files.entries:
        if entry.type == messages.fd_types.REG and here(text_of(entry.reg.name)) in paths:
            for field in ("size", "mode", "build_id"):
                entry.reg.ClearField(field)
    images.write("files.img", files.encode())


def accept_growth(images: Workspace, here: Callable[[str], str]) -> list[tuple[str, int, int]]:
    """Let CRIU open files that have only grown since the dump, such as logs that the tree reads.

    Returns their paths, sizes then and sizes now. Files that are mapped, or that the tree writes to other
    than at their end, are left out: they must be the same. `here` says where a path lies on this host.
    """
    files = read_files(images)
    remapped = remapped_ids(images)
    regular = [entry for entry in files.entries if entry.type == messages.fd_types.REG]
    grown: dict[str, tuple[str, int, int]] = {}
    for entry in regular:
        if entry.reg.HasField("size") and entry.id not in remapped and not entry.reg.ext:
            path = text_of(entry.reg.name)
            now = _size_of(here(path))
            if now > entry.reg.size:
                grown[path] = (path, entry.reg.size, now)
    if grown:
        mapped = mapped_ids(images)
        for entry in regular:
            if entry.id in mapped or writes_anywhere(entry.reg.flags):
                grown.pop(text_of(entry.reg.name), None)
        for entry in regular:
            if text_of(entry.reg.name) in grown:
                entry.reg.ClearField("size")
        images.write("files.img", files.encode())
    return list(grown.values())


def make_room_for_deleted(images: Workspace, here: Callable[[str], str] = str) -> list[str]:
    """Give deleted files and folders other names, where CRIU could not make them under their own.

    It makes each for a moment, and removes it again. It needs the folder above (which it would make, and
    leave behind), takes a folder that somebody has made there meanwhile for its own, and does not go on where
    a restore that was killed has left a file of that moment. `here` says where a path lies on this host.
    Returns the places of these files for the moment.
    """
    files = read_files(images)
    unnamed = unnamed_ids(images)
    renamed: dict[tuple[int, str], str] = {}
    taken: set[str] = set()
    moments: set[str] = set()
    for entry in files.entries:
        if entry.type != messages.fd_types.REG or entry.id not in unnamed:
            continue
        path = text_of(entry.reg.name)
        key = (unnamed[entry.id], path)
        is_folder = stat.S_ISDIR(entry.reg.mode)
        made_as = "{}" if is_folder else f"{{}}.cr.{unnamed[entry.id]:x}.ghost"
        if key not in renamed:
            is_free = path not in taken and not os.path.lexists(here(made_as.format(path)))
            has_room = is_free and os.path.isdir(here(os.path.dirname(path)))
            renamed[key] = path if has_room else _free_name(path, made_as, here, taken)
            taken.update([renamed[key]] if is_folder else [])
        if renamed[key] != path:
            entry.reg.name = renamed[key]
        if not is_folder:
            moments.add(here(made_as.format(renamed[key])))
    if any(path != name for (_, path), name in renamed.items()):
        images.write("files.img", files.encode())
    return sorted(moments)


def _free_name(path: str, made_as: str, here: Callable[[str], str], taken: Collection[str]) -> str:
    """A name that nothing has, nor what it is made as, in the nearest folder above that is there."""
    folder, name = os.path.split(path)
    while not os.path.isdir(here(folder)):
        folder = os.path.dirname(folder)
    start = os.path.join(folder, name.encode(errors="replace").decode()[:50])  # messages take UTF-8 only
    names = (f"{start}.gone-{number}" for number in itertools.count(1))
    return next(
        name
        for name in names
        if name not in taken and not any(os.path.lexists(here(one)) for one in (name, made_as.format(name)))
    )


def _size_of(path: str) -> int:
    """The size of a regular file; 0 when there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def touched_folders(images: Workspace) -> list[str]:
    """Folders with names that a restore makes, removes or fills: bound sockets, FIFOs, unnamed files."""
    found: set[str] = set()
    entries = read_files(images).entries
    fifos = {entry.fifo.regf_id for entry in entries if entry.type == messages.fd_types.FIFO}
    special = remapped_ids(images) | fifos
    for entry in entries:
        if entry.type == messages.fd_types.UNIXSK and not entry.usk.uflags & _OUTSIDE_SOCKET:
            if path := _socket_path(entry.usk):
                found.add(os.path.dirname(path))
        elif entry.type == messages.fd_types.REG and entry.id in special:
            found.add(os.path.dirname(text_of(entry.reg.name)))
    return sorted(os.path.normpath(folder) for folder in found if os.path.isdir(folder))


def outside_sockets(images: Workspace) -> list[str]:
    """Paths of the unix sockets of others that the tree sends to."""
    return sorted(
        path
        for entry in read_files(images).entries
        if entry.type == messages.fd_types.UNIXSK
        and entry.usk.uflags & _OUTSIDE_SOCKET
        and (path := _socket_path(entry.usk))
    )


def _socket_path(entry: Any) -> str:
    """Where a unix socket is bound; empty for one without a name, or with an abstract one."""
    if entry.name[:1] in (b"", b"\0"):
        return ""
    return os.path.join(text_of(entry.name_dir) or "/", os.fsdecode(entry.name.rstrip(b"\0")))
