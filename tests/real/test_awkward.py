"""Awkward processes, tried: each is refused by name and untouched, or comes back whole, or as was said.

Each program is a Python text. Those that are restored define `state()`, which is printed before the dump and
again afterwards; the rows say which finding names them, and what must be the same.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crcli.criu.binary import knows_bpf
from crcli.findings import Finding, Severity
from crcli.process.gather import gather
from crcli.process.preflight import preflight
from crcli.process.tree import refuse_bad_target, scan_tree
from tests.support.crcli import Crcli, crcli_in, wait_until
from tests.support.programs import Program, spawn_python, then_wait

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

PRELUDE = """
import ctypes, fcntl, mmap, os, select, signal, socket, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*arguments):
    result = libc.syscall(*arguments)
    if result < 0:
        print(f"unsupported={ctypes.get_errno()}", flush=True)
    return result
def apart(flags):
    '''Have a thread that does not share what unshare(2) takes by these flags.'''
    done = threading.Event()
    threading.Thread(target=lambda: (call(272, flags), done.set(), time.sleep(600)), daemon=True).start()
    done.wait()
def peek_at_descriptor(box):
    '''The descriptor in a message that nobody has taken yet.'''
    (rights,) = box.recvmsg(100, socket.CMSG_SPACE(4), socket.MSG_PEEK)[1]
    return struct.unpack("i", rights[2])[0]
def leave_tree(work):
    '''Run work() in a process that nobody in the tree is the parent of.'''
    reader, writer = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            os.setsid()
            work()
            print(f"daemon={os.getpid()}", flush=True)
            os.close(writer), os.close(reader)
            while True: time.sleep(60)
        os._exit(0)
    os.wait(), os.close(writer)
    os.read(reader, 1), os.close(reader)
