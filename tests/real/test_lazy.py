"""A tree that runs before its memory is here: it never sees a page that is not its own, whatever happens.

The images are in S3 behind a proxy that holds back what is fetched in the background (large ranges), so that
the trees live on what they touch until a test lets the rest through.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from crcli.memory.userfault import is_available
from tests.support.crcli import (
    COMMAND_LIMIT_SECONDS,
    Crcli,
    assert_goes_on,
    counter,
    end,
    tree_of,
    wait_until,
)
from tests.support.faulty_proxy import Exchange, FaultyProxy, answer, pass_on
from tests.support.programs import Program, spawn_python
from tests.support.s3servers import S3Server

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
    pytest.mark.skipif(not is_available(), reason="needs userfaultfd"),
]

MOST_ON_DEMAND = 5 << 19
MEGABYTES = 24

RESTLESS = """
    import ctypes, mmap, os, random, signal, threading, traceback
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = libc.mmap.restype = ctypes.c_void_p
    MB, PAGE = 1 << 20, 4096
    READ, WRITE, PRIVATE, ANONYMOUS, FIXED, MAYMOVE = 1, 2, 2, 32, 16, 1
    def p(address): return ctypes.c_void_p(address)
    def n(number): return ctypes.c_size_t(number)
    def content(number): return random.Random(number).randbytes(MB)
    base = libc.mmap(None, n((MEGABYTES + 4) * MB), READ | WRITE, PRIVATE | ANONYMOUS, -1, n(0))
    for number in range(MEGABYTES):
        ctypes.memmove(base + number * MB, content(number), MB)
    def at(number): return base + number * MB
    def look(address, size=MB): return ctypes.string_at(address, size)
    def done(result): assert result not in (-1, 2**64 - 1), os.strerror(ctypes.get_errno())

    WIPED, KEPT = 22, 23
    done(libc.madvise(p(at(WIPED)), n(4 * PAGE), 18))  # MADV_WIPEONFORK
    done(libc.madvise(p(at(KEPT)), n(MB), 10))  # MADV_DONTFORK

    def forks():
        if os.fork() == 0:
            code = 1
            try:
                ctypes.memset(at(0), 7, PAGE)
                assert look(at(0)) == bytes([7]) * PAGE + content(0)[PAGE:]
                assert look(at(WIPED), 5 * PAGE) == bytes(4 * PAGE) + content(WIPED)[4 * PAGE : 5 * PAGE]
                if os.fork() == 0:
                    os._exit(0 if look(at(1)) == content(1) and look(at(0), 1) == bytes([7]) else 1)
                code = os.waitstatus_to_exitcode(os.wait()[1])
                assert look(at(1)) == content(1)
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, "a child saw something else"
        assert look(at(0)) == content(0), "a child's page is the parent's"
    def moves():
        there = libc.mremap(p(at(2)), n(MB), n(MB), MAYMOVE | 2, p(at(MEGABYTES + 1)))
        done(there)
        grown = libc.mremap(p(there), n(MB), n(2 * MB), MAYMOVE)
        done(grown)
        assert look(grown) == content(2) and look(grown + MB) == bytes(MB)
    def moves_onto_another():
        done(libc.mremap(p(at(4)), n(MB), n(MB), MAYMOVE | 2, p(at(5))))
        assert look(at(5)) == content(4)
    def drops():
        done(libc.madvise(p(at(6) + 8 * PAGE), n(8 * PAGE), 4))
        expected = content(6)[: 8 * PAGE] + bytes(8 * PAGE) + content(6)[16 * PAGE :]
        assert look(at(6)) == expected
    def unmaps():
        done(libc.munmap(p(at(7) + 4 * PAGE), n(4 * PAGE)))
        done(libc.mmap(p(at(7) + 4 * PAGE), n(2 * PAGE), READ | WRITE, PRIVATE | ANONYMOUS | FIXED, -1, n(0)))
        assert look(at(7), 6 * PAGE) == content(7)[: 4 * PAGE] + bytes(2 * PAGE)
        assert look(at(7) + 8 * PAGE, MB - 8 * PAGE) == content(7)[8 * PAGE :]
    def protects():
        done(libc.mprotect(p(at(8) + 3 * PAGE), n(5 * PAGE), READ))
        assert look(at(8)) == content(8)
        done(libc.mprotect(p(at(9)), n(MB), 0))
        done(libc.mprotect(p(at(9)), n(MB), READ))
        assert look(at(9)) == content(9)
    def writes():
        ctypes.memset(at(10) + 100, 3, 50)
        expected = content(10)
        assert look(at(10)) == expected[:100] + bytes([3]) * 50 + expected[150:]
    def is_read_by_many():
        wrong = []
        def read(seed):
            for _ in range(30):
                number = random.Random(seed).randrange(11, MEGABYTES)
                seed += 1
                if look(at(number)) != content(number):
                    wrong.append(number)
        threads = [threading.Thread(target=read, args=(100 * seed,)) for seed in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not wrong, wrong

    def act(number, frame):
        for step in (forks, moves, moves_onto_another, drops, unmaps, protects, writes, is_read_by_many):
            try:
                step()
                print(f"{step.__name__}: right")
            except BaseException:
                traceback.print_exc()
        print("acted")
    def check(number, frame):
        for number in range(11, MEGABYTES):
            assert look(at(number)) == content(number)
        print("whole")
    signal.signal(signal.SIGUSR1, act)
    signal.signal(signal.SIGUSR2, check)
    print("ready")
    while True: signal.pause()
    """


@dataclass
class Far:
    """crcli with a store whose background reads wait for `let_through`, and that can be taken away."""

    crcli: Crcli
    proxy: FaultyProxy
    url: str
    through: threading.Event = field(default_factory=threading.Event)
    down: threading.Event = field(default_factory=threading.Event)
    spoil: threading.Event = field(default_factory=threading.Event)
    """Set: one byte of the next read is changed."""

    def fault(self, exchange: Exchange) -> None:
        """What the proxy does with each read of a pack."""
        begin, _, end = (
            exchange.handler.headers.get("Range", "bytes=0-0").removeprefix("bytes=").partition("-")
        )
        if int(end) - int(begin) >= MOST_ON_DEMAND:
            self.through.wait(60)
        if self.down.is_set():
            answer(503, "SlowDown")(exchange)
        elif self.spoil.is_set():
            self.spoil.clear()
            response, body = exchange.forward(exchange.read_body())
            exchange.answer(response, bytes([body[0] ^ 1]) + body[1:])
        else:
            pass_on(exchange)

    def dump(self, program: Program, *options: str) -> str:
        """Dump a tree, and return its image."""
        done = self.crcli.run("dump", str(program.pid), "--store", self.url, "--json", *options).json
        program.process.wait(10)
        return str(done["image"])

    def restore(self, image: str, *options: str, code: int = 0) -> dict[str, Any]:
        """Restore it lazily."""
        arguments = ("restore", image, "--store", self.url, "--lazy", "--json", *options)
        done = self.crcli.run(*arguments, code=code).json
        if "host_pid" in done:
            self.crcli.adopt(done["host_pid"])
        return done

    def logs(self) -> str:
        """What pagers and keepers have logged."""
        return "".join(path.read_text() for path in (self.crcli.folder / "logs").glob("*-crcli-pager-*"))


@pytest.fixture
def far(tmp_path: Path, moto: S3Server) -> Iterator[Far]:
    """The command, its store behind a proxy, and the end of all that was restored."""
    crcli = Crcli(tmp_path)
    with FaultyProxy(moto) as proxy:
        far_away = {"AWS_ENDPOINT_URL": proxy.endpoint_url, "AWS_MAX_ATTEMPTS": "1", "CRCLI_CACHE_SIZE": "0"}
        os.environ.update(moto.env | far_away)
        far = Far(crcli, proxy, moto.url("far"))
        proxy.inject(far.fault, method="GET", containing="/packs/", times=float("inf"))
        try:
            yield far
        finally:
            far.down.clear()
            far.through.set()
            crcli.clean_up()
            for name in moto.env | far_away:
                os.environ.pop(name, None)
            wait_until(lambda: not pagers(), f"left behind: {pagers()}", 40)


@pytest.fixture
def restless() -> Iterator[Program]:
    """A program that does to its memory whatever can be done, once it is told to."""
    with spawn_python(textwrap.dedent(RESTLESS.replace("MEGABYTES", str(MEGABYTES)))) as program:
        yield program


def pagers() -> list[psutil.Process]:
    """The pagers and keepers of our restores, reaped; tests beside this one have theirs."""
    found = []
    for one in psutil.Process().children(recursive=True):
        try:
            if one.name() not in ("crcli-pager", "crcli-keeper"):
                continue
            os.waitpid(one.pid, os.WNOHANG)
        except psutil.NoSuchProcess:
            continue
        except ChildProcessError:
            pass
        found.append(one)
    return [one for one in found if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def tell(pid: int, number: int, program: Program, word: str) -> None:
    """Send a signal, and wait for the word that the program answers with."""
    os.kill(pid, number)
    wait_until(lambda: word in program.output, f"no {word!r}:\n{program.output[-3000:]}", 30)


def test_a_tree_runs_before_its_memory_is_here(far: Far) -> None:
    """With all background reads held it goes on, on what it touches; then all comes, and nobody is left."""
    with spawn_python(counter(kilobytes=MEGABYTES << 10)) as program:
        image = far.dump(program)
        report = far.restore(image)
        assert report["missing_bytes"] > (MEGABYTES - 1) << 20
        assert psutil.Process(report["pager"]).name() == "crcli-pager"
        assert_goes_on(program)
        far.through.set()
        wait_until(lambda: not pagers(), "it is never whole", 20)
        assert_goes_on(program)


def test_more_address_space_may_be_reserved_than_there_is_memory(far: Far) -> None:
    """A parent and its child have reserved twice of it, as Chromium has on most machines; both go on."""
    code = f"""
        import ctypes, os, signal
        reserve = ctypes.CDLL(None).mmap
        reserve.restype, reserve.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] * 3
        size = {2 * psutil.virtual_memory().total >> 12 << 12}
        at = reserve(None, size, 0, 0x22, -1 % 2**32, 0)  # private, anonymous, and nobody may touch it
        assert at != 2**64 - 1
        if os.fork() == 0:
            signal.pause()
        """
    with spawn_python(textwrap.dedent(code) + counter()) as program:
        far.restore(far.dump(program))
        assert_goes_on(program)


def test_locks_are_taken_again_where_a_stack_is_missing(far: Far, tmp_path: Path) -> None:
    """Locks on files that are mapped are taken by their owners, with whatever of their memory is here."""
    code = f"""
        import fcntl, mmap, os, signal
        told, tell = os.pipe()
        for number in range(6):
            if os.fork() == 0:
                file = open({str(tmp_path)!r} + f"/locked-{{number}}", "w+b")
                file.truncate(4096)
                mapped = mmap.mmap(file.fileno(), 4096)
                fcntl.lockf(file, fcntl.LOCK_EX)
                os.write(tell, b"1")
                signal.pause()
        for _ in range(6):
            os.read(told, 1)
        """
    with spawn_python(textwrap.dedent(code) + counter()) as program:
        far.restore(far.dump(program))
        for number in range(6):
            with (tmp_path / f"locked-{number}").open("r+b") as file, pytest.raises(BlockingIOError):
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert_goes_on(program)


@pytest.mark.parametrize("background", ["held", "coming"])
@pytest.mark.parametrize("namespace", ["host", "new"])
def test_a_restless_tree_sees_only_its_own_pages(
    background: str, namespace: str, far: Far, restless: Program
) -> None:
    """It forks, moves, drops, unmaps, protects and writes memory that is still missing, from many threads."""
    image = far.dump(restless)
    if background == "coming":
        far.through.set()
    pid = far.restore(image, "--pid-namespace", namespace)["host_pid"]
    tell(pid, signal.SIGUSR1, restless, "acted")
    assert restless.output.count(": right") == 8, restless.output[-3000:]
    far.through.set()
    wait_until(lambda: not pagers(), "it is never whole", 20)
    tell(pid, signal.SIGUSR2, restless, "whole")


def test_it_waits_for_a_store_that_is_away(far: Far, restless: Program) -> None:
    """While the store refuses, who touches a missing page waits; nothing dies, and the log says why."""
    pid = far.restore(far.dump(restless))["host_pid"]
    far.down.set()
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: "does not answer" in far.logs(), "nothing is logged", 30)
    time.sleep(3)  # the store is asked some more times
    assert len(list((far.crcli.folder / "logs").glob("*-crcli-pager-*"))) == 1, "the log is flooded"
    assert psutil.pid_exists(pid) and "acted" not in restless.output
    far.down.clear()
    far.through.set()
    wait_until(lambda: "acted" in restless.output, restless.output[-3000:], 40)
    assert restless.output.count(": right") == 8, restless.output[-3000:]


def test_what_is_still_missing_is_no_garbage(far: Far, restless: Program) -> None:
    """Somebody removes the image, and collects garbage, while the tree that was restored from it waits for
    memory: that stays until the tree is whole, and goes with the next collection."""
    image = far.dump(restless)
    pid = far.restore(image)["host_pid"]
    far.crcli.run("rm", image, "--store", far.url)
    collect = ("gc", "--grace", "0", "--store", far.url, "--json")
    report = far.crcli.run(*collect).json
    assert (report["packs_removed"], len(report["deferred"])) == (0, 1)
    far.through.set()
    wait_until(lambda: not pagers(), "it is never whole", 20)
    tell(pid, signal.SIGUSR2, restless, "whole")
    report = far.crcli.run(*collect).json
    assert report["packs_removed"] and not report["deferred"]


def test_without_its_pager_a_tree_ends_and_sees_no_zeros(far: Far, restless: Program) -> None:
    """When the pager is killed too early the keeper ends the tree, which can be restored again."""
    image = far.dump(restless)
    report = far.restore(image)
    os.kill(report["host_pid"], signal.SIGUSR1)
    os.kill(report["pager"], signal.SIGKILL)
    wait_until(lambda: not pagers(), "the keeper stays", 20)
    wait_until(lambda: not _runs(report["host_pid"]), "the tree runs without its memory")
    assert "Error" not in restless.output, restless.output
    assert "the pager was killed" in far.logs()
    far.through.set()
    far.crcli.clean_up()
    pid = far.restore(image)["host_pid"]
    tell(pid, signal.SIGUSR2, restless, "whole")


def test_without_its_keeper_a_tree_becomes_whole(far: Far, restless: Program) -> None:
    """The keeper is only there for when the pager is not."""
    report = far.restore(far.dump(restless))
    (keeper,) = [one for one in pagers() if one.name() == "crcli-keeper"]
    keeper.kill()
    far.through.set()
    tell(report["host_pid"], signal.SIGUSR1, restless, "acted")
    assert restless.output.count(": right") == 8, restless.output[-3000:]
    wait_until(lambda: not pagers(), "it is never whole", 20)


def test_who_left_the_tree_sees_no_zeros_without_the_pager(far: Far) -> None:
    """A daemon of the tree, which is not below its root any more, waits when the pager was killed."""
    code = """
        import os, random, signal, sys, time
        memory = random.Random(1).randbytes(MEGABYTES << 20)
        def leave(number, frame):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    print(f"daemon={os.getpid()}")
                    while os.getppid() == parent or not os.path.exists(sys.argv[0] + GO): time.sleep(0.01)
                    print("looks")
                    print("zeros" if memory[12 << 20 : 13 << 20].count(0) == 1 << 20 else "right")
                os._exit(0)
            os.wait()
        parent = os.getpid()
        signal.signal(signal.SIGUSR1, leave)
        print("ready")
        while True: signal.pause()
        """
    go = far.crcli.folder / "go"
    code = code.replace("MEGABYTES", str(MEGABYTES)).replace("sys.argv[0] + GO", repr(str(go)))
    with spawn_python(textwrap.dedent(code)) as program:
        report = far.restore(far.dump(program))
        tell(report["host_pid"], signal.SIGUSR1, program, "daemon=")
        daemon = int(program.value_of("daemon"))
        os.kill(report["pager"], signal.SIGKILL)
        wait_until(lambda: not _runs(report["host_pid"]), "the tree runs without its memory")
        go.touch()
        try:
            wait_until(lambda: "looks" in program.output or not _runs(daemon), program.output)
            time.sleep(1)
            assert "zeros" not in program.output
        finally:
            if _runs(daemon):
                os.kill(daemon, signal.SIGKILL)


def test_a_tree_that_is_not_whole_yet_is_not_dumped(far: Far, restless: Program) -> None:
    """Its missing pages would be taken for zeros: refused until the pager is done."""
    pid = far.restore(far.dump(restless))["host_pid"]
    refused = far.crcli.run("dump", str(pid), "--store", far.url, "--json", code=10).json
    assert "memory-missing" in {one["name"] for one in refused["error"]["findings"]}
    far.through.set()
    wait_until(lambda: not pagers(), "it is never whole", 20)
    far.crcli.run("dump", str(pid), "--store", far.url, "--json", "--leave-running")
    tell(pid, signal.SIGUSR2, restless, "whole")


def test_a_tree_that_is_whole_at_once_is_restored(tmp_path: Path) -> None:
    """The pager can have done before CRIU has: it stays until CRIU has told it so, else CRIU fails."""
    crcli = Crcli(tmp_path)
    with spawn_python("import os\nprint('ready')\nos.execvp('sleep', ['sleep', '1000'])") as program:
        wait_until(lambda: psutil.Process(program.pid).name() == "sleep", "it is no sleep")
        image = crcli.dump(program.pid)["image"]
        for _ in range(5):
            crcli.restore(image, "--lazy")
            crcli.clean_up()
            wait_until(lambda: not pagers(), f"left behind: {pagers()}")


def test_a_tree_of_zombies_is_whole_at_once(tmp_path: Path) -> None:
    """What zombies say of themselves, after all others, is not taken for CRIU's word that it has finished."""
    crcli = Crcli(tmp_path)
    text = """
        import os
        for _ in range(20):
            if os.fork() == 0:
                os._exit(0)
        print("ready")
        os.execvp("sleep", ["sleep", "1000"])
        """
    with spawn_python(text) as program:
        wait_until(lambda: psutil.Process(program.pid).name() == "sleep", "it is no sleep")
        wait_until(lambda: all(one.status() == "zombie" for one in tree_of(program.pid)[1:]), "a child lives")
        image = crcli.dump(program.pid)["image"]
        for _ in range(5):
            crcli.restore(image, "--lazy")
            crcli.clean_up()
            wait_until(lambda: not pagers(), f"left behind: {pagers()}")


