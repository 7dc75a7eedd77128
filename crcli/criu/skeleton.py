"""CRIU's images made ready for a restore: the memory that CRIU reads itself, and edits for this place.

The edits of TCP and UDP sockets are in connections.py, those of terminals in terminals.py.
"""

from __future__ import annotations

import itertools
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from crcli.criu import messages
from crcli.criu.images import (
    ImageFile,
    create_pages,
    mapped_ids,
    pagemap_name,
    pages_name,
    read_files,
    remapped_ids,
    text_of,
    unnamed_ids,
    write_pagemap,
)
from crcli.criu.inspect import OUTSIDE_SOCKET, writes_anywhere
from crcli.criu.options import PARENT_LINK
from crcli.memory.extents import PAGE, Extent, SpaceKey

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from crcli.criu.workspace import Workspace
    from crcli.memory.huge import Runs
    from crcli.memory.replay import Inherited

_MADV_HUGEPAGE = 14
_ORDINARY = 1 << 0 | 1 << 9
"""VMA_AREA_REGULAR and VMA_ANON_PRIVATE: private memory of no file."""


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


def forget_death_of_parent(images: Workspace, root: int) -> int:
    """Let the root live on when its parent ends; return the signal that it was to get then (0: none)."""
    core = ImageFile.parse(images.read(f"core-{root}.img"), messages.core_entry)
    thread = core.entries[0].thread_core
    number = int(thread.pdeath_sig)
    if number:
        thread.ClearField("pdeath_sig")
        images.write(f"core-{root}.img", core.encode())
    return number


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


def accept_growth(images: Workspace, here: Callable[[str], str]) -> None:
    """Let CRIU open files that have only grown since the dump, such as logs that the tree reads.

    Files that are mapped, or that the tree writes to other than at their end, are left out: they must be the
    same. `here` says where a path lies on this host.
    """
    files = read_files(images)
    remapped = remapped_ids(images)
    regular = [entry for entry in files.entries if entry.type == messages.fd_types.REG]
    grown: set[str] = set()
    for entry in regular:
        if entry.reg.HasField("size") and entry.id not in remapped and not entry.reg.ext:
            path = text_of(entry.reg.name)
            if _size_of(here(path)) > entry.reg.size:
                grown.add(path)
    if grown:
        mapped = mapped_ids(images)
        for entry in regular:
            if entry.id in mapped or writes_anywhere(entry.reg.flags):
                grown.discard(text_of(entry.reg.name))
        for entry in regular:
            if text_of(entry.reg.name) in grown:
                entry.reg.ClearField("size")
        images.write("files.img", files.encode())


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
        if entry.type == messages.fd_types.UNIXSK and not entry.usk.uflags & OUTSIDE_SOCKET:
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
        and entry.usk.uflags & OUTSIDE_SOCKET
        and (path := _socket_path(entry.usk))
    )


def _socket_path(entry: Any) -> str:
    """Where a unix socket is bound; empty for one without a name, or with an abstract one."""
    if entry.name[:1] in (b"", b"\0"):
        return ""
    return os.path.join(text_of(entry.name_dir) or "/", os.fsdecode(entry.name.rstrip(b"\0")))
