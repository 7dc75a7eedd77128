"""Memory filled in while its process does with it what it likes: the kernel's own events, without CRIU.

The process registers memory of its own and hands the descriptor over, as CRIU does for a restored one. What
is fetched when is the test's to say, so that each race can be brought about on purpose.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from crcli.memory.extents import PAGE, Extent, Origin, Source, SpaceKey, SpaceKind
from crcli.memory.lazy import LazyFill
from crcli.memory.replay import Replay, targets
from crcli.memory.userfault import Userfault, is_available
from tests.support.crcli import wait_until

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
    pytest.mark.skipif(not is_available(), reason="needs userfaultfd"),
]

CHUNK = 16
"""Pages of a chunk."""

PROCESS = """
    import ctypes, fcntl, json, os, socket, struct, sys, threading, time
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = libc.mmap.restype = ctypes.c_void_p
    PAGE, READ, WRITE, PRIVATE, ANONYMOUS, MAYMOVE, FIXED, DONTUNMAP = 4096, 1, 2, 2, 32, 1, 2, 4
    def p(page): return ctypes.c_void_p((first + page) * PAGE)
    def n(pages): return ctypes.c_size_t(pages * PAGE)
    def done(result):
        if result in (-1, 2**64 - 1): raise OSError(ctypes.get_errno(), "a call failed")
    def first_byte(page): return ctypes.string_at((first + page) * PAGE, 1)[0]
    def move(page, old, new, flags, to=0):
        done(libc.mremap(p(page), n(old), n(new), flags, p(to)))
    def drop(page, pages): done(libc.madvise(p(page), n(pages), 4))
    def unmap(page, pages): done(libc.munmap(p(page), n(pages)))
    def through_a_pipe(page):
        reader, writer = os.pipe()
        return os.read(reader, 1)[0] if libc.write(writer, p(page), 1) == 1 else "gone"
    def in_child(function):
        reader, writer = os.pipe()
        if (pid := os.fork()) == 0:
            try: os.write(writer, json.dumps(function()).encode())
            finally: os._exit(0)
        os.close(writer)
        answer = open(reader).read()
        os.waitpid(pid, 0)
        return json.loads(answer)

    channel, pages = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    first = libc.mmap(None, ctypes.c_size_t(pages * PAGE), READ | WRITE, PRIVATE | ANONYMOUS, -1, 0) // PAGE
    fd = libc.syscall(SYSCALL, os.O_CLOEXEC | os.O_NONBLOCK)
    fcntl.ioctl(fd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6, 0))
    fcntl.ioctl(fd, 0xC020AA00, struct.pack("QQQQ", first * PAGE, pages * PAGE, 1, 0))
    socket.send_fds(channel, [b"%d" % first], [fd])
    os.close(fd)
    def run(number, code):
        try:
            result = eval(code)
        except BaseException as error:
            result = repr(error)
        channel.send(json.dumps([number, result]).encode())
    while order := channel.recv(1 << 18):
        threading.Thread(target=run, args=json.loads(order), daemon=True).start()
    """


class Process:
    """A process with `pages` pages of registered memory, that does what it is told, each in a new thread."""

    def __init__(self, pages: int) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pages = pages
        call = "282" if os.uname().machine == "aarch64" else "323"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                textwrap.dedent(PROCESS).replace("SYSCALL", call),
                str(theirs.fileno()),
                str(pages),
            ],
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        word, fds, _, _ = socket.recv_fds(self._channel, 64, 1)
        self.first = int(word)
        self.fd = fds[0]
        self._numbers = iter(range(1 << 30))
        self._answers: dict[int, object] = {}

    def start(self, code: str) -> int:
        """Have it begin; give the number for `answer`."""
        number = next(self._numbers)
        self._channel.send(json.dumps([number, code]).encode())
        return number

    def answer(self, number: int, limit_s: float = 20.0) -> object:
        """What came of it; fails when that takes too long."""
        self._channel.settimeout(limit_s)
        while number not in self._answers:
            try:
                got, result = json.loads(self._channel.recv(1 << 18))
            except TimeoutError:
                raise AssertionError("it hangs") from None
            self._answers[got] = result
        return self._answers[number]

    def do(self, code: str) -> object:
        """Have it do something, and wait for what comes of it."""
        return self.answer(self.start(code))

    def waits(self) -> bool:
        """Whether one of its threads waits for a page."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return any((thread / "wchan").read_text() == "handle_userfault" for thread in threads)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._channel.close()


class Bytes:
    """Where the pages come from: page i holds bytes of value i + 1. A chunk comes once it was let through."""

    def __init__(self) -> None:
        self._let = threading.Condition()
        self._through: set[int] = set()
        self._all = False

    def let(self, *chunks: int) -> None:
        """Let these chunks come, or all that there are."""
        with self._let:
            self._through.update(chunks)
            self._all = self._all or not chunks
            self._let.notify_all()

    def read(self, group: Sequence[Origin]) -> Iterator[tuple[Origin, bytes]]:
        """See LazyFill."""
        for origin in group:
            with self._let:
                while not self._all and origin.number not in self._through:
                    self._let.wait()
            yield origin, b"".join(bytes([value(origin.number * CHUNK + i)]) * PAGE for i in range(CHUNK))


