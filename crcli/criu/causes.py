"""The causes for which CRIU gives up that we know: how its log names them, what they mean, what helps.

Imported only after a failure. `tests/real/test_causes.py` provokes every entry with a real CRIU and reads
the log that it writes, but for those that are marked `upstream`: their words were taken from CRIU's source
(file: function, and the text as it stands there), and nobody here has seen them happen.

`says` is searched in the lines that can be causes (see crcli.criu.log), joined by newlines, so it may span
two of them; its named groups fill in `meaning` and `remedy`. A group `path` gets the leading slash that CRIU
leaves out. Of two entries that match in the same line the first one counts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from crcli.records import Struct


class Upstream(NamedTuple):
    """Where in CRIU's source (4.2.1) the words stand, and they themselves, as far as they are constant."""

    file: str
    function: str
    text: str


class KnownCause(Struct, frozen=True):
    """One entry. `name` is stable; `retry` says whether trying again, with nothing changed, can help."""

    name: str
    says: str
    meaning: str
    remedy: str
    retry: bool = False
    upstream: Upstream | None = None

    @property
    def pattern(self) -> re.Pattern[str]:
        """`says`, compiled."""
        return re.compile(self.says)


_OURS = "crcli sets what CRIU asks for here by itself: report this, with CRIU's log"
_NEEDS_ROOT = "run crcli as root; in a container grant the capability (--cap-add)"