"""

THEN_COMPARE = """
print(f"before={state()}", flush=True)
print("ready", flush=True)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
signal.sigwait({signal.SIGUSR2})
print(f"after={state()}", flush=True)
while True: time.sleep(60)
"""


def findings(pid: int) -> dict[str, Finding]:
    """Return the findings about the tree of a pid, by name."""
    return {one.name: one for one in preflight(gather(scan_tree(refuse_bad_target(pid))))}


def blockers(found: dict[str, Finding]) -> list[str]:
    """Return the names of those that stop a dump."""
    return [one.name for one in found.values() if one.severity is Severity.BLOCKER]


@contextmanager
def running(code: str, then: str, **options: Any) -> Iterator[Program]:
    """A program with the prelude; skips where this kernel does not know what it needs. Daemons are ended."""
    with spawn_python(PRELUDE + textwrap.dedent(code) + then, **options) as program:
        try:
            for line in program.output.splitlines():
                if line.startswith("unsupported="):
                    pytest.skip(f"this kernel does not permit it: {os.strerror(int(line.partition('=')[2]))}")
            yield program
        finally:
            for line in program.output.splitlines():
                if line.startswith("daemon="):
                    os.kill(int(line.partition("=")[2]), signal.SIGKILL)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Crcli]:
    """The command with a store of its own."""
    with crcli_in(tmp_path) as command:
        yield command


# --- refused, by name --------------------------------------------------------------------------------------

REFUSED = {
    "a named but unopened socket": (
        "path-only",
        """
        os.chdir(os.environ["FOLDER"])
        one = socket.socket(socket.AF_UNIX); one.bind("s")
        fd = os.open("s", os.O_PATH)
        """,
    ),
    "a named but unopened FIFO": (
        "path-only",
        """
        os.mkfifo(os.environ["FOLDER"] + "/f")
        fd = os.open(os.environ["FOLDER"] + "/f", os.O_PATH)
        """,
    ),
    "an eventfd that counts down by one": ("eventfd-semaphore", "fd = os.eventfd(5, os.EFD_SEMAPHORE)"),
    "an epoll on a pipe that only the child has": (
        "epoll-closed",
        """
        reader, writer = os.pipe()
        if os.fork() == 0:
            time.sleep(600)
        epoll = select.epoll()
        epoll.register(reader, select.EPOLLIN)
        os.close(reader)
        """,
    ),
    "an epoll on a timer that only the child has": (
        "epoll-closed",
        """
        one, another = libc.timerfd_create(1, 0), libc.timerfd_create(1, 0)
        if os.fork() == 0:
            time.sleep(600)
        epoll = select.epoll()
        epoll.register(one, select.EPOLLIN)
        os.close(one)
        """,
    ),
    "a POSIX message queue": (
        "posix-mqueue",
        """
        queue = libc.mq_open(b"/crcli-test", os.O_RDWR | os.O_CREAT, 0o600, None)
        libc.mq_unlink(b"/crcli-test")
        """,
    ),
    "many who have /dev/tty open": (
        "terminals-many",
        """
        import pty
        pid, master = pty.fork()
        if pid == 0:
            files = [os.open("/dev/tty", os.O_RDWR) for _ in range(64)]
            os.write(1, b"opened")
            time.sleep(600)
        os.read(master, 6)
        """,
    ),
    "a dash below another shell": (
        "terminal-inner-shell",
        """
        import pty
        pid, master = pty.fork()
        if pid == 0:
            os.execlp("dash", "dash", "-i")
        os.write(master, b"dash -i\\n")
        def opened():
            try:
                child = open(f"/proc/{pid}/task/{pid}/children").read().strip()
                return os.readlink(f"/proc/{child}/fd/10")
            except OSError:
                return ""
        while opened() != "/dev/tty":
            time.sleep(0.01)
        """,
    ),
    "a file about its parent": ("proc-outside", "f = open(f'/proc/{os.getppid()}/status')"),
    "a program started from memory": (
        "executable-in-memory",
        """
        fd = os.memfd_create("program", 0)
        os.write(fd, open("/bin/sleep", "rb").read())
        child = subprocess.Popen(["sleep", "600"], executable=f"/proc/self/fd/{fd}", pass_fds=[fd])
        """,
    ),
    "scheduling by deadline": (
        "sched-deadline",
        """
        attributes = struct.pack("IIQiIQQQ", 48, 6, 0, 0, 0, 10**6, 10**7, 10**7)
        call(314, 0, ctypes.create_string_buffer(attributes, 48), 0)
        """,
    ),
    "a ruleset of Landlock": (
        "landlock",
        "fd = call(444, ctypes.create_string_buffer(struct.pack('Q', 2), 8), 8, 0)",
    ),
    "datagrams held back": (
        "udp-corked",
        """
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.connect(("127.0.0.1", 9))
        one.setsockopt(socket.IPPROTO_UDP, 1, 1)
        one.send(b"held back")
        """,
    ),
    "unread messages of the kernel": (
        "netlink-unread",
        """
        one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        one.bind((0, 0))
        one.send(struct.pack("IHHIIB3x", 20, 18, 0x301, 1, 0, 0))  # RTM_GETLINK
        """,
    ),
    "a netlink socket in a group above the 32nd": (
        "netlink-groups",
        """
        one = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        one.bind((0, 0))
        one.setsockopt(270, 1, 33)  # NETLINK_ADD_MEMBERSHIP
        """,
    ),
    "a socket that was renamed, bound by a relative path": (
        "unix-renamed",
        """
        os.chdir(os.environ["FOLDER"])
        one = socket.socket(socket.AF_UNIX); one.bind("first"); one.listen()
        os.rename("first", "second")
        """,
    ),
    "a thread with open files of its own": ("thread-apart", "apart(0x400)"),
    "a thread with a working folder of its own": ("thread-apart", "apart(0x200)"),
    "a thread in a network of its own": ("thread-apart", "apart(0x40000000)"),
    "a process in the memory of another": (
        "memory-in-common",
        """
        stack = ctypes.create_string_buffer(1 << 16)
        top = ctypes.c_void_p(ctypes.addressof(stack) + (1 << 16) - 64)
        pause = ctypes.cast(libc.pause, ctypes.c_void_p)
        assert libc.clone(pause, top, 0x100 | signal.SIGCHLD, None) > 0
        """,
    ),
    "connections used before they were accepted": (
        "unix-unaccepted",
        """
        server = socket.socket(socket.AF_UNIX); server.bind("\\0crcli-test-%d" % os.getpid()); server.listen()
        client = socket.socket(socket.AF_UNIX); client.connect(server.getsockname()); client.send(b"x")
        """,
    ),
    "connections closed before they were accepted": (
        "unix-unaccepted",
        """
        server = socket.socket(socket.AF_UNIX); server.bind("\\0crcli-test-%d" % os.getpid()); server.listen()
        client = socket.socket(socket.AF_UNIX); client.connect(server.getsockname()); client.close()
        """,
    ),
}
"""What the program is, which finding refuses it, and how it becomes so."""


@pytest.mark.parametrize("row", REFUSED)
def test_it_is_refused_by_its_name_and_only_by_that(row: str, tmp_path: Path) -> None:
    """A state that CRIU fails on, or would lose, is named before the freeze, with what to do."""
    name, code = REFUSED[row]
    with running(code, then_wait(), env=os.environ | {"FOLDER": str(tmp_path)}) as program:
        time.sleep(0.1)
        found = findings(program.pid)
    assert blockers(found) == [name]
    assert found[name].remedy and found[name].evidence


def test_memory_of_a_process_outside_the_tree_is_refused() -> None:
    """Of two processes with one memory neither is dumped without the other, which would write on into it."""
    code = REFUSED["a process in the memory of another"][1].replace("assert ", "print(pid := ", 1)
    with running(code.replace(" > 0", ")"), then_wait()) as program:
        child = int(program.output.split()[0])
        found = findings(child)["memory-in-common"]
    assert f"({program.pid}), outside the tree" in found.message
    assert [one["with"] for one in found.evidence["processes"]] == [program.pid]


def test_a_refusal_touches_nothing(command: Crcli) -> None:
    """The command refuses such a process with exit 10, names the finding, and the program runs on."""
    code = "import time\nprint('ready')\nwhile True: print('tick'); time.sleep(0.05)"
    with spawn_python("import os\nfd = os.eventfd(5, os.EFD_SEMAPHORE)\n" + code) as program:
        error = command.dump(program.pid, code=10)["error"]
        ticks = program.output.count("tick")
        wait_until(lambda: program.output.count("tick") > ticks, "the program stands still")
    assert error["state"] == "untouched"
    assert "eventfd-semaphore" in {one["name"] for one in error["findings"]}


def test_a_bpf_map_is_refused_unless_criu_knows_bpf(command: Crcli) -> None:
    """A BPF map is named by the command itself, which knows how this CRIU was built."""
    code = "call(321, 0, ctypes.create_string_buffer(struct.pack('IIIII', 2, 4, 8, 4, 0), 72), 72)"
    with running(code, then_wait()) as program:
        done = command.run("check", str(program.pid), "--json", code=0 if knows_bpf() else 10)
    names = [one["name"] for one in done.json["findings"] if one["severity"] == "blocker"]
    assert names == ([] if knows_bpf() else ["bpf-map"])


def test_a_probed_program_is_refused(tmp_path: Path) -> None:
    """Once a probe has been hit in its code (here in a library of its own), a copy would die of it."""
    tracing = tmp_path / "tracing"
    tracing.mkdir()
    if subprocess.run(["mount", "-t", "tracefs", "crcli", tracing], check=False).returncode:
        pytest.skip("no tracing here")
    code = """
        import shutil
        lines = [line.split() for line in open("/proc/self/maps")]
        original = next(line[5] for line in lines if line[5:] and "/libc.so" in line[5])
        path = os.environ["FOLDER"] + "/library.so"
        shutil.copy(original, path)
        function = ctypes.CDLL(path).getppid
        address = ctypes.cast(function, ctypes.c_void_p).value
        for start, _, offset, *_, name in (line.split() for line in open("/proc/self/maps")):
            low, high = (int(part, 16) for part in start.split("-"))
            if name == path and low <= address < high:
                print(f"offset={address - low + int(offset, 16)}", flush=True)
        signal.signal(signal.SIGUSR1, lambda *_: print(f"hit={function()}", flush=True))
        """
    name = f"crcli_test_{os.getpid()}"
    try:
        with running(code, then_wait(), env=os.environ | {"FOLDER": str(tmp_path)}) as program:
            assert "uprobes" not in findings(program.pid)
            if not tracing.joinpath("uprobe_events").exists():
                pytest.skip("this kernel has no uprobes")
            place = f"{tmp_path}/library.so:{int(program.value_of('offset')):#x}"
            _append(tracing / "uprobe_events", f"p:{name}/one {place}\n")
            enable = tracing / "events" / name / "enable"
            enable.write_text("1")
            os.kill(program.pid, signal.SIGUSR1)
            wait_until(lambda: "hit=" in program.output, "the probe was not hit")
            enable.write_text("0")
            found = findings(program.pid)
        _append(tracing / "uprobe_events", f"-:{name}/one\n")
    finally:
        subprocess.run(["umount", "--lazy", tracing], check=True)
    assert blockers(found) == ["uprobes"]


def _append(path: Path, text: str) -> None:
    """Write to a file in which one cannot seek."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "before",
    [("--user", "--map-root-user"), ("--user", "--map-root-user", "--net", "--ipc")],
    ids=["alone", "with-others"],
)
def test_a_user_namespace_is_refused(before: tuple[str, ...]) -> None:
    """A tree that is root only in a namespace of its own cannot be set up again."""
    with spawn_python(then_wait(), before=("unshare", *before)) as program:
        assert blockers(findings(program.pid)) == ["user-namespace"]


