"""The process tree that a dump is about: its root and every descendant, as /proc describes them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from crcli.errors import PreflightRefused
from crcli.process.identity import ENDED, ProcessId, Stat, read_proc, read_stat
from crcli.process.settings import ThreadSettings, read_core_filter, read_settings
from crcli.records import Struct

NAMESPACES = (
    "cgroup",
    "ipc",
    "mnt",
    "net",
    "pid",
    "pid_for_children",
    "time",
    "time_for_children",
    "user",
    "uts",
)

PID_GONE = (FileNotFoundError, ProcessLookupError)
"""What the kernel answers once a process has ended: ENOENT on opening its files, ESRCH on reading them."""


class Capabilities(NamedTuple):
    """The sets of capabilities of a process, as bits."""

    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int


class Process(Struct, frozen=True):
    """One process as /proc shows it, seen from crcli's own pid namespace.

    `uids` and `gids` are real, effective, saved, file system. `namespaces` maps a name in /proc/PID/ns to
    its inode. `cgroups` is /proc/PID/cgroup as it stands. `tracer` is the pid of a debugger on any of its
    threads, 0 for none; `uninterruptible` are the threads that no signal reaches just now (state D).
    `nspid` and `nssid` list its pid and session id from crcli's pid namespace inwards. `seccomp` is the
    highest mode of any thread (0 none, 1 strict, 2 filters). `cpus` is the list of processors that it may
    run on, `thread_settings` the same and more of each thread. `personality` is as
    personality(2) has it, `lsm` the profile or label that a security module (AppArmor, SELinux) gives it.
    `anonymous_bytes` (anonymous and swapped memory) is about what CRIU would write for this process alone,
    `shared_bytes` is memory that it may share with others, `huge_bytes` lies in pages of hugetlbfs,
    `locked_bytes` may not be swapped out. `core_filter` says what a core dump of it holds (core(5); -1: not
    known).
    A zombie has no memory, files or namespaces, so those fields are empty.
    """

    pid: int
    start: int
    ppid: int
    pgid: int
    sid: int
    state: str
    comm: str
    argv: tuple[str, ...]
    exe: str
    cwd: str
    root: str
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    threads: int
    tty_nr: int
    tty_pgid: int
    namespaces: dict[str, int]
    cgroups: str
    tracer: int
    uninterruptible: tuple[int, ...]
    nspid: tuple[int, ...]
    nssid: tuple[int, ...]
    cap_eff: int
    seccomp: int
    no_new_privs: bool
    cpus: str
    capabilities: Capabilities
    thread_settings: tuple[ThreadSettings, ...]
    personality: int
    lsm: str
    resident_bytes: int
    anonymous_bytes: int
    shared_bytes: int
    huge_bytes: int
    locked_bytes: int
    core_filter: int

    @property
    def identity(self) -> ProcessId:
        """The pid with its start time."""
        return ProcessId(self.pid, self.start)

    @property
    def is_zombie(self) -> bool:
        """Whether it has ended and waits to be reaped."""
        return self.state in ENDED and self.threads <= 1

    @property
    def leader_exited(self) -> bool:
        """Whether its first thread has ended while others run on; /proc then hides its memory and files."""
        return self.state in ENDED and self.threads > 1

    @property
    def is_stopped(self) -> bool:
        """Whether job control has stopped it (SIGSTOP, SIGTSTP)."""
        return self.state == "T"

    @property
    def label(self) -> str:
        """The process in a sentence: `python3 (4711)`."""
        return f"{self.comm} ({self.pid})"


class Tree(Struct, frozen=True):
    """The processes of one dump, parents before their children, the root first."""

    root: Process
    processes: tuple[Process, ...]
    pids: frozenset[int]

    def __iter__(self) -> Iterator[Process]:
        return iter(self.processes)

    def __len__(self) -> int:
        return len(self.processes)

    def __contains__(self, pid: int) -> bool:
        return pid in self.pids

    @property
    def living(self) -> tuple[Process, ...]:
        """The processes that have memory and files: all but the zombies."""
        return tuple(process for process in self.processes if not process.is_zombie)

    @property
    def identities(self) -> frozenset[ProcessId]:
        """Every process by pid and start time; two scans with equal sets saw the same tree."""
        return frozenset(process.identity for process in self.processes)

    def process(self, pid: int) -> Process:
        """Return the process of the tree that has this pid; raise KeyError when there is none."""
        for process in self.processes:
            if process.pid == pid:
                return process
        raise KeyError(pid)


def scan_tree(root: ProcessId) -> Tree:
    """Return the root and every descendant of it that exists now.

    A process that ends while it is looked at is left out, unless it is the root: then PreflightRefused. The
    tree may change the moment after; only a frozen tree stands still.
    """
    found: dict[int, Process] = {}
    waiting = deque([root.pid])
    while waiting:
        pid = waiting.popleft()
        if pid in found:
            continue
        process = read_process(pid)
        if process is None:
            continue
        found[pid] = process
        waiting.extend(child_pids(pid))
    first = found.get(root.pid)
    if first is None or first.start != root.start_time or first.is_zombie:
        raise PreflightRefused(
            f"process {root.pid} ended while crcli was looking at it", hint="start it again, then dump it"
        )
    return Tree(first, tuple(found.values()), frozenset(found))


def child_pids(pid: int) -> list[int]:
    """Return the pids of the children that exist now, of all threads; none when the process is gone."""
    children: list[int] = []
    for tid in _tids(pid):
        try:
            children += map(int, read_proc(f"/proc/{pid}/task/{tid}/children").split())
        except PID_GONE:
            if os.path.exists(f"/proc/{pid}/task/{tid}") and not _kernel_lists_children():
                return _children_by_ppid(pid)
    return children


def _kernel_lists_children() -> bool:
    """Whether this kernel was built with CONFIG_PROC_CHILDREN."""
    return os.path.exists("/proc/thread-self/children")


def _children_by_ppid(parent: int) -> list[int]:
    return [stat.pid for stat in every_stat() if stat.ppid == parent]


def every_stat() -> Iterator[Stat]:
    """Yield the stat record of every process on the host, those that end meanwhile left out."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                yield read_stat(int(name))
            except ProcessLookupError:
                continue


