"""Pages that are read where they are: in a process that stands still."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from crcli import kernel
from crcli.errors import DumpFailed
from crcli.memory import intake as intake_module
from crcli.memory.blocks import BLOCK_PAGES, GROUP_PAGES, KEY
from crcli.memory.extents import PAGE, Extent, SpaceKey, SpaceKind
from crcli.memory.intake import Intake
from crcli.memory.lookahead import Lookahead
from crcli.memory.reading import may_read_all, read_scattered
from crcli.pipeline import in_place
from crcli.process.identity import identify
from tests.support import memory
from tests.support.memory import (
    KeepingSink,
    KnownFrom,
    MemoryFile,
    Sent,
    Standing,
    digests_of,
    expected,
    rebuilt,
)
from tests.unit.test_intake import channel_with
from tests.unit.test_lookahead import wait_for

A, B = SpaceKey(SpaceKind.PROCESS, 41), SpaceKey(SpaceKind.PROCESS, 42)
LIMIT = 64 << 20
BLOCK = BLOCK_PAGES * PAGE
OTHER = 999_999
"""What comes out of the channel for pages that are to be read elsewhere."""


class SlowSink(KeepingSink):
    """One that takes nothing before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def add(self, *given: object, **more: object) -> None:
        """See ChunkSink."""
        self.go_on.wait(20)
        super().add(*given, **more)  # type: ignore[arg-type]


@pytest.fixture
def overflow() -> Iterator[MemoryFile]:
    with MemoryFile(LIMIT) as file:
        yield file


@pytest.fixture
def lookahead(overflow: MemoryFile) -> Iterator[Lookahead]:
    with Lookahead(overflow.fd, overflow.limit, in_place=LIMIT, at_once=True) as process:
        yield process


def numbers(count: int, seed: int = 1) -> list[int]:
    """Pages that are all different, some of them zero."""
    random = Random(seed)
    return [0 if random.random() < 0.1 else random.getrandbits(48) for _ in range(count)]


def group_keys(raw: bytes, start: int) -> bytes:
    """The keys of the whole groups of memory whose first page has this number."""
    first = -start % GROUP_PAGES * PAGE
    return b"".join(digest[:KEY] for digest in digests_of(raw[first:], GROUP_PAGES))


def left(
    standing: Standing,
    sink: KeepingSink,
    overflow: MemoryFile,
    lookahead: Lookahead | None = None,
    **known: object,
) -> Intake:
    """An intake that was sent other pages than those that the process has, and was told where those are."""
    taking = Intake(
        known.get("known"),
        sink,
        overflow,
        lookahead=lookahead,
        owner_of=lambda space: standing.pid,  # type: ignore[arg-type]
    )
    if "keys" in known:
        taking.learn(known["known"], known["keys"])  # type: ignore[arg-type]
    pages = len(standing.raw) // PAGE
    sent = Sent(A, standing.start, (OTHER,) * pages)
    with channel_with([sent]) as channel:
        taking.begin_space(A)
        taking.receive(channel, A, standing.start, pages, lazy=True)
    taking.flush()
    return taking


def before(standing: Standing, contents: list[int]) -> tuple[KeepingSink, bytes]:
    """What the store has of the process as it was with these contents, and the keys of its groups."""
    sink = KeepingSink()
    sent = Sent(A, standing.start, tuple(contents))
    with MemoryFile(LIMIT) as other:
        taking = Intake(None, sink, other)
        with channel_with([sent]) as channel:
            taking.receive(channel, A, sent.start, len(contents), lazy=True)
        taking.finish()
    return sink, group_keys(sent.bytes, sent.start)


def memory_of(spaces: dict[SpaceKey, list[Extent]], *sinks: tuple[int, KeepingSink]) -> bytes:
    """All bytes of A, put together from what was stored, the numbers of whose chunks begin there."""
    chunks = {first + number: raw for first, sink in sinks for number, raw in sink.chunks.items()}
    found = rebuilt({A: spaces[A]}, chunks)
    return b"".join(raw for _, (raw, _) in sorted(found.items()))


