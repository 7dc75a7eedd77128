"""CRIU's own image files: read, edited and written with pycriu's messages.

A file is one or two 32-bit magics followed by protobuf messages, each after its 32-bit size (pagemaps
begin with a head message). Only files of that plain kind are touched here; the others pass through as bytes.
"""

from __future__ import annotations

import mmap
import os
import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from crcli.criu import messages
from crcli.memory.extents import PAGE, SpaceKind
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Mapping

    from crcli.criu.workspace import Workspace
    from crcli.memory.extents import SpaceKey

_COMMON_MAGIC, _SERVICE_MAGIC = 0x54564319, 0x55105940
_SHARED_MAGICS = tuple(struct.pack("<I", value) for value in (_COMMON_MAGIC, _SERVICE_MAGIC))
_SIZE = struct.Struct("<I")
_IN_PARENT, _PRESENT = 1, 4
_REMEMBERED_RUNS = 4096
_MADV_WIPEONFORK = 18
_MAP_NORESERVE = 0x4000
_LARGE_BYTES = 1 << 30
"""From where on address space that may not be written is taken out of the kernel's account (bytes)."""
_TASK_ALIVE, _TASK_STOPPED = 1, 3
_COUNTS = ("nr_pages", "compat_nr_pages")
"""Where a pagemap entry counts its pages: CRIU 4.2 has two such fields, for its older readers."""

REMAP_PREFIX = "link_remap."
"""How the names begin that CRIU gives to files without one."""

_REMAP_LINKED, _REMAP_GHOST, _REMAP_PROCFS = 0, 1, 2
_MAPS_A_FILE = 1 << 6 | 1 << 7  # VMA_FILE_PRIVATE, VMA_FILE_SHARED


class ImageFolder(Protocol):
    """Where CRIU's images can be read: a workspace, or the blobs of an image in a store."""

    def names(self) -> list[str]:
        """The names of the files in it, sorted."""
        ...

    def read(self, name: str) -> bytes:
        """Return one file whole."""
        ...


class ImageFile(Struct):
    """One image file taken apart: its magics, and its messages, which may be edited in place."""

    head: bytes
    entries: list[Any]

    @classmethod
    def parse(cls, data: bytes, kind: Any) -> ImageFile:
        """Take a file apart. Raises ValueError when it is not a whole file of messages of `kind`."""
        entries: list[Any] = []
        head = at = 8 if data[:4] in _SHARED_MAGICS else 4
        while at < len(data):
            (size,) = _SIZE.unpack_from(data, at)
            at += 4
            if at + size > len(data):
                raise ValueError("an image of CRIU's is cut short")
            entries.append(kind.FromString(data[at : at + size]))
            at += size
        return cls(data[:head], entries)

    def encode(self) -> bytes:
        """Put it together again."""
        return self.head + b"".join(_message(entry) for entry in self.entries)


def text_of(field: str | bytes) -> str:
    """A name from a message, as Python has file names: protobuf hands one that is not UTF-8 over as bytes."""
    return os.fsdecode(field)


def _message(entry: Any) -> bytes:
    body: bytes = entry.SerializeToString()
    return _SIZE.pack(len(body)) + body


def single_magic(name: str) -> bytes:
    """How the inventory begins, the one image that has no second magic."""
    return struct.pack("<I", messages.magic(name))


def _head(name: str) -> bytes:
    return struct.pack("<II", _COMMON_MAGIC, messages.magic(name))


class TreeMember(Struct, frozen=True):
    """One process as the image has it: all numbers as the tree itself sees them."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: tuple[int, ...]
    alive: bool
    stopped: bool
    """Whether job control has stopped it; it is alive then."""
    comm: str
    rseq_pages: tuple[int, ...]
    """Pages that hold an rseq area: the kernel writes there while CRIU restores."""
    has_oom_score: bool = False
    """Whether CRIU gives it an oom_score_adj: one that is not 0."""


def read_tree(images: ImageFolder) -> list[TreeMember]:
    """The processes of the image, the root first."""
    members: list[TreeMember] = []
    there = set(images.names())
    for entry in ImageFile.parse(images.read("pstree.img"), messages.pstree_entry).entries:
        state, comm, rseq, has_oom_score = 0, "", set(), False
        threads = _threads_of(entry, there)
        for thread in threads:
            core = ImageFile.parse(images.read(f"core-{thread}.img"), messages.core_entry).entries[0]
            if thread == entry.pid:
                state, comm = core.tc.task_state, text_of(core.tc.comm)
                has_oom_score = core.tc.oom_score_adj != 0
            if core.thread_core.HasField("rseq_entry"):
                rseq.add(core.thread_core.rseq_entry.rseq_abi_pointer // PAGE)
        members.append(
            TreeMember(
                entry.pid,
                entry.ppid,
                entry.pgid,
                entry.sid,
                threads,
                state in (_TASK_ALIVE, _TASK_STOPPED),
                state == _TASK_STOPPED,
                comm,
                tuple(rseq),
                has_oom_score,
            )
        )
    return members


def _threads_of(entry: Any, there: Container[str]) -> tuple[int, ...]:
    """The threads of a process. Of one that has ended CRIU writes down what happens to be in its memory."""
    return tuple(thread for thread in entry.threads if f"core-{thread}.img" in there)


def wiped_on_fork(images: ImageFolder, pid: int) -> list[int]:
    """The pages of a process whose children do not get their contents (MADV_WIPEONFORK)."""
    mm = ImageFile.parse(images.read(f"mm-{pid}.img"), messages.mm_entry).entries[0]
    return [
        page
        for vma in mm.vmas
        if vma.madv & 1 << _MADV_WIPEONFORK
        for page in range(vma.start // PAGE, vma.end // PAGE)
    ]


def join_threads_to_leaders(images: Workspace) -> None:
    """Say of every thread that it is in its process's cgroups, for a restore that leaves cgroups alone."""
    there = set(images.names())
    for member in ImageFile.parse(images.read("pstree.img"), messages.pstree_entry).entries:
        for thread in _threads_of(member, there):
            name = f"core-{thread}.img"
            core = ImageFile.parse(images.read(name), messages.core_entry)
            if core.entries[0].thread_core.HasField("cg_set"):
                core.entries[0].thread_core.ClearField("cg_set")
                images.write(name, core.encode())