def read_process(pid: int) -> Process | None:
    """Return the process that has this pid now; None when there is none."""
    here = f"/proc/{pid}"
    try:
        stat = read_stat(pid)
        status = _status_fields(read_proc(f"{here}/status"))
        cgroups = read_proc(f"{here}/cgroup").decode(errors="surrogateescape")
        argv = _argv(read_proc(f"{here}/cmdline"))
    except PID_GONE:
        return None
    threads = _read_threads(pid) if stat.threads > 1 else [_thread(pid, stat.state, status)]
    return Process(
        pid=pid,
        start=stat.start_time,
        ppid=stat.ppid,
        pgid=stat.pgid,
        sid=stat.sid,
        state=stat.state,
        comm=stat.comm,
        argv=argv,
        exe=_link(f"{here}/exe"),
        cwd=_link(f"{here}/cwd"),
        root=_link(f"{here}/root"),
        uids=_numbers(status["Uid"]),
        gids=_numbers(status["Gid"]),
        threads=stat.threads,
        tty_nr=stat.tty_nr,
        tty_pgid=stat.tty_pgid,
        namespaces=read_namespaces(pid),
        cgroups=cgroups,
        tracer=next((thread.tracer for thread in threads if thread.tracer), 0),
        uninterruptible=tuple(thread.tid for thread in threads if thread.state == "D"),
        nspid=_numbers(status.get("NSpid", str(pid))),
        nssid=_numbers(status.get("NSsid", str(stat.sid))),
        cap_eff=int(status["CapEff"], 16),
        seccomp=max((thread.seccomp for thread in threads), default=int(status.get("Seccomp", "0"))),
        no_new_privs=status.get("NoNewPrivs", "0") == "1",
        cpus=status.get("Cpus_allowed_list", ""),
        capabilities=Capabilities(*(int(status[name], 16) for name in _CAPABILITY_SETS)),
        thread_settings=tuple(
            setting
            for thread in threads
            if (setting := read_settings(thread.tid, thread.inner_tid, thread.cpus)) is not None
        ),
        personality=int(_text(f"{here}/personality") or "0", 16),
        lsm=_text(f"{here}/attr/current"),
        resident_bytes=_kilobytes(status, "VmRSS"),
        anonymous_bytes=_kilobytes(status, "RssAnon") + _kilobytes(status, "VmSwap"),
        shared_bytes=_kilobytes(status, "RssShmem"),
        huge_bytes=_kilobytes(status, "HugetlbPages"),
        locked_bytes=_kilobytes(status, "VmLck"),
        core_filter=read_core_filter(pid),
    )


def read_namespaces(pid: int) -> dict[str, int]:
    """Return the inode of each namespace of a process, none for a zombie: {"net": 4026531840, …}."""
    inodes = {}
    for name in NAMESPACES:
        link = _link(f"/proc/{pid}/ns/{name}")
        if link:
            inodes[name] = int(link[link.index("[") + 1 : -1])
    return inodes


_CAPABILITY_SETS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


class _Thread(NamedTuple):
    tid: int
    state: str
    tracer: int
    seccomp: int
    inner_tid: int
    cpus: str


