"""`dump --pre-copy`: what is copied while the tree runs is what the image has, whatever the tree did since.

Most of this needs a kernel that tracks writes. Where this host's does not, `tests/nodes` runs these tests in
a virtual machine with one that does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from crcli.memory.pagemap import tracks_writes
from crcli.pipeline.rates import BUILT_IN, VERSION
from crcli.process.tree import child_pids
from tests.support.crcli import Crcli, assert_goes_on, counter, end, launched, tree_of, wait_until
from tests.support.faults import Attempt, Victim, state_of, victim
from tests.support.programs import Program

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root")
tracking = pytest.mark.skipif(not tracks_writes(), reason="this kernel does not track writes")
not_tracking = pytest.mark.skipif(tracks_writes(), reason="this kernel tracks writes")
pytestmark = [needs_root, pytest.mark.timeout(600)]

MIB = 1 << 20

AT_WORK = """
    import hashlib, mmap, os, random, signal, time
    state = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    megabyte = random.Random(5).randbytes(1 << 20)
    for at in range(64):
        state[at << 20 : (at + 1) << 20] = at.to_bytes(16, "big") + megabyte[16:]
    def tell(*_):
        print(f"hash={hashlib.blake2b(state[64 << 12:], digest_size=8).hexdigest()}")
    signal.signal(signal.SIGUSR1, tell)
    tell()
    print("ready")
    number = 0
    while True:
        number += 1
        for page in range(64):
            state[page << 12 : (page << 12) + 8] = number.to_bytes(8, "big")
        print(f"number={number} {len({state[page << 12 : (page << 12) + 8] for page in range(64)})}")
        time.sleep(0.01)
    """
"""64 MiB of state, the first 64 pages of which are written to all the time, all with one number."""

RESTLESS = """
    import ctypes, hashlib, mmap, os, signal, struct, sys, time
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    for call in (libc.munmap, libc.madvise, libc.mprotect):
        call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    SIZE = HUGE = 2 << 20  # a page table, or a huge page
    READ, WRITE, FIXED, PRIVATE, ANONYMOUS, NO_RESERVE = 1, 2, 0x10, 2, 0x20, 0x4000
    DONTNEED, HUGEPAGE, NOHUGEPAGE, MAYMOVE, MOVE_FIXED = 4, 14, 15, 1, 2

    # One stretch of addresses at borders of 2 MiB; the regions lie in it with gaps between them.
    base = libc.mmap(None, 256 << 20, 0, PRIVATE | ANONYMOUS | NO_RESERVE, -1, 0)
    places = iter(range((base + HUGE - 1) // HUGE * HUGE, base + (250 << 20), SIZE + HUGE))

    def region(number, advice, at=0):
        at = at or next(places)
        libc.mmap(at, SIZE, READ | WRITE, PRIVATE | ANONYMOUS | FIXED, -1, 0)
        libc.madvise(at, SIZE, advice)
        for page in range(0, SIZE, 4096):
            ctypes.memmove(at + page, struct.pack("<QQ", number, page) * 256, 4096)
        return at

    def write(at, number):
        ctypes.memmove(at, struct.pack("<Q", number) * 512, 4096)

    class Group:
        def __init__(self, number):
            self.number = number * 100
            kinds = "moved target fresh dropped holes replaced hidden readonly written shared still".split()
            self.at = {}
            for index, kind in enumerate(kinds):
                advice = HUGEPAGE if kind in ("dropped", "written") else NOHUGEPAGE
                self.at[kind] = region(self.number + index, advice)

        def disturb(self):
            at, number = self.at, self.number + 50
            libc.munmap(at["target"], SIZE, 0)
            libc.mremap(at.pop("moved"), SIZE, SIZE, MAYMOVE | MOVE_FIXED, at["target"])
            place = next(places)
            libc.munmap(place, SIZE, 0)
            libc.mremap(at["fresh"], SIZE, SIZE, MAYMOVE | MOVE_FIXED, place)
            at["fresh"] = place
            libc.madvise(at["dropped"], SIZE, DONTNEED)
            ctypes.string_at(at["dropped"] + HUGE // 2, 8)
            libc.madvise(at["holes"] + HUGE // 4, HUGE // 4, DONTNEED)
            write(at["holes"] + HUGE // 4, number)
            ctypes.string_at(at["holes"] + HUGE // 4 + 8192, 8)
            libc.munmap(at["replaced"], SIZE, 0)
            libc.mmap(at["replaced"], SIZE, READ | WRITE, PRIVATE | ANONYMOUS | FIXED, -1, 0)
            write(at["replaced"] + 12288, number)
            write(at["hidden"] + 4096, number)
            libc.mprotect(at["hidden"], SIZE, 0)
            write(at["readonly"] + 8192, number)
            libc.mprotect(at["readonly"], SIZE, READ)
            for page in range(0, SIZE, 16 * 4096):
                write(at["written"] + page, number)
            if os.fork() == 0:
                write(at["shared"] + 16384, number + 1)
                print(f"child={os.getpid()}")
                while True:
                    time.sleep(0.02)  # not pause: a signal may come before it is restarted
            write(at["shared"] + 20480, number + 2)

    groups = [Group(1), Group(2)]
    memory = open("/proc/self/mem", "rb", 0)
    def tell(*_):
        digest = hashlib.blake2b(digest_size=8)
        with open("/proc/self/mem", "rb", 0) as memory:
            for group in groups:
                for kind, at in group.at.items():
                    memory.seek(at)
                    digest.update(kind.encode() + memory.read(SIZE))
        print(f"hash {os.getpid()} {digest.hexdigest()}")

    # A page that was written to, and is not dirty any more: a round has passed.
    pagemap = open("/proc/self/pagemap", "rb", 0)
    sentinel = libc.mmap(None, 4096, READ | WRITE, PRIVATE | ANONYMOUS, -1, 0)
    def is_dirty():
        pagemap.seek(sentinel // 4096 * 8)
        return struct.unpack("<Q", pagemap.read(8))[0] >> 55 & 1

    signal.signal(signal.SIGUSR1, tell)
    write(sentinel, 1)
    print("ready")
    for number, group in enumerate(groups):
        while is_dirty():
            time.sleep(0.001)
        group.disturb()
        write(sentinel, 2 + number)
        print(f"disturbed={number}")
    while True:
        time.sleep(0.02)  # not pause: a signal may come before it is restarted
    """
"""Regions of memory that are moved, dropped, replaced, hidden, forked and written to, half of them after each
of the first two rounds, which it notices by itself."""


ASLEEP = """
    import hashlib, itertools, random, signal, time
    class Awake(Exception): pass
    def wake(*_): raise Awake
    memory = random.Random(3).randbytes(4 << 20)
    signal.signal(signal.SIGUSR1, wake)
    print('ready')
    for number in itertools.count():
        print(number, hashlib.blake2b(memory, digest_size=8).hexdigest())
        try:
            time.sleep(0.01 if number else 9999)
        except Awake:
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    """
"""A counter that sleeps after its first number, until it is woken."""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """A program with 64 MiB of state, at work."""
    with python(AT_WORK, tmp_path) as found:
        yield found


def python(code: str, folder: Path):  # type: ignore[no-untyped-def]
    """Run Python code as a service until the block ends; it has said that it is ready."""
    import textwrap
    from contextlib import contextmanager

    @contextmanager
    def running() -> Iterator[Program]:
        with launched([sys.executable, "-u", "-c", textwrap.dedent(code)], folder) as program:
            program.wait_for("ready")
            yield program

    return running()


def assert_works_on(program: Program) -> None:
    """Assert that it goes on with its counter, none left out, and has the state that it began with."""
    words = [line.split() for line in program.output.splitlines() if line.startswith("number=")]
    begun = len(words)
    wait_until(lambda: program.output.count("number=") > begun + 3, "it stands still")
    lines = [line for line in program.output.splitlines()[:-1] if line.startswith("number=")]
    assert lines == [f"number={number + 1} 1" for number in range(len(lines))]


def copying_takes(milliseconds: float, folder: Path) -> None:
    """Have commands believe that it takes so long to copy a MiB."""
    step = {"rates": BUILT_IN["take"] | {"mib": milliseconds}, "seen": 9, "at": time.time()}
    (folder / "rates.json").write_text(json.dumps({"version": VERSION, "steps": {"take": step}}))


def hash_after_a_signal(program: Program, pid: int) -> str:
    """The hash of its memory that a program tells when asked."""
    before = program.output.count("hash=")
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: program.output.count("hash=") > before, "it does not answer")
    return program.value_of("hash")


@not_tracking
def test_a_number_of_rounds_is_refused_where_writes_are_not_tracked(crcli: Crcli, tmp_path: Path) -> None:
    """Exit 40, with the reason, and the tree was not touched; `auto` dumps without rounds, and says so."""
    with launched([sys.executable, "-u", "-c", counter()], tmp_path) as program:
        program.wait_for("ready")
        error = crcli.dump(program.pid, "--pre-copy", "2", code=40)["error"]
        assert error["state"] == "untouched" and "CONFIG_MEM_SOFT_DIRTY" in error["message"]
        assert not (tmp_path / "store").exists()
        report = crcli.dump(program.pid, "--pre-copy", "auto")
        assert "pre-copy-left-out" in [finding["name"] for finding in report["findings"]]
        assert report["rounds"] == [] and report["pre_copied_bytes"] == 0
        crcli.restore(report["image"])
        assert_goes_on(program)


@tracking
def test_the_last_round_carries_little(crcli: Crcli, program: Program) -> None:
    """Of 64 MiB of state, of which little changes, two rounds leave little for the freeze; all comes back."""
    report = crcli.dump(program.pid, "--pre-copy", "2")
    first, second = report["rounds"]
    assert first["bytes"] > 64 * MIB
    assert second["bytes"] < first["bytes"] / 8
    assert report["memory_bytes"] > 64 * MIB
    assert report["pre_copied_bytes"] == first["bytes"] + second["bytes"]
    sent_frozen = report["memory_bytes"] - (report["pre_copied_bytes"] - report["wasted_bytes"])
    assert sent_frozen < first["bytes"] / 8
    assert 0 < report["wasted_bytes"] < first["bytes"] / 8
    print(
        "figures", json.dumps({k: report[k] for k in ("rounds", "wasted_bytes", "frozen_ms", "memory_bytes")})
    )
    restored = crcli.restore(report["image"])
    assert_works_on(program)
    assert hash_after_a_signal(program, restored["host_pid"])
    assert len({line for line in program.output.splitlines() if line.startswith("hash=")}) == 1


@tracking
def test_auto_makes_as_many_rounds_as_pay(crcli: Crcli, program: Program, tmp_path: Path) -> None:
    """Where copying all would take long, `auto` makes rounds until little is left; where not, none.

    What such a tree leaves running is dumped again with rounds, from its new beginning.
    """
    copying_takes(5.0, tmp_path)
    report = crcli.dump(program.pid, "--pre-copy", "auto", "--leave-running")
    assert 1 <= len(report["rounds"]) <= 3
    assert report["forecast"]["frozen_ms"] < 5.0 * 64
    copying_takes(0.001, tmp_path)
    assert crcli.dump(program.pid, "--pre-copy", "auto", "--leave-running")["rounds"] == []
    final = crcli.dump(program.pid, "--pre-copy", "1")
    assert final["rounds"][0]["bytes"] > 64 * MIB
    assert final["stored_bytes"] < 16 * MIB
    restored = crcli.restore(final["image"])
    assert_works_on(program)
    hash_after_a_signal(program, restored["host_pid"])
    assert len({line for line in program.output.splitlines() if line.startswith("hash=")}) == 1


@tracking
def test_nothing_changed_between_rounds(crcli: Crcli, tmp_path: Path) -> None:
    """A tree that sleeps all the while has next to nothing left to send, and comes back whole."""
    with python(ASLEEP, tmp_path) as program:
        report = crcli.dump(program.pid, "--pre-copy", "3")
        assert max(one["bytes"] for one in report["rounds"][1:]) < MIB
        assert report["memory_bytes"] - (report["pre_copied_bytes"] - report["wasted_bytes"]) < MIB
        restored = crcli.restore(report["image"])
        os.kill(restored["host_pid"], signal.SIGUSR1)
        assert_goes_on(program)


@tracking
@pytest.mark.parametrize("huge", ["never", "always"])
def test_whatever_memory_does_between_rounds_it_is_what_it_was(
    huge: str, crcli: Crcli, tmp_path: Path
) -> None:
    """Moved, dropped, replaced, hidden, forked, written to between rounds: each page is what it was when the
    tree stopped, as the stopped original and the restored copy tell."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    before = setting.read_text().partition("[")[2].partition("]")[0]
    setting.write_text(huge)
    try:
        with python(RESTLESS, tmp_path) as program:
            report = crcli.dump(program.pid, "--pre-copy", "2", "--leave-stopped")
            originals = tree_of(program.pid)
            assert "disturbed=1" in program.output, "it was too slow to be disturbed between the rounds"
            assert len(originals) == 3
            was = hashes(program, originals)
            end(originals)
            copies = tree_of(crcli.restore(report["image"])["host_pid"])
            assert sorted(one.pid for one in copies) == sorted(one.pid for one in originals)
            assert hashes(program, copies) == was
    finally:
        setting.write_text(before)


def hashes(program: Program, tree: list[psutil.Process]) -> dict[int, str]:
    """What each process of a tree, stopped or not, says that its memory is: its hash, by pid."""
    known = len(program.output.splitlines())
    for process in tree:
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGCONT)

    def told() -> dict[int, str]:
        lines = [line.split() for line in program.output.splitlines()[known:]]
        return {int(words[1]): words[2] for words in lines if len(words) == 3 and words[0] == "hash"}

    wait_until(lambda: len(told()) == len(tree), f"not all answer:\n{program.output}")
    return told()


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Victim]:
    """A tree in which everything moves."""
    with victim(tmp_path / "victim", megabytes=2) as found:
        yield found


def in_a_round(attempt: Attempt) -> bool:
    """Whether CRIU is at work on a round: it does that in a child of its own."""
    return bool(attempt.criu()) and bool(child_pids(attempt.criu()))


def begin(tree: Victim, folder: Path, *options: str) -> Attempt:
    """Start a dump with rounds."""
    store = f"file://{folder}/store"
    return Attempt(folder, ("dump", str(tree.pid), "--name", "tree", "--store", store, *options))


@tracking
@pytest.mark.parametrize(("number", "later_s"), [(signal.SIGKILL, 0.0), (signal.SIGTERM, 0.3)])
def test_crcli_ended_in_a_round_leaves_the_tree_running(
    number: int, later_s: float, tree: Victim, tmp_path: Path
) -> None:
    """The tree goes on, every part of it, and looks as it did; a dump with rounds then works."""
    before = tree.look()
    attempt = begin(tree, tmp_path, "--pre-copy", "9")
    assert attempt.wait_for(lambda: in_a_round(attempt))
    time.sleep(later_s)
    attempt.send(number)
    attempt.end()
    assert attempt.code == -number if number == signal.SIGKILL else attempt.code in (11, 143), (
        attempt.describe()
    )
    tree.assert_runs_as(before)
    attempt.assert_nothing_left()
    again = begin(tree, tmp_path, "--pre-copy", "1")
    again.end()
    assert again.code == 0 and not tree.remains(), again.describe()
    tree.reap()
    back = Attempt(tmp_path, ("restore", "tree", "--store", f"file://{tmp_path}/store"))
    back.end(but=tree)
    tree.pid = back.json["host_pid"]
    tree.assert_goes_on()


@tracking
@pytest.mark.parametrize("wish", ["auto", "3"])
def test_criu_killed_in_a_round(wish: str, tree: Victim, tmp_path: Path) -> None:
    """`auto` goes on without rounds; a number of rounds fails, exit 11, with the tree running."""
    before = tree.look()
    copying_takes(50.0, tmp_path)
    attempt = begin(tree, tmp_path, "--pre-copy", wish, "--leave-running")
    assert attempt.wait_for(lambda: in_a_round(attempt))
    attempt.wait_for(lambda: state_of(tree.pid) != "t", 5)
    criu = attempt.criu()
    assert criu, "there is no CRIU, and 0 would be all of us"
    for pid in (*child_pids(criu), criu):
        os.kill(pid, signal.SIGKILL)
    attempt.end()
    tree.assert_runs_as(before, parasite=True)
    if wish == "auto":
        assert attempt.code == 0, attempt.describe()
        assert "pre-copy-left-out" in [finding["name"] for finding in attempt.json["findings"]]
    else:
        assert attempt.code == 11 and attempt.json["error"]["state"] == "running", attempt.describe()