def free_reservations(images: Workspace) -> None:
    """Have address space that is only reserved take no memory by the kernel's account, where it did.

    Of what a child shares with its parent, and of all in a lazy restore, CRIU makes such a mapping writable
    for a moment, and the kernel refuses one that is larger than the host's memory, if it may be written and
    is without MAP_NORESERVE. Chromium reserves 32 GiB that nobody may touch.
    """
    for name in images.names():
        if name.startswith("mm-"):
            mm = ImageFile.parse(images.read(name), messages.mm_entry)
            large = [vma for vma in mm.entries[0].vmas if _is_reservation(vma)]
            for vma in large:
                vma.flags |= _MAP_NORESERVE
            if large:
                images.write(name, mm.encode())


def _is_reservation(vma: Any) -> bool:
    is_private = vma.flags & (mmap.MAP_PRIVATE | _MAP_NORESERVE) == mmap.MAP_PRIVATE
    return is_private and not vma.prot & mmap.PROT_WRITE and vma.end - vma.start >= _LARGE_BYTES


def read_files(images: ImageFolder) -> ImageFile:
    """Every open and mapped file of the tree (`file_entry` messages)."""
    return ImageFile.parse(images.read("files.img"), messages.file_entry)


def rename_sockets(images: Workspace, paths: Mapping[int, str]) -> None:
    """Have unix sockets, by their inodes, be bound to these paths on a restore."""
    files = read_files(images)
    for entry in files.entries:
        if entry.type == messages.fd_types.UNIXSK and entry.usk.ino in paths:
            entry.usk.name = os.fsencode(paths[entry.usk.ino]) + b"\0"
    images.write("files.img", files.encode())


def read_descriptors(images: Workspace) -> dict[int, list[tuple[str, int]]]:
    """For each file id of `read_files`, the (fdinfo image, descriptor) pairs that refer to it."""
    users: dict[int, list[tuple[str, int]]] = {}
    for name in images.names():
        if name.startswith("fdinfo-"):
            for entry in ImageFile.parse(images.read(name), messages.fdinfo_entry).entries:
                users.setdefault(entry.id, []).append((name, entry.fd))
    return users


def holders_of(images: Workspace, ids: Collection[int]) -> list[tuple[int, int]]:
    """One (pid inside the tree, descriptor) for each of these file ids that a process has open."""
    return sorted(holder_by_id(images, ids).values())


def holder_by_id(images: Workspace, ids: Collection[int]) -> dict[int, tuple[int, int]]:
    """The same, by the file's id."""
    owners: dict[str, int] = {}
    for name in images.names():
        if name.startswith("ids-"):
            kobj = ImageFile.parse(images.read(name), messages.task_kobj_ids_entry).entries[0]
            owners[f"fdinfo-{kobj.files_id}.img"] = int(name[4:-4])
    users = read_descriptors(images)
    holders = {
        number: [(owners[name], fd) for name, fd in users.get(number, ()) if name in owners] for number in ids
    }
    return {number: found[0] for number, found in holders.items() if found}


def mapped_ids(images: ImageFolder, pid: int | None = None) -> set[int]:
    """Ids of the files that a process (None: any) has mapped or executes."""
    names = [name for name in images.names() if name.startswith("mm-")] if pid is None else [f"mm-{pid}.img"]
    found: set[int] = set()
    for name in names:
        for mm in ImageFile.parse(images.read(name), messages.mm_entry).entries:
            found.add(mm.exe_file_id)
            found.update(vma.shmid for vma in mm.vmas if vma.status & _MAPS_A_FILE)
    return found


