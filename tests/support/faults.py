"""A tree in which everything moves, a command disturbed at a chosen moment, and what must be true then.

    with network_of_our_own(), victim(folder) as tree:
        before = tree.look()
        attempt = Attempt(folder, ("dump", str(tree.pid), "--store", store))
        attempt.wait_for(lambda: tree.state() == "t")
        attempt.kill_criu()
        attempt.end()
        tree.assert_runs_as(before)
        attempt.assert_nothing_left()

Everything waits with a limit. Processes are found by a mark in their environment, wherever they have got to.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crcli import kernel
from crcli.criu import netlock
from crcli.process.tree import child_pids
from tests.support.programs import SLOWNESS, spawn_python

ROOT = Path(__file__).parents[2]
_LIBC = ctypes.CDLL(None)
COMMAND_LIMIT_SECONDS = 60.0 * SLOWNESS
SETTLE_SECONDS = 20.0 * SLOWNESS

COUNTERS = (
    "root",
    "root thread",
    "child",
    "grandchild",
    "memory",
    "child's memory",
    "inside",
    "outside",
    "pipe",
)
RECONNECTS, BAD = 30, 31
PARASITE = "/memfd:CRIUMFD"
"""What the mapping of CRIU's code in a process is called."""

VICTIM = """
    import fcntl, mmap, os, random, socket, struct, threading, time, traceback, zlib
    folder, port, megabytes = os.environ["VICTIM_FOLDER"], int(os.environ["VICTIM_PORT"]), MEGABYTES
    with open(f"{folder}/board", "r+b") as file:
        board = mmap.mmap(file.fileno(), 4096)
    SO_PEEK_OFF = 42
    kept = []

    def bump(slot, by=1):
        value = struct.unpack_from("Q", board, 8 * slot)[0] + by
        board[8 * slot : 8 * slot + 8] = struct.pack("Q", value)

    def spin(slot):
        while True:
            bump(slot)
            time.sleep(0.003)

    def remember(slot):
        block = random.Random(slot).randbytes(megabytes << 20)
        checksum = zlib.crc32(block)
        while True:
            assert zlib.crc32(block) == checksum, "memory changed"
            bump(slot)
            time.sleep(0.05)

    def talk(sock, slot):
        number = 0
        while True:
            sock.sendall(struct.pack("Q", number) + bytes(3000))
            answer = sock.recv(3008, socket.MSG_WAITALL)
            if len(answer) != 3008:
                raise ConnectionResetError("closed")
            assert struct.unpack_from("Q", answer)[0] == number, "out of order"
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1, "SO_REUSEADDR lost"
            number += 1
            bump(slot)
            time.sleep(0.002)

    def talk_inside(address, slot):
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.connect(address)
        talk(sock, slot)

    def talk_outside(slot):
        while True:
            try:
                sock = socket.socket()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.connect(("127.0.0.1", port))
                talk(sock, slot)
            except OSError:
                bump(30)
                time.sleep(0.05)

    def echo(listener):
        sock, _ = listener.accept()
        while data := sock.recv(4096):
            sock.sendall(data)
        raise ConnectionResetError("closed")

    def write_lines(end):
        number = 0
        while True:
            os.write(end, b"%d\\n" % number)
            number += 1
            time.sleep(0.003)

    def read_lines(end, slot):
        with os.fdopen(end) as lines:
            for number, line in enumerate(lines):
                assert int(line) == number, "a line was lost"
                bump(slot)

    def queue():
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for number in range(3):
            theirs.send(b"datagram %d" % number)
        while True:
            assert ours.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == -1, "SO_PEEK_OFF changed"
            assert ours.recv(100, socket.MSG_PEEK) == b"datagram 0", "the queue changed"
            time.sleep(0.02)

    def nameless():
        with open(f"{folder}/first", "w+") as file:
            os.link(f"{folder}/first", f"{folder}/second")
            os.unlink(f"{folder}/first")
            file.write("nameless")
            file.flush()
            while True:
                assert os.pread(file.fileno(), 100, 0) == b"nameless", "a file changed"
                time.sleep(0.02)

    def lock():
        with open(f"{folder}/lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            while True:
                time.sleep(60)

    def start(work, *arguments):
        def guarded():
            try:
                work(*arguments)
            except BaseException:
                traceback.print_exc()
            bump(31)
        thread = threading.Thread(target=guarded)
        kept.append(thread)
        thread.start()

    def join():
        for thread in kept:
            thread.join()

    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    reads, writes = os.pipe()
    if os.fork() == 0:
        if os.fork() == 0:
            listener.close()
            os.close(writes)
            start(spin, 3)
            start(talk_outside, 7)
            start(read_lines, reads, 8)
            join()
        os.close(reads)
        listener.close()
        start(spin, 2)
        start(remember, 5)
        start(talk_inside, address, 6)
        start(write_lines, writes)
        join()
    os.close(reads), os.close(writes)
    start(spin, 0)
    start(spin, 1)
    start(remember, 4)
    start(echo, listener)
    start(queue)
    start(nameless)
    start(lock)
    os.write(1, b"ready\\n")
    join()
    """


