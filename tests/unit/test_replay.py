"""Memory put back: what CRIU must find and what is written afterwards, divided page by page."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from unittest.mock import Mock, patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crcli import kernel
from crcli.memory import replay, writing
from crcli.memory import scattered as scattered_module
from crcli.memory.buffers import address_of
from crcli.memory.extents import (
    PAGE,
    Extent,
    Origin,
    Source,
    SpaceKey,
    SpaceKind,
    coalesce,
    distinct_bytes,
)
from crcli.memory.replay import Replay, split, targets
from crcli.memory.writing import write_scattered
from tests.support.memory import page, rebuilt

libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

PARENT, CHILD, OTHER = (SpaceKey(SpaceKind.PROCESS, pid) for pid in (1, 2, 3))
SHARED = SpaceKey(SpaceKind.SHARED, 9)
CHUNKS = {
    Origin(Source.CHUNK, number): b"".join(page(number * 100 + at + 1) for at in range(64))
    for number in range(4)
}

FIRST = Origin(Source.CHUNK, 0)

Page = tuple[Source, int, int]
"""Where one page comes from: its source, and if that is a chunk, the chunk and the page in it."""

Pages = dict[int, tuple[Page, bool]]
"""A space: by page number, where each page comes from, and whether it is lazy."""


@st.composite
def spaces_of(draw: st.DrawFn) -> list[Extent]:
    """The extents of one space, as an image has them. Few chunks, so that spaces have pages in common."""
    extents: list[Extent] = []
    start = 0
    for _ in range(draw(st.integers(0, 6))):
        start += draw(st.sampled_from([0, 0, 1, 7]))
        pages = draw(st.integers(1, 20))
        lazy = draw(st.sampled_from([True, True, False]))
        if draw(st.booleans()):
            chunk, shift = draw(st.integers(0, 3)), draw(st.integers(0, 2))
            pages = min(pages, 64 - (start + shift) % 40)
            extents.append(Extent(start, pages, Source.CHUNK, chunk, (start + shift) % 40, lazy))
        else:
            extents.append(Extent(start, pages, Source.ZERO, 0, 0, lazy))
        start += pages
    return coalesce(extents)


def pages_of(extents: Sequence[Extent]) -> Pages:
    """The same space page by page; asserts that no page is in it twice."""
    found: Pages = {}
    for extent in extents:
        for index in range(extent.pages):
            assert extent.start + index not in found
            chunk = (extent.chunk, extent.offset + index) if extent.source == Source.CHUNK else (0, 0)
            found[extent.start + index] = (extent.source, *chunk), extent.lazy
    return found


def are_alike(spaces: Mapping[SpaceKey, Pages], one: SpaceKey, other: SpaceKey, number: int) -> bool:
    """Whether two spaces have the same page of the same chunk there."""
    where, same = spaces[one].get(number), spaces[other].get(number)
    return where is not None and same is not None and where[0][0] == Source.CHUNK and where[0] == same[0]


@given(
    st.tuples(spaces_of(), spaces_of(), spaces_of(), spaces_of()),
    st.dictionaries(st.sampled_from([1, 2, 3]), st.sets(st.integers(0, 100), max_size=4)),
    st.sampled_from([{}, {CHILD: PARENT}, {CHILD: PARENT, OTHER: PARENT}, {CHILD: PARENT, OTHER: CHILD}]),
)
@settings(deadline=None, max_examples=300)
def test_every_page_is_early_or_late(
    extents: tuple[list[Extent], ...],
    kernel_pages: dict[int, set[int]],
    parents: dict[SpaceKey, SpaceKey],
) -> None:
    """Each page of each space is in exactly one part, from where it was; which one, the rules say: those of
    FORMAT.md, and that who has no children inherits what is its parent's too, which finds that early."""
    spaces = dict(zip((PARENT, CHILD, OTHER, SHARED), extents, strict=True))
    pairs = [(child.number, parent.number) for child, parent in parents.items()]
    divided = split(spaces, pairs, kernel_pages)
    whole = {space: pages_of(listed) for space, listed in spaces.items()}
    for space in spaces:
        early, late = pages_of(divided.early[space]), pages_of(divided.late[space])
        kernel = kernel_pages.get(space.number, set()) if space.kind == SpaceKind.PROCESS else set()
        family = [parents[space]] if space in parents else []
        children = [child for child, parent in parents.items() if parent == space]
        alike = {
            number
            for number in whole[space]
            if any(are_alike(whole, space, other, number) for other in family + children)
        }
        inherits = alike if family and not children else set()
        assert inherits == {
            run.start + index
            for run in (divided.inherited[space].runs if space in divided.inherited else [])
            for index in range(run.pages)
        }
        assert all(number in pages_of(divided.early[family[0]]) for number in inherits)
        assert {**early, **late} == {n: page for n, page in whole[space].items() if n not in inherits}
        assert len(early) + len(late) + len(inherits) == len(whole[space])
        must = {n for n, (_, lazy) in whole[space].items() if not lazy or n in kernel}
        everything = set(whole[space]) if space.kind == SpaceKind.SHARED else must | alike
        assert set(early) == everything - inherits
        for part in (divided.early[space], divided.late[space]):
            assert [extent.start for extent in part] == sorted(extent.start for extent in part)