def test_the_pager_keeps_nothing_of_its_caller_open(far: Far) -> None:
    """Who waits for the end of a pipe that crcli inherited, or for a lock, does not wait for all memory."""
    with spawn_python(counter(kilobytes=MEGABYTES << 10)) as program:
        image = far.dump(program)
        reader, writer = os.pipe()
        arguments = ("restore", image, "--store", far.url, "--lazy", "--json")
        with far.crcli.start(*arguments, pass_fds=[writer]) as process:
            os.close(writer)
            out, _ = process.communicate(timeout=COMMAND_LIMIT_SECONDS)
        far.crcli.adopt(json.loads(out)["host_pid"])
        assert pagers()
        ready, _, _ = select.select([reader], [], [], 5)
        os.close(reader)
        assert ready, "somebody has it open"


def test_the_end_of_the_pager_is_waited_for(far: Far) -> None:
    """With --wait crcli stays for as long as the tree: no zombie stays with it."""
    with spawn_python(counter(kilobytes=MEGABYTES << 10)) as program:
        image = far.dump(program)
        with far.crcli.start("restore", image, "--store", far.url, "--lazy", "--wait") as process:
            try:
                both = ["crcli-keeper", "crcli-pager"]  # at first the keeper is called as who forked it
                wait_until(lambda: sorted(one.name() for one in pagers()) == both, "there is no pager", 30)
                (pager,) = [one for one in pagers() if one.name() == "crcli-pager"]
                assert_goes_on(program)
                far.through.set()
                wait_until(lambda: not pager.is_running(), "it is still there, maybe a zombie", 20)
                assert process.poll() is None
            finally:
                end(tree_of(process.pid))


