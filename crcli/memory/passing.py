"""Processes that hash pages on their way in: for a tree of which the store has nearly everything.

Such a tree's pages need not be put aside, for which memory had to be got before and which is a copy of it
all. They are handed on, as the kernel's pages that they are, through one pipe to each process, which brings
them into a block that is ours too, and hashes each whole group while it is in the processor's cache. What is
known is forgotten then; what is not is still in the block. A block is used again as soon as it was worked on.

Threads could not do it: each waits for Python's lock after every group, and so would the one that receives.
"""

from __future__ import annotations

import fcntl
import gc
import mmap
import os
import signal
import struct
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

from blake3 import blake3

from crcli import kernel
from crcli.errors import DumpFailed, TreeState
from crcli.memory.classify import (
    BLOCK_PAGES,
    DIGEST,
    GROUP_PAGES,
    ZERO_GROUP,
    ZERO_GROUP_DIGEST,
    heads_of,
)
from crcli.memory.extents import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from crcli.memory.classify import Run
    from crcli.store.base import Buffer

BLOCKS = 8
"""Blocks that pages are brought into: so few of them stay in a processor's cache."""

_BLOCK_BYTES = BLOCK_PAGES * PAGE
_DIGESTS_BYTES = BLOCK_PAGES // GROUP_PAGES * DIGEST
_DIGESTS_AT = BLOCKS * _BLOCK_BYTES
_PIECE_PAGES = 8 * GROUP_PAGES
"""What one process is given at once; the next goes to the next one."""

_PIPE_BYTES = 1 << 20
_PIECE = struct.Struct("<HHHH")
"""What is said before the pages of a piece: their block, their place in it, how many there are, and how many
come before the first that begins a group. A piece of no pages ends a block."""

_DONE = b"."
_FIRST = 64
"""So many bytes of a group tell whether it is worth comparing with zeros."""


class Passing:
    """See the module. A context manager: leaving it ends the processes."""

    def __init__(self, count: int) -> None:
        """Fork `count` processes, before any thread is started. Raises OSError where that cannot be."""
        self._shared = mmap.mmap(-1, _DIGESTS_AT + BLOCKS * _DIGESTS_BYTES)
        self._memory = memoryview(self._shared)
        self._pids: list[int] = []
        self._pipes: list[int] = []
        self._answers: list[int] = []
        self._hashed: list[set[int]] = [set() for _ in range(BLOCKS)]
        """The first pages of the groups of a block that the processes hash."""
        self._done = [0] * count
        self._turn = 0
        self._ended = 0
        self._hearing = threading.Lock()
        self._ending = threading.Lock()
        try:
            for _ in range(count):
                self._fork()
        except BaseException:
            self.close()
            raise

    def _fork(self) -> None:
        pages, ours = os.pipe()
        answers, theirs = os.pipe()
        self._pipes.append(ours)
        self._answers.append(answers)
        try:
            pid = kernel.quiet_fork()
            if pid == 0:
                _run(self._memory, pages, theirs)
            self._pids.append(pid)
        finally:
            os.close(pages)
            os.close(theirs)

    def begin(self) -> None:
        """Get ready: from now on a tree waits for them."""
        for pid, pipe in zip(self._pids, self._pipes, strict=True):
            try:
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            except OSError:  # the user's pipe budget is spent; a small pipe works as well, slower
                pass
            try:
                os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, 0))
            except OSError:
                pass

    # The thread that receives.

    def open(self, block: int) -> None:
        """Pages come for a block that nobody uses."""
        self._hashed[block] = set()

    def splice(self, source: int, block: int, run: Run) -> None:
        """Hand on a run's pages, which come next in the socket `source`, to be brought into a block.

        Raises ConnectionError when the socket ends, DumpFailed when a process was killed.
        """
        with _all_living():
            for pipe, _, pages in self._pieces(block, run):
                left = pages * PAGE
                while left:
                    got = os.splice(source, pipe, left)
                    if not got:
                        raise ConnectionError("CRIU closed the page connection in the middle of a run")
                    left -= got

    def put(self, block: int, run: Run, data: memoryview) -> None:
        """Hand on a run's pages that are here. Raises DumpFailed when a process was killed."""
        with _all_living():
            for pipe, first, pages in self._pieces(block, run):
                _write(pipe, data[first * PAGE : (first + pages) * PAGE])

    def _pieces(self, block: int, run: Run) -> Iterator[tuple[int, int, int]]:
        """For each piece of a run the pipe that it goes into next, its first page in the run, and its pages.

        None parts a group.
        """
        first = 0
        while first < run.pages:
            start, at = run.start + first, run.at + first
            pages = min(run.pages - first, _PIECE_PAGES - start % GROUP_PAGES)
            loose = min(pages, -start % GROUP_PAGES)
            pipe = self._pipes[self._turn]
            self._turn = (self._turn + 1) % len(self._pipes)
            _write(pipe, _PIECE.pack(block, at, pages, loose))
            yield pipe, first, pages
            self._hashed[block].update(_heads(at + loose, at + pages))
            first += pages

    def end(self, block: int) -> int:
        """No more pages come for a block. Return the number by which `digests` waits for it.

        Raises DumpFailed when a process was killed.
        """
        with _all_living():
            for pipe in self._pipes:
                _write(pipe, _PIECE.pack(block, 0, 0, 0))
        self._ended += 1
        return self._ended

    # The workers.

    def digests(self, block: int, number: int, runs: Sequence[Run]) -> dict[int, bytes]:
        """The digests of all whole groups of a block with these runs, by first page, once its pages are here.

        `number` is what `end` has said. Raises DumpFailed when a process was killed.
        """
        self._wait_for(number)
        hashed, record = self._hashed[block], _DIGESTS_AT + block * _DIGESTS_BYTES
        found: dict[int, bytes] = {}
        for head in heads_of(runs):
            if head in hashed:
                place = record + head // GROUP_PAGES * DIGEST
                found[head] = self._shared[place : place + DIGEST]
            else:  # its pages came in two runs
                found[head] = blake3(self.pages(block, head, head + GROUP_PAGES)).digest()
        return found

    def pages(self, block: int, begin: int, end: int) -> memoryview:
        """The pages of a block from `begin` to `end`, once its digests were got."""
        at = block * _BLOCK_BYTES
        return self._memory[at + begin * PAGE : at + end * PAGE]

    def _wait_for(self, number: int) -> None:
        """Return when all processes have answered for so many blocks."""
        with self._hearing:
            for which, answers in enumerate(self._answers):
                while self._done[which] < number:
                    said = os.read(answers, BLOCKS)
                    if not said:
                        raise _killed()
                    self._done[which] += len(said)

    # Everybody.

    def give_up(self) -> None:
        """Have nobody wait for the processes any more. Called from several threads."""
        with self._ending:
            for pid in self._pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            self._pids = []

    def close(self) -> None:
        """End the processes; safe to call again. Nobody else uses them any more."""
        self.give_up()
        for end in (*self._pipes, *self._answers):
            os.close(end)
        self._pipes, self._answers = [], []
        with suppress(BufferError):  # a worker that failed still has some of it: it goes with the last
            self._memory.release()
            self._shared.close()

    def __enter__(self) -> Passing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _killed() -> DumpFailed:
    return DumpFailed(
        "a process that hashes pages was killed",
        hint="run it again; the kernel kills processes where memory is short (`dmesg`)",
        state=TreeState.RUNNING,
    )