def test_another_user_beside_a_filter_is_refused_exactly_when_criu_could_not() -> None:
    """A seccomp filter (of one thread) and another user need CAP_SYS_RESOURCE; each alone does not."""
    filter_ = """
        def lay_filter():
            libc.prctl(38, 1, 0, 0, 0)
            allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000), 8)
            program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 1, ctypes.addressof(allow)), 16)
            assert libc.prctl(22, 2, program, 0, 0) == 0
            time.sleep(600)
        threading.Thread(target=lay_filter, daemon=True).start()
        time.sleep(0.2)
        """
    other = "\nif os.fork() == 0:\n    os.setgid(65534); os.setuid(65534); time.sleep(600)\ntime.sleep(0.2)\n"
    with running(filter_, then_wait()) as program:
        evidence = gather(scan_tree(refuse_bad_target(program.pid)))
        alone = {one.name: one for one in preflight(evidence)}
    with running(other, then_wait()) as program:
        unfiltered = findings(program.pid)
    with running(textwrap.dedent(filter_) + other, then_wait()) as program:
        both = findings(program.pid)
    assert not blockers(alone) and alone["seccomp"].severity is Severity.NOTE
    assert not blockers(unfiltered)
    assert blockers(both) == (["seccomp-other-user"] if evidence.viewer.lacks_sys_resource else [])


# --- comes back whole --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A program that comes back as it was; `names` are the findings that must name it."""

    code: str
    names: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