def test_pages_stay_and_others_are_taken(overflow: MemoryFile) -> None:
    """What may come late is read in the process whose it is; all else is what CRIU sent."""
    first, second = numbers(BLOCK_PAGES + 100), numbers(70, seed=2)
    sink = KeepingSink()
    with Standing(first) as one, Standing(second) as other:
        owners = {A: one.pid, B: other.pid}
        taking = Intake(None, sink, overflow, owner_of=lambda space: owners.get(space, 0))
        unknown = SpaceKey(SpaceKind.PROCESS, 43)
        runs = [
            (Sent(A, one.start, (OTHER,) * 500), first[:500]),
            (Sent(A, 5, (7, 8, 9), lazy=False), [7, 8, 9]),
            (Sent(A, one.start + 500, (OTHER,) * (BLOCK_PAGES - 400)), first[500:]),
            (Sent(B, other.start, (OTHER,) * 70), second),
            (Sent(unknown, 3, (1, 2)), [1, 2]),
        ]
        with channel_with([sent for sent, _ in runs]) as channel:
            for sent, _ in runs:
                taking.begin_space(sent.space)
                taking.receive(channel, sent.space, sent.start, len(sent.contents), sent.lazy)
        assert os.fstat(overflow.fd).st_blocks * 512 == 5 * PAGE
        spaces, counts = taking.finish()
    assert rebuilt(spaces, sink.chunks) == expected(
        [replace(sent, contents=tuple(contents)) for sent, contents in runs]
    )
    assert counts.total == (BLOCK_PAGES + 100 + 70 + 5) * PAGE
    assert taking.has_left_pages


def test_a_tree_that_runs_on_is_copied(overflow: MemoryFile) -> None:
    """So is what comes in a round before the last, while the tree runs."""
    contents, sink = tuple(numbers(64)), KeepingSink()
    with Standing([OTHER] * 64) as standing:
        taking = Intake(None, sink, overflow, owner_of=lambda space: standing.pid)
        taking.begin_round((), is_last=False)
        sent = Sent(A, standing.start, contents)
        with channel_with([sent]) as channel:
            taking.receive(channel, A, sent.start, 64, lazy=True)
        taken = taking.end_round()
        taking.close()
    assert rebuilt(taken.spaces, sink.chunks) == expected([sent])
    assert not taking.has_left_pages


