"""What threads have for themselves, and processes with each other, where CRIU takes the opposite for granted.

It asks the first thread of a process for its open files, its folders and its namespaces, and takes all
others to have the same (unshare(2) and setns(2) are for one thread). And it takes the memory of each process
to be its own, which clone(2) with CLONE_VM alone makes that of two. One of them may be outside the
tree, where nobody stops it from writing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from crcli import kernel
from crcli.process.identity import ENDED, Stat, parse_stat, read_proc
from crcli.process.tree import PID_GONE, Process, Tree
from crcli.records import Struct

_OF_THREADS = ("net", "uts", "ipc")
"""The namespaces that a thread can have for itself, folders apart: the one of mounts comes with those."""

_WITHOUT_FILES = 0x4 | 0x10 | 0x4000
"""Flags of a thread (include/linux/sched.h) that is just ending (PF_EXITING), or is one of the kernel's
own in a process (PF_IO_WORKER, PF_USER_WORKER): it has no files rather than others."""


class ThreadApart(Struct, frozen=True):
    """A thread that does not share `what` with the first one of its process."""

    pid: int
    tid: int
    what: str


def threads_apart(tree: Tree) -> tuple[ThreadApart, ...]:
    """Return the threads with open files, folders or namespaces of their own."""
    found: list[ThreadApart] = []
    for process in tree.living:
        if process.threads > 1 and not process.leader_exited:
            found += [
                one
                for one in _apart(process)
                if all(_runs_the_program(one.pid, tid) for tid in (one.tid, one.pid))
            ]
    return tuple(found)


def _apart(process: Process) -> list[ThreadApart]:
    leader, found = process.pid, []
    for tid in _other_tids(leader):
        try:
            if not kernel.shares(leader, tid, kernel.KCMP_FILES):
                found.append(ThreadApart(leader, tid, "open files"))
            if not kernel.shares(leader, tid, kernel.KCMP_FS):
                found.append(ThreadApart(leader, tid, "a working folder"))
            if names := [
                name for name in _OF_THREADS if _namespace(leader, tid, name) != process.namespaces.get(name)
            ]:
                found.append(ThreadApart(leader, tid, f"namespaces ({', '.join(names)})"))
        except OSError:
            continue  # it has ended meanwhile, or there is no knowing it here
    return found


def _runs_the_program(pid: int, tid: int) -> bool:
    """Whether it is a thread of the program's that goes on. To be asked afterwards: one that ends says so
    before it lets go of its files."""
    try:
        stat = parse_stat(read_proc(f"/proc/{pid}/task/{tid}/stat"))
    except PID_GONE:
        return False
    return stat.state not in ENDED and not stat.flags & _WITHOUT_FILES


def _other_tids(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task") if name != str(pid)]
    except PID_GONE:
        return []


def _namespace(pid: int, tid: int, name: str) -> int:
    link = os.readlink(f"/proc/{pid}/task/{tid}/ns/{name}")
    return int(link[link.index("[") + 1 : -1])


class MemoryInCommon(Struct, frozen=True):
    """A process of the tree, and another (`pid`, `comm`) that has the same memory."""

    process: Process
    pid: int
    comm: str


def sharing_memory(tree: Tree, everybody: Iterable[Stat]) -> tuple[MemoryInCommon, ...]:
    """Return the processes that have the memory of their parent, but for those that it waits for in vfork,
    or that of one (of `everybody` on this host) that is not in the tree."""
    members = {process.pid: process for process in tree}
    inside = [
        MemoryInCommon(process, parent.pid, parent.comm)
        for process in tree.living
        if (parent := members.get(process.ppid)) is not None
        and not parent.uninterruptible
        and _have_one_memory(process.pid, parent.pid)
    ]
    return (*inside, *_with_outsiders(members, everybody))


def _with_outsiders(members: Mapping[int, Process], everybody: Iterable[Stat]) -> Iterator[MemoryInCommon]:
    """Who has the memory of another has its layout, as a fork has: only such are compared. Children of the
    tree that are not in it were born since: into vfork, most often."""
    layouts: dict[tuple[int, ...], list[Process]] = {}
    outside: list[Stat] = []
    for stat in everybody:
        if stat.pid in members:
            layouts.setdefault(stat.layout, []).append(members[stat.pid])
        elif any(stat.layout) and stat.ppid not in members:
            outside.append(stat)
    for other in outside:
        for process in layouts.get(other.layout, ()):
            if _have_one_memory(process.pid, other.pid):
                yield MemoryInCommon(process, other.pid, other.comm)


def _have_one_memory(pid: int, other: int) -> bool:
    try:
        return kernel.shares(pid, other, kernel.KCMP_VM)
    except OSError:
        return False