def value(page: int) -> int:
    """What the bytes of a page are."""
    return page % 255 + 1


class Filling:
    """The filling of one process under way, as the pager does it: all is let go of once it is over."""

    def __init__(self, process: Process, source: Bytes, chunks: Sequence[int]) -> None:
        key = SpaceKey(SpaceKind.PROCESS, 1)
        extents = [Extent(process.first + number * CHUNK, CHUNK, Source.CHUNK, number) for number in chunks]
        plan = [[Origin(Source.CHUNK, number)] for number in chunks]
        self.held: list[int] = []
        self.fill = LazyFill({key: extents}, plan, source.read, 1, self.held.append)
        self.fill.add(key, process.fd)
        self.fill.go()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        try:
            self.fill.wait()
        finally:
            self.fill.end()
            self.fill.close()

    def wait(self, limit_s: float = 20.0) -> None:
        """Return when it is over."""
        self._thread.join(limit_s)
        assert not self._thread.is_alive(), "it is never over"


@contextmanager
def filling(pages: int, chunks: Sequence[int]) -> Iterator[tuple[Process, Bytes, Filling]]:
    """A process of which these chunks are missing, where they come from, and their filling in."""
    process, source = Process(pages), Bytes()
    filling = Filling(process, source, chunks)
    try:
        yield process, source, filling
    finally:
        process.close()
        source.let()
        filling.wait()


def test_nothing_to_fill_is_over_at_once() -> None:
    """A tree of which nothing is missing is whole: nobody waits for its end."""
    with filling(CHUNK, []) as (_, _, under_way):
        under_way.wait()


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        ("drop(3, 1)", 0),
        ("unmap(3, 1)", "gone"),
        ("move(3, 1, 1, MAYMOVE | FIXED, 40)", "gone"),
        ("move(3, 1, 1, MAYMOVE | FIXED | DONTUNMAP, 40)", 0),
    ],
)
def test_who_waits_for_a_page_that_goes_away_does_not_wait_on(what: str, seen: object) -> None:
    """Another thread drops, unmaps or moves it meanwhile: nothing will come to that place any more."""
    with filling(64, range(2)) as (process, _, _):
        waiting = process.start("through_a_pipe(3)")
        wait_until(process.waits, "it does not wait")
        process.do(what)
        assert process.answer(waiting) == seen


def test_what_is_moved_and_cut_comes_where_it_belongs() -> None:
    """A move that shortens leaves what lies behind its new place alone."""
    with filling(64, range(4)) as (process, source, under_way):
        process.do("move(0, 8, 4, MAYMOVE | FIXED, 32)")
        source.let()
        under_way.wait()
        there = process.do("[first_byte(page) for page in range(32, 64)]")
        assert there == [value(page) for page in (*range(4), *range(36, 64))]


def test_children_forked_while_pages_come_have_them_too() -> None:
    """A fork that falls into the filling in of a chunk takes no page away from the child."""
    pages = 64 * CHUNK
    with filling(pages, range(64)) as (process, source, _):
        look = f"[in_child(lambda: [first_byte(page) for page in range({pages})]) for _ in range(3)]"
        forking = [process.start(look) for _ in range(6)]
        for chunk in range(64):
            source.let(chunk)
            time.sleep(0.01)
        right = [value(page) for page in range(pages)]
        for number in forking:
            assert process.answer(number) == [right] * 3


def test_of_children_that_ended_nothing_is_kept() -> None:
    """A tree may start any number of processes before all of its memory is here."""
    with filling(CHUNK, [0]) as (process, _, _):
        before = len(os.listdir("/proc/self/fd"))
        process.do("[in_child(lambda: 1) for _ in range(400)]")
        assert len(os.listdir("/proc/self/fd")) < before + 200


def test_pages_that_are_there_and_memory_of_nobody_are_written() -> None:
    """A restore that fills in what is missing writes what is there already, or was never handed over."""
    process = Process(4 * CHUNK)
    try:
        key, source = SpaceKey(SpaceKind.PROCESS, 1), Bytes()
        other = process.do("libc.mmap(None, n(16), READ | WRITE, PRIVATE | ANONYMOUS, -1, 0) // PAGE")
        assert isinstance(other, int)
        gap = Userfault(process.fd)
        gap.zero(process.first + 3)
        gap.zero(process.first + CHUNK)
        extents = [Extent(process.first + at * CHUNK, CHUNK, Source.CHUNK, at) for at in range(3)]
        wanted = targets({key: [*extents, Extent(other, CHUNK, Source.CHUNK, 3)]})
        source.let()
        memory = os.open(f"/proc/{process.process.pid}/mem", os.O_WRONLY)
        replay = Replay(wanted, [[origin] for origin in wanted], source.read, 2)
        replay.write_to({key: memory}, missing={key: gap})
        os.close(memory)
        gap.close()
        there = process.do(f"[first_byte(page) for page in range({4 * CHUNK})]")
        assert there == [value(page) for page in range(3 * CHUNK)] + [0] * CHUNK
        there = process.do(f"[first_byte({other} - first + page) for page in range(16)]")
        assert there == [value(page) for page in range(3 * CHUNK, 4 * CHUNK)]
        assert replay.written_bytes == 4 * CHUNK * PAGE
    finally:
        process.close()
