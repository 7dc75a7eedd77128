"""Everything that /proc and the kernel say about a tree before anything is frozen.

`gather` (its own module) collects the facts once; the plan of a dump chooses its options from them,
`preflight` turns them into findings.
"""

from __future__ import annotations

import os
from typing import Any

from crcli.process.capabilities import CAP_SYS_RESOURCE
from crcli.process.files import FileId, Kind, Lock, Mapping, Mount, OpenFile
from crcli.process.outside import Outsider
from crcli.process.rings import EventRing
from crcli.process.settings import ThreadSettings
from crcli.process.sharing import MemoryInCommon, ThreadApart
from crcli.process.sockets import Socket, State
from crcli.process.sysv import SysvObject
from crcli.process.tree import Capabilities, Process, Tree
from crcli.process.watches import Watch
from crcli.records import Struct

MEMORY_FILE_SYSTEMS = frozenset(("tmpfs", "ramfs", "hugetlbfs"))

WRITTEN_LIMIT = 64 << 20
"""A file that is open for writing and larger than this (bytes) is not taken along, but named in a finding."""

MEMORY_LIMIT = 1 << 30
"""The same for files on memory file systems, which exist nowhere else."""

PSEUDO_FILE_SYSTEMS = frozenset(
    [
        "autofs",
        "bdev",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devtmpfs",
        "efivarfs",
        "fusectl",
        "mqueue",
        "nsfs",
        "proc",
        "pstore",
        "resctrl",
        "securityfs",
        "selinuxfs",
        "sysfs",
        "tracefs",
    ]
)
"""Where reading a file asks the kernel a question, or takes something away."""

REMOTE_FILE_SYSTEMS = frozenset(
    (
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fuse",
        "fuseblk",
        "gfs2",
        "gpfs",
        "lustre",
        "nfs",
        "nfs4",
        "ocfs2",
        "smb3",
        "virtiofs",
    )
)
"""Where the files are somebody else's: a server's on the network, or a program's (FUSE, also `fuse.NAME`)."""

VIRTUAL_CONSOLES, LAST_VIRTUAL_CONSOLE = 4, 63  # a major number and its minors; above them ttyS*


_SOCKET_PATH_SIZE = 108  # sun_path of struct sockaddr_un

CONTROLLING_TTY = os.makedev(5, 0)
"""/dev/tty, which is another terminal for each session."""

MOST_EXTERNAL_TERMINALS = 63
"""How many opened terminals CRIU takes as external in one dump."""


class Terminal(Struct, frozen=True):
    """One terminal that the tree has open.

    `index` is N of /dev/pts/N, also behind /dev/tty; None for a console or a serial line. `rdev` and `dev`
    name it to CRIU (`criu_key`). `master_inside`: a process of the tree drives it; else `master` is who does,
    if found. `inner_shells` have opened it to control jobs (as /dev/tty, under a number that shells keep for
    themselves) without leading its session. `opens` is how often it was opened: what was inherited or
    duplicated counts once, but only beyond `MOST_EXTERNAL_TERMINALS` of `holders` is that looked into.
    """

    path: str
    index: int | None
    rdev: int
    dev: int
    holders: tuple[OpenFile, ...]
    master_inside: bool
    master: Outsider | None
    inner_shells: tuple[OpenFile, ...] = ()
    opens: int = 1

    @property
    def leads_outside(self) -> bool:
        """Whether it must be put in place again: driven from outside, or one that CRIU has no driver for.

        Those are serial lines, and /dev/tty0, which is whatever console is shown.
        """
        if self.index is not None:
            return not self.master_inside
        return os.major(self.rdev) == VIRTUAL_CONSOLES and not 0 < os.minor(self.rdev) <= LAST_VIRTUAL_CONSOLE

    @property
    def criu_key(self) -> str:
        """The name under which CRIU takes it as external, and inherits another in its place."""
        return f"tty[{self.rdev:x}:{self.dev:x}]"


class UnreadTerminal(Struct, frozen=True):
    """Bytes that wait in a terminal which the tree itself drives, and which nobody has read from `holder`.

    `is_over`: the programs in the terminal have ended, so that there is no other side any more.
    """

    holder: OpenFile
    size: int
    is_over: bool


