"""Files as part of a tree's state: open, deleted, in memory only, locked, growing, half a transaction."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from crcli.process.host_turn import HostTurn
from tests.support.crcli import (
    COMMAND_LIMIT_SECONDS,
    Crcli,
    assert_goes_on,
    counted,
    counter,
    reap,
    tree_of,
    wait_until,
)
from tests.support.faulty_proxy import FaultyProxy, Trickle
from tests.support.programs import Program, spawn_python, then_wait
from tests.support.s3servers import S3Server

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

ASKED = """
    import signal, time

    def answer(number, frame):
        print(f"state={{state()}}")

    signal.signal(signal.SIGUSR1, answer)
    {setup}
    print("ready")
    while True: time.sleep(60)
    """

SHARED_MEMORY = """
import multiprocessing, time
from multiprocessing.shared_memory import SharedMemory

def child(name, turn, done):
    memory = SharedMemory(name)
    while True:
        turn.acquire()
        memory.buf[0] = (memory.buf[0] + 1) % 256
        done.release()

def main():
    context = multiprocessing.get_context("spawn")
    turn, done = context.Semaphore(0), context.Semaphore(0)
    memory = SharedMemory(create=True, size=1 << 20)
    memory.buf[1:9] = b"contents"
    context.Process(target=child, args=(memory.name, turn, done)).start()
    turn.release(), done.acquire()
    print("ready")
    for number in range(1, 10**6):
        assert memory.buf[0] == number % 256 and bytes(memory.buf[1:9]) == b"contents"
        turn.release(), done.acquire()
        print(f"number={number}")
        time.sleep(0.01)
"""


def asked(setup: str) -> str:
    """Return the code of a program that does this, and says what `state()` gives when it gets SIGUSR1."""
    return ASKED.format(setup=setup.strip().replace("\n", "\n    "))


def state(program: Program, pid: int) -> str:
    """Ask such a program."""

    def answers() -> int:
        return program.output.rpartition("\n")[0].count("state=")

    before = answers()
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: answers() > before, "no answer:\n" + program.output)
    return program.value_of("state")


def test_a_deleted_file_keeps_its_contents(crcli: Crcli, tmp_path: Path) -> None:
    """A file that was unlinked while open is whole after the restore, at the same offset, without a name."""
    path = tmp_path / "deleted"
    setup = f"""
import os
file = open({str(path)!r}, "w+b", buffering=0)
file.write(b"x" * (3 << 20) + b"end")
file.seek(3 << 20)
os.unlink({str(path)!r})
def state():
    at = file.tell()
    return (at, file.read(), file.seek(at), os.fstat(file.fileno()).st_nlink)
"""
    with spawn_python(asked(setup)) as program:
        report = crcli.move(program.pid)
        assert state(program, report["host_pid"]) == str((3 << 20, b"end", 3 << 20, 0))
        assert not path.exists()


def test_what_lies_where_a_deleted_file_was_is_not_the_tree_s(crcli: Crcli, tmp_path: Path) -> None:
    """A log is rotated away and others use its name: that file does not travel, may change, and is left as it
    is, and a named pipe there is not opened, which would hold a frozen tree for ever."""
    path = tmp_path / "log.1"
    setup = f"""
import os
log = open({str(path)!r}, "w+")
log.write("of the tree"); log.flush()
os.unlink(log.name)
state = lambda: log.seek(0) or log.read()
"""
    with spawn_python(asked(setup)) as program:
        os.mkfifo(path)
        crcli.dump(program.pid, "--leave-running")
        path.unlink()
        path.write_text("of another")
        image = crcli.dump(program.pid)["image"]
        path.write_text("of another, and of today")
        report = crcli.restore(image)
        assert state(program, report["host_pid"]) == "of the tree"
        assert path.read_text() == "of another, and of today"


def test_a_restore_that_was_killed_does_not_prevent_the_next(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU gives a deleted file a name for a moment: one that it left is no hindrance, and one that it leaves
    where somebody else survives is removed."""
    path = tmp_path / "deleted"
    code = f"import os\nfile = open({str(path)!r}, 'w+b', 0)\nos.unlink(file.name)\nfile.write(b'unnamed')\n"
    moments = [tmp_path / f"deleted.cr.{number:x}.ghost" for number in range(64)]  # one of them is CRIU's
    with spawn_python(code + then_wait()) as program:
        image = crcli.dump(program.pid)["image"]
        for moment in moments:
            moment.write_text("left")
        fds = Path(f"/proc/{crcli.restore(image)['host_pid']}/fd")
        (file,) = [fd for fd in fds.iterdir() if os.readlink(fd).startswith(str(path))]
        assert file.read_bytes() == b"unnamed"
        assert {moment.read_text() for moment in moments} == {"left"}
        crcli.clean_up()
        for moment in moments:
            moment.unlink()
        killed = tmp_path / "criu"
        asked = "select.select([int(sys.argv[2])], [], [])"
        makes = f"for path in {list(map(str, moments))}: open(path, 'w')"
        killed.write_text(f"#!{sys.executable}\nimport select, sys\n{asked}\n{makes}\n")
        killed.chmod(0o755)
        monkeypatch.setenv("CRCLI_CRIU", str(killed))
        crcli.restore(image, code=21)
        assert [moment.exists() for moment in moments].count(False) == 1


