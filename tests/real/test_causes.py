"""Every cause that crcli knows of a CRIU that gives up, provoked: CRIU fails for real, and its log is read.

CRIU is given wrong options, or a place that does not fit, on purpose: crcli itself would not let it come to
this. What each case stands for is the name of the cause (crcli/criu/causes.py).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pycriu import images

from crcli import kernel
from crcli.criu import causes
from crcli.criu.binary import criu_command
from crcli.criu.causes import KNOWN
from crcli.criu.log import explain
from crcli.criu.options import LOG_NAME
from crcli.criu.workspace import Workspace
from crcli.pipeline.logs import explain_failure
from tests.support.crcli import Crcli, counter, end, reap, tree_of
from tests.support.programs import Program, spawn_python, then_wait
from tests.support.raw_criu import Attempt, raw_dump, raw_restore, started_with

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

CPU_INS = 1 << 2
SKIP_NETWORK_LOCK, IPTABLES = 3, 1
KEEP_TCP = {"tcp_established": True, "network_lock": SKIP_NETWORK_LOCK}


@dataclass
class Place:
    """Where a case plays: its folder, the program, a service outside, and what ends with the case."""

    folder: Path
    program: Program
    held: ExitStack
    service: socket.socket

    @property
    def images(self) -> Path:
        """CRIU's images."""
        return self.folder / "images"

    def edit(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the first message of one of CRIU's images."""
        path = next(self.images.glob(name))
        with path.open("rb") as file:
            content = images.load(file)
        change(content["entries"][0])
        with path.open("wb") as file:
            images.dump(content, file)


Step = Callable[[Place], object]


def nothing(_: Place) -> None:
    """The step that does nothing."""


@dataclass(frozen=True)
class Case:
    """How a cause is provoked: a program, what is done to it and its images, and CRIU's options.

    Without `restore` the dump is to fail; `dump_with` and `restore_with` are what a shell does before it
    starts CRIU; `pid` picks the process to dump.
    """

    cause: str
    code: str = ""
    before: tuple[str, ...] = ()
    prepare: Step = nothing
    pid: Callable[[Program], int] = lambda program: program.pid
    dump: dict[str, Any] = field(default_factory=dict)
    dump_with: str = ""
    between: Step = nothing
    restore: dict[str, Any] | None = None
    restore_with: str = ""
    says: str = ""
    """Something that the meaning or the remedy must name."""
    stdin: str = ""
    needs: str = ""
    """A file without which this cannot be tried here."""


def cut(name: str) -> Step:
    """Cut an image in half."""

    def step(place: Place) -> None:
        path = next(place.images.glob(name))
        os.truncate(path, path.stat().st_size // 2)

    return step


def unreadable(name: str) -> Step:
    """Put in an image's place something that cannot be read: memory that is not there."""

    def step(place: Place) -> None:
        path = next(place.images.glob(name))
        path.unlink()
        path.symlink_to("/proc/self/mem")

    return step


def remove(name: str) -> Step:
    """Remove an image."""
    return lambda place: next(place.images.glob(name)).unlink()


def edit(name: str, **values: Any) -> Step:
    """Set fields of the first message of an image."""
    return lambda place: place.edit(name, lambda entry: entry.update(values))


def move_pid(place: Place, new: int) -> None:
    """Make the image one of a process with another pid."""
    place.edit("pstree.img", lambda entry: entry.update(pid=new, pgid=new, sid=new, threads=[new]))
    for path in list(place.images.glob(f"*-{place.program.pid}.img")):
        path.rename(path.with_name(path.name.replace(str(place.program.pid), str(new))))


def claim_all_features(entry: dict[str, Any]) -> None:
    """Make an image say that its CPU had whatever there is."""
    words = entry["x86_entry"][0]["capability"]
    words[:3] = [0xFFFF_FFFF] * 3


def move_address(place: Place) -> None:
    """Make the listening socket one of an address that this host does not have."""
    path = place.images / "files.img"
    with path.open("rb") as file:
        content = images.load(file)
    for entry in content["entries"]:
        if "isk" in entry:
            entry["isk"]["src_addr"] = ["192.0.2.1"]
    with path.open("wb") as file:
        images.dump(content, file)


def spoil_filters(place: Place) -> None:
    """Put in the place of seccomp filters something that is none."""
    place.edit(
        "seccomp.img", lambda entry: [one.update(filter="AAAAAAAAAAA=") for one in entry["seccomp_filters"]]
    )


def library(place: Path, answer: int) -> None:
    """Compile a library that differs in one constant, so in its build-id only."""
    source = place / "library.c"
    source.write_text(f"int answer(void) {{ return {answer}; }}")
    command = ["gcc", "-shared", "-fPIC", "-Wl,--build-id=sha1", "-o", place / "new.so", source]
    subprocess.run(command, check=True, timeout=60)
    (place / "new.so").rename(place / "library.so")


def listen(place: Place) -> None:
    """Take the port that the program listens on."""
    server = place.held.enter_context(socket.socket())
    server.bind(("127.0.0.1", int(place.program.value_of("port"))))
    server.listen()


def full(place: Place) -> None:
    """Have images written where there is little room."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place.images], check=True)
    place.held.callback(subprocess.run, ["umount", place.images], check=True)


def in_cgroup(controller: str, setting: str, value: str) -> str:
    """What a shell does to enter a new cgroup with one limit."""
    folder = f"/sys/fs/cgroup/{controller}/crcli-test-causes"
    return f"mkdir -p {folder}; echo {value} >{folder}/{setting}; echo $$ >{folder}/cgroup.procs; exec"


def leave_cgroups(place: Place) -> None:
    """Have the cgroup of the case removed when all in it has ended."""
    for folder in Path("/sys/fs/cgroup").glob("*/"):
        place.held.callback(_remove_when_empty, folder / "crcli-test-causes")


def _remove_when_empty(folder: Path) -> None:
    for _ in range(200):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)


def trace(place: Place) -> None:
    """Have strace hold the program, as nobody could know before the dump began."""
    command = ["strace", "-o", "/dev/null", "-p", str(place.program.pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    place.held.callback(tracer.wait)
    place.held.callback(tracer.kill)
    status = Path(f"/proc/{place.program.pid}/status")
    while f"TracerPid:\t{tracer.pid}" not in status.read_text():
        assert tracer.poll() is None
        time.sleep(0.01)


def second_process(program: Program) -> int:
    """The program's first child."""
    return int(tree_of(program.pid)[1].pid)


FILE = "import os; f = open('f', 'w+'); f.write('abc'); f.flush()"
IN_FOLDER = "import os; os.mkdir('w'); os.chdir('w')"
TCP = """
import socket
server = socket.create_server(("127.0.0.1", 0))
near = socket.create_connection(server.getsockname())
far, _ = server.accept()
"""
LISTENER = """
import socket
server = socket.create_server(("127.0.0.1", 0))
print(f"port={server.getsockname()[1]}")
"""
LOW_PORT = """
import socket
server = socket.socket()
for port in range(700, 1024):
    try:
        server.bind(("127.0.0.1", port))
        break
    except OSError:
        continue
server.listen()
"""
UNIX_SERVER = """
import os, socket
server = socket.socket(socket.AF_UNIX)
server.bind(os.getcwd() + "/{}")
server.listen()
"""
OUTSIDE = f"\0crcli-test-causes-{os.urandom(4).hex()}"
"""The address of a service outside of every tree: one to each of several runs at once."""

UNIX_UNACCEPTED = """
import os, socket
server = socket.socket(socket.AF_UNIX); server.bind("\\0crcli-test-%d" % os.getpid()); server.listen()
client = socket.socket(socket.AF_UNIX); client.connect(server.getsockname())
"""
UNIX_OUTSIDE = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({OUTSIDE!r})"
SYSTEM_CALL = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
FILTER = """
import ctypes, struct
libc = ctypes.CDLL(None)
program = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))
header = ctypes.create_string_buffer(struct.pack('HxxxxxxP', 1, ctypes.addressof(program)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, header, 0, 0) == 0
"""
LEADERLESS_CHILD = """
import ctypes, os, threading, time
child = os.fork()
if child == 0:
    threading.Thread(target=time.sleep, args=(600,)).start()
    ctypes.CDLL(None).syscall(60, 0)
while open(f"/proc/{child}/stat").read().rpartition(")")[2].split()[0] != "Z":
    time.sleep(0.01)
"""
VFORK = """
import subprocess, time
open("v.c", "w").write("#include <unistd.h>\\nint main() { if (!vfork()) { sleep(600); _exit(0); } }")
subprocess.run(["gcc", "-o", "v", "v.c"], check=True)
child = subprocess.Popen(["./v"])
while open(f"/proc/{child.pid}/stat").read().rpartition(")")[2].split()[0] != "D":
    time.sleep(0.01)
"""
ANOTHER_USER = ("setpriv", "--reuid", "1", "--regid", "1", "--clear-groups")
MANY = "import subprocess\nfor _ in range(6): subprocess.Popen(['sleep', '600'])"
THREADS = """
import threading, time
for _ in range(20):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""
LARGE = "import os; memory = os.urandom(64 << 20)"


def accepted(place: Place) -> None:
    """Take the program's connection to the service outside."""
    place.held.enter_context(place.service.accept()[0])


def service() -> socket.socket:
    """A service outside of every tree, for programs to connect to."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(OUTSIDE)
    server.listen()
    return server


def nested(kind: str, more: str = "") -> str:
    """A program with a child in a namespace of its own."""
    return f"""
import subprocess
command = ["unshare", "--{kind}", {more} "sh", "-c", "echo there; exec sleep 600"]
child = subprocess.Popen(command, stdout=subprocess.PIPE)
assert child.stdout.readline()
"""


NO_IPTABLES = "mkdir {folder}/bin; ln -s /bin/sh {folder}/bin/sh; PATH={folder}/bin; export PATH; exec"
"""Have CRIU find a shell and nothing else."""

NEW_TO_THE_KERNEL = "exec unshare -n -m sh -c 'mount -t tmpfs none /run && exec \"$@\"' sh"
"""Have CRIU find no network, and not what it noted of the kernel in /run (where that is a tmpfs)."""


CASES = [
    # Dumps
    Case("traced", prepare=trace, needs="/usr/bin/strace", says="TracerPid"),
    Case("traced", dump_with="exec setpriv --bounding-set=-sys_ptrace"),
    Case("process-ended", pid=lambda _: 4194000),
    Case("limits-unreadable", before=ANOTHER_USER),
    Case("seccomp-unreadable", FILTER, before=ANOTHER_USER, dump={"answer_limits": True}),
    Case("io-uring", SYSTEM_CALL + "assert libc.syscall(425, 8, ctypes.create_string_buffer(200)) > 0"),
    Case("userfaultfd", SYSTEM_CALL + "assert libc.syscall(323, 1) > 0"),
    Case(
        "perf-event",
        SYSTEM_CALL + "import struct\n"
        "asked = ctypes.create_string_buffer(struct.pack('IIQ', 1, 128, 0) + bytes(112))\n"
        "assert libc.syscall(298, asked, 0, -1, -1, 0) > 0",
    ),
    Case(
        "bpf-map",
        SYSTEM_CALL + "import struct\n"
        "asked = ctypes.create_string_buffer(struct.pack('IIII', 1, 4, 8, 4) + bytes(112))\n"
        "assert libc.syscall(321, 0, asked, 72) > 0",
        says="map",
    ),
    Case(
        "memfd-secret",
        SYSTEM_CALL + "import mmap, os\nfd = libc.syscall(447, 0); assert fd > 0\n"
        "os.ftruncate(fd, 4096); memory = mmap.mmap(fd, 4096)",
    ),
    Case("device", "f = open('/dev/fuse', 'rb')", needs="/dev/fuse", says="chr 10:229"),
    Case("file-unsupported", SYSTEM_CALL + "assert libc.syscall(430, b'tmpfs', 0) > 0", says="fscontext"),
    *(
        Case("namespace-nested", nested(kind, more), says=f"a {name} namespace")
        for kind, more, name in (
            ("user", "", "user"),
            ("pid", '"--fork",', "pid"),
            ("ipc", "", "ipc"),
            ("uts", "", "uts"),
            ("time", "", "time"),
            ("cgroup", "", "cgroup"),
        )
    ),
    Case("socket-unsupported", "import socket; s = socket.socket(2, 1, 262)", says="multipathtcp=0"),
    Case("socket-unsupported", "import socket; s = socket.socket(socket.AF_VSOCK, 1)"),
    Case(
        "socket-corked",
        "import socket; s = socket.socket(2, 2); s.connect(('127.0.0.1', 9))\n"
        "s.setsockopt(17, 1, 1); s.send(b'x')",
    ),
    Case("tcp-not-asked-for", TCP),
    Case(
        "tcp-in-flight",
        TCP.replace("far, _ = server.accept()", ""),
        dump=KEEP_TCP,
    ),
    *(Case("unix-unaccepted", UNIX_UNACCEPTED + how) for how in ("client.send(b'x')", "client.close()")),
    Case("unix-outside", UNIX_OUTSIDE, prepare=accepted),
    Case("unix-outside", UNIX_OUTSIDE, prepare=accepted, dump={"ext_unix_sk": True}),
    Case("terminal-outside", stdin="terminal"),
    Case(
        "not-session-leader",
        before=("sh", "-c", '"$@"; true', "sh"),
        pid=second_process,
    ),
    Case(
        "link-taken",
        "import os; f = open('f', 'w'); os.link('f', 'g'); os.unlink('f')",
        prepare=lambda place: [(place.folder / f"link_remap.{number}").touch() for number in range(100)],
        dump={"link_remap": True},
        says="/f",
    ),
    Case("file-unlinked", "import os; f = open('f', 'w'); os.link('f', 'g'); os.unlink('f')", says="/f"),
    Case(
        "file-deleted-large",
        "import os; f = open('f', 'wb'); f.write(bytes(2 << 20)); f.flush(); os.unlink('f')",
        dump={"ghost_limit": 4096},
        says="/f",
    ),
    Case("file-locks", "import fcntl; f = open('f', 'w'); fcntl.flock(f, fcntl.LOCK_EX)"),
    Case(
        "file-unreachable",
        "import os, subprocess\nos.mkdir('m')\n"
        "subprocess.run(['mount', '-t', 'tmpfs', 'none', 'm'], check=True)\nf = open('m/gone', 'w')\n"
        "subprocess.run(['umount', '-l', 'm'], check=True)",
        says="/gone",
    ),
    Case(
        "mount-unsupported",
        "import os, subprocess; os.mkdir('m')\n"
        "subprocess.run(['mount', '-t', 'hugetlbfs', 'none', 'm'], check=True)",
        before=("unshare", "-p", "-m", "-f", "--mount-proc"),
        pid=second_process,
        says="/m",
    ),
    Case(
        "mount-unsupported",
        "import os, subprocess\ndef run(*command): subprocess.run(command, check=True)\n"
        "os.mkdir('m'), os.mkdir('n'), run('mount', '-t', 'tmpfs', 'none', 'm'), os.mkdir('m/part')\n"
        "run('mount', '--bind', 'm/part', 'n'), run('umount', 'm')",
        before=("unshare", "-p", "-m", "-f", "--mount-proc"),
        pid=second_process,
        says="/n",
    ),
    Case("session-outside", before=("unshare", "-p", "-f"), pid=second_process),
    Case(
        "sysv-shm",
        SYSTEM_CALL + "id = libc.shmget(0, 4096, 0o1600); libc.shmat.restype = ctypes.c_void_p\n"
        "libc.shmat(id, None, 0); libc.shmctl(id, 0, None)",
        says="unshare --ipc",
    ),
    Case("pipe-packets", "import os; r, w = os.pipe2(os.O_DIRECT); os.write(w, b'x')"),
    Case("pidfd-outside", "import os; fd = os.pidfd_open(os.getppid())", says=str(os.getpid())),
    Case(
        "tun",
        "import os, fcntl, struct; f = os.open('/dev/net/tun', os.O_RDWR)\n"
        "fcntl.ioctl(f, 0x400454ca, struct.pack('16sH14x', b'crcli-causes', 0x1001))",
        needs="/dev/net/tun",
    ),
    Case(
        "iptables-missing",
        TCP,
        dump={"tcp_established": True, "network_lock": IPTABLES},
        dump_with=NO_IPTABLES,
    ),
    Case("iptables-missing", before=("unshare", "-n"), dump_with=NO_IPTABLES),
    Case("zombie-threads", LEADERLESS_CHILD),
    Case("freeze-timeout", VFORK, dump={"timeout": 1}, needs="/usr/bin/gcc"),
    Case(
        "network-lock",
        TCP,
        dump={"tcp_established": True, "network_lock": IPTABLES},
        dump_with="PATH=/nonexistent; export PATH; exec",
    ),
    # Restores
    Case("pid-taken", dump={"leave_running": True}, restore={}),
    Case("pid-out-of-range", restore={}, between=lambda place: move_pid(place, 5_000_000), says="5000001"),
    Case(
        "process-limit",
        MANY,
        prepare=leave_cgroups,
        restore={},
        restore_with=in_cgroup("pids", "pids.max", "4"),
        needs="/sys/fs/cgroup/pids/cgroup.procs",
    ),
    Case(
        "process-limit",
        THREADS,
        prepare=leave_cgroups,
        restore={},
        restore_with=in_cgroup("pids", "pids.max", "8"),
        needs="/sys/fs/cgroup/pids/cgroup.procs",
    ),
    Case(
        "killed-while-restored",
        LARGE,
        prepare=leave_cgroups,
        restore={},
        restore_with=in_cgroup("memory", "memory.limit_in_bytes", "24000000"),
        needs="/sys/fs/cgroup/memory/memory.limit_in_bytes",
    ),
    Case(
        "folder-missing", IN_FOLDER, between=lambda place: (place.folder / "w").rmdir(), restore={}, says="/w"
    ),
    Case("file-missing", FILE, between=lambda place: (place.folder / "f").unlink(), restore={}, says="/f"),
    Case(
        "file-missing",
        "import os; os.mkfifo('f'); fd = os.open('f', os.O_RDWR)",
        between=lambda place: (place.folder / "f").unlink(),
        restore={},
        says="mkfifo",
    ),
    Case(
        "file-missing",
        "import os; os.mkdir('w')\n" + SYSTEM_CALL + "libc.inotify_add_watch(libc.inotify_init(), b'w', 2)",
        between=lambda place: (place.folder / "w").rmdir(),
        restore={},
        says="/w, which the tree watches",
    ),
    Case(
        "folder-missing",
        "import os; os.mkdir('d')\n" + UNIX_SERVER.format("d/s"),
        between=lambda place: shutil.rmtree(place.folder / "d"),
        restore={},
        says="d/s",
    ),
    Case(
        "socket-path-taken",
        UNIX_SERVER.format("s"),
        between=lambda place: ((place.folder / "s").unlink(), (place.folder / "s").write_text("")),
        restore={},
    ),
    Case(
        "file-denied",
        FILE,
        between=lambda place: (
            subprocess.run(["chattr", "+i", "f"], cwd=place.folder, check=True)
            and place.held.callback(subprocess.run, ["chattr", "-i", place.folder / "f"], check=True)
        ),
        restore={},
    ),
    Case(
        "file-changed",
        FILE,
        between=lambda p: (p.folder / "f").write_text("x"),
        restore={},
        says="1 bytes now",
    ),
    Case(
        "file-mode-changed",
        FILE,
        between=lambda p: (p.folder / "f").chmod(0o600),
        restore={},
        says="chmod 0644 /",
    ),
    Case(
        "file-updated",
        "import ctypes; ctypes.CDLL('./library.so')",
        between=lambda place: library(place.folder, 2),
        restore={},
        needs="/usr/bin/gcc",
        says="/library.so",
    ),
    Case("port-taken", LISTENER, between=listen, restore={}),
    Case(
        "address-gone",
        LISTENER.replace("127.0.0.1", "127.0.0.7"),
        between=move_address,
        restore={},
    ),
    Case(
        "terminal-missing",
        stdin="terminal",
        before=("sh", "-c", '"$@"; true', "sh"),
        pid=second_process,
        dump={"shell_job": True},
        restore={"shell_job": True},
    ),
    Case("namespace-nested", nested("net"), restore={}),
    Case(
        "tcp-not-asked-for",
        TCP,
        dump=KEEP_TCP,
        restore={},
    ),
    Case("memory-short", LARGE, restore={}, restore_with="ulimit -v 50000; exec"),
    Case("descriptor-limit", MANY, restore={}, restore_with="exec prlimit --nofile=40"),
    Case(
        "locked-memory-limit",
        SYSTEM_CALL + "assert libc.mlockall(1) == 0",
        restore={},
        restore_with="exec setpriv --bounding-set=-ipc_lock prlimit --memlock=65536",
    ),
    Case("port-denied", LOW_PORT, restore={}, restore_with="exec setpriv --bounding-set=-net_bind_service"),
    Case(
        "socket-denied",
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
        restore={},
        restore_with="exec setpriv --bounding-set=-net_raw",
    ),
    Case(
        "network-denied",
        TCP,
        dump=KEEP_TCP,
        dump_with="exec setpriv --bounding-set=-net_admin",
    ),
    Case(
        "network-denied",
        TCP,
        dump=KEEP_TCP,
        restore=KEEP_TCP,
        restore_with="exec setpriv --bounding-set=-net_admin",
    ),
    *(
        Case(
            "user-denied",
            before=ANOTHER_USER,
            dump={"answer_limits": True},
            restore={},
            restore_with=f"exec setpriv --bounding-set=-{right}",
        )
        for right in ("setuid", "setgid")
    ),
    Case("clock-denied", restore={}, restore_with="exec setpriv --bounding-set=-sys_time"),
    Case("root-denied", restore={}, restore_with="exec setpriv --bounding-set=-sys_chroot"),
    Case("capability-denied", restore={}, restore_with="exec setpriv --bounding-set=-sys_boot"),
    Case(
        "capability-not-dropped",
        before=("setpriv", "--bounding-set=-sys_boot"),
        restore={},
        restore_with="exec setpriv --bounding-set=-setpcap",
    ),
    Case(
        "cpu-features",
        dump={"cpu_cap": CPU_INS},
        between=lambda place: place.edit("cpuinfo.img", claim_all_features),
        restore={"cpu_cap": CPU_INS},
    ),
    Case("seccomp-denied", FILTER, between=spoil_filters, restore={}),
    Case("image-version", between=edit("inventory.img", img_version=9), restore={}, says="version 9"),
    Case("image-option-tcp-close", between=edit("inventory.img", tcp_close=True), restore={}),
    Case("image-option-uprobes", between=edit("inventory.img", allow_uprobes=True), restore={}),
    *(
        Case("image-cut-short", between=cut(name), restore={})
        for name in ("pstree.img", "core-*.img", "files.img", "mm-*.img", "inventory.img", "pagemap-*.img")
    ),
    Case("image-cut-short", between=remove("inventory.img"), restore={}),
    Case("image-pages-missing", between=remove("pages-1.img"), restore={}),
    Case(
        "image-corrupt",
        between=lambda p: shutil.copy(p.images / "pstree.img", p.images / "files.img"),
        restore={},
    ),
    Case("criu-crashed", between=remove("mm-*.img"), restore={}),
    # Both
    Case("kernel-lacks", dump_with=NEW_TO_THE_KERNEL, says="kerndat_tcp_repair"),
    Case("disk-full", LARGE, prepare=full),
    Case("page-server-gone", LARGE, dump={"page_channel": "closed"}),
    Case("input-output", between=unreadable("files.img"), restore={}),
]


def provoke(case: Case, folder: Path) -> Attempt:
    """Have CRIU fail in this way."""
    kernel.become_subreaper()
    (folder / "images").mkdir()
    if "library.so" in case.code:
        library(folder, 1)
    with ExitStack() as held:
        popen: dict[str, Any] = {"cwd": folder}
        if case.stdin:
            master, slave = os.openpty()
            held.callback(os.close, master)
            held.callback(os.close, slave)
            popen["stdin"] = slave
        outside = held.enter_context(service())
        program = held.enter_context(spawn_python(then_wait(case.code), before=case.before, **popen))
        place = Place(folder, program, held, outside)
        held.callback(lambda: end(tree_of(program.pid)))
        case.prepare(place)
        done = dump(case, place)
        if case.restore is None:
            return done
        assert done.success, done.log
        case.between(place)
        with started(case.restore_with, folder):
            return raw_restore(place.images, **case.restore)


def dump(case: Case, place: Place) -> Attempt:
    """The dump of a case; a tree that it killed is reaped."""
    options = dict(case.dump)
    if "page_channel" in options:
        ours, theirs = socket.socketpair()
        ours.close()
        place.held.callback(theirs.close)
        options["page_channel"] = theirs.fileno()
    tree = tree_of(case.pid(place.program))
    with started(case.dump_with, place.folder):
        done = raw_dump(case.pid(place.program), place.images, **options)
    if done.success and not case.dump.get("leave_running"):
        reap(tree)
    return done


@contextmanager
def started(before: str, folder: Path) -> Iterator[None]:
    """CRIU started by a shell that does something first, or as ever."""
    with started_with(before.format(folder=folder), folder) if before else nullcontext():
        yield


def name_of(case: Case) -> str:
    """What pytest calls a case."""
    return f"{case.cause}-{sum(other.cause == case.cause for other in CASES[: CASES.index(case)])}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_cause_is_named(case: Case, tmp_path: Path) -> None:
    """CRIU's log, provoked for real, is understood: the cause has its name, and what it names is named."""
    if case.needs and not Path(case.needs).exists():
        pytest.skip(f"needs {case.needs}")
    done = provoke(case, tmp_path)
    assert not done.success
    cause = explain(done.log)
    errors = [line for line in done.log.splitlines() if "Error" in line or "Warn" in line]
    assert cause.name == case.cause, "\n".join([str(cause), *errors, done.log[-200:]])
    assert case.says in f"{cause.meaning} {cause.remedy}", cause
    assert cause.said in done.log and cause.remedy and "{" not in cause.meaning + cause.remedy


def test_every_cause_was_seen() -> None:
    """No entry of the table is invented: each is provoked here, or says where in CRIU's source it stands."""
    provoked = {case.cause for case in CASES}
    taken = {known.name for known in KNOWN if known.upstream is not None}
    assert {known.name for known in KNOWN} == provoked | taken and not provoked & taken


def test_what_was_not_provoked_is_in_criu() -> None:
    """The words that were taken from CRIU's source are words that this CRIU can say."""
    program = Path(criu_command()[-1]).read_bytes()
    for known in KNOWN:
        if known.upstream is not None:
            assert known.upstream.text.encode() in program, known.name


def test_a_run_that_works_has_no_cause(tmp_path: Path) -> None:
    """What CRIU calls errors in a dump and a restore that work is never taken for a cause."""
    (tmp_path / "images").mkdir()
    kernel.become_subreaper()
    with spawn_python(counter()) as program:
        tree = tree_of(program.pid)
        dumped = raw_dump(program.pid, tmp_path / "images")
        reap(tree)
        restored = raw_restore(tmp_path / "images")
        end(tree_of(program.pid))
    for done in (dumped, restored):
        assert done.success, done.log
        cause = explain(done.log)
        assert not cause.name and ("ends without" in cause.meaning or "tells of no error" in cause.meaning)


@pytest.mark.parametrize(
    ("log", "said", "meaning"),
    [
        (None, "", "wrote no log"),
        (None, "(0.1) Error (criu/x.c:1): it cannot", "it cannot"),
        (b"", "", "tells of no error"),
        (b"(0.1) Error (criu/r.c:1): rlimit: Can't setup RLIMIT_NOFILE for self\n", "", "tells of no error"),
        (b"(0.1) Restoring\n", "", "ends without an error, with: (0.1) Restoring"),
    ],
)
def test_no_cause_is_made_up(
    log: bytes | None, said: str, meaning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed from outside, CRIU says nothing: of several processes it logs errors only."""
    monkeypatch.setenv("CRCLI_LOG_DIR", str(tmp_path))
    with Workspace.create() as folder:
        if log is not None:
            folder.write(LOG_NAME, log)
        cause = explain_failure(folder, "test", said)
    assert meaning in cause.meaning and ("doctor" in cause.remedy) == ("cannot" not in cause.meaning)


def test_an_unknown_cause_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table lacks is shown as CRIU said it; that CRIU then kills what it began is not the cause."""
    case = next(case for case in CASES if case.says == "mkfifo")
    done = provoke(case, tmp_path)
    killed = "(00.056001) Error (criu/cr-restore.c:1269): 15713 killed by signal 9: Killed\n"
    monkeypatch.setattr(causes, "KNOWN", [known for known in KNOWN if known.name != "file-missing"])
    lines = done.log.splitlines(keepends=True)
    (end,) = (number for number, line in enumerate(lines) if "Restoring FAILED" in line)
    in_time = [*lines[:end], killed, *lines[end:]]
    for log in (done.log + killed, "".join(in_time)):  # when CRIU sees it late, and in time
        cause = explain(log)
        assert cause.name == "" and cause.retry is None
        assert cause.said == cause.meaning and cause.said.startswith("Can't open fake fifo")


def test_a_failed_dump_says_its_cause(crcli: Crcli, tmp_path: Path) -> None:
    """The cause, whether to try again, CRIU's words and its log come with the error; the tree runs on."""
    with (
        spawn_python(counter()) as program,
        started_with("exec setpriv --bounding-set=-sys_ptrace", tmp_path),
    ):
        error = crcli.dump(program.pid, code=11)["error"]
        assert error["cause"] == "traced" and error["retry"] is True and error["state"] == "running"
        assert f"process {program.pid} cannot be stopped" in error["message"] and "TracerPid" in error["hint"]
        assert error["criu"] in Path(error["log"]).read_text()
        said = crcli.run("dump", str(program.pid), "--store", crcli.store, code=11).err
        assert all(
            part in said for part in (error["message"], error["hint"], error["criu"], "Trying again can")
        )
        assert f"CRIU's whole log: {tmp_path}/logs/" in said


def test_a_failed_trial_says_its_cause(crcli: Crcli, tmp_path: Path) -> None:
    """A trial is a restore: what would have been in its way is named, and its log is kept too."""
    with spawn_python(then_wait(LARGE)) as program, started_with("ulimit -v 50000; exec", tmp_path):
        error = crcli.dump(program.pid, code=11)["error"]
        assert (error["cause"], error["state"]) == ("memory-short", "running")
        assert error["criu"] in Path(error["log"]).read_text()


def test_a_failed_restore_says_its_cause(crcli: Crcli, tmp_path: Path) -> None:
    """A restore that CRIU gives up says why, and an unknown reason is quoted as it is."""
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid)["image"]
        with started_with("exec setpriv --bounding-set=-sys_boot", tmp_path):
            error = crcli.restore(image, code=21)["error"]
        assert (error["cause"], error["retry"]) == ("capability-denied", False)
        assert error["criu"] in Path(error["log"]).read_text()