class Pipe(Struct, frozen=True):
    """One pipe or FIFO (then with a `path`) of the tree. `outsiders` hold an end that the tree lacks."""

    id: FileId
    path: str
    readers: tuple[OpenFile, ...]
    writers: tuple[OpenFile, ...]
    outsiders: tuple[Outsider, ...]

    @property
    def criu_key(self) -> str:
        """The name under which CRIU's restore can be given another pipe or file in its place."""
        return f"pipe:[{self.id.ino}]"

    @property
    def holders(self) -> tuple[OpenFile, ...]:
        """Every descriptor of it in the tree; one that is open both ways counts once."""
        return tuple(dict.fromkeys(self.readers + self.writers))


class HeldSocket(Struct, frozen=True):
    """One socket of the tree.

    `inside`: its other end is in the tree as well, False for one that leads out, None where there is no other
    end. `outsiders` are the processes at the other end of a unix socket, when they could be found.
    `peer` is a unix socket's other end.
    """

    socket: Socket
    holders: tuple[OpenFile, ...]
    inside: bool | None
    peer: Socket | None = None
    outsiders: tuple[Outsider, ...] = ()

    @property
    def criu_key(self) -> str:
        """The name under which CRIU takes a unix socket as external."""
        return f"unix[{self.socket.inode}]"


class HeldLock(Struct, frozen=True):
    """One file lock of the tree, with one descriptor through which it is held."""

    file: OpenFile
    lock: Lock


class DeletedFile(Struct, frozen=True):
    """A file without its path, kept by descriptors and mappings. `nlink` > 0: it has another name."""

    path: str
    id: FileId
    size: int
    nlink: int
    open: tuple[OpenFile, ...]
    mapped: tuple[Mapping, ...]

    @property
    def needs_link_remap(self) -> bool:
        """Whether CRIU must give it a temporary name to find it again (glibc semaphores are such files)."""
        return self.nlink > 0


class NamedFile(Struct, frozen=True):
    """A regular file with a path, that the tree has open or mapped."""

    path: str
    id: FileId
    size: int
    mode: int
    open: tuple[OpenFile, ...]
    mapped: tuple[Mapping, ...]

    @property
    def written(self) -> bool:
        """Whether the tree can write to it."""
        return any(file.writable for file in self.open) or any(
            mapping.shared and "w" in mapping.permissions for mapping in self.mapped
        )


class Database(Struct, frozen=True):
    """An SQLite database that the tree has open, and the files beside it that exist now."""

    path: str
    id: FileId
    siblings: tuple[str, ...]


class ForeignNamespace(Struct, frozen=True):
    """A namespace of one process that is not the root's. `ours`: it is crcli's own."""

    pid: int
    name: str
    inode: int
    ours: bool


class Relative(Struct, frozen=True):
    """A process outside the tree that began inside it.

    `reason` is how it can be told: it is in a `session` or process `group` that began there, it was `forked`
    there and never ran another program, or it is in a `cgroup` that the tree has for itself.
    """

    pid: int
    comm: str
    reason: str


class SharedMemory(Struct, frozen=True):
    """Memory of the tree that processes outside have mapped or open as well. `holders` are the tree's."""

    path: str
    holders: tuple[OpenFile | Mapping, ...]
    outsiders: tuple[Outsider, ...]

    @property
    def label(self) -> str:
        """Its path, as it stands in a sentence; what was mapped before a fork has none."""
        return "without a name" if self.path == "/dev/zero" else self.path


class Membership(Struct, frozen=True):
    """A UDP socket, and the multicast groups to which it listens."""

    socket: HeldSocket
    groups: tuple[str, ...]


class Unaccepted(Struct, frozen=True):
    """A unix listener with connections that nobody has accepted.

    `closed` of them have no other end any more, `unread` have something to read, `outside` were opened by
    processes outside the tree.
    """

    listener: HeldSocket
    closed: int
    unread: int
    outside: int