def test_names_that_are_not_utf_8_are_names_too(crcli: Crcli, tmp_path: Path) -> None:
    """Files, folders and processes may be called anything: bytes that are no text, line ends, "(deleted)"."""
    setup = f"""
import ctypes, os
ctypes.CDLL(None).prctl(15, b"a\\n) \\xff(c", 0, 0, 0)
os.mkdir({os.fsencode(tmp_path)!r} + b"/\\xff\\n (deleted)")
os.chdir({os.fsencode(tmp_path)!r} + b"/\\xff\\n (deleted)")
kept, gone = (os.open(name, os.O_RDWR | os.O_CREAT) for name in (b"\\xfe", b"\\xfd"))
os.write(kept, b"kept"), os.write(gone, b"gone")
os.unlink(b"\\xfd")
def state():
    comm = open("/proc/self/comm", "rb").read()
    return os.getcwdb()[-12:], comm, os.pread(kept, 9, 0), os.pread(gone, 9, 0), os.listdir(b".")
"""
    with spawn_python(asked(setup)) as program:
        before = state(program, program.pid)
        image = crcli.dump(program.pid, "--name", "bytes")["image"]
        next(tmp_path.glob("*(deleted)/*")).unlink()
        report = crcli.restore(image)
        assert state(program, report["host_pid"]) == before
        crcli.run("ls", "--store", crcli.store), crcli.run("show", "bytes", "--store", crcli.store)


def test_a_file_in_dev_shm_travels(crcli: Crcli) -> None:
    """A mapped file in /dev/shm is in the image, and is put back when it is not there any more."""
    path = Path(f"/dev/shm/crcli-test-{os.getpid()}")
    setup = f"""
import mmap, os
fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT, 0o640)
os.ftruncate(fd, 1 << 20)
memory = mmap.mmap(fd, 1 << 20)
memory[:5] = b"hello"
def state():
    memory[-1] += 1
    return (bytes(memory[:5]), memory[-1])
"""
    try:
        with spawn_python(asked(setup)) as program:
            assert state(program, program.pid) == str((b"hello", 1))
            image = crcli.dump(program.pid)["image"]
            path.unlink()
            report = crcli.restore(image)
            assert state(program, report["host_pid"]) == str((b"hello", 2))
            assert path.read_bytes()[:5] == b"hello" and path.stat().st_mode & 0o777 == 0o640
    finally:
        path.unlink(missing_ok=True)


def start_shared_memory(folder: Path) -> str:
    """Return the code of a program that shares memory and semaphores with a child that it spawned."""
    (folder / "sharing.py").write_text(SHARED_MEMORY)
    return f"import sys; sys.path.insert(0, {str(folder)!r}); import sharing; sharing.main()"


def number(program: Program) -> int:
    """Return the last number that the two have agreed on."""
    return int(program.value_of("number")) if "number=" in program.output else 0


def assert_moves_on(program: Program) -> None:
    """Assert that the two agree on further numbers."""
    before = number(program)
    wait_until(lambda: number(program) > before + 5, "they stand still:\n" + program.output[-2000:])


@pytest.mark.alone
def test_shared_memory_and_semaphores_live_on(crcli: Crcli, tmp_path: Path, before: set[str]) -> None:
    """multiprocessing's SharedMemory and semaphores, which have names in /dev/shm, work after a restore."""
    with spawn_python(start_shared_memory(tmp_path)) as program:
        assert_moves_on(program)
        crcli.move(program.pid)
        assert_moves_on(program)