@given(st.tuples(spaces_of(), spaces_of()))
def test_targets_name_every_page_of_every_chunk(extents: tuple[list[Extent], ...]) -> None:
    """What is to be written, chunk by chunk, is what the extents say."""
    spaces = dict(zip((PARENT, OTHER), extents, strict=True))
    named = [
        (target.space, target.start + index, chunk.number, target.offset + index)
        for chunk, listed in targets(spaces).items()
        for target in listed
        for index in range(target.pages)
    ]
    assert sorted(named) == sorted(
        (space, number, chunk, at)
        for space, listed in spaces.items()
        for number, ((source, chunk, at), _) in pages_of(listed).items()
        if source == Source.CHUNK
    )


def by_number(chunks: Mapping[Origin, bytes]) -> dict[int, bytes]:
    """The chunks as extents name them."""
    return {origin.number: raw for origin, raw in chunks.items()}


@contextmanager
def memories(spaces: Mapping[SpaceKey, Sequence[Extent]]) -> Iterator[dict[SpaceKey, int]]:
    """A file for each space that takes its pages, as /proc/PID/mem does."""
    files = {space: os.memfd_create("memory") for space in spaces}
    try:
        yield files
    finally:
        for fd in files.values():
            os.close(fd)


def read_back(
    files: Mapping[SpaceKey, int], spaces: Mapping[SpaceKey, Sequence[Extent]]
) -> dict[tuple[SpaceKey, int], tuple[bytes, bool]]:
    """Every page of the spaces, as it stands in their files."""
    return {
        (space, number): (os.pread(files[space], PAGE, number * PAGE).ljust(PAGE, b"\0"), lazy)
        for space, extents in spaces.items()
        for number, (_, lazy) in pages_of(extents).items()
    }