WHOLE = {
    "threads with settings of their own": Whole(
        """
        def own():
            ids.append(threading.get_native_id())
            os.sched_setaffinity(0, {0})
            call(251, 1, 0, 3 << 13)
            libc.prctl(29, 12345, 0, 0, 0)
            time.sleep(600)
        ids = []
        threading.Thread(target=own, daemon=True).start()
        time.sleep(0.2)
        def state():
            slack = open(f"/proc/{ids[0]}/timerslack_ns").read().strip()
            return os.sched_getaffinity(0), os.sched_getaffinity(ids[0]), call(252, 1, ids[0]), slack
        """,
        ("cpu-affinity", "thread-settings"),
    ),
    "a connection whose other end is on its way in a message": Whole(
        """
        one, other = socket.socketpair()
        messenger, box = socket.socketpair()
        socket.send_fds(messenger, [b"take it"], [other.fileno()])
        other.close()
        epoll = select.epoll()
        epoll.register(one)
        one.setblocking(False)
        def state():
            fd = peek_at_descriptor(box)
            os.write(fd, b"hello"), os.close(fd)
            return one.recv(100)
        """,
    ),
    "a pipe that a daemon has as well, with its other end on its way": Whole(
        """
        reader, writer = os.pipe()
        messenger, box = socket.socketpair()
        socket.send_fds(messenger, [b"take it"], [reader])
        leave_tree(lambda: None)
        os.close(reader)
        def state():
            fd = peek_at_descriptor(box)
            os.write(writer, b"hello")
            time.sleep(0.3)  # nobody else may take it
            found = os.read(fd, 100)
            os.close(fd)
            return found
        """,
        ("pipe-outside",),
    ),
    "what a core dump holds": Whole(
        """
        open("/proc/self/coredump_filter", "w").write("0x7f")
        def state():
            return open("/proc/self/coredump_filter").read()
        """,
    ),
    "timers of every kind": Whole(
        """
        alarms = []
        signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        timer = ctypes.c_void_p()
        libc.timer_create(1, None, ctypes.byref(timer))
        often = ctypes.create_string_buffer(struct.pack("qqqq", 0, 10**7, 0, 10**7))
        libc.timer_settime(timer, 0, often, None)
        fd = libc.timerfd_create(1, 0)
        libc.timerfd_settime(fd, 0, often, None)
        def state():
            alarms.clear(); time.sleep(0.3)
            return bool(alarms), len(os.read(fd, 8))
        """,
        ("timers",),
    ),
    "a child that nobody has waited for": Whole(
        """
        child = os.fork()
        if child == 0:
            os._exit(3)
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        def state():
            return os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT).si_status
        """,
        ("zombie",),
    ),
    "the first process of a pid namespace": Whole(
        """
        path = os.readlink("/proc/self/fd/1")
        if os.getpid() == 1:
            os.setsid()
        memory = bytearray(os.urandom(1 << 20))
        def state():
            return os.getpid(), hash(bytes(memory[:100])), len(memory)
        """,
        ("namespaces",),
        ("unshare", "--pid", "--fork"),
    ),
    "mounts of its own that hold nothing": Whole(
        """
        for fd in (0, 1, 2):
            path = os.readlink(f"/proc/self/fd/{fd}")
            os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), fd)
        def state():
            return os.getcwd()
        """,
        ("mounts-left-behind",),
        ("unshare", "--mount"),
    ),
    "a watch on /sys": Whole(
        """
        fd = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(fd, b"/sys/class/net", 0x100)
        def state():
            lines = open(f"/proc/self/fdinfo/{fd}").readlines()
            return [line.split()[1:3] for line in lines if line.startswith("inotify")]
        """,
        ("watch-searched",),
    ),
    "epolls on what is closed, but open elsewhere in it": Whole(
        """
        epoll, inner = select.epoll(), select.epoll()
        reader, writer = os.pipe()
        copy = os.dup(reader)
        inner.register(reader, select.EPOLLIN)
        epoll.register(inner.fileno(), select.EPOLLIN)
        os.close(reader)
        os.write(writer, b"x")
        def state():
            return epoll.poll(0), inner.poll(0)
        """,
    ),
    "files in odd states": Whole(
        """
        os.chdir(os.environ["FOLDER"])
        os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
        nameless = os.open(os.environ["FOLDER"], os.O_TMPFILE | os.O_RDWR); os.write(nameless, b"hello")
        path = os.open("/etc/passwd", os.O_PATH)
        program = os.environ["FOLDER"] + "/sleep"
        subprocess.run(["cp", "/bin/sleep", program])
        child = subprocess.Popen([program, "600"])
        while not os.readlink(f"/proc/{child.pid}/exe").endswith("/sleep"): time.sleep(0.01)
        os.unlink(program)
        def state():
            links = [os.readlink("/proc/self/cwd"), os.readlink(f"/proc/{child.pid}/exe")]
            return links, os.pread(nameless, 9, 0), os.readlink(f"/proc/self/fd/{path}"), child.poll()
        """,
        ("deleted-files",),
    ),
    "a unix socket that was renamed": Whole(
        """
        os.chdir(os.environ["FOLDER"])
        one = socket.socket(socket.AF_UNIX)
        one.bind(os.environ["FOLDER"] + "/first")
        os.chmod("first", 0o640)
        os.rename("first", "second")
        one.listen()
        def state():
            client = socket.socket(socket.AF_UNIX)
            client.connect("second")
            accepted = one.accept()[0]
            client.close(), accepted.close()
            return os.path.exists("first"), oct(os.stat("second").st_mode)
        """,
        ("socket-renamed",),
    ),
    "sockets that are connected or bound to what a trial does not have": Whole(
        """
        far, device = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
        far.bind(("127.77.0.1", 0))
        far.connect(("127.77.0.2", 53))
        device.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, os.listdir("/sys/class/net")[0].encode())
        def state():
            return far.getsockname(), far.getpeername(), device.getsockopt(socket.SOL_SOCKET, 25, 20)
        """,
    ),
    "a working folder that was deleted, with another in its place": Whole(
        """
        os.chdir(os.environ["FOLDER"])
        for path in ("full", "empty", "file", "twice"):
            for _ in range(2 if path == "twice" else 1):
                os.mkdir(path)
                if os.fork() == 0:
                    os.chdir(path)
                    time.sleep(600)
                time.sleep(0.2)
                os.rmdir(path)
        os.makedirs("full/new"), os.mkdir("empty"), open("file", "w").close()
        def state():
            return [path for path in ("full/new", "empty", "file", "twice") if os.path.exists(path)]
        """,
    ),
    "what lay in folders that are gone": Whole(
        """
        import shutil
        os.makedirs(os.environ["FOLDER"] + "/gone/too"), os.makedirs(os.environ["FOLDER"] + "/replaced/too")
        os.chdir(os.environ["FOLDER"] + "/gone/too")
        files = [open(path + "/too/deleted", "w+b", 0) for path in ("..", "../../replaced")]
        for file in files:
            file.write(b"deleted")
        shutil.rmtree(os.environ["FOLDER"] + "/gone")
        shutil.rmtree(os.environ["FOLDER"] + "/replaced")
        open(os.environ["FOLDER"] + "/replaced", "w").close()
        def state():
            there = [os.path.exists(os.environ["FOLDER"] + path) for path in ("/gone", "/replaced")]
            return os.listdir("."), there, [os.pread(file.fileno(), 99, 0) for file in files]
        """,
    ),
    "daemons below a root that takes them in": Whole(
        """
        libc.prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
        reader, writer = os.pipe()
        for _ in range(2):
            if os.fork() == 0:
                os.setsid()
                for _ in range(2):
                    if os.fork() == 0:
                        os.fork()
                        os.write(writer, b"x")
                        time.sleep(600)
                os._exit(0)
            os.wait()
        ready = b""
        while len(ready) < 8:
            ready += os.read(reader, 8)
        def state():
            daemons = sorted(open("/proc/thread-self/children").read().split())
            below = [open(f"/proc/{pid}/task/{pid}/children").read().split() for pid in daemons]
            return daemons, below
        """,
    ),
    "a terminal whose program has ended": Whole(
        """
        import pty
        pid, master = pty.fork()
        if pid == 0:
            os._exit(3)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        def state():
            try:
                return os.read(master, 1)
            except OSError as error:
                return os.strerror(error.errno)
        """,
    ),
    "what waits in a terminal that changes nothing": Whole(
        """
        import tty
        master, slave = os.openpty()
        tty.setraw(slave)
        os.write(slave, b"out\\n"), os.write(master, b"in\\n")
        def state():
            ends = {master: slave, slave: master}
            read = {end: os.read(end, 100) for end in ends}
            for end, text in read.items():
                os.write(ends[end], text)
            return list(read.values())
        """,
    ),
    "a symbolic link that is open itself": Whole(
        """
        os.symlink("/nowhere", os.environ["FOLDER"] + "/link")
        fd = os.open(os.environ["FOLDER"] + "/link", os.O_PATH | os.O_NOFOLLOW)
        def state():
            return os.readlink("", dir_fd=fd)
        """,
    ),
    "a root that is to die with its parent": Whole(
        """
        libc.prctl(1, signal.SIGRTMIN + 3)
        def state():
            return os.getsid(0) == os.getpid()
        """,
    ),
    "strict seccomp in a child": Whole(
        """
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            buffer, read = ctypes.create_string_buffer(1), libc.syscall
            libc.prctl(22, 1, 0, 0, 0)
            read(0, reader, buffer, 1)
        time.sleep(0.2)
        def state():
            return [line.split() for line in open(f"/proc/{child}/status") if line.startswith("Seccomp:")]
        """,
        ("seccomp",),
    ),
}