@pytest.mark.alone
def test_shared_memory_of_a_running_tree_can_be_restored_later(
    crcli: Crcli, tmp_path: Path, before: set[str]
) -> None:
    """An image taken with --leave-running comes back after the original, and its files, are gone."""
    with spawn_python(start_shared_memory(tmp_path)) as program:
        image = crcli.dump(program.pid, "--leave-running")["image"]
        assert_moves_on(program)
        end_all(program.pid)
        remove_new(before)
        crcli.restore(image)
        assert_moves_on(program)


@pytest.mark.alone
def test_shared_memory_of_a_killed_tree_comes_back_on_a_clean_host(
    crcli: Crcli, tmp_path: Path, before: set[str]
) -> None:
    """A tree that was killed comes back although nothing of it is left in /dev/shm, as on another host."""
    with spawn_python(start_shared_memory(tmp_path)) as program:
        image = crcli.dump(program.pid)["image"]
        remove_new(before)
        crcli.restore(image)
        assert_moves_on(program)


@pytest.mark.alone
@pytest.mark.parametrize("outcome", ["killed", "stopped"])
def test_trees_with_semaphores_are_dumped_beside_each_other(
    crcli: Crcli, tmp_path: Path, outcome: str, before: set[str]
) -> None:
    """CRIU gives files without a name the same names in every dump: two trees get on with that, at once and
    one after the other, and each gets its own files back."""
    how = {"killed": [], "stopped": ["--leave-stopped"]}[outcome]
    with ExitStack() as held:
        code = start_shared_memory(tmp_path)
        programs = [held.enter_context(spawn_python(code)) for _ in range(3)]
        trees = [tree_of(program.pid) for program in programs]
        dumps = [
            held.enter_context(crcli.start("dump", str(program.pid), "--store", crcli.store, *how))
            for program in programs[1:]
        ]
        for dump in dumps:
            assert dump.wait(COMMAND_LIMIT_SECONDS) == 0, dump.communicate()
        crcli.run("dump", str(programs[0].pid), "--store", crcli.store, *how)
        for program, tree in zip(programs, trees, strict=True):
            end_all(program.pid) if outcome == "stopped" else reap(tree)
        listed = crcli.run("ls", "--store", crcli.store, "--json").json["images"]
        assert len({image["image"] for image in listed}) == 3
        for image in listed:
            crcli.restore(image["image"])
        for program in programs:
            assert_moves_on(program)
        assert not {name for name in os.listdir("/dev/shm") if name.startswith("link_remap")} - before


@pytest.mark.alone
def test_a_dump_waits_until_another_has_its_names(crcli: Crcli, tmp_path: Path, before: set[str]) -> None:
    """While CRIU dumps one tree with files that have no name, another such tree is not frozen."""
    with spawn_python(start_shared_memory(tmp_path)) as program:
        turn = HostTurn("links", "/dev/shm")
        try:
            with crcli.start(
                "dump", str(program.pid), "--store", crcli.store, "--leave-running", "--json"
            ) as dump:
                wait_until(lambda: is_waiting(dump.pid), "it does not wait for its turn")
                assert_moves_on(program)
                assert dump.poll() is None and is_waiting(dump.pid)
                turn.end()
                _, err = dump.communicate(timeout=COMMAND_LIMIT_SECONDS)
                assert dump.returncode == 0, err
        finally:
            turn.end()
        names = set(os.listdir("/dev/shm")) - before
        assert not [name for name in names if name.startswith("link_remap")]


def is_waiting(pid: int) -> bool:
    """Whether a command waits for its turn, or has it."""
    files = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            files.append(os.readlink(descriptor))
    return "/run/crcli/links.lock" in files