@contextmanager
def network_of_our_own() -> Iterator[None]:
    """Within the block this thread, and what it starts, has an empty network: filter tables are all ours."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    kernel.unshare(kernel.CLONE_NEWNET)
    try:
        kernel.loopback_up()
        yield
    finally:
        kernel.setns(before, kernel.CLONE_NEWNET)
        os.close(before)


@dataclass(frozen=True)
class Looks:
    """What a tree looks like from outside; two looks at an undisturbed tree are equal."""

    threads: dict[int, dict[int, str]]
    """For each process, the blocked signals of each thread."""
    files: dict[int, dict[str, str]]
    maps: dict[int, set[str]]
    code: dict[int, bool]
    """For each process, whether the beginnings of its program text are those of the files."""
    locks: list[str]
    reconnects: int


class Victim:
    """A tree of three processes that count, compute, and talk to each other and to a server of ours."""

    def __init__(self, folder: Path, pid: int, mark: str, output: Callable[[], str]) -> None:
        self.folder = folder
        self.pid = pid
        self.mark = mark
        self._output = output
        self._known: set[int] = set()

    def board(self, slot: int) -> int:
        """Return a number from the board that all of the tree write to."""
        with (self.folder / "board").open("rb") as file:
            file.seek(8 * slot)
            value: int = struct.unpack("Q", file.read(8))[0]
            return value

    def pids(self) -> list[int]:
        """Return the processes of the tree that exist now, the root first."""
        found = [self.pid]
        for pid in found:
            found += child_pids(pid)
        self._known.update(found)
        return found

    def state(self) -> str:
        """Return the root's state letter; empty when it is gone."""
        return state_of(self.pid)

    def look(self) -> Looks:
        """Look at the tree."""
        pids = self.pids()
        return Looks(
            {pid: _threads(pid) for pid in pids},
            {pid: _files(pid) for pid in pids},
            {pid: _maps(pid) for pid in pids},
            {pid: _code_is_whole(pid) for pid in pids},
            _locks(pids),
            self.board(RECONNECTS),
        )

    def counters(self) -> dict[str, int]:
        """Return how far everything has come."""
        return {name: self.board(slot) for slot, name in enumerate(COUNTERS)}

    def assert_goes_on(self, seconds: float = 15.0 * SLOWNESS) -> None:
        """Assert that every part of the tree moves on, and none has found anything wrong."""
        begun = self.counters()
        end = time.monotonic() + seconds
        while still := {name for name, value in self.counters().items() if value < begun[name] + 2}:
            assert not self.board(BAD), self._output()
            assert time.monotonic() < end, f"stands still: {still}\n{self._output()}{self.states()}"
            time.sleep(0.01)
        assert not self.board(BAD), self._output()

    def assert_runs_as(self, before: Looks, parasite: bool = False) -> None:
        """Assert that the tree goes on, and looks as it did.

        With `parasite`, the mapping of CRIU's code may be left: nobody removes it when CRIU was killed.
        """
        self.assert_goes_on()
        now = self.look()
        if parasite:
            for lines in (*before.maps.values(), *now.maps.values()):
                lines -= {line for line in lines if PARASITE in line}
        assert now.threads == before.threads, "threads or their blocked signals changed"
        assert now.code == before.code, "program text changed"
        assert now.maps == before.maps, _difference(before.maps, now.maps)
        assert now.files == before.files, _difference(before.files, now.files)
        assert now.locks == before.locks, f"locks: {before.locks} became {now.locks}"
        assert now.reconnects == before.reconnects, "a connection broke"

    def states(self) -> str:
        """Return what each process does, for a failure's message."""
        return "\n".join(f"{pid} {state_of(pid)} {_word(pid, 'wchan')}" for pid in self.pids())

    def remains(self) -> dict[int, str]:
        """Return every process that has this tree's mark, wherever it is, with its state."""
        return marked(self.mark)

    def reap(self) -> None:
        """Reap what has ended and is our child, so that its pids are free."""
        for pid in self._known | {self.pid}:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue

    def end(self) -> None:
        """Kill all of it, wherever it is, and return when its pids are free."""
        end_marked(self.mark)
        end = time.monotonic() + SETTLE_SECONDS
        while any(os.path.exists(f"/proc/{pid}") for pid in self._known):
            assert time.monotonic() < end, "zombies are left"
            self.reap()
            time.sleep(0.002)