def _root_of(program: Program, before: tuple[str, ...]) -> int:
    """Return the program's own pid, where `unshare --fork` stands between us and it."""
    if "--fork" not in before:
        return program.pid
    return int(Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()[0])


@pytest.mark.parametrize("row", WHOLE)
def test_it_comes_back_whole(row: str, command: Crcli, tmp_path: Path) -> None:
    """A state that sounds difficult is not refused, is named where it matters, and is the same afterwards."""
    case = WHOLE[row]
    environment = os.environ | {"FOLDER": str(tmp_path), "PYTHONHASHSEED": "0"}
    with running(case.code, THEN_COMPARE, before=case.before, env=environment) as program:
        root = _root_of(program, case.before)
        found = findings(root)
        assert not blockers(found)
        assert set(case.names) <= set(found)
        restored = command.move(root)
        _ask_again(program, restored["host_pid"])
        assert program.value_of("after") == program.value_of("before")


def _ask_again(program: Program, pid: int) -> None:
    os.kill(pid, signal.SIGUSR2)
    wait_until(lambda: "\nafter=" in program.output, f"it says nothing more:\n{program.output}")


# --- comes back changed, as it was said --------------------------------------------------------------------


def test_a_terminal_whose_number_is_taken_gets_another(command: Crcli) -> None:
    """Terminals that the tree drives go on, whatever terminals others have opened meanwhile."""
    code = """
        import pty
        shells = []
        for _ in range(2):
            pid, master = pty.fork()
            if pid == 0:
                os.execlp("bash", "bash", "--norc", "-i")
            shells.append((pid, master))
        def says(master):
            os.write(master, b"echo $((6 * 7)) >/dev/tty\\n")
            text = b""
            while b"42" not in text:
                text += os.read(master, 1000)
            return True
        def state():
            return [(says(master), os.tcgetpgrp(master) == pid) for pid, master in shells]
        """
    with running(code, THEN_COMPARE) as program:
        terminals = [os.readlink(f"/proc/{pid}/fd/0") for pid in map(int, _children(program.pid))]
        image = command.dump(program.pid)["image"]
        opened = [os.openpty() for _ in range(8)]
        assert all(map(os.path.exists, terminals))
        try:
            restored = command.restore(image)
            _ask_again(program, restored["host_pid"])
        finally:
            for fd in (fd for pair in opened for fd in pair):
                os.close(fd)
        assert program.value_of("after") == program.value_of("before") == "[(True, True), (True, True)]"


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@dataclass(frozen=True)
class Changed:
    """A program that comes back different; `name` says so before, and `after` is how it is then."""

    name: str
    code: str
    after: str