@pytest.mark.alone
@pytest.mark.parametrize("how", [(), ("--leave-stopped",), ("--leave-running",)])
def test_names_of_a_failed_dump_are_gone(
    crcli: Crcli,
    tmp_path: Path,
    moto: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    how: tuple[str, ...],
    before: set[str],
) -> None:
    """Whatever keeps a tree from being saved, also SIGKILL of crcli: no name that the dump made stays."""

    def names() -> list[str]:
        return [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("link_remap")]

    for name, value in moto.env.items():
        monkeypatch.setenv(name, value)
    store = ("--store", moto.url("agents"), "--endpoint-url")
    with spawn_python(start_shared_memory(tmp_path)) as program, FaultyProxy(moto) as proxy:
        hang = Trickle()
        proxy.inject(hang, method="PUT", containing="/images/", times=float("inf"))
        for number in (signal.SIGTERM, signal.SIGKILL):
            hang.begun.clear()
            with crcli.start("dump", str(program.pid), *store, proxy.endpoint_url, *how) as dump:
                wait_until(hang.begun.is_set, "the manifest is not sent")
                assert how == ("--leave-running",) or names()
                dump.send_signal(number)
                dump.wait(COMMAND_LIMIT_SECONDS)
            wait_until(lambda: not names(), f"the names stay: {names()}")
            assert_moves_on(program)


SEMAPHORE = """
import _multiprocessing, multiprocessing
held = multiprocessing.get_context("spawn").Lock()
held.acquire()
print("name=" + held._semlock.name)
def state():
    known = held._semlock
    return _multiprocessing.SemLock._rebuild(0, known.kind, known.maxvalue, known.name).acquire(False)
"""
"""A program that has a semaphore, and opens it by its name once more, as each process that joins in does."""


@contextmanager
def semaphore(crcli: Crcli, *how: str) -> Iterator[tuple[Program, str, Path]]:
    """Such a program, its image, and the semaphore's file; nothing is left in /dev/shm after the block."""
    before = set(os.listdir("/dev/shm"))
    try:
        with spawn_python(asked(SEMAPHORE)) as program:
            assert state(program, program.pid) == "False"
            image = crcli.dump(program.pid, *how)["image"]
            yield program, image, Path("/dev/shm/sem." + program.value_of("name").lstrip("/"))
            assert not [
                name for name in set(os.listdir("/dev/shm")) - before if name.startswith("link_remap")
            ]
    finally:
        remove_new(before)


def let_go(file: Path) -> None:
    """Change a semaphore: its value is in its first word."""
    file.write_bytes(b"\1" + file.read_bytes()[1:])


@pytest.mark.alone
@pytest.mark.parametrize("stays", ["nothing", "name", "link", "both"])
def test_a_semaphore_is_found_by_its_name(crcli: Crcli, stays: str) -> None:
    """Who opens a restored tree's semaphore by its name gets the tree's own, here and where it never was."""
    with semaphore(crcli) as (program, image, file):
        (link,) = Path("/dev/shm").glob(f"link_remap.*-{image.partition('@')[2]}")
        for path, kept in ((link, stays in ("link", "both")), (file, stays in ("name", "both"))):
            if not kept:
                path.unlink()
        assert state(program, crcli.restore(image)["host_pid"]) == "False"


@pytest.mark.alone
def test_a_semaphore_that_was_left_behind_is_the_image_s_again(crcli: Crcli) -> None:
    """A tree that ran on and died has left its semaphore as it was then: that is put aside."""
    with semaphore(crcli, "--leave-running") as (program, image, file):
        for process in tree_of(program.pid)[1:]:
            process.kill()  # multiprocessing's resource tracker, which removes what a dead process leaves
        end_all(program.pid)
        let_go(file)
        report = crcli.restore(image)
        assert state(program, report["host_pid"]) == "False"
        assert "file-changed" in {finding["name"] for finding in report["findings"]}
        (aside,) = Path("/dev/shm").glob(f"{file.name}.before-*")
        assert aside.read_bytes()[0] == 1


@pytest.mark.alone
def test_a_semaphore_in_use_is_not_taken_away(crcli: Crcli) -> None:
    """While another has a semaphore that changed since, the restore is refused, until --files says how."""
    with semaphore(crcli, "--leave-running") as (program, image, file):
        let_go(file)
        error = crcli.restore(image, code=20)["error"]
        assert str(file) in error["message"] and file.read_bytes()[0] == 1
        report = crcli.restore(image, "--files", "host", "--pid-namespace", "new")
        assert state(program, report["host_pid"]) == "True"


@pytest.fixture
def before() -> Iterator[set[str]]:
    """What is in /dev/shm before a test, which leaves nothing more there."""
    names = set(os.listdir("/dev/shm"))
    yield names
    remove_new(names)