OF_DUMPS = (
    KnownCause(
        "traced",
        r"Unable to interrupt task: (?P<pid>\d+) \(Operation not permitted\)",
        "process {pid} cannot be stopped: a debugger has it, it is ending, or this host allows no tracing",
        "`grep TracerPid /proc/{pid}/status` names the debugger: end it, and dump again",
        retry=True,
    ),
    KnownCause(
        "process-ended",
        r"Unable to interrupt task: (?P<pid>\d+) \(No such process\)",
        "process {pid} ended before it could be frozen",
        "dump again: the tree is looked at anew",
        retry=True,
    ),
    KnownCause(
        "criu-too-old",
        r"Can't get 1:(?:16|34)(?:\(\d+\))? opt: Operation not supported",
        "this CRIU is too old for this kernel: from Linux 6.16 on, connections need CRIU 4.2",
        "scripts/install-criu finds one that works here, or unpacks it beside the system's",
        upstream=Upstream("criu/sockets.c", "do_dump_opt", "Can't get %d:%d opt"),
    ),
    KnownCause(
        "limits-unreadable",
        r"Can't get rlimit \d+: Operation not permitted",
        "a process of the tree runs as another user, and reading its limits needs CAP_SYS_RESOURCE here",
        "grant CAP_SYS_RESOURCE (--cap-add SYS_RESOURCE)",
    ),
    KnownCause(
        "seccomp-unreadable",
        r"suspending seccomp failed: Operation not permitted",
        "a process of the tree has a seccomp filter, which CRIU may not suspend from under its own",
        "run crcli outside of containers that filter its calls, with CAP_SYS_RESOURCE",
    ),
    KnownCause(
        "link-taken",
        r"Can't link remap to (?P<path>\S+): File exists",
        "beside {path}, which the tree has open without a name, lies a link_remap.N of another dump, and "
        "CRIU gives the same names each time",
        "try again, in case that dump is under way; what an older crcli left, `ls /dev/shm/link_remap.*` "
        "shows: restore first what was dumped here, or remove it (its image restores without it, too)",
        retry=True,
    ),
    KnownCause(
        "io-uring",
        r"send_fds failed \(-22\)|anon_inode:\[io_uring\]",
        "a process of the tree has a descriptor that cannot be passed on, which is how io_uring shows itself",
        "try again: an event loop that is made meanwhile comes with a ring; else set the sysctl "
        "kernel.io_uring_disabled=2 before the program starts",
    ),
    KnownCause(
        "userfaultfd",
        r"anon_inode:\[userfaultfd\]",
        "a process of the tree handles its own page faults (userfaultfd), which CRIU cannot save",
        "start the program without that feature",
    ),
    KnownCause(
        "perf-event",
        r"anon_inode:\[perf_event\]",
        "a process of the tree has performance counters open, which CRIU cannot save",
        "end the profiler, and dump again",
    ),
    KnownCause(
        "bpf-map",
        r"anon_inode:bpf-(?P<kind>\w+)",
        "a process of the tree has a BPF {kind} open, which this CRIU does not save",
        "have the program close it before the dump",
    ),
    KnownCause(
        "memfd-secret",
        r"\(/secretmem",
        "a process of the tree has secret memory (memfd_secret), which nobody else can read",
        "start the program without that feature",
    ),
    KnownCause(
        "device",
        r"Can't dump file (?P<fd>-?\d+) of that type \[[0-7]+\] \((?P<kind>chr|blk) (?P<number>[\d:]+)\)",
        "a process of the tree has a device open (descriptor {fd}, {kind} {number}) that CRIU cannot save",
        "`ls -l /dev` shows which it is; have the program close it before the dump",
    ),
    KnownCause(
        "file-unsupported",
        r"Can't dump file (?P<fd>-?\d+) of that type \[[0-7]+\] \((?P<what>.*)\)",
        "a process of the tree has a file open that CRIU has no code for (descriptor {fd}: {what})",
        "have the program close it before the dump",
    ),
    KnownCause(
        "namespace-nested",
        r"Can't dump nested (?P<kind>\w+) namespace for (?P<pid>\d+)",
        "process {pid}, a member of the tree, lives in a {kind} namespace of its own",
        "wait until that process (a sandbox, most often) has ended, or dump it by itself",
    ),
    KnownCause(
        "socket-unsupported",
        r"Unsupported proto 262\b",
        "a process of the tree has an MPTCP socket, which CRIU cannot save",
        "start Go servers with GODEBUG=multipathtcp=0",
    ),
    KnownCause(
        "socket-unsupported",
        r"Unsupported proto (?P<number>\d+)|Unknown socket collected \(family (?P<family>\d+)\)",
        "a process of the tree has a socket of a protocol that CRIU does not know",
        "have the program close it before the dump; CRIU's log names its number",
    ),
    KnownCause(
        "socket-corked",
        r"Can't dump corked dgram socket",
        "a UDP socket of the tree holds data back until more comes (UDP_CORK)",
        "try again: a moment later it has sent what it held",
        retry=True,
    ),
    KnownCause(
        "tcp-not-asked-for",
        r"Connected TCP socket, consider using|Connected TCP socket in image",
        "the tree has established TCP connections, and CRIU was not told to keep them",
        _OURS,
    ),
    KnownCause(
        "tcp-in-flight",
        r"In-flight connection \(l\)",
        "a listening socket of the tree has connections that nobody has accepted yet",
        "try again, when the program has accepted them",
        retry=True,
    ),
    KnownCause(
        "unix-unaccepted",
        r"Non-empty write queue on an in-flight socket|Found a closed in-flight socket",
        "a unix socket of the tree was used, or closed again, before whoever listens had accepted it",
        "try again: a moment later it has been accepted",
        retry=True,
    ),
    KnownCause(
        "unix-outside",
        r"External socket is used|Can't dump half of stream unix connection|External socket found in image",
        "a unix socket of the tree leads to a process outside",
        "`crcli check` names the other end: dump the tree that holds both, or close the connection before",
        retry=True,
    ),
    KnownCause(
        "terminal-outside",
        r"Found slave peer index \d+ without correspond master|Found dangling tty",
        "the tree uses a terminal whose other side is outside",
        _OURS,
    ),
    KnownCause(
        "not-session-leader",
        r"The root process (?P<pid>\d+) is not a session leader",
        "process {pid} belongs to a session that began outside of the tree",
        _OURS,
    ),
    KnownCause(
        "file-unlinked",
        r"Can't create link remap for (?P<path>\S+)\.",
        "the tree has {path} open under a name that is gone, while the file has others",
        _OURS,
    ),
    KnownCause(
        "file-deleted-large",
        r"Can't dump ghost file (?P<path>.+) of (?P<size>\d+) size, increase limit",
        "the tree has the deleted file {path} open, and it is too large to travel along ({size} bytes)",
        "dump again: its size is taken anew; one that grows faster than that has to be closed before",
        retry=True,
    ),
    KnownCause(
        "file-locks",
        r"Some file locks are hold by dumping tasks",
        "the tree holds file locks, and CRIU was not told to keep them",
        _OURS,
    ),
    KnownCause(
        "file-unreachable",
        r"Can't lookup mount=\d+ for fd=(?P<fd>-?\d+) path=(?P<path>\S+)",
        "the tree has {path} open (descriptor {fd}) on a mount that it cannot see any more",
        "mount it again, or have the program close the file before the dump",
    ),
    KnownCause(
        "mount-unsupported",
        r"FS mnt \.?(?P<path>\S+) dev \S+ root \S+ unsupported",
        "the tree has mounts of its own, and {path} among them is of a kind that CRIU cannot save",
        "dump from outside of the container, or start the program without namespaces of its own",
    ),
    KnownCause(
        "mount-unsupported",
        r"mnt: \d+:\.?(?P<path>\S+) doesn't have a proper root mount",
        "the tree has mounts of its own, and {path} is part of one that it cannot see",
        "dump from outside of the container, or start the program without namespaces of its own",
    ),
    KnownCause(
        "session-outside",
        r"A session leader of (?P<pid>\d+)\(\d+\) is outside of its pid namespace",
        "process {pid} lives in a pid namespace, and its session began outside of it",
        "have the first process of the namespace begin a session of its own (setsid)",
    ),
    KnownCause(
        "sysv-shm",
        r"Task (?P<pid>\d+) with SysVIPC shmem map \S+ doesn't live in IPC ns",
        "process {pid} uses System V shared memory of the host",
        "start the program in an IPC namespace of its own: unshare --ipc",
    ),
    KnownCause(
        "pipe-packets",
        r"The packetized mode for pipes is not supported",
        "the tree has a pipe in packet mode (O_DIRECT), which CRIU cannot save",
        "have the program use an ordinary pipe, or a socket of packets",
    ),
    KnownCause(
        "pidfd-outside",
        r"pidfd pid (?P<pid>\d+) is not a part of process tree",
        "the tree holds a descriptor of process {pid}, which is outside of it",
        "have the program close it before the dump, or dump the tree that holds both",
    ),
    KnownCause(
        "tun",
        r"Net namespace is required to dump tun link",
        "the tree has a tun interface of the host's network",
        "start the program in a network namespace of its own, or have it close the interface before the dump",
    ),
    KnownCause(
        "iptables-missing",
        r"exited, status=127\nIptables configuration failed|execvp\(\"ip6?tables-restore\"",
        "CRIU wanted to hold the tree's connections with iptables, which is not installed here",
        "install iptables, or use a kernel with nftables, which crcli prefers",
    ),
    KnownCause(
        "zombie-threads",
        r"Zombies with threads are not supported",
        "the main thread of a process has ended while others go on",
        "wait for it to end, or start the program anew",
    ),
    KnownCause(
        "freeze-timeout",
        r"Timeout reached\. Try to interrupt",
        "the tree did not stop in time: it forks too fast, or a process hangs in the kernel",
        "try again when it has less to do",
        retry=True,
    ),
    KnownCause(
        "network-lock",
        r"Failed to lock TCP connection|Locking network failed",
        "the tree's connections could not be held while it stood still",
        "a kernel with nftables (CONFIG_NF_TABLES_INET) and CAP_NET_ADMIN are needed",
    ),
)