CHANGED = {
    "unread datagrams": Changed(
        "udp-unread",
        """
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind(("127.0.0.1", 0))
        one.sendto(b"unread", one.getsockname())
        one.setblocking(False)
        def state():
            return len(select.select([one], [], [], 0)[0])
        """,
        "0",
    ),
    "a multicast group": Changed(
        "multicast",
        """
        one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        one.bind(("", 0))
        group = socket.inet_aton("239.1.2.3") + socket.inet_aton("127.0.0.1")
        one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        def state():
            try:
                one.setsockopt(socket.IPPROTO_IP, socket.IP_DROP_MEMBERSHIP, group)
                one.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            except OSError:
                return "left"
        """,
        "left",
    ),
    "unread events": Changed(
        "events-unread",
        """
        fd = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(fd, os.environ["FOLDER"].encode(), 0x100)
        open(os.environ["FOLDER"] + "/new", "w").close()
        def state():
            return len(select.select([fd], [], [], 0)[0])
        """,
        "0",
    ),
    "what an ended program left unread": Changed(
        "terminal-unread",
        """
        master, slave = os.openpty()
        os.write(slave, b"unread")
        select.select([master], [], [])
        os.close(slave)
        def state():
            return struct.unpack("i", fcntl.ioctl(master, 0x541B, bytes(4)))[0]
        """,
        "0",
    ),
    "output that nobody has read": Changed(
        "terminal-unread",
        """
        master, slave = os.openpty()
        os.write(slave, b"unread\\n")
        select.select([master], [], [])
        def state():
            return struct.unpack("i", fcntl.ioctl(master, 0x541B, bytes(4)))[0]
        """,
        "9",
    ),
    "memory locked as it is touched": Changed(
        "memory-locked-whole",
        """
        libc.mmap.restype = ctypes.c_void_p
        memory = libc.mmap(None, ctypes.c_size_t(1 << 20), 3, 0x22, -1, ctypes.c_long(0))
        assert libc.mlock2(ctypes.c_void_p(memory), ctypes.c_size_t(1 << 20), 1) == 0
        def state():
            flags = (line.split() for line in open("/proc/self/smaps") if line.startswith("VmFlags"))
            return any("lf" in line for line in flags)
        """,
        "False",
    ),
    "a watch on a deleted file": Changed(
        "watch-deleted",
        """
        path = os.environ["FOLDER"] + "/file"
        file = open(path, "w")
        fd = libc.inotify_init1(os.O_NONBLOCK)
        libc.inotify_add_watch(fd, path.encode(), 2)
        os.unlink(path)
        def state():
            return sum(line.startswith("inotify") for line in open(f"/proc/self/fdinfo/{fd}"))
        """,
        "0",
    ),
    "a personality": Changed(
        "personality",
        """
        libc.personality(0x0040000)
        def state():
            return libc.personality(0xFFFFFFFF)
        """,
        "0",
    ),
}


@pytest.mark.parametrize("row", CHANGED)
def test_it_comes_back_changed_as_was_said(row: str, command: Crcli, tmp_path: Path) -> None:
    """What CRIU leaves behind is told before the freeze, and so it is afterwards."""
    case = CHANGED[row]
    with running(case.code, THEN_COMPARE, env=os.environ | {"FOLDER": str(tmp_path)}) as program:
        found = findings(program.pid)
        assert not blockers(found)
        assert found[case.name].severity is Severity.CHANGE and found[case.name].evidence
        _ask_again(program, command.move(program.pid)["host_pid"])
        assert program.value_of("before") != case.after == program.value_of("after")