@contextmanager
def victim(folder: Path, megabytes: int = 6) -> Iterator[Victim]:
    """Run a victim until the block ends; inside the block all of it moves."""
    kernel.become_subreaper()  # what the command detaches comes to us, and can be reaped
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "board").write_bytes(bytes(4096))
    mark = f"VICTIM_MARK={uuid.uuid4().hex}"
    with echo_server() as port:
        code = textwrap.dedent(VICTIM).replace("MEGABYTES", str(megabytes))
        words = {
            "VICTIM_FOLDER": str(folder),
            "VICTIM_PORT": str(port),
            "VICTIM_MARK": mark.partition("=")[2],
        }
        with spawn_python(code, env=os.environ | words) as program:
            tree = Victim(folder, program.pid, mark, lambda: program.output)
            try:
                tree.assert_goes_on()
                yield tree
            finally:
                tree.end()


@contextmanager
def echo_server() -> Iterator[int]:
    """A server outside of every tree that sends back what it gets; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()
    threading.Thread(target=_accept, args=(listener, over), daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _accept(listener: socket.socket, over: threading.Event) -> None:
    while not over.is_set():
        try:
            peer, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(peer,), daemon=True).start()


def _echo(peer: socket.socket) -> None:
    with peer:
        try:
            while data := peer.recv(4096):
                peer.sendall(data)
        except OSError:
            pass


@dataclass
class Attempt:
    """One run of the command, to be disturbed. `end` waits for it, and for all that it has started."""

    folder: Path
    arguments: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mark = f"ATTEMPT_MARK={uuid.uuid4().hex}"
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir(parents=True, exist_ok=True)
        self._mounts = mounts_in(self.folder)
        self._tables = netlock.tables()
        words = {
            "ATTEMPT_MARK": self.mark.partition("=")[2],
            "CRCLI_LOG_DIR": f"{self.folder}/logs",
            "CRCLI_RATES": f"{self.folder}/rates.json",
            "CRCLI_CACHE_DIR": f"{self.folder}/cache",
            "TMPDIR": str(self.temporary),
        }
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "crcli", *self.arguments, "--json"],
            cwd=ROOT,
            env=os.environ | words | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.out = self.err = ""

    @property
    def pid(self) -> int:
        """The command's pid."""
        return self.process.pid

    @property
    def code(self) -> int:
        """Its exit code; negative for the signal that killed it."""
        assert self.process.returncode is not None
        return self.process.returncode

    @property
    def json(self) -> dict[str, Any]:
        """The object that it printed; empty when it was killed before."""
        found: dict[str, Any] = json.loads(self.out) if self.out.strip() else {}
        return found

    def criu(self) -> int:
        """Return the pid of the CRIU that is the command's own child; 0 when there is none."""
        return next((pid for pid in child_pids(self.pid) if _is_criu(pid)), 0)

    def deep_criu(self) -> int:
        """Return the pid of a CRIU further down: in the trial's namespaces, or below a warden; 0 for none."""
        below = [pid for pid in child_pids(self.pid) if not _is_criu(pid)]
        for pid in below:
            if _is_criu(pid):
                return pid
            below += child_pids(pid)
        return 0

    def wait_for(self, true: Callable[[], Any], seconds: float = COMMAND_LIMIT_SECONDS) -> bool:
        """Return True as soon as `true` says so, False when the command has ended before.

        Who sleeps between two looks leaves the command a processor to come to that moment on, and is woken at
        once; who only looks is made to wait for its next turn when there are others, and misses more.
        """
        end = time.monotonic() + seconds
        while not true():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, f"the moment does not come\n{self.describe()}"
            time.sleep(0.0002)
        return True

    def send(self, number: int) -> None:
        """Send the command a signal, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(number)

    def send_to_another_thread(self, number: int) -> None:
        """Give one of the command's threads, but not the main one, a signal."""
        assert self.wait_for(lambda: give_to_another_thread(self.pid, number)), self.describe()

    def kill_criu(self) -> bool:
        """Kill the CRIU that is the command's own child; say whether there was one."""
        return _kill(self.criu(), signal.SIGKILL)

    def kill_helper(self) -> bool:
        """Kill the newest process that the command has forked (not CRIU); say whether there was one."""
        helpers = [pid for pid in child_pids(self.pid) if not _is_criu(pid)]
        return _kill(helpers[-1] if helpers else 0, signal.SIGKILL)

    def kill_deep_criu(self) -> bool:
        """Kill the CRIU further down; say whether there was one."""
        return _kill(self.deep_criu(), signal.SIGKILL)

    def end(self, but: Victim | None = None, seconds: float = COMMAND_LIMIT_SECONDS) -> None:
        """Return once the command and all that it started, `but` a restored tree, has ended; else fail."""
        try:
            self.out, self.err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            description = self.describe()
            self.process.kill()
            self.process.communicate()
            end_marked(self.mark, self.pid)
            raise AssertionError(f"no end within {seconds} s\n{description}") from None
        self.ended = time.monotonic()
        end = time.monotonic() + SETTLE_SECONDS
        while left := self.remains(but):
            if time.monotonic() > end:
                description = self.describe()
                end_marked(self.mark, self.pid)
                raise AssertionError(f"left behind: {left}\n{description}")
            time.sleep(0.005)

    def remains(self, but: Victim | None = None) -> dict[int, str]:
        """Return what the command has started and still runs: CRIU loses its environment, not its session.

        A restored tree that runs, and the reaper of its namespace, are no remains.
        """
        living = but.remains() if but is not None else {}
        found = marked(self.mark, self.pid)
        return {
            pid: state
            for pid, state in found.items()
            if pid not in living and not (living and "os.wait()" in _cmdline(pid))
        }

    def assert_nothing_left(self, locked: bool = False) -> None:
        """Assert that no filter table (unless the tree is `locked`), mount, or temporary file is left."""
        end = time.monotonic() + SETTLE_SECONDS
        while mounts := mounts_in(self.folder) - self._mounts:  # CRIU's may be those of another test
            assert time.monotonic() < end, f"mounts left: {mounts}"
            time.sleep(0.05)
        files = list(self.temporary.iterdir())
        assert not files, f"temporary files left: {files}"
        left = netlock.tables() - self._tables
        assert not left or locked, f"filter tables left: {left}"

    def describe(self) -> str:
        """Return what is known of the command, for a failure's message."""
        log = "".join(path.read_text() for path in sorted((self.folder / "logs").glob("*.log"))[-1:])
        found = "\n".join(f"{pid} {state} {_cmdline(pid)}" for pid, state in self.remains().items())
        end = f"exit {self.process.returncode}\n{self.out}\n{self.err}"
        return f"{self.arguments}\n{end}\n{found}\n{log[-3000:]}"