OF_RESTORES = (
    KnownCause(
        "pid-taken",
        r"Can't fork for (?P<pid>\d+): File exists",
        "process id {pid}, which the tree had, is in use here",
        "restore with --pid-namespace new, or wait until that process has ended",
        retry=True,
    ),
    KnownCause(
        "pid-out-of-range",
        r"Can't set kernel pid_max=(?P<number>\d+)",
        "this kernel has no process ids as high as the tree's ({number})",
        "raise kernel.pid_max there where the kernel allows it (4194304 on 64 bits)",
    ),
    KnownCause(
        "process-limit",
        r"Can't fork for \d+: Resource temporarily unavailable|Unable to create a thread: -11",
        "no more processes may be started here: the limit of the cgroup (pids.max) or of the user is reached",
        "raise that limit, or end other processes",
        retry=True,
    ),
    KnownCause(
        "folder-missing",
        r"Can't open file (?P<path>.+) on restore: No such file or directory\n(?:.*\n)?Can't open cwd",
        "{path}, the working folder of a process, is not here",
        "create it",
    ),
    KnownCause(
        "file-missing",
        r"Can't open file (?P<path>.+) on restore: No such file or directory",
        "{path}, which the tree has open or mapped, is not here",
        "copy it from the host of the dump, or dump with --include {path}",
    ),
    KnownCause(
        "file-missing",
        r"Can't open fake fifo \S+ \[(?P<path>.+)\]: No such file or directory",
        "{path}, a pipe that the tree has open, is not here",
        "create it: mkfifo {path}",
    ),
    KnownCause(
        "file-missing",
        r"fsnotify: Unable to open (?P<path>.+): No such file or directory",
        "{path}, which the tree watches, is not here",
        "create it, or copy it from the host of the dump",
    ),
    KnownCause(
        "folder-missing",
        r"Can't bind id \S+ ino \d+ addr (?P<path>.+): No such file or directory",
        "the folder for the tree's unix socket {path} is not here",
        "create it",
    ),
    KnownCause(
        "socket-path-taken",
        r"Can't bind id \S+ ino \d+ addr (?P<name>.+): Address already in use",
        "{name}, the name of a unix socket of the tree, is in use here",
        "end whoever has it, or remove the file",
        retry=True,
    ),
    KnownCause(
        "file-denied",
        r"Can't open file (?P<path>.+) on restore: (?P<why>Permission denied|Operation not permitted)",
        "{path}, which the tree has open or mapped, may not be opened here",
        "run crcli as a user who may, or give CRIU the right to it",
    ),
    KnownCause(
        "file-changed",
        r"File (?P<path>.+) has bad size (?P<now>\d+) \(expect (?P<then>\d+)\)",
        "{path} has changed since the dump: {now} bytes now, {then} then",
        "put the version of then back; where it travelled in the image, --files image does",
    ),
    KnownCause(
        "file-mode-changed",
        r"File (?P<path>.+) has bad mode 0\d+?(?P<now>\d{4}) \(expect 0\d+?(?P<then>\d{4})\)",
        "{path} has other permissions than at the dump (now {now}, then {then})",
        "chmod {then} {path}",
    ),
    KnownCause(
        "file-updated",
        r"File (?P<path>.+) has bad build-ID",
        "{path} is another build than at the dump: code of then would run into code of now",
        "install the version of then, or restore on a host that has it",
    ),
    KnownCause(
        "port-taken",
        r"Can't bind inet socket.*: Address already in use",
        "a port that the tree listens on is in use here",
        "`ss -ltnp` shows by whom: end it, or restore elsewhere",
        retry=True,
    ),
    KnownCause(
        "address-gone",
        r"Can't bind inet socket.*: Cannot assign requested address",
        "an address that the tree listens on, or is connected from, is not one of this host's",
        "add the address, or restore on the host that has it; --tcp close gives up connections",
    ),
    KnownCause(
        "port-denied",
        r"Can't bind inet socket.*: Permission denied",
        "the tree listens on a port below 1024, which needs CAP_NET_BIND_SERVICE here",
        _NEEDS_ROOT,
    ),
    KnownCause(
        "socket-denied",
        r"Can't create inet socket: (?:Operation not permitted|Permission denied)",
        "the tree has a raw or other special socket, which needs CAP_NET_RAW here",
        _NEEDS_ROOT,
    ),
    KnownCause(
        "network-denied",
        r"Can't turn TCP repair mode ON: Operation not permitted|SO_RCVBUFFORCE: Operation not permitted",
        "sockets cannot be looked into or set up: that needs CAP_NET_ADMIN here",
        _NEEDS_ROOT,
    ),
    KnownCause(
        "terminal-missing",
        r"Don't have tty to inherit session from",
        "the tree wants a terminal, and there is none to give it",
        _OURS,
    ),
    KnownCause(
        "namespace-nested",
        r"Can't restore sub-task in NS",
        "a member of the tree lived in namespaces of its own, which CRIU saves but cannot bring back",
        "dump again when that process has ended; this image cannot be restored",
    ),
    KnownCause(
        "memory-short",
        r"Cannot allocate memory|Can't restore 0x\w+ mapping with 0xf{15}4",
        "there is not enough memory for the tree under the limits that hold here",
        "raise the limit (ulimit -v, the cgroup's), free memory, or restore on a larger host",
    ),
    KnownCause(
        "locked-memory-limit",
        r"Can't restore 0x\w+ mapping with 0xf{15}5",
        "the tree has more memory locked (mlock) than may be locked here",
        "raise the limit (ulimit -l), or grant CAP_IPC_LOCK",
    ),
    KnownCause(
        "killed-while-restored",
        r"(?P<pid>\d+) killed by signal 9: Killed",
        "process {pid} was killed while it was being restored, most often by the kernel for want of memory",
        "`dmesg` says so if it was: free memory, raise the cgroup's limit, or restore on a larger host",
    ),
    KnownCause(
        "criu-crashed",
        r"(?P<pid>\d+) (?:stopped|killed) by signal (?P<number>11|7|4|8): ",
        "CRIU's own code crashed (signal {number}) while it restored process {pid}: the image may be damaged",
        "`crcli verify` reads the image back; when it is whole, report this with CRIU's log",
    ),
    KnownCause(
        "terminal-taken",
        r"Unable to open dev/ptmx with specified index (?P<number>\d+)",
        "somebody opened a terminal under a number (/dev/pts/{number}) that the tree was about to get",
        "restore again",
        retry=True,
        upstream=Upstream("criu/tty.c", "open_ptmx_index", "Unable to open %s with specified index %d"),
    ),
    KnownCause(
        "descriptor-limit",
        r"Can't chose service_fd_base",
        "the tree has more files open than may be opened here",
        "raise the limit of open files (ulimit -n) where crcli is started",
    ),
    KnownCause(
        "clock-denied",
        r"Unable to set a (?:monotonic|boottime) clock offset: Operation not permitted",
        "the tree's clocks cannot go on from where they were: that needs CAP_SYS_TIME here",
        _NEEDS_ROOT,
    ),
    KnownCause(
        "root-denied",
        r"Can't change root: Operation not permitted",
        "a process cannot be given its root folder: that needs CAP_SYS_CHROOT here",
        _NEEDS_ROOT,
    ),
    KnownCause(
        "user-denied",
        r"Unable to set real, effective and saved (?P<what>user|group) ID: -1|Can't setgroups",
        "a process of the tree runs as another {what}, and cannot be made one here",
        "grant CAP_SETUID and CAP_SETGID (--cap-add), or run crcli as root",
    ),
    KnownCause(
        "capability-denied",
        r"Unable to restore capabilities: -1|Unable to raise ambient capability",
        "this host does not let a process of the tree have a capability that it had",
        "start crcli with at least the capabilities that the program had (`crcli doctor` lists ours)",
    ),
    KnownCause(
        "capability-not-dropped",
        r"Unable to drop capability (?P<number>\d+): -\d+",
        "a process of the tree lacked capability {number}, and this host does not let CRIU take it away",
        "grant CAP_SETPCAP, or start the program with no_new_privs",
    ),
    KnownCause(
        "cpu-features",
        r"CPU (?:(?:instruction )?capabilities do not match|xsave|xfeatures)|FPU feature required by image",
        "this CPU lacks what the CPU of the dump had, and the programs may use",
        "restore on a host with the same or a newer CPU",
    ),
    KnownCause(
        "image-version",
        r"Not supported images version (?P<number>\d+)",
        "the image was made by a CRIU whose format (version {number}) this one does not know",
        "restore with a newer CRIU: scripts/install-criu",
    ),
    KnownCause(
        "image-option-tcp-close",
        r"Need to set the --tcp-close options",
        "the image was made with its connections closed, and must be restored so",
        "restore with --tcp close",
    ),
    KnownCause(
        "image-option-uprobes",
        r"Dumped with --allow-uprobes",
        "the image was made of processes with uprobes in them",
        "end the tracer that set them, and dump again",
    ),
    KnownCause(
        "image-cut-short",
        r"Read \d+ bytes while \d+ expected (?:from|on) (?P<file>[^\s:]+)|Unexpected EOF on",
        "one of CRIU's own image files is missing or cut short",
        "`crcli verify` reads the image back; when it is whole, report this with CRIU's log",
    ),
    KnownCause(
        "image-pages-missing",
        r"Can't read pages data \((?P<number>-?\d+)\)",
        "the pages of a process are missing from CRIU's images, or cannot be read",
        "`crcli verify` reads the image back; when it is whole, report this with CRIU's log",
    ),
    KnownCause(
        "image-corrupt",
        r"Magic doesn't match for (?P<file>\S+)|Head magic doesn't match|Failed unpacking object",
        "one of CRIU's own image files is not what its name says",
        "`crcli verify` reads the image back; when it is whole, report this with CRIU's log",
    ),
    KnownCause(
        "cgroup",
        r"bad cgroup path|Can't move .* into .*\(-?\d+/-?\d+\)|Can't make cgroup dir",
        "a cgroup that a process of the tree was in cannot be made or entered here",
        "make it, with its controllers, or let the container's manager do so",
        upstream=Upstream("criu/cgroup.c", "restore_cgroup_prop", "bad cgroup path: %s"),
    ),
    KnownCause(
        "plugin-missing",
        r"Missing required plugin: (?P<name>\S+)",
        "the image was made with CRIU's plug-in {name}, which this CRIU does not have",
        "install it, or restore on a host that has it",
        upstream=Upstream("criu/image.c", "check_inventory_plugins", "Missing required plugin: %s"),
    ),
    KnownCause(
        "lsm-profile",
        r"can't write lsm profile|mismatched lsm types|(?:apparmor|selinux) LSM specified but",
        "the security profile (AppArmor or SELinux) of a process cannot be given back here",
        "load the profile on this host, or restore on one that has it",
        upstream=Upstream("criu/pie/restorer.c", "lsm_set_label", "can't write lsm profile %d"),
    ),
    KnownCause(
        "seccomp-denied",
        r"seccomp: SECCOMP_SET_MODE_FILTER returned|seccomp: PR_SET_SECCOMP returned",
        "a process of the tree cannot be given its seccomp filter back: the kernel does not take it",
        "run crcli outside of containers that filter its calls; the image may be of another kernel",
    ),
)

OF_BOTH = (
    KnownCause(
        "kernel-lacks",
        r"(?P<probe>kerndat_\w+) failed when initializing kerndat",
        "the kernel does not offer something that CRIU needs, or does not offer it here ({probe})",
        "`crcli doctor` asks CRIU what is missing; in a container its network must be up (ip link set lo up)",
    ),
    KnownCause(
        "disk-full",
        r"No space left on device",
        "there is no room left where CRIU writes",
        "free space there; crcli's own folder is memory: free memory, or raise the cgroup's limit",
        retry=True,
    ),
    KnownCause(
        "page-server-gone",
        r"page-xfer: .*(?:Broken pipe|Connection reset by peer)",
        "whoever takes the memory hung up in the middle of it",
        "run it again",
        retry=True,
    ),
    KnownCause(
        "input-output",
        r"Input/output error",
        "a disk or a network file system failed to read or write",
        "`dmesg` says which; try again when it is well",
        retry=True,
    ),
)

KNOWN: tuple[KnownCause, ...] = (*OF_DUMPS, *OF_RESTORES, *OF_BOTH)
"""All of them, in the order in which they count."""