# --- with others -------------------------------------------------------------------------------------------

SHARED = {
    "a mapping from before the fork": "memory = mmap.mmap(-1, 4096)\nleave_tree(lambda: None)",
    "a memfd": "fd = os.memfd_create('x')\nos.write(fd, b'x')\nleave_tree(lambda: None)",
    "a deleted file in /dev/shm": """
        file = open(f"/dev/shm/crcli-test-{os.getpid()}", "w+b")
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
        os.unlink(file.name), file.close()
        leave_tree(lambda: None)
        """,
}


@pytest.mark.parametrize("row", SHARED)
def test_memory_shared_with_an_outsider_is_told(row: str) -> None:
    """Whoever shares the tree's memory from outside is named, and the daemon itself as well."""
    with running(SHARED[row], then_wait()) as program:
        daemon = int(program.value_of("daemon"))
        found = findings(program.pid)
    (memory,) = found["memory-shared-outside"].evidence["memory"]
    assert [one["pid"] for one in memory["outsiders"]] == [daemon]


def test_memory_shared_inside_the_tree_is_not_worth_a_word() -> None:
    """A child that shares its parent's memory is in the image with it."""
    code = "memory = mmap.mmap(-1, 4096)\nif os.fork() == 0: time.sleep(600)\nfd = os.memfd_create('x')"
    with running(code, then_wait()) as program:
        assert set(findings(program.pid)) == {"files-written"}


def test_a_daemon_in_a_session_of_its_own_is_told() -> None:
    """A process that was forked twice and shares neither session nor group is known by its memory's place."""
    with running("leave_tree(lambda: None)", then_wait()) as program:
        daemon = int(program.value_of("daemon"))
        evidence = findings(program.pid)["relative-outside"].evidence
    assert [(one["pid"], one["reason"]) for one in evidence["processes"]] == [(daemon, "forked")]


def test_a_daemon_that_ran_another_program_is_told_by_its_cgroup(tmp_path: Path) -> None:
    """In a cgroup that the tree has for itself, as a service has, every orphan is its own."""
    group = Path(f"/sys/fs/cgroup/pids/crcli-test-{os.getpid()}")
    if not group.parent.joinpath("cgroup.procs").exists():
        pytest.skip("no cgroup hierarchy of this kind")
    code = f"""
        open("{group}/cgroup.procs", "w").write(str(os.getpid()))
        def become_another():
            print(f"daemon={{os.getpid()}}", flush=True)
            os.execvp("sleep", ["sleep", "600"])
        leave_tree(become_another)
        """
    group.mkdir()
    try:
        with running(code, then_wait()) as program:
            daemon = int(program.value_of("daemon"))
            evidence = findings(program.pid)["relative-outside"].evidence
        wait_until(lambda: not group.joinpath("cgroup.procs").read_text(), "somebody is left")
    finally:
        group.rmdir()
    assert [(one["pid"], one["reason"]) for one in evidence["processes"]] == [(daemon, "cgroup")]


def test_workers_of_one_server_are_no_relatives() -> None:
    """Siblings that one parent has forked lie alike in memory, and have not left anybody's tree."""
    code = """
        pids = []
        for _ in range(2):
            pid = os.fork()
            if pid == 0: time.sleep(600)
            pids.append(pid)
        print(f"worker={pids[0]}", flush=True)
        """
    with running(code, then_wait()) as program:
        assert "relative-outside" not in findings(int(program.value_of("worker")))


def test_semaphores_of_the_host_are_told_and_those_of_a_namespace_are_not() -> None:
    """System V semaphores stay behind, except for those in an IPC namespace of the tree's own."""
    code = """
        semaphores = libc.semget(0, 1, 0o600)
        libc.semop(semaphores, ctypes.create_string_buffer(struct.pack("Hhh", 0, 1, 0), 6), 1)
        print(f"semaphores={semaphores}", flush=True)
        """
    with running(code, then_wait()) as program:
        found = findings(program.pid)
        number = program.value_of("semaphores")
        subprocess.run(["ipcrm", "-s", number], check=True)
    (one,) = found["sysv-ipc"].evidence["objects"]
    assert (one["pid"], one["id"]) == (program.pid, int(number))
    with running(code, then_wait(), before=("unshare", "--ipc")) as program:
        assert "sysv-ipc" not in findings(program.pid)


def test_connections_from_outside_that_wait_are_told() -> None:
    """A client of ours that nobody has accepted yet is dropped, and that is said before."""
    name = f"\0crcli-test-{os.getpid()}"
    code = f"one = socket.socket(socket.AF_UNIX)\none.bind({name!r})\none.listen()"
    with running(code, then_wait()) as program, socket.socket(socket.AF_UNIX) as client:
        client.connect(name)
        found = findings(program.pid)
    assert found["unix-in-flight"].severity is Severity.CHANGE and not blockers(found)