def marked(mark: str, session: int = 0) -> dict[int, str]:
    """Return the processes (zombies aside) with this in their environment, or of this session: their states.

    Session 0, that of kernel threads and of whatever was started outside of this container, is none.
    """
    found = {}
    wanted = mark.encode()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    state, _, _, sid = file.read().rpartition(b")")[2].split()[:4]
                with open(f"/proc/{name}/environ", "rb") as file:
                    is_ours = int(sid) == session != 0 or wanted in file.read().split(b"\0")
                    if state not in b"ZX" and is_ours:
                        found[int(name)] = state.decode()
            except OSError:
                continue
    return found


def end_marked(mark: str, session: int = 0) -> None:
    """Kill all processes with this mark, or of this session, and return when they are gone."""
    end = time.monotonic() + SETTLE_SECONDS
    while left := marked(mark, session):
        assert time.monotonic() < end, f"cannot be killed: {left}"
        for pid in left:
            _kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def mounts_in(folder: Path) -> set[str]:
    """Return where something is mounted in a folder, or by CRIU."""
    with open("/proc/self/mountinfo") as file:
        points = {line.split()[4] for line in file}
    return {point for point in points if point.startswith(str(folder)) or "criu" in point}


def state_of(pid: int) -> str:
    """Return a process's state letter; empty when it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except OSError:
        return ""


def give_to_another_thread(pid: int, number: int) -> bool:
    """Give a signal to the oldest thread of a process, but for the main one, that does not block it; say
    whether there was one. The kernel may do so where it is sent to the process."""
    for tid in sorted(map(int, os.listdir(f"/proc/{pid}/task"))):
        blocked = re.search(r"^SigBlk:\s*(\w+)$", _word(pid, f"task/{tid}/status"), re.MULTILINE)
        is_open = tid != pid and blocked is not None and not int(blocked[1], 16) >> (number - 1) & 1
        if is_open and _LIBC.tgkill(pid, tid, number) == 0:
            return True
    return False


def _kill(pid: int, number: int) -> bool:
    if not pid:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _is_criu(pid: int) -> bool:
    words = _cmdline(pid).split(" ")
    return "swrk" in words or "--rpc" in words  # it renames itself once it has its order


def _cmdline(pid: int) -> str:
    return _word(pid, "cmdline").replace("\0", " ")


def _word(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _threads(pid: int) -> dict[int, str]:
    found = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        lines = _word(pid, f"task/{tid}/status").splitlines()
        found[int(tid)] = next((line for line in lines if line.startswith("SigBlk")), "")
    return found


def _files(pid: int) -> dict[str, str]:
    return {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}


def _locks(pids: list[int]) -> list[str]:
    """The file locks that these processes hold, each once: the kernel lists one twice when others, before it
    in a list that is read piece by piece, come meanwhile."""
    words = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return sorted({" ".join(line[1:6]) for line in words if line[1] != "->" and int(line[4]) in pids})


def _maps(pid: int) -> set[str]:
    """The mappings that a program does not make and unmake while it computes: those with a name."""
    lines = (line.split(maxsplit=5) for line in _word(pid, "maps").splitlines())
    return {" ".join((line[0], line[1], line[5])) for line in lines if len(line) > 5 and line[5] != "[heap]"}


def _code_is_whole(pid: int) -> bool:
    """Whether the first page of each mapping of program text is what the file says."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in _word(pid, "maps").splitlines():
            span, flags, offset, _, _, *name = line.split(maxsplit=5)
            if "x" in flags and name and name[0].startswith("/") and os.path.exists(name[0]):
                memory.seek(int(span.partition("-")[0], 16))
                with open(name[0], "rb") as file:
                    file.seek(int(offset, 16))
                    expected = file.read(4096)
                if memory.read(4096)[: len(expected)] != expected:
                    return False
    return True


def _difference(before: dict[int, Any], now: dict[int, Any]) -> str:
    words = []
    for pid in before:
        old, new = set(map(str, _items(before[pid]))), set(map(str, _items(now.get(pid, ()))))
        if old != new:
            words.append(f"{pid}: gone {sorted(old - new)}, new {sorted(new - old)}")
    return "; ".join(words) or f"{set(before)} became {set(now)}"


def _items(value: Any) -> Any:
    return value.items() if isinstance(value, dict) else value