@given(
    st.tuples(spaces_of(), spaces_of(), spaces_of()),
    st.sampled_from([0, 64 * PAGE, 1 << 30]),
    st.integers(1, 4),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_all_is_written(extents: tuple[list[Extent], ...], ahead: int, threads: int, together: bool) -> None:
    """However much may be fetched ahead, and in whatever groups, everything gets where it belongs."""
    spaces = dict(zip((PARENT, CHILD, OTHER), extents, strict=True))
    wanted = targets(spaces)
    plan = [list(wanted)] if together and wanted else [[number] for number in wanted]
    amounts: list[tuple[int, int]] = []
    with patch.object(replay, "AHEAD_BYTES", ahead), memories(spaces) as files:
        work = Replay(wanted, plan, lambda group: ((number, CHUNKS[number]) for number in group), threads)
        work.write_to(files, lambda done, total: amounts.append((done, total)))
        assert read_back(files, spaces) == rebuilt(spaces, by_number(CHUNKS))
    total = sum(target.pages for listed in wanted.values() for target in listed) * PAGE
    assert work.written_bytes == total
    assert all(done <= total == of for done, of in amounts)


def test_no_more_is_fetched_ahead_than_allowed() -> None:
    """Until the tree is ready, no more is held than the limit, and one chunk in each thread's hand."""
    spaces = {OTHER: [Extent(at * 64, 64, Source.CHUNK, at % 4, 0) for at in range(40)]}
    chunks = CHUNKS
    wanted = {
        Origin(Source.CHUNK, number): [replay.Target(OTHER, number * 64, 0, 64)] for number in range(40)
    }
    fetched = threading.Semaphore(0)
    count = 0

    def read(group: Sequence[Origin]) -> Iterator[tuple[Origin, bytes]]:
        nonlocal count
        for origin in group:
            count += 1
            fetched.release()
            yield origin, chunks[origin._replace(number=origin.number % 4)]

    with patch.object(replay, "AHEAD_BYTES", 5 * 64 * PAGE), memories(spaces) as files:
        work = Replay(wanted, [[number] for number in wanted], read, 2)
        for _ in range(7):
            assert fetched.acquire(timeout=10)
        assert not fetched.acquire(timeout=0.1)
        assert count == 7
        work.write_to(files)
        assert read_back(files, spaces) == rebuilt(spaces, by_number(chunks))
    assert count == 40


def test_what_fails_while_fetching_is_raised() -> None:
    """An error in a thread is raised where the memory is written, and nothing waits for ever."""

    def read(group: Sequence[Origin]) -> Iterator[tuple[Origin, bytes]]:
        raise ValueError("not what its hash says")
        yield

    work = Replay({FIRST: [replay.Target(OTHER, 0, 0, 1)]}, [[FIRST]], read, 2)
    with memories({OTHER: []}) as files, pytest.raises(ValueError, match="hash"):
        work.write_to(files)


def test_given_up_nothing_more_is_written() -> None:
    """Threads that wait for the tree end when the restore is given up, and touch nothing."""
    spaces = {OTHER: [Extent(0, 64, Source.CHUNK, 0, 0)]}
    with memories(spaces):
        work = Replay(targets(spaces), [[FIRST]], lambda group: ((n, CHUNKS[n]) for n in group), 2)
        work.abandon()
        assert work.written_bytes == 0


@pytest.mark.parametrize("is_scattered", [False, True])
def test_memory_of_a_process_that_ended_is_not_waited_for(is_scattered: bool) -> None:
    """Writing into memory that is gone raises: the kernel just writes nothing, again and again."""
    child = subprocess.Popen(["sleep", "60"])
    memory = os.open(f"/proc/{child.pid}/mem", os.O_WRONLY)
    try:
        child.kill()
        child.wait()
        with pytest.raises(ProcessLookupError):
            if is_scattered:
                write_scattered(child.pid, memory, memoryview(bytes(PAGE)), [(0, 0x10000, PAGE)])
            else:
                replay.write_all(memory, memoryview(bytes(PAGE)), 0x10000)
    finally:
        os.close(memory)


@contextmanager
def own_memory(pages: int) -> Iterator[tuple[mmap.mmap, int, int]]:
    """Memory of our own, the number of its first page, and a descriptor to write it by; every ninth page is
    read-only."""
    descriptor = os.open("/proc/self/mem", os.O_WRONLY)
    area = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        with address_of(memoryview(area)) as address:
            for number in range(0, pages, 9):
                assert libc.mprotect(address + number * PAGE, PAGE, mmap.PROT_READ) == 0
            yield area, address // PAGE, descriptor
    finally:
        os.close(descriptor)


def scattered(first: int, pages: int) -> list[Extent]:
    """Each page from another place."""
    shuffled = Random(5).sample(range(pages), pages)
    return [
        Extent(first + at, 1, Source.CHUNK, place // 64, place % 64)
        for at, place in zip(range(pages), shuffled, strict=True)
    ]


@pytest.mark.parametrize("most", [1024, 7, 1])
@pytest.mark.parametrize("refusal", [0, errno.EPERM, errno.ENOSYS])
def test_what_lies_scattered_is_written_too(most: int, refusal: int) -> None:
    """Into memory of which some is read-only, and where the host does not allow the call for many parts."""

    def refuse(*_: object) -> int:
        raise OSError(refusal, "no")

    with (
        own_memory(256) as (area, first, descriptor),
        patch.object(scattered_module, "_MOST_PARTS", most),
        patch.object(kernel, "write_scattered", refuse if refusal else kernel.write_scattered),
    ):
        spaces = {OTHER: scattered(first, 256)}
        wanted = targets(spaces)
        work = Replay(wanted, [list(wanted)], lambda group: ((one, CHUNKS[one]) for one in group), 2)
        work.write_to({OTHER: descriptor}, pids={OTHER: os.getpid()})
        there = {(OTHER, first + at): (area[at * PAGE : (at + 1) * PAGE], True) for at in range(256)}
        assert there == rebuilt(spaces, by_number(CHUNKS))
    assert work.written_bytes == 256 * PAGE


def test_what_lies_scattered_takes_few_calls() -> None:
    """One for all parts of a chunk, and nothing is written page by page."""
    chunk = CHUNKS[FIRST]
    parts = [(at * PAGE, at) for at in range(0, 64, 2)]
    with own_memory(65) as (area, first, descriptor), patch.object(writing, "write_all") as page_by_page:
        whither = [(begin, (first + 1 + at % 8) * PAGE, PAGE) for begin, at in parts]
        calls = Mock(wraps=kernel.write_scattered)
        with patch.object(kernel, "write_scattered", calls):
            write_scattered(os.getpid(), descriptor, memoryview(chunk), whither)
        assert area[PAGE : 2 * PAGE] == chunk[56 * PAGE : 57 * PAGE]
    assert calls.call_count == 1
    page_by_page.assert_not_called()


def test_memory_that_is_shared_counts_once() -> None:
    """What two spaces have alike at one address, zeros and others; not what only one of them has."""
    alike = [Extent(0, 3, Source.CHUNK, 1, 0), Extent(8, 2, Source.ZERO)]
    spaces = {
        PARENT: [*alike, Extent(20, 1, Source.CHUNK, 1, 0)],
        CHILD: [*alike, Extent(20, 1, Source.WEIGHTS, 1, 0)],
    }
    assert distinct_bytes(spaces) == (2 * PAGE, 5 * PAGE)
    assert distinct_bytes({OTHER: spaces[PARENT]}) == (2 * PAGE, 4 * PAGE)
    assert distinct_bytes({}) == (0, 0)