def test_https_is_called_by_its_name() -> None:
    """A connection to port 443 is what an API's client has, so the finding says what will become of it."""
    with socket.create_server(("127.0.0.1", 443)) as server:
        code = "one = socket.create_connection(('127.0.0.1', 443))"
        with running(code, then_wait()) as program:
            server.accept()[0].close()
            message = findings(program.pid)["tcp-outside"].message
    assert "(HTTPS)" in message and "closed" in message


# --- on file systems of others -----------------------------------------------------------------------------


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[Path]:
    """A FUSE file system with one file, `hello`."""
    point = tmp_path / "fuse"
    point.mkdir()
    server = Path(__file__).parents[1] / "support" / "fuse_server.py"
    process = subprocess.Popen(
        [sys.executable, server, point], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if b"mounted" not in line:
            pytest.skip(f"no FUSE here: {line.decode()}")
        yield point
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", "--lazy", point], stderr=subprocess.DEVNULL, check=False)


def test_a_file_on_fuse_comes_back_and_is_told(fuse: Path, command: Crcli) -> None:
    """What another program or a server keeps must be mounted at the restore, and then all is whole."""
    code = f"""
        os.chdir({str(fuse)!r})
        file = os.open("hello", os.O_RDONLY)
        def state():
            return os.pread(file, 5, 0), os.getcwd()
        """
    with running(code, THEN_COMPARE) as program:
        found = findings(program.pid)
        assert found["remote-files"].severity is Severity.NOTE and not blockers(found)
        _ask_again(program, command.move(program.pid)["host_pid"])
        assert program.value_of("after") == program.value_of("before")


def test_watches_on_an_overlay_come_back(tmp_path: Path, command: Crcli) -> None:
    """Containers live on overlays, which do not tell a watched file's path: we look for it. Who has what is
    in a folder watched (uvicorn --reload, vite) watches hundreds, which are looked for together."""
    parts = [tmp_path / name for name in ("lower", "upper", "work", "merged")]
    for part in parts:
        part.mkdir()
    lower, upper, work, merged = parts
    folders = [f"deep/{number % 20}/{number}" for number in range(300)]
    for folder in folders:
        lower.joinpath(folder).mkdir(parents=True)
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    if subprocess.run(["mount", "-t", "overlay", "crcli", "-o", options, merged], check=False).returncode:
        pytest.skip("no overlay here")
    code = f"""
        fd = libc.inotify_init1(os.O_NONBLOCK)
        folders = {[f"{merged}/{folder}" for folder in folders]}
        for folder in folders:
            libc.inotify_add_watch(fd, folder.encode(), 0x100)
        def state():
            seen = []
            for folder in folders:
                open(f"{{folder}}/{{time.time_ns()}}", "w").close()
                seen.append(len(os.read(fd, 4096)) > 0)
            return all(seen)
        """
    try:
        with running(code, THEN_COMPARE) as program:
            found = findings(program.pid)
            paths = found["watch-searched"].evidence["paths"]
            assert sorted(paths) == sorted(f"{merged}/{folder}" for folder in folders)
            _ask_again(program, command.move(program.pid)["host_pid"])
            assert program.value_of("after") == program.value_of("before") == "True"
            command.clean_up()
    finally:
        subprocess.run(["umount", "--lazy", merged], check=True)


# --- with what crcli itself may not ------------------------------------------------------------------------


def _check_as(pid: int, *setpriv: str) -> dict[str, str]:
    """Return the findings' severities by name, of a check that runs with less than we have."""
    done = subprocess.run(
        ["setpriv", *setpriv, sys.executable, "-m", "crcli", "check", str(pid), "--json"],
        capture_output=True,
        cwd=Path(__file__).parents[2],
        text=True,
        check=False,
    )
    return {one["name"]: one["severity"] for one in json.loads(done.stdout)["findings"]}


LESS = {
    "a capability less": ("", ("--bounding-set", "-net_raw"), "capabilities", "blocker"),
    "nothing to change users with": ("as_nobody()", ("--bounding-set", "-setuid"), "capabilities", "blocker"),
    "a capability less than it could gain": (
        "as_nobody()",
        ("--bounding-set", "-net_raw"),
        "capability-bounds",
        "change",
    ),
    "no higher priorities": (
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5)); as_nobody()",
        ("--bounding-set", "-sys_nice"),
        "priority",
        "change",
    ),
    "no new privileges": ("", ("--no-new-privs",), "no-new-privs", "change"),
}


@pytest.mark.parametrize("row", LESS)
def test_what_crcli_may_not_give_back_is_told(row: str) -> None:
    """A crcli with fewer rights than the program says what it cannot bring back, or only in part."""
    code, less, name, severity = LESS[row]
    as_nobody = "def as_nobody(): os.setgid(65534), os.setuid(65534)\n"
    with running(as_nobody + code, then_wait()) as program:
        assert not {"capabilities", name} & set(findings(program.pid))
        assert _check_as(program.pid, *less)[name] == severity


def test_limits_above_ours_are_told() -> None:
    """Without CAP_SYS_RESOURCE a hard limit cannot be raised again, and is said to be lowered."""
    with running("", then_wait()) as program:
        assert "limits" not in findings(program.pid)
        with_less = ("--bounding-set", "-sys_resource", "prlimit", "--nofile=64:64")
        assert _check_as(program.pid, *with_less)["limits"] == "change"