@contextmanager
def _all_living() -> Iterator[None]:
    """Within the block, that nobody reads from a pipe any more means that a process was killed."""
    try:
        yield
    except BrokenPipeError as error:
        raise _killed() from error


def _heads(begin: int, end: int) -> range:
    """The first pages of the groups between these pages of a block, if one begins at `begin`."""
    return range(begin, end - GROUP_PAGES + 1, GROUP_PAGES)


def _write(pipe: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(pipe, view) :]


def _run(memory: memoryview, pages: int, answers: int) -> NoReturn:
    """What a process does."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        kernel.close_all_but(pages, answers)
        gc.disable()  # it would touch, and so copy, all of the memory that is our parent's too
        said = memoryview(bytearray(_PIECE.size))
        while _fill(pages, said):
            block, at, count, loose = _PIECE.unpack(said)
            if count:
                _take(memory, pages, block, at, count, loose)
            else:
                os.write(answers, _DONE)
    finally:
        os._exit(0)


def _take(memory: memoryview, pages: int, block: int, at: int, count: int, loose: int) -> None:
    """Bring a piece into its block; each of its groups is hashed at once."""
    first, end = block * _BLOCK_BYTES, at + count
    record = _DIGESTS_AT + block * _DIGESTS_BYTES
    heads = _heads(at + loose, end)
    _fill(pages, memory[first + at * PAGE : first + (at + loose) * PAGE])
    for head in heads:
        group = memory[first + head * PAGE : first + (head + GROUP_PAGES) * PAGE]
        _fill(pages, group)
        place = record + head // GROUP_PAGES * DIGEST
        memory[place : place + DIGEST] = _digest(group)
    rest = heads[-1] + GROUP_PAGES if heads else at + loose
    _fill(pages, memory[first + rest * PAGE : first + end * PAGE])


def _digest(group: memoryview) -> bytes:
    if bytes(group[:_FIRST]) == ZERO_GROUP[:_FIRST] and bytes(group) == ZERO_GROUP:
        return ZERO_GROUP_DIGEST
    return blake3(group).digest()


def _fill(pipe: int, view: memoryview) -> bool:
    """Fill `view`; return False when the pipe has ended, which nobody does but who is ending us."""
    while view:
        got = os.readv(pipe, [view])
        if not got:
            return False
        view = view[got:]
    return True