def _thread(tid: int, state: str, status: dict[str, str]) -> _Thread:
    return _Thread(
        tid=tid,
        state=state,
        tracer=int(status["TracerPid"]),
        seccomp=int(status.get("Seccomp", "0")),
        inner_tid=_numbers(status.get("NSpid", str(tid)))[-1],
        cpus=status.get("Cpus_allowed_list", ""),
    )


def _read_threads(pid: int) -> list[_Thread]:
    """Return what each thread has for itself: a debugger can hold a single one, so can a slow disk."""
    threads = []
    for tid in _tids(pid):
        try:
            status = _status_fields(read_proc(f"/proc/{pid}/task/{tid}/status"))
        except PID_GONE:
            continue
        if "TracerPid" in status:
            threads.append(_thread(int(tid), status["State"][0], status))
    return threads


def _tids(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except PID_GONE:
        return []


def _status_fields(raw: bytes) -> dict[str, str]:
    fields = {}
    for line in raw.decode(errors="surrogateescape").splitlines():
        key, _, value = line.partition(":")
        fields[key] = value.strip()
    return fields


def _argv(raw: bytes) -> tuple[str, ...]:
    return tuple(os.fsdecode(word) for word in raw.removesuffix(b"\0").split(b"\0")) if raw else ()


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


def _kilobytes(status: dict[str, str], key: str) -> int:
    return int(status.get(key, "0 kB").split()[0]) * 1024


def _text(path: str) -> str:
    """Return what a file in /proc says; empty where it says nothing or we may not read it."""
    try:
        return read_proc(path).decode(errors="surrogateescape").strip("\n\0 ")
    except OSError:
        return ""


def _link(path: str) -> str:
    """Return where a link in /proc points; empty for a zombie's, and for what we may not see."""
    try:
        return os.readlink(path)
    except OSError:
        return ""


def find_target(pid: int) -> ProcessId:
    """Return the identity of a process that can be the root of a dump; refuse what never can be."""
    try:
        stat = read_stat(pid)
    except ProcessLookupError:
        raise PreflightRefused(f"there is no process {pid}", hint="`ps` or `pgrep` show what runs") from None
    for check in (_refuse_kernel, _refuse_ourselves, _refuse_thread, _refuse_zombie):
        check(stat)
    return ProcessId(pid, stat.start_time)


def refuse_bad_target(pid: int) -> ProcessId:
    """Return the identity of a process that can be the root of a dump now; refuse any other."""
    root = find_target(pid)
    _refuse_traced(pid)
    return root


def _refuse_kernel(stat: Stat) -> None:
    if stat.pid == 1:
        raise PreflightRefused(
            "process 1 is the init of this system (or container)",
            hint="dump the service itself, or the container from outside",
        )
    if stat.is_kernel_thread:
        raise PreflightRefused(f"{stat.comm} ({stat.pid}) is a thread of the kernel, not a program")


def _refuse_ourselves(stat: Stat) -> None:
    if stat.pid == os.getpid():
        raise PreflightRefused("this is crcli itself", hint="give the pid of the program to dump")
    if stat.pid in _ancestors():
        raise PreflightRefused(
            f"crcli runs inside the tree of {stat.comm} ({stat.pid}) and would freeze itself",
            hint="start crcli from another terminal or service, outside of that tree",
        )


def _refuse_thread(stat: Stat) -> None:
    leader = _thread_leader(stat.pid)
    if leader != stat.pid:
        raise PreflightRefused(
            f"{stat.pid} is a thread of {stat.comm} ({leader}), not a process", hint=f"dump {leader}"
        )


def _refuse_zombie(stat: Stat) -> None:
    if stat.is_zombie:
        raise PreflightRefused(
            f"{stat.comm} ({stat.pid}) has ended and waits for its parent {stat.ppid} to reap it",
            hint="there is nothing left to dump",
        )


def _refuse_traced(pid: int) -> None:
    process = read_process(pid)
    if process is not None and process.tracer:
        tracer = tracer_label(process.tracer)
        raise PreflightRefused(
            f"{process.label} is traced by {tracer}; only one tracer can hold a process",
            hint=f"end {tracer} (a debugger, strace, or another dump), then try again",
        )


def _ancestors() -> set[int]:
    found: set[int] = set()
    pid = os.getppid()
    while pid > 1 and pid not in found:
        found.add(pid)
        try:
            pid = read_stat(pid).ppid
        except ProcessLookupError:
            break
    return found


def _thread_leader(pid: int) -> int:
    """Return the process that a thread id belongs to: /proc/TID exists for every thread, if not listed."""
    try:
        return int(_status_fields(read_proc(f"/proc/{pid}/status"))["Tgid"])
    except PID_GONE:
        return pid


def tracer_label(pid: int) -> str:
    """Return who traces, as it stands in a sentence: `strace (812)`."""
    try:
        return f"{read_stat(pid).comm} ({pid})"
    except ProcessLookupError:
        return f"process {pid}"