def remove_new(before: set[str]) -> None:
    """Remove what came into /dev/shm since `before` and has the names of these programs."""
    for name in set(os.listdir("/dev/shm")) - before:
        if name.startswith(("psm_", "sem.mp-", "link_remap", "mp-")) or len(name) == 6:
            Path("/dev/shm", name).unlink(missing_ok=True)


def end_all(pid: int) -> None:
    """Kill a tree, and reap it."""
    tree = tree_of(pid)
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    reap(tree)


def test_an_open_transaction_is_committed_after_the_restore(crcli: Crcli, tmp_path: Path) -> None:
    """An SQLite writer that was dumped in the middle of a transaction (WAL) commits it; nothing is lost."""
    path = tmp_path / "database"
    setup = f"""
import sqlite3
database = sqlite3.connect({str(path)!r}, isolation_level=None)
database.execute("PRAGMA journal_mode=WAL")
database.execute("CREATE TABLE numbers (number)")
database.execute("INSERT INTO numbers VALUES (1)")
database.execute("BEGIN IMMEDIATE")
database.execute("INSERT INTO numbers VALUES (2)")
def state():
    if database.in_transaction:
        database.execute("COMMIT")
    return [row[0] for row in database.execute("SELECT number FROM numbers")]
"""
    with spawn_python(asked(setup)) as program:
        image = crcli.dump(program.pid)["image"]
        for name in ("database", "database-wal", "database-shm"):
            (tmp_path / name).unlink()  # as on another host
        report = crcli.restore(image)
        assert state(program, report["host_pid"]) == "[1, 2]"


WRITERS = """
import sqlite3, threading
connect = lambda: sqlite3.connect({path!r}, isolation_level=None, check_same_thread=False)
connections = [connect()]
connections[0].execute("CREATE TABLE numbers (number)")
if {in_thread}:
    thread = threading.Thread(target=lambda: connections.append(connect()))  # in memory beside the heap
    thread.start(), thread.join()
    connections[1].execute("SELECT * FROM numbers").fetchall()
def state():
    for connection in [*connections, connect()]:
        connection.execute("INSERT INTO numbers VALUES (1)")
    return connections[0].execute("SELECT COUNT(*) FROM numbers").fetchone()[0]
"""
"""A program that writes to a database with a rollback journal, over connections of its own and a new one."""


@pytest.mark.parametrize("in_thread", [False, True], ids=["one connection", "one of a thread's too"])
def test_sqlite_writes_to_a_database_that_was_laid_out_anew(
    crcli: Crcli, tmp_path: Path, in_thread: bool
) -> None:
    """SQLite knows a database by its inode, which is another on another host: it writes on all the same."""
    path = tmp_path / "database"
    with spawn_python(asked(WRITERS.format(path=str(path), in_thread=in_thread))) as program:
        image = crcli.dump(program.pid)["image"]
        path.rename(tmp_path / "kept")  # so that its inode stays taken
        report = crcli.restore(image)
        assert "database-moved" not in {one["name"] for one in report["findings"]}
        assert state(program, report["host_pid"]) == ("3" if in_thread else "2")
        with sqlite3.connect(path) as other:
            assert other.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_moved_database_whose_memory_is_not_here_yet_is_told(crcli: Crcli, tmp_path: Path) -> None:
    """A lazy restore does not search memory for what SQLite knows of a file: it says what will happen."""
    path = tmp_path / "database"
    with spawn_python(asked(WRITERS.format(path=str(path), in_thread=False))) as program:
        image = crcli.dump(program.pid)["image"]
        path.rename(tmp_path / "kept")
        report = crcli.restore(image, "--lazy")
        assert "database-moved" in {one["name"] for one in report["findings"]}


def test_a_lock_is_held_again(crcli: Crcli, tmp_path: Path) -> None:
    """flock and fcntl locks are held before, and again after the restore."""
    path = tmp_path / "locked"
    setup = f"""
import fcntl
file, other = open({str(path)!r}, "w"), open({str(path)!r} + "2", "w")
fcntl.flock(file, fcntl.LOCK_EX)
fcntl.lockf(other, fcntl.LOCK_EX)
state = lambda: 1
"""
    with spawn_python(asked(setup)) as program:
        crcli.move(program.pid)
        with path.open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with Path(f"{path}2").open("r+") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