def memfd_names(images: ImageFolder) -> set[str]:
    """The names that the tree's memfds were made with."""
    if "memfd.img" not in images.names():
        return set()
    inodes = ImageFile.parse(images.read("memfd.img"), messages.memfd_inode_entry).entries
    return {text_of(inode.name) for inode in inodes}


def run_id(images: ImageFolder) -> str:
    """The id under which CRIU locked the network at the dump (empty when it has none)."""
    entry = ImageFile.parse(images.read("inventory.img"), messages.inventory_entry).entries[0]
    return str(getattr(entry, "dump_criu_run_id", ""))


def frozen_ms(images: ImageFolder) -> float:
    """For how long a dump or pre-dump that has worked stopped the tree, as CRIU measured it (ms)."""
    stats = ImageFile.parse(images.read("stats-dump"), messages.stats_entry).entries[0].dump
    return float((stats.freezing_time + stats.frozen_time) / 1000)


def link_remaps(images: ImageFolder) -> list[str]:
    """Paths of the temporary hard links that CRIU made for files without a name of their own."""
    linked = {entry.remap_id for entry in _remaps(images) if entry.remap_type == _REMAP_LINKED}
    return [text_of(entry.reg.name) for entry in read_files(images).entries if entry.id in linked]


def rename_link_remaps(images: Workspace, addition: str) -> dict[str, str]:
    """Have these links go by longer names, which no other image has; return the new paths by the old ones.

    One in a folder whose name is not UTF-8 keeps its name: protobuf sets no other text.
    """
    linked = {entry.remap_id for entry in _remaps(images) if entry.remap_type == _REMAP_LINKED}
    renamed: dict[str, str] = {}
    if linked:
        files = read_files(images)
        for entry in files.entries:
            if entry.id in linked and isinstance(entry.reg.name, str):
                old = entry.reg.name
                renamed[old] = entry.reg.name = f"{old}-{addition}"
        images.write("files.img", files.encode())
    return renamed


def remapped_ids(images: ImageFolder) -> set[int]:
    """Ids of the files that have no name of their own any more (those of ended processes in /proc aside)."""
    return {entry.orig_id for entry in _remaps(images) if entry.remap_type != _REMAP_PROCFS}


def unnamed_ids(images: ImageFolder) -> dict[int, int]:
    """Ids of the open files and folders that have no name at all any more, and which unnamed one each is."""
    return {e.orig_id: e.remap_id for e in _remaps(images) if e.remap_type == _REMAP_GHOST}


def _remaps(images: ImageFolder) -> list[Any]:
    if "remap-fpath.img" not in images.names():
        return []
    return ImageFile.parse(images.read("remap-fpath.img"), messages.remap_file_path_entry).entries


def write_pagemap(
    images: Workspace,
    space: SpaceKey,
    pages_id: int,
    runs: Iterable[tuple[int, int]],
    in_parent: Iterable[tuple[int, int]],
) -> None:
    """Write the list of pages of one address space: `runs` stand in `pages-<pages_id>.img`, in order, those
    `in_parent` are to be found by the pagemap of the same name in the folder `parent`.

    All are (first page number, pages); `runs` ascend.
    """
    parts = [_head("PAGEMAP"), _message(messages.pagemap_head(pages_id=pages_id))]
    parts += [_page_run(start, pages, flags) for start, pages, flags in _entries(runs, in_parent)]
    images.write(pagemap_name(space), b"".join(parts))


def _entries(
    runs: Iterable[tuple[int, int]], in_parent: Iterable[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """All runs in order, those joined that continue one another: CRIU takes longer for many short ones."""
    found = [(start, pages, _PRESENT) for start, pages in runs]
    found += [(start, pages, _IN_PARENT) for start, pages in in_parent]
    joined: list[tuple[int, int, int]] = []
    first, end, last = 0, 0, 0
    for start, pages, flags in sorted(found):
        if start != end or flags != last:
            if last:
                joined.append((first, end - first, last))
            first, last = start, flags
        end = start + pages
    return [*joined, (first, end - first, last)] if last else joined


@lru_cache(_REMEMBERED_RUNS)
def _page_run(start: int, pages: int, flags: int) -> bytes:
    """The message for one run; of a process with many children most have the same."""
    known = messages.pagemap_entry.DESCRIPTOR.fields_by_name
    counts = {name: pages for name in _COUNTS if name in known}
    return _message(messages.pagemap_entry(vaddr=start * PAGE, flags=flags, **counts))


def pagemap_name(space: SpaceKey) -> str:
    """The name of an address space's pagemap."""
    return f"pagemap-{'shmem-' if space.kind == SpaceKind.SHARED else ''}{space.number}.img"


def pages_name(pages_id: int) -> str:
    """The name of the page file of this number."""
    return f"pages-{pages_id}.img"


def create_pages(images: Workspace, pages_id: int, pages: int) -> int:
    """Make the page file of this number, all holes, and return a descriptor to fill it with."""
    fd = images.create_file(pages_name(pages_id))
    os.ftruncate(fd, pages * PAGE)
    return fd