@pytest.mark.parametrize("changed", [3, 200, 900])
@pytest.mark.parametrize("told", ["all", "nothing", "less"])
def test_a_repeat_stores_what_has_changed(
    overflow: MemoryFile, lookahead: Lookahead, changed: int, told: str
) -> None:
    """However much of it, and whatever was said of what the store has."""
    old = numbers(3 * BLOCK_PAGES)
    new = list(old)
    for page in Random(changed).sample(range(len(old)), changed):
        new[page] = 1_000_000_000_000_000 + page
    sink = KeepingSink()
    with Standing(new) as standing:
        earlier, keys = before(standing, old)
        keys = {"all": keys, "nothing": b"", "less": keys[: len(keys) // 2]}[told]
        known = KnownFrom(earlier, first=1000)
        taking = left(standing, sink, overflow, lookahead, known=known, keys=keys)
        if told == "all":
            wait_for(lookahead, 3)
        spaces, counts = taking.finish()
        assert memory_of(spaces, (0, sink), (1000, earlier)) == standing.raw
    assert counts.new == changed * PAGE


def test_what_is_new_and_comes_twice_is_stored_once(overflow: MemoryFile, lookahead: Lookahead) -> None:
    """Within a block, and in another."""
    old = [n or 1 for n in numbers(2 * BLOCK_PAGES)]
    new = list(old)
    for page in (300, 301, 700, BLOCK_PAGES + 300):
        new[page] = 77_777
    sink = KeepingSink()
    with Standing(new) as standing:
        earlier, keys = before(standing, old)
        taking = left(standing, sink, overflow, lookahead, known=KnownFrom(earlier, 1000), keys=keys)
        wait_for(lookahead, 2)
        spaces, counts = taking.finish()
        assert memory_of(spaces, (0, sink), (1000, earlier)) == standing.raw
    assert counts.new == PAGE


def test_what_has_a_known_key_and_is_not_known_is_read_again(
    overflow: MemoryFile, lookahead: Lookahead
) -> None:
    """A key is only a part of a digest."""
    contents, sink, nothing = [n or 1 for n in numbers(BLOCK_PAGES)], KeepingSink(), KeepingSink()
    with Standing(contents) as standing:
        keys = group_keys(standing.raw, standing.start)
        taking = left(standing, sink, overflow, lookahead, known=KnownFrom(nothing, first=1000), keys=keys)
        wait_for(lookahead, 1)
        spaces, _ = taking.finish()
        assert memory_of(spaces, (0, sink)) == standing.raw


@pytest.mark.parametrize("changed", [[400, 500], [*range(400, 600)], [*range(0, BLOCK_PAGES, 32)]])
@pytest.mark.parametrize("written", [400, 801, 960])
def test_what_is_written_meanwhile_never_makes_an_image_that_contradicts_itself(
    overflow: MemoryFile, lookahead: Lookahead, changed: list[int], written: int
) -> None:
    """Whoever writes to memory that stands still (a device, a debugger), to what has changed since the last
    dump or to what has not: each page is as it was at some time, and stored under the digest that it then had
    (which the sink asserts)."""
    old = [n or 1 for n in numbers(BLOCK_PAGES)]
    new = list(old)
    for page in changed:
        new[page] = 77_000 + page
    sink = KeepingSink()
    with Standing(new) as standing:
        earlier, keys = before(standing, old)
        taking = left(standing, sink, overflow, lookahead, known=KnownFrom(earlier, 1000), keys=keys)
        wait_for(lookahead, 1)
        later = b"L" * PAGE
        standing.write(written, later)
        spaces, _ = taking.finish()
        found = memory_of(spaces, (0, sink), (1000, earlier))
        for page in range(BLOCK_PAGES):
            now = found[page * PAGE : (page + 1) * PAGE]
            assert now == standing.raw[page * PAGE : (page + 1) * PAGE] or now == later
        for digest, places in sink.mixed.items():
            assert digest in digests_of(found[-standing.start % GROUP_PAGES * PAGE :], GROUP_PAGES), places


def test_the_image_of_a_tree_that_is_killed_while_the_store_takes_its_time_comes_to_be(
    overflow: MemoryFile,
) -> None:
    """What waits for longer is copied out of the tree meanwhile."""
    contents = [n or 1 for n in numbers(4 * BLOCK_PAGES)]
    sink = SlowSink()
    with Standing(contents) as standing, patch.object(intake_module, "_SAVE_AFTER_S", 0.0):
        taking = left(standing, sink, overflow)
        ending = threading.Thread(target=_kill_once_saved, args=(standing, overflow, sink))
        taking.open_gate()
        ending.start()
        spaces, _ = taking.finish()
        ending.join()
        assert memory_of(spaces, (0, sink)) == standing.raw


def _kill_once_saved(standing: Standing, overflow: MemoryFile, sink: SlowSink) -> None:
    """Kill it when the two blocks that the two workers do not have were copied."""
    _wait_until_saved(overflow)
    standing.end()
    sink.go_on.set()


def _wait_until_saved(overflow: MemoryFile) -> None:
    end = time.monotonic() + 10
    while os.fstat(overflow.fd).st_blocks * 512 < 2 * BLOCK and time.monotonic() < end:
        time.sleep(0.01)


def test_a_tree_that_was_killed_before_is_said_to_be(overflow: MemoryFile) -> None:
    """The dump fails; nothing is taken for zeros."""
    with Standing(numbers(64)) as standing:
        taking = left(standing, KeepingSink(), overflow)
        standing.end()
        with pytest.raises(DumpFailed, match=f"process {standing.pid}, which stands still, cannot be read"):
            taking.finish()
        taking.abandon()


@pytest.mark.parametrize("how", ["killed", "woken"])
def test_a_tree_that_is_woken_while_it_is_read_has_no_image(overflow: MemoryFile, how: str) -> None:
    """What its threads had the kernel write on their way out may have been read."""
    with Standing(numbers(64)) as standing:
        taking = left(standing, KeepingSink(), overflow)

        def read_just_before(pid: int, into: memoryview, parts: Sequence[tuple[int, int, int]]) -> None:
            read_scattered(pid, into, parts)
            if how == "killed":
                standing.end()
            else:
                standing.wake()

        with patch.object(intake_module, "read_scattered", read_just_before), pytest.raises(DumpFailed):
            taking.finish()
        taking.abandon()


def test_what_was_saved_is_not_looked_at_in_a_tree_that_was_woken_since(overflow: MemoryFile) -> None:
    """Whoever looked ahead may have done so later than it was copied out."""
    old = [n or 1 for n in numbers(4 * BLOCK_PAGES)]

    def wake_once_saved() -> None:
        _wait_until_saved(overflow)
        standing.write(40, memory.page(OTHER))
        standing.wake()
        os.kill(ahead.pids[0], signal.SIGCONT)
        time.sleep(0.5)  # it looks at what is left
        sink.go_on.set()

    sink = SlowSink()
    with (
        Standing(old) as standing,
        Lookahead(overflow.fd, overflow.limit, in_place=LIMIT, at_once=True) as ahead,
        patch.object(intake_module, "_SAVE_AFTER_S", 0.0),
    ):
        os.kill(ahead.pids[0], signal.SIGSTOP)
        earlier, keys = before(standing, [*old[: 2 * BLOCK_PAGES], *numbers(2 * BLOCK_PAGES, seed=9)])
        taking = left(standing, sink, overflow, ahead, known=KnownFrom(earlier, 1000), keys=keys)
        waking = threading.Thread(target=wake_once_saved)
        waking.start()
        spaces, _ = taking.finish()
        waking.join()
        assert memory_of(spaces, (0, sink), (1000, earlier)) == standing.raw


def test_nothing_depends_on_who_looks_ahead(overflow: MemoryFile, lookahead: Lookahead) -> None:
    """Killed with half of it done, it leaves the rest to the workers."""
    old, sink = numbers(4 * BLOCK_PAGES), KeepingSink()
    with Standing(old) as standing:
        earlier, keys = before(standing, old)
        os.kill(lookahead.pids[0], 9)
        taking = left(standing, sink, overflow, lookahead, known=KnownFrom(earlier, 1000), keys=keys)
        spaces, counts = taking.finish()
        assert memory_of(spaces, (0, sink), (1000, earlier)) == standing.raw
    assert counts.new == 0


@pytest.mark.parametrize("refusal", [0, errno.EPERM, errno.ENOSYS])
def test_scattered_parts_come_where_they_belong(refusal: int) -> None:
    """More of them than the kernel takes at once, and such as the program itself may not read; also where the
    host does not allow the call for many parts."""

    def refuse(*_: object) -> int:
        raise OSError(refusal, "no")

    contents = [n or 1 for n in numbers(3000)]
    with Standing(contents, unreadable=[0, 1, 1500, 2999]) as standing:
        order = list(range(3000))
        Random(3).shuffle(order)
        into = bytearray(3000 * PAGE)
        parts = [(at * PAGE, (standing.start + page) * PAGE, PAGE) for at, page in enumerate(order)]
        with patch.object(kernel, "read_scattered", refuse if refusal else kernel.read_scattered):
            read_scattered(standing.pid, memoryview(into), parts)
        for at, page in enumerate(order):
            assert into[at * PAGE : (at + 1) * PAGE] == standing.raw[page * PAGE : (page + 1) * PAGE]


def test_a_host_that_lets_nobody_read_all_is_noticed() -> None:
    """Then all is taken out of the tree, as CRIU sends it."""

    def refused(*_: object) -> int:
        raise OSError(5, "Input/output error")

    forbidden = "proc_mem.force_override=" in Path("/proc/cmdline").read_text()
    assert forbidden or may_read_all.__wrapped__()
    root = SimpleNamespace(nspid=(os.getpid(),))
    tree = in_place.FrozenTree(root)  # type: ignore[arg-type]
    tree.criu = identify(os.getpid())
    ours = SpaceKey(SpaceKind.PROCESS, os.getpid())
    with patch.object(in_place, "writes_over_memory", lambda pid: False):
        for refusing in (False, True):
            may_read_all.cache_clear()
            with patch.object(os, "preadv", refused) if refusing else nullcontext():
                owner = tree.owner_of(ours)
            assert owner == (0 if refusing or forbidden else os.getpid())
    may_read_all.cache_clear()


def test_what_cannot_be_read_is_an_error() -> None:
    """Where nothing is mapped, and where nobody is."""
    with Standing([1]) as standing, pytest.raises(OSError):
        read_scattered(standing.pid, memoryview(bytearray(PAGE)), [(0, 4096, PAGE)])
    with pytest.raises(ProcessLookupError):
        read_scattered(standing.pid, memoryview(bytearray(PAGE)), [(0, standing.start * PAGE, PAGE)])