MAPPED_AND_LOCKED = """
import fcntl, itertools, mmap, os, threading, time
file = open({path!r}, "w+b")
file.truncate(8192)
memory = mmap.mmap(file.fileno(), 4096)
fcntl.lockf(file, fcntl.LOCK_EX, 10, 20)
fcntl.lockf(file, fcntl.LOCK_SH, 0, 100)
turns = [0, 0]
def count(thread):
    while True:
        turns[thread] += 1
        time.sleep(0.001)
for thread in range(2):
    threading.Thread(target=count, args=(thread,)).start()
numbers = iter(lambda: len([1 for _ in range(10**5)]), 0)
threading.Thread(target=lambda: [1 / 0 for number in numbers if number != 10**5], daemon=True).start()
def state():
    fcntl.lockf(file, fcntl.LOCK_UN)
    return turns
"""


@pytest.mark.parametrize("namespace", ["host", "new"])
def test_a_lock_on_a_mapped_file_is_held_again(crcli: Crcli, tmp_path: Path, namespace: str) -> None:
    """POSIX locks on a file that is also mapped are held again by their owner, whose threads go on."""
    path = tmp_path / "locked"
    with spawn_python(asked(MAPPED_AND_LOCKED.format(path=str(path)))) as program:
        image = crcli.dump(program.pid)["image"]
        report = crcli.restore(image, "--pid-namespace", namespace)
        with path.open("r+") as file:
            for kind, start in ((fcntl.LOCK_EX, 20), (fcntl.LOCK_SH, 29), (fcntl.LOCK_EX, 5000)):
                with pytest.raises(BlockingIOError):
                    fcntl.lockf(file, kind | fcntl.LOCK_NB, 1, start)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 20, 0)
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, 5000)
            fcntl.lockf(file, fcntl.LOCK_UN)
            before = json.loads(state(program, report["host_pid"]))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for thread in range(2):
            wait_until(
                lambda thread=thread: json.loads(state(program, report["host_pid"]))[thread] > before[thread],
                "a thread stands still",
            )
        assert "Traceback" not in program.output


def test_another_database_writer_waits_for_a_restored_one(crcli: Crcli, tmp_path: Path) -> None:
    """SQLite's locks in WAL mode lie on a mapped file: they keep others out after the restore as before."""
    path = tmp_path / "database"
    setup = f"""
import sqlite3
database = sqlite3.connect({str(path)!r}, isolation_level=None)
database.execute("PRAGMA journal_mode=WAL")
database.execute("CREATE TABLE numbers (number)")
database.execute("BEGIN IMMEDIATE")
database.execute("INSERT INTO numbers VALUES (1)")
state = lambda: database.execute("COMMIT") and 1
"""

    def write() -> None:
        with sqlite3.connect(path, timeout=0.05) as other:
            other.execute("INSERT INTO numbers VALUES (2)")

    with spawn_python(asked(setup)) as program:
        report = crcli.move(program.pid)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            write()
        state(program, report["host_pid"])
        write()


def test_a_log_that_grew_meanwhile_is_kept(crcli: Crcli) -> None:
    """Lines that others added to the log between dump and restore stay; the tree adds its own after them."""
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid)["image"]
        with program.output_path.open("a") as log:
            log.write("\nadded by another\n")
        crcli.restore(image)
        assert_goes_on(program)
        assert "\nadded by another\n" in program.output


def test_a_log_that_is_gone_is_written_again(crcli: Crcli) -> None:
    """A log that was removed meanwhile comes back as it was, and grows on."""
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid)["image"]
        program.output_path.unlink()
        crcli.restore(image)
        assert_goes_on(program)


def test_a_changed_file_is_never_overwritten_unasked(crcli: Crcli, tmp_path: Path) -> None:
    """A file that another has changed stops the restore; --files image or --files host decides."""
    path = tmp_path / "state"
    setup = f"""
file = open({str(path)!r}, "w+")
file.write("of the tree"); file.flush()
state = lambda: file.seek(0) or file.read()
"""
    with spawn_python(asked(setup)) as program:
        image = crcli.dump(program.pid)["image"]
        path.write_text("of another!")
        refused = crcli.restore(image, code=20)["error"]
        assert refused["findings"][0]["name"] == "file-changed" and path.read_text() == "of another!"
        report = crcli.restore(image, "--files", "image")
        assert state(program, report["host_pid"]) == "of the tree"
        assert [p.read_text() for p in tmp_path.glob("state.before-*")] == ["of another!"]