class RenamedSocket(Struct, frozen=True):
    """A unix socket that is bound to a path, and the path where that file lies now."""

    socket: HeldSocket
    path: str

    @property
    def is_findable(self) -> bool:
        """Whether CRIU can save it, and bind it again.

        What was bound by a relative path it looks for under that very name.
        """
        return self.socket.socket.path.startswith("/") and len(os.fsencode(self.path)) < _SOCKET_PATH_SIZE


class Viewer(Struct, frozen=True):
    """crcli itself and its host: namespaces, cgroups, capabilities, users, limits.

    `hard_limits` are by number (RLIMIT_CPU is 0). `usual_cpus` are the lists of processors
    on which a process runs that nobody has bound to any.
    """

    namespaces: dict[str, int]
    cgroups: str
    cap_eff: int
    capabilities: Capabilities
    no_new_privs: bool
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    hard_limits: tuple[int, ...]
    usual_cpus: frozenset[str]

    @property
    def lacks_sys_resource(self) -> bool:
        """Whether CAP_SYS_RESOURCE is missing, without which CRIU cannot read another user's limits."""
        return not self.may(CAP_SYS_RESOURCE)

    def may(self, capability: int) -> bool:
        """Whether crcli, and so CRIU, has this capability."""
        return bool(self.cap_eff >> capability & 1)