def test_an_image_that_lost_a_pack_is_refused_before_its_tree_runs(tmp_path: Path) -> None:
    """That its packs are there is seen before, for afterwards is too late."""
    crcli = Crcli(tmp_path)
    with spawn_python(counter(kilobytes=80 << 10)) as program:
        image = crcli.dump(program.pid)["image"]
    largest = max((tmp_path / "store" / "packs").rglob("*"), key=lambda path: path.stat().st_size)
    largest.unlink()
    error = crcli.restore(image, "--lazy", code=22)["error"]
    assert error["state"] == "untouched"
    assert not pagers()


def test_a_page_that_is_damaged_ends_the_tree(tmp_path: Path) -> None:
    """A page that no place has as it was cannot be given: the tree ends, and the log says of what."""
    crcli = Crcli(tmp_path)
    with spawn_python(counter(kilobytes=80 << 10)) as program:
        image = crcli.dump(program.pid)["image"]
        largest = max((tmp_path / "store" / "packs").rglob("*"), key=lambda path: path.stat().st_size)
        with largest.open("r+b") as file:
            file.seek(largest.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        crcli.run("restore", image, "--lazy", "--store", crcli.store, "--json", code=21)
    wait_until(lambda: not pagers(), f"left behind: {pagers()}", 20)
    logs = "".join(path.read_text() for path in (tmp_path / "logs").glob("*-crcli-pager-*"))
    assert "not what its hash says" in logs


def test_bytes_that_were_damaged_on_their_way_are_fetched_again(far: Far) -> None:
    """Only what is wrong twice is an image that is damaged."""
    with spawn_python(counter(kilobytes=MEGABYTES << 10)) as program:
        far.restore(far.dump(program))
        far.spoil.set()
        far.through.set()
        wait_until(lambda: not pagers(), "it is never whole", 20)
        assert not far.spoil.is_set(), "nothing was damaged"
        assert_goes_on(program)


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