def test_what_is_included_and_is_no_file_is_said(crcli: Crcli, tmp_path: Path) -> None:
    """A path without a file is a finding, and so is a named pipe: opening it would hold a frozen tree for as
    long as nobody writes there."""
    os.mkfifo(tmp_path / "fifo")
    names = (str(tmp_path / "fifo"), str(tmp_path / "nothing"))
    with spawn_python(then_wait()) as program:
        options = [word for name in names for word in ("--include", name)]
        for how in ("--dry-run", "--leave-running"):
            findings = crcli.dump(program.pid, how, *options)["findings"]
            told = [one["evidence"]["path"] for one in findings if one["name"] == "include-missing"]
            assert told == [*names], how


def test_an_included_folder_travels(crcli: Crcli, tmp_path: Path) -> None:
    """What --include names is put back, although the tree had none of it open."""
    folder = tmp_path / "folder" / "inner"
    folder.mkdir(parents=True)
    (folder / "file").write_text("contents")
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid, "--include", str(tmp_path / "folder"))["image"]
        (folder / "file").unlink()
        folder.rmdir()
        crcli.restore(image)
        assert (folder / "file").read_text() == "contents"


def test_output_to_a_pipe_outside_goes_to_a_log(crcli: Crcli, tmp_path: Path) -> None:
    """A program whose stdout and stderr were pipes to others writes on, every line into one log."""
    code = """
        import itertools, sys, time
        for number in itertools.count():
            print(number)
            print(f"e{number}", file=sys.stderr)
            time.sleep(0.01)
        """
    with spawn_python(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        stdout, stderr = program.process.stdout, program.process.stderr
        assert stdout is not None and stderr is not None
        last = int([stdout.readline() for _ in range(10)][-1])
        stderr.readline()
        report = crcli.dump(program.pid)
        assert "pipe-outside" in {finding["name"] for finding in report["findings"]}
        last = int((b"%d\n" % last + stdout.read()).split()[-1])
        stdout.close()
        stderr.close()
        crcli.restore(report["image"])
        log = tmp_path / "logs" / f"{report['image']}.log"
        wait_until(lambda: len(log.read_text().splitlines()) > 40, "nothing is logged")
        found = log.read_text().rpartition("\n")[0].splitlines()
        out = [int(line) for line in found if line.isdigit()]
        err = [int(line[1:]) for line in found if line.startswith("e")]
        assert len(out) + len(err) == len(found), f"lines were torn: {found}"
        assert out == list(range(last + 1, last + 1 + len(out))) and err == list(
            range(err[0], err[0] + len(err))
        )


def test_pipes_that_are_waited_for_can_be_replaced(crcli: Crcli, tmp_path: Path) -> None:
    """A program that waits for its pipes to outside in an event loop (epoll) finds pipes there again."""
    code = """
        import asyncio, os, sys

        async def main():
            loop = asyncio.get_running_loop()
            reader = asyncio.StreamReader()
            await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
            writing, protocol = await loop.connect_write_pipe(asyncio.BaseProtocol, sys.stdout)
            writing.write(b"ready\\n")
            rest = await reader.read()
            writing.write(b"end of input after %d\\n" % len(rest))
            await asyncio.sleep(3600)

        asyncio.run(main())
        """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with spawn_python(code, ready_line="", **pipes) as program:
        stdin, stdout = program.process.stdin, program.process.stdout
        assert stdin is not None and stdout is not None
        assert stdout.readline() == b"ready\n"
        stdin.write(b"text")
        stdin.flush()
        report = crcli.move(program.pid)
        stdin.close()
        stdout.close()
        log = tmp_path / "logs" / f"{report['image']}.log"
        wait_until(lambda: log.exists() and log.read_text() == "end of input after 4\n", "it reads no end")


def test_output_to_a_socket_outside_goes_to_a_log(crcli: Crcli, tmp_path: Path) -> None:
    """A program that was given one end of a socket pair as stdio (as Node does) writes on, into the log."""
    code = """
        import itertools, sys, time
        for number in itertools.count():
            print(number)
            time.sleep(0.01)
            if number > 20:
                assert sys.stdin.read() == ""
        """
    ours, theirs = socket.socketpair()
    with ours, theirs, spawn_python(code, stdin=theirs, stdout=theirs, stderr=theirs) as program:
        theirs.close()
        assert ours.recv(2, socket.MSG_WAITALL) == b"0\n"
        report = crcli.dump(program.pid)
        rest = b"".join(iter(lambda: ours.recv(4096), b""))
        crcli.restore(report["image"])
        log = tmp_path / "logs" / f"{report['image']}.log"
        last = int(rest.split()[-1])
        wait_until(lambda: log.exists() and f"\n{last + 40}\n" in log.read_text(), "nothing is logged")
        assert log.read_text().startswith(f"{last + 1}\n{last + 2}\n")


def test_stdio_null_throws_output_away(crcli: Crcli, tmp_path: Path) -> None:
    """With --stdio null no log is made, and the program runs on."""
    with spawn_python(counter(), stdout=subprocess.PIPE) as program:
        assert program.process.stdout is not None
        program.process.stdout.readline()
        report = crcli.dump(program.pid)
        program.process.stdout.close()
        host_pid = crcli.restore(report["image"], "--stdio", "null")["host_pid"]
        written = io_of(host_pid)
        wait_until(lambda: io_of(host_pid) > written + 100, "it does not write any more")
        assert not list(tmp_path.glob("logs/*@*"))


def test_a_log_that_cannot_be_made_is_named(crcli: Crcli, tmp_path: Path) -> None:
    """Where output has nowhere to go nothing is restored, and the error says what can be done."""
    with spawn_python(counter(), stdout=subprocess.PIPE) as program:
        assert program.process.stdout is not None
        program.process.stdout.readline()
        image = crcli.dump(program.pid)["image"]
        program.process.stdout.close()
        shutil.rmtree(tmp_path / "logs", ignore_errors=True)
        (tmp_path / "logs").write_text("in the way")
        error = crcli.restore(image, code=21)["error"]
        assert str(tmp_path / "logs") in error["message"]
        assert "CRCLI_LOG_DIR" in error["hint"] and "--stdio null" in error["hint"]
        crcli.restore(image, "--stdio", "null")


def io_of(pid: int) -> int:
    """Return how many bytes a process has written, to wherever."""
    return int(psutil.Process(pid).io_counters().write_chars)


def test_stdio_inherit_joins_a_program_to_our_pipe(crcli: Crcli) -> None:
    """With --wait --stdio inherit the restored program writes into the pipe of the restore."""
    with spawn_python(counter(), stdout=subprocess.PIPE) as program:
        assert program.process.stdout is not None
        program.process.stdout.readline()
        image = crcli.dump(program.pid)["image"]
        program.process.stdout.close()
        with crcli.start("restore", image, "--store", crcli.store, "--wait", "--stdio", "inherit") as restore:
            assert restore.stdout is not None
            words = restore.stdout.readline().split()
            restore.terminate()
            restore.communicate(timeout=COMMAND_LIMIT_SECONDS)
        assert words[0].isdigit() and len(words[1]) == 16


def test_a_program_reads_on_where_it_was(crcli: Crcli, tmp_path: Path) -> None:
    """A file that is only read is not in the image, and is read on at the same place."""
    path = tmp_path / "lines"
    path.write_text("".join(f"{number:06}\n" for number in range(1000)))
    setup = f"""
file = open({str(path)!r}, "rb", buffering=0)
def state():
    return int(file.read(7))
"""
    with spawn_python(asked(setup)) as program:
        assert state(program, program.pid) == "0"
        report = crcli.move(program.pid)
        assert state(program, report["host_pid"]) == "1"


def test_a_missing_file_is_named_before_anything_starts(crcli: Crcli, tmp_path: Path) -> None:
    """A file that is not in the image and not here is a finding of the guard, not a riddle of CRIU's."""
    path = tmp_path / "lines"
    path.write_text("text")
    with spawn_python(asked(f"file = open({str(path)!r})\nstate = lambda: file.read()")) as program:
        image = crcli.dump(program.pid)["image"]
        path.unlink()
        error = crcli.restore(image, code=20)["error"]
        assert error["findings"][0]["evidence"] == {"path": str(path)}
        assert not psutil.pid_exists(program.pid)
        path.write_text("text")
        report = crcli.restore(image)
        assert state(program, report["host_pid"]) == "text"


def test_memory_stays_intact_while_files_travel(crcli: Crcli) -> None:
    """A counter that is moved twice in a row has lost nothing."""
    with spawn_python(counter()) as program:
        crcli.move(program.pid)
        crcli.move(program.pid)
        assert_goes_on(program)
        assert counted(program)