class Evidence(Struct, frozen=True):
    """What was seen of a tree, in one moment before the freeze.

    `files` and `mappings` are everything; the rest is drawn from them. `mounts` are those of the root
    process, by device. `unreachable` are files on mounts that the tree has left, `prlimit_denied` the
    processes whose limits the kernel does not let us read, `stuck` those that wait in the kernel where no
    signal reaches them, `locked_when_touched` those with memory locked by MLOCK_ONFAULT, `sharing_memory`
    those whose memory is their parent's as well. `netlink_unread` are inodes of sockets, `netlink_beyond` the
    netlink sockets in groups that CRIU has no room for, `events_unread` the inotify descriptors with events
    that nobody has read, `terminals_unread` what CRIU loses or alters of what waits in terminals, `corked`
    the UDP sockets that hold back what was sent, `own_mounts` where the tree sees another mount than we do,
    `limits_above` the processes with a hard limit above ours that we may not raise, `timers` the number of
    POSIX timers by pid.
    `is_rooted_here`: the root process has our root folder as its own.
    """

    tree: Tree
    viewer: Viewer
    files: tuple[OpenFile, ...]
    mappings: tuple[Mapping, ...]
    mounts: dict[int, Mount]
    terminals: tuple[Terminal, ...]
    pipes: tuple[Pipe, ...]
    sockets: tuple[HeldSocket, ...]
    locks: tuple[HeldLock, ...]
    deleted: tuple[DeletedFile, ...]
    named: tuple[NamedFile, ...]
    databases: tuple[Database, ...]
    device_mappings: tuple[Mapping, ...]
    event_rings: tuple[EventRing, ...]
    unreachable: tuple[OpenFile, ...]
    foreign_namespaces: tuple[ForeignNamespace, ...]
    threads_apart: tuple[ThreadApart, ...]
    sharing_memory: tuple[MemoryInCommon, ...]
    relatives: tuple[Relative, ...]
    prlimit_denied: tuple[Process, ...]
    stuck: tuple[Process, ...]
    locked_when_touched: tuple[Process, ...]
    unfilled: tuple[Process, ...]
    watches: tuple[Watch, ...]
    shared_memory: tuple[SharedMemory, ...]
    sysv_objects: tuple[SysvObject, ...]
    memberships: tuple[Membership, ...]
    unaccepted_unix: tuple[Unaccepted, ...]
    renamed_sockets: tuple[RenamedSocket, ...]
    netlink_unread: frozenset[int]
    netlink_beyond: tuple[HeldSocket, ...]
    events_unread: tuple[OpenFile, ...]
    terminals_unread: tuple[UnreadTerminal, ...]
    epolls_astray: tuple[OpenFile, ...]
    corked: tuple[HeldSocket, ...]
    own_mounts: tuple[str, ...]
    limits_above: tuple[Process, ...]
    timers: dict[int, int]
    is_rooted_here: bool

    @property
    def root(self) -> Process:
        """The process that the dump was asked for."""
        return self.tree.root

    @property
    def foreign_sessions(self) -> tuple[Process, ...]:
        """The processes whose session leader or process group leader is not in the tree."""
        return tuple(p for p in self.tree if p.sid not in self.tree or p.pgid not in self.tree)

    @property
    def own_namespaces(self) -> dict[str, int]:
        """The root's namespaces that crcli does not share; CRIU takes those into the image."""
        mine = self.viewer.namespaces
        return {
            name: inode
            for name, inode in self.root.namespaces.items()
            if not name.endswith("_for_children") and mine.get(name) != inode
        }

    @property
    def entered(self) -> bool:
        """Whether CRIU must work from inside the root's pid and mount namespaces.

        So it is for a program below the init of a pid namespace that has a /proc of its own, as after a
        restore into a new one: seen from outside, CRIU would want to take the init as well. And for one that
        has mounts of its own on top of ours (`unshare --mount`, PrivateTmp of systemd): CRIU cannot build up
        such a namespace again, but from inside it sees no other.
        """
        own = set(self.own_namespaces) - {"time"}
        inner = own == {"pid", "mnt"} and self.root.nspid[-1:] != (1,)
        return inner or (own == {"mnt"} and "/" not in self.own_mounts)

    @property
    def outside_terminals(self) -> tuple[Terminal, ...]:
        """The terminals that something outside the tree drives, and that CRIU does not just open again."""
        return tuple(one for one in self.terminals if one.leads_outside)

    @property
    def reopened_terminals(self) -> tuple[Terminal, ...]:
        """What is open as /dev/tty, and is a terminal that the tree itself drives."""
        return tuple(one for one in self.terminals if one.master_inside and one.rdev == CONTROLLING_TTY)

    @property
    def jobs_in_terminals(self) -> tuple[Process, ...]:
        """The processes that a terminal controls whose session another process of the tree leads."""
        return tuple(p for p in self.tree.living if p.tty_nr and p.sid != p.pid and p.sid in self.tree)

    @property
    def outside_pipes(self) -> tuple[Pipe, ...]:
        """The pipes and FIFOs whose other end a process outside the tree holds."""
        return tuple(pipe for pipe in self.pipes if pipe.outsiders)

    @property
    def tcp(self) -> tuple[HeldSocket, ...]:
        """The TCP sockets that are bound or connected."""
        return tuple(held for held in self.sockets if held.socket.protocol == "tcp")

    @property
    def listeners(self) -> tuple[HeldSocket, ...]:
        """The TCP sockets that wait for connections."""
        return tuple(held for held in self.tcp if held.socket.state is State.LISTEN)

    @property
    def outside_tcp(self) -> tuple[HeldSocket, ...]:
        """The TCP connections whose other end is not in the tree."""
        return tuple(held for held in self.tcp if held.inside is False)

    @property
    def inside_tcp(self) -> tuple[HeldSocket, ...]:
        """The TCP connections with both ends in the tree."""
        return tuple(held for held in self.tcp if held.inside)

    @property
    def in_flight_tcp(self) -> tuple[HeldSocket, ...]:
        """TCP on the way: SYN sent or received, and listeners with connections that nobody has accepted."""
        return tuple(
            held
            for held in self.tcp
            if held.socket.state in (State.SYN_SENT, State.SYN_RECV)
            or (held.socket.state is State.LISTEN and held.socket.queued)
        )

    @property
    def outside_unix(self) -> tuple[HeldSocket, ...]:
        """The unix sockets that are connected to one outside the tree."""
        return tuple(held for held in self.sockets if held.socket.family == "unix" and held.inside is False)

    @property
    def ghost_bytes(self) -> int:
        """What CRIU must copy of files that have no name left at all; its ghost limit must lie above each."""
        return sum(file.size for file in self.deleted if not file.needs_link_remap)

    @property
    def in_memory_files(self) -> tuple[NamedFile, ...]:
        """The files on tmpfs and its like: gone after a reboot, absent on another host."""
        return tuple(
            file
            for file in self.named
            if file.id.dev in self.mounts and self.mounts[file.id.dev].fstype in MEMORY_FILE_SYSTEMS
        )

    @property
    def written_files(self) -> tuple[NamedFile, ...]:
        """The regular files that the tree can write to."""
        return tuple(file for file in self.named if file.written)

    @property
    def stopped(self) -> tuple[Process, ...]:
        """The processes that job control has stopped; they come back stopped."""
        return tuple(process for process in self.tree if process.is_stopped)

    @property
    def devices(self) -> tuple[OpenFile, ...]:
        """Open device files that are no terminals; /dev/null and its kin are among them."""
        return tuple(file for file in self.files if file.kind is Kind.DEVICE)

    @property
    def may_use_gpus(self) -> bool:
        """Whether a process has CUDA's library mapped, or a device of NVIDIA's: the GPU side looks closer."""
        paths = [one.path for one in self.devices] + [one.path for one in self.mappings]
        return any(path.startswith("/dev/nvidia") or "/libcuda.so" in path for path in paths)

    @property
    def pinned(self) -> tuple[Process, ...]:
        """The processes that may not run on every processor of this host (taskset, OMP, numactl)."""
        return tuple(
            process
            for process in self.tree.living
            if process.cpus not in self.viewer.usual_cpus
            or any(thread.cpus not in self.viewer.usual_cpus for thread in process.thread_settings)
        )

    @property
    def settings_to_keep(self) -> dict[int, tuple[tuple[ThreadSettings, dict[str, Any]], ...]]:
        """By pid: the threads with settings of their own that CRIU does not save, and which settings."""
        found = {}
        for process in self.tree.living:
            kept = tuple((one, own) for one in process.thread_settings if (own := self._own_settings(one)))
            if kept:
                found[process.pid] = kept
        return found

    def _own_settings(self, thread: ThreadSettings) -> dict[str, Any]:
        own: dict[str, Any] = {}
        if thread.cpus not in self.viewer.usual_cpus:
            own["cpus"] = thread.cpus
        if thread.io_priority:
            own["io_priority"] = thread.io_priority
        if not thread.has_usual_slack and not thread.is_real_time:
            own["slack_ns"] = thread.slack_ns
        return own

    @property
    def remote_files(self) -> tuple[NamedFile, ...]:
        """The files that a server on the network or a program (FUSE) keeps."""
        return tuple(file for file in self.named if self.is_remote(file.id.dev))

    @property
    def remote_folders(self) -> tuple[Process, ...]:
        """The processes whose working folder lies on such a file system."""
        points = [mount.point for mount in self.mounts.values() if self.is_remote(mount.dev)]
        return tuple(
            process
            for process in self.tree.living
            if any(f"{process.cwd}/".startswith(f"{point}/") for point in points)
        )

    def is_remote(self, dev: int) -> bool:
        """Whether this device is a file system on the network or FUSE."""
        fstype = self.mounts[dev].fstype if dev in self.mounts else ""
        return fstype in REMOTE_FILE_SYSTEMS or fstype.startswith("fuse.")

    @property
    def resident_bytes(self) -> int:
        """Memory of all processes, shared pages counted once each time."""
        return sum(process.resident_bytes for process in self.tree)

    @property
    def expected_bytes(self) -> int:
        """About what CRIU will send as pages."""
        return sum(process.anonymous_bytes for process in self.tree) + self.shared_bytes

    @property
    def shared_bytes(self) -> int:
        """About what of it is shared memory, which counts as if all processes had the same."""
        return max((process.shared_bytes for process in self.tree), default=0)

    @property
    def threads(self) -> int:
        """Threads of all processes."""
        return sum(process.threads for process in self.tree)

    def anon(self, name: str) -> tuple[OpenFile, ...]:
        """Return the descriptors of one kind of anonymous inode (`io_uring`, `userfaultfd`…)."""
        return tuple(file for file in self.files if file.anon_name == name)

    def label(self, pid: int) -> str:
        """Return a process of the tree as it stands in a sentence: `python3 (4711)`."""
        return self.tree.process(pid).label
