"""A tree that was dumped, killed and restored goes on as if nothing had happened; its memory is described."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from crcli.memory.userfault import is_available
from tests.support.crcli import (
    COMMAND_LIMIT_SECONDS,
    ROOT,
    Crcli,
    assert_goes_on,
    counter,
    tree_of,
    wait_until,
)
from tests.support.programs import Program, spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

PIPELINE = """
    import itertools, os, time
    reads, writes = os.pipe()
    if os.fork() == 0:
        os.close(writes)
        lines = os.fdopen(reads)
        if (child := os.fork()) == 0:
            for line in lines:
                print(int(line) * 2)
        os.waitpid(child, 0)
    os.close(reads)
    print('ready')
    for number in itertools.count():
        os.write(writes, b'%d\\n' % number)
        time.sleep(0.01)
    """

THREADS = """
    import itertools, threading, time
    turn, numbers = threading.Condition(), itertools.count()
    whose = -1
    local = threading.local()

    def work(me):
        global whose
        local.turns = 0
        while True:
            with turn:
                turn.wait_for(lambda: whose == me)
                local.turns += 1
                print(f"{me}:{local.turns}")
                whose = (me + 1) % 5
                turn.notify_all()
            time.sleep(0.002)

    for me in range(5):
        threading.Thread(target=work, args=(me,)).start()
    print('ready')
    with turn:
        whose = 0
        turn.notify_all()
    """

SHARED_SINCE_THE_FORK = """
    import mmap, os, random, time
    megabyte = random.Random(5).randbytes(1 << 20)
    private = mmap.mmap(-1, 24 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    common = mmap.mmap(-1, 1 << 20)
    for at in range(24):
        private[at << 20 : (at + 1) << 20] = bytes([at]) * 16 + megabyte[16:]
    for child in range(2):
        if os.fork() == 0:
            private[:4096] = bytes([child]) * 4096
            break
    else:
        print('ready')
        child = 9
    while True:
        time.sleep(0.01)
        common[child] = (common[child] + 1) % 256
        if child == 9 and common[0] and common[1]:
            print(f"turns={common[0]},{common[1]}")
    """

FAMILY = """
    import ctypes, hashlib, mmap, os, random, tempfile, time
    libc = ctypes.CDLL(None)
    source = random.Random(6)
    ours = mmap.mmap(-1, 2000 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    ours[:] = source.randbytes(len(ours))
    file = tempfile.TemporaryFile()
    file.write(source.randbytes(60 << 12))
    file.flush()
    of_file = mmap.mmap(file.fileno(), 60 << 12, flags=mmap.MAP_PRIVATE)
    of_file[: 50 << 12] = of_file[: 50 << 12]
    parts = [slice(0, 2000 << 12)]
    def write(every, memory):
        for page in range(0, len(memory) >> 12, every):
            memory[page << 12 : (page + 1) << 12] = source.randbytes(4096)
    def at(page):
        return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(ours)) + (page << 12))
    name = "root"
    if not os.fork():
        name = "changed"
        write(7, ours)
        write(9, of_file)
        libc.madvise(at(100), 100 << 12, 4)
        libc.munmap(at(500), 50 << 12)
        libc.mprotect(at(600), 200 << 12, 1)
        parts = [slice(0, 500 << 12), slice(550 << 12, 2000 << 12)]
    elif not os.fork():
        name = "parent"
        write(5, ours)
        if not os.fork():
            name = "grandchild"
            write(11, ours)
            write(3, of_file)
    elif not os.fork():
        name = "same"
    else:
        write(13, ours)
        print("ready")
    while True:
        digest = hashlib.blake2b()  # without a copy: what memory the family uses is compared
        for piece in (*(memoryview(ours)[part] for part in parts), memoryview(of_file)):
            digest.update(piece)
        os.write(1, f"{name}={digest.hexdigest()}\\n".encode())  # print may write the end of a line by itself
        time.sleep(0.05)
    """

PAGES = """
    import mmap, os, random, signal, time
    from hashlib import blake2b
    source = random.Random({seed})
    memory = mmap.mmap(-1, {megabytes} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages = len(memory) >> 12
    for at in range(0, len(memory), 1 << 20):
        memory[at : at + (1 << 20)] = source.randbytes(1 << 20)

    def change(number, frame):
        for page in random.sample(range(pages), pages // 100):
            memory[page << 12 : (page + 1) << 12] = os.urandom(4096)
        print('changed')

    signal.signal(signal.SIGUSR1, change)
    signal.signal(signal.SIGUSR2, lambda *_: print('hash=' + blake2b(memory).hexdigest()))
    print('ready')
    while True: time.sleep(60)
    """


UNABLE_TO_RESTORE = """
    import socket
    everybody = socket.socket(type=socket.SOCK_DGRAM)
    everybody.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    everybody.connect(("255.255.255.255", 9))  # CRIU connects before it allows that
    """

WAITS = """
    import ctypes, os, threading, time
    libc = ctypes.CDLL(None, use_errno=True)
    reads, writes = os.pipe()
    three_seconds, left = (ctypes.c_long * 2)(3, 0), (ctypes.c_long * 2)()
    futex = ctypes.c_int(5)
    waiting = (ctypes.c_int * 2)(reads, 1)
    calls = {{
        "poll": lambda: libc.poll(waiting, 1, -1),
        "nanosleep": lambda: libc.nanosleep(three_seconds, left),
        "clock_nanosleep": lambda: libc.clock_nanosleep(1, 0, three_seconds, left),
        "futex": lambda: libc.syscall(202, ctypes.byref(futex), 0, 5, three_seconds, None, 0),
    }}
    def wait(name):
        result = calls[name]()
        why = os.strerror(ctypes.get_errno()) if result == -1 else ""
        os.write(1, f"{{name}}={{result}} {{why}}\\n".encode())  # in one piece: they end together
    for name in calls:
        threading.Thread(target=wait, args=(name,)).start()
    time.sleep(0.2)
    print("ready")
    while not os.path.exists({path!r}):
        time.sleep(0.02)
    os.write(writes, b"x")
    """


needs_arguments = pytest.mark.skipif(
    os.uname().machine != "x86_64", reason="elsewhere CRIU does not store the call's arguments"
)


@needs_arguments
@pytest.mark.parametrize("way", ["restored", "left running", "left running again", "refused by the trial"])
def test_no_wait_is_interrupted(crcli: Crcli, tmp_path: Path, way: str) -> None:
    """poll, nanosleep and futex end as they would have, not with EINTR, of which `tail -f` dies."""
    code = WAITS.format(path=str(tmp_path / "go"))
    if way == "refused by the trial":
        code = UNABLE_TO_RESTORE + code
    with spawn_python(code) as program:
        if way == "restored":
            crcli.move(program.pid)
        elif way == "left running":
            crcli.dump(program.pid, "--leave-running")
        elif way == "left running again":  # CRIU works inside its namespace
            crcli.dump(crcli.move(program.pid, "--pid-namespace", "new")["host_pid"], "--leave-running")
        else:
            crcli.dump(program.pid, code=11)
        (tmp_path / "go").touch()
        wait_until(lambda: program.output.count("=") == 4, "they do not end:\n" + program.output)
        assert program.value_of("poll").split() == ["1"]
        assert program.value_of("nanosleep").split() == program.value_of("clock_nanosleep").split() == ["0"]
        assert program.value_of("futex") == f"-1 {os.strerror(errno.ETIMEDOUT)}"


@needs_arguments
def test_a_time_limit_ends_however_often_a_tree_is_dumped(crcli: Crcli) -> None:
    """A wait of some seconds is over some time though images are taken more often than that."""
    code = """
        import ctypes, os, time
        libc = ctypes.CDLL(None, use_errno=True)
        waiting = (ctypes.c_int * 2)(os.pipe()[0], 1)
        print("ready")
        print(f"poll={libc.poll(waiting, 1, 9000)}")
        time.sleep(600)
        """
    with spawn_python(code) as program:
        end = time.monotonic() + 40
        while "poll=" not in program.output and time.monotonic() < end:
            crcli.dump(program.pid, "--leave-running")
        assert program.value_of("poll") == "0"


MEMORY_OF_MANY_KINDS = """
    import ctypes, hashlib, mmap, os, random, tempfile, time
    libc = ctypes.CDLL(None)
    source = random.Random(3)
    def mapped(pages, fd=-1, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        memory = mmap.mmap(fd, pages << 12, flags=flags)
        return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))
    def protect(address, pages, how):
        assert libc.mprotect(ctypes.c_void_p(address), pages << 12, how) == 0
    scattered, at = mapped(600)
    for page in range(0, 600, 7):
        scattered[page << 12 : (page + 1) << 12] = source.randbytes(4096)
    for page in range(1, 600, 50):
        scattered[page << 12 : (page + 1) << 12] = bytes(4096)
    protect(at + (100 << 12), 100, 1)
    protect(at + (300 << 12), 1, 1)
    dense, at = mapped(3000)
    dense[:] = source.randbytes(3000 << 12)
    protect(at + (1000 << 12), 1, 1)
    libc.madvise(ctypes.c_void_p(at + (2000 << 12)), 100 << 12, 4)
    huge, at = mapped(2048)
    libc.madvise(ctypes.c_void_p(at), 2048 << 12, 14)
    huge[:] = source.randbytes(2048 << 12)
    file = tempfile.TemporaryFile()
    file.write(source.randbytes(50 << 12))
    file.flush()
    of_file, _ = mapped(50, file.fileno(), mmap.MAP_PRIVATE)
    of_file[:] = of_file[:]
    of_file[5000:9000] = bytes(4000)
    shared, _ = mapped(50, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    shared[:100] = source.randbytes(100)
    everything = (scattered, dense, huge, of_file, shared)
    print("ready")
    while True:
        print("hash=" + hashlib.blake2b(b"".join(memory[:] for memory in everything)).hexdigest(), flush=True)
        time.sleep(0.05)
        dense[0] = dense[0]
    """

HANDED_OVER = """
import pathlib, sys
from crcli.main import main
from crcli.pipeline import handover, refill
refill.FILL_IN_PAGES = 0  # in whatever pieces its memory is just then
take = handover.Handover.take
def taken(self):
    pathlib.Path({path!r}).touch()
    return take(self)
handover.Handover.take = taken
sys.exit(main())
"""


def lines(program: Program) -> list[str]:
    """Return the whole lines that a program has printed after it was ready."""
    return program.output.rpartition("\n")[0].partition("ready\n")[2].splitlines()


def proportional_bytes(pid: int) -> int:
    """Return what a tree has of memory of its own, each page divided among those that share it. Files are
    left out: those of Python's are shared with whatever else runs here just then."""
    found = 0
    for process in tree_of(pid):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        found += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss_Anon:"))
    return found


def test_a_counter_goes_on_with_its_memory_intact(crcli: Crcli) -> None:
    """No number is left out or repeated, and the hash of the memory stays the same."""
    with spawn_python(counter()) as program:
        report = crcli.move(program.pid)
        assert report["pid"] == program.pid
        assert_goes_on(program)


def test_a_dumped_tree_is_gone_and_its_image_whole(crcli: Crcli) -> None:
    """After a dump nothing of the tree runs, `ls` shows its image, `verify` reads it back."""
    with spawn_python(counter()) as program:
        report = crcli.dump(program.pid, "--name", "agent")
        assert report["outcome"] == "killed" and report["image"] == f"agent@{report['id']}"
        assert report["memory_bytes"] > report["stored_bytes"] > 512 << 10
        assert not psutil.pid_exists(program.pid)
        assert report["id"] in crcli.run("ls", "--store", crcli.store, "--json").out
        crcli.run("verify", "agent", "--store", crcli.store)


def test_children_and_the_pipe_between_them_live_on(crcli: Crcli) -> None:
    """What is under way in a pipe of a tree of three arrives once, in order."""
    with spawn_python(PIPELINE) as program:
        wait_until(lambda: len(lines(program)) > 20, "the pipeline stands still")
        assert crcli.move(program.pid)["processes"] == 3
        before = len(lines(program))
        wait_until(lambda: len(lines(program)) > before + 20, "the pipeline stands still after the restore")
        assert [int(line) for line in lines(program)] == [2 * n for n in range(len(lines(program)))]


def test_threads_keep_their_turns_and_locals(crcli: Crcli) -> None:
    """Five threads that take turns by a condition go on in the same order, each with its own count."""
    with spawn_python(THREADS) as program:
        wait_until(lambda: len(lines(program)) > 50, "the threads stand still")
        crcli.move(program.pid)
        before = len(lines(program))
        wait_until(lambda: len(lines(program)) > before + 50, "the threads stand still after the restore")
        printed = lines(program)
        assert printed == [f"{n % 5}:{n // 5 + 1}" for n in range(len(printed))]


FORKS = """
    import mmap, os, time
    for _ in range(3):
        if os.fork() == 0:
            own = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
            time.sleep(600)
    """


def test_more_pages_than_the_trial_is_given(crcli: Crcli) -> None:
    """Of many processes with much memory of their own in mapped files the trial has but the most needed: a
    process without any page made CRIU crash, so that such a tree could not be dumped (torch.compile's)."""
    code = f"""
from unittest.mock import patch
from crcli.pipeline.dump import dump
from crcli.pipeline.stages import DumpOptions
with patch("crcli.memory.intake._KEEP_PAGES", 40):
    print(dump(DumpOptions(pid=int(sys.argv[1]), store={crcli.store!r}, name="many")).image)
"""
    with spawn_python(textwrap.dedent(FORKS) + counter()) as program:
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{code}", str(program.pid)],
            cwd=ROOT,
            env=crcli.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        crcli.restore(done.stdout.strip())
        assert_goes_on(program)


def test_memory_shared_since_a_fork_stays_shared(crcli: Crcli) -> None:
    """A restored family uses no more memory than before, and still sees each other's writes."""
    with spawn_python(SHARED_SINCE_THE_FORK) as program:
        wait_until(lambda: "turns=" in program.output, "the family stands still")
        before = proportional_bytes(program.pid)
        assert before < 3 * (24 << 20)
        report = crcli.move(program.pid)
        after = proportional_bytes(report["host_pid"])
        assert after < before * 1.1, f"{before >> 10} KiB before, {after >> 10} KiB after"
        turns = program.value_of("turns")
        wait_until(lambda: program.value_of("turns") != turns, "the family stands still after the restore")


@pytest.mark.parametrize("way", ["--eager", "--lazy"])
def test_generations_that_went_their_ways_have_each_its_memory(crcli: Crcli, way: str) -> None:
    """Pages changed, dropped, unmapped and protected since the forks are what they were; the others are
    shared still, among children and grandchildren."""
    if way == "--lazy" and not is_available():
        pytest.skip("needs userfaultfd")
    names = ("root", "changed", "parent", "grandchild", "same")
    with spawn_python(FAMILY) as program:
        wait_until(lambda: all(f"{name}=" in program.output for name in names), "it does not begin")
        expected = {name: program.value_of(name) for name in names}
        before = proportional_bytes(program.pid)
        report = crcli.restore(crcli.dump(program.pid)["image"], way)
        seen = len(lines(program))
        wait_until(
            lambda: all(sum(f"{name}=" in line for line in lines(program)[seen:]) > 1 for name in names),
            "the family stands still",
        )
        assert set(lines(program)) == {f"{name}={digest}" for name, digest in expected.items()}
        after = proportional_bytes(report["host_pid"])
        # A quarter more is CRIU's: what a parent has changed since, its children no longer share with each
        # other. With nothing shared it would be 3.6 times as much.
        assert after < before * 1.3, f"{before >> 10} KiB before, {after >> 10} KiB after"


@pytest.mark.skipif(not is_available(), reason="needs userfaultfd")
def test_memory_that_is_filled_in_is_what_it_was(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process gets its memory through userfaultfd before it runs, and can be dumped and restored again."""
    with spawn_python(MEMORY_OF_MANY_KINDS, "ready") as program:
        wait_until(lambda: "hash=" in program.output, "it does not begin")
        expected = program.value_of("hash")
        for pays in ("0", "0", str(1 << 60)):
            marker = tmp_path / "handed-over"
            monkeypatch.setenv("CRCLI_FILL_IN_BYTES", pays)
            image = crcli.dump(program.pid)["image"]
            command = ("restore", image, "--store", crcli.store, "--json")
            done = subprocess.run(
                [sys.executable, "-c", HANDED_OVER.format(path=str(marker)), *command],
                cwd=ROOT,
                env=crcli.environment,
                capture_output=True,
                text=True,
                timeout=COMMAND_LIMIT_SECONDS,
            )
            assert done.returncode == 0, done.stdout
            crcli.adopt(json.loads(done.stdout)["host_pid"])
            assert marker.exists() == (pays == "0")
            marker.unlink(missing_ok=True)
            count = program.output.count("hash=")
            wait_until(lambda more=count + 2: program.output.count("hash=") > more, "it stands still")
            assert {line for line in lines(program) if line.startswith("hash=")} == {f"hash={expected}"}


def test_a_second_dump_stores_only_what_changed(crcli: Crcli) -> None:
    """With 1 % of the pages changed, scattered, the second dump stores at most 2 %."""
    with spawn_python(PAGES.format(seed=7, megabytes=64)) as program:
        first = crcli.dump(program.pid, "--name", "agent", "--leave-running")
        assert first["stored_bytes"] > 64 << 20
        os.kill(program.pid, signal.SIGUSR1)
        program.wait_for("changed")
        second = crcli.dump(program.pid, "--name", "agent", "--leave-running")
        assert second["reused_bytes"] > 0.98 * first["memory_bytes"] - first["zero_bytes"]
        assert second["stored_bytes"] <= 0.02 * first["stored_bytes"]


def test_a_large_tree_is_dumped_again_and_again(crcli: Crcli) -> None:
    """Each dump stores what has changed since the last, of a tree that is hashed by a process of its own, and
    its memory is as it was."""
    with spawn_python(PAGES.format(seed=11, megabytes=160)) as program:
        first = crcli.dump(program.pid, "--name", "agent")
        for generation in range(1, 4):
            crcli.restore("agent")
            os.kill(program.pid, signal.SIGUSR1)
            wait_until(lambda count=generation: program.output.count("changed") == count, "it changes")
            before = memory_hash(program)
            again = crcli.dump(program.pid, "--name", "agent")
            assert again["stored_bytes"] <= 0.02 * first["stored_bytes"]
        crcli.restore("agent")
        assert memory_hash(program) == before


def memory_hash(program: Program) -> str:
    """What a program with PAGES says of its memory."""

    def said() -> list[str]:
        return [line for line in lines(program) if line.startswith("hash=")]

    seen = len(said())
    os.kill(program.pid, signal.SIGUSR2)
    wait_until(lambda: len(said()) > seen, "it hashes its memory")
    return said()[-1]


def test_a_tree_restored_twice_stores_only_what_changed(crcli: Crcli) -> None:
    """Dump, restore, dump: the pages that CRIU put back are those that the store has."""
    with spawn_python(PAGES.format(seed=8, megabytes=32)) as program:
        first = crcli.dump(program.pid, "--name", "agent")
        crcli.restore("agent")
        os.kill(program.pid, signal.SIGUSR1)
        program.wait_for("changed")
        second = crcli.dump(program.pid, "--name", "agent")
        assert second["stored_bytes"] <= 0.025 * first["stored_bytes"]
        crcli.restore("agent")


def test_a_twin_stores_next_to_nothing(crcli: Crcli) -> None:
    """Another process with the same memory, dumped under the same name, stores a few percent."""
    code = PAGES.format(seed=9, megabytes=32)
    with spawn_python(code) as one, spawn_python(code) as other:
        first = crcli.dump(one.pid, "--name", "agent")
        second = crcli.dump(other.pid, "--name", "agent")
        assert first["stored_bytes"] > 32 << 20
        assert second["stored_bytes"] <= 0.1 * first["stored_bytes"]


def test_twins_within_one_tree_are_stored_once(crcli: Crcli) -> None:
    """Two processes of one tree with the same pages, shared or not, take the room of one."""
    with spawn_python(
        f"""
        import os
        child = os.fork()
        exec({textwrap.dedent(PAGES.format(seed=10, megabytes=16))!r})
        """
    ) as program:
        report = crcli.dump(program.pid)
        assert report["memory_bytes"] > 32 << 20
        assert report["stored_bytes"] < 24 << 20


def test_zero_pages_are_never_stored(crcli: Crcli) -> None:
    """Memory that was touched but holds only zeros costs nothing."""
    code = "zeros = bytearray(48 << 20)\nfor at in range(0, len(zeros), 4096): zeros[at] = 0\n" + counter()
    with spawn_python(code) as program:
        report = crcli.dump(program.pid)
        assert report["zero_bytes"] >= 47 << 20
        assert report["stored_bytes"] < 8 << 20
        crcli.restore(report["image"])
        assert_goes_on(program)
