"""Processes that look at blocks of pages before the workers do: they hash groups, and find weights. Once they
were told what the store has, they also hash the single pages of groups that it does not have.

That is most of the work on a tree that was dumped before, or whose memory stands in files. Threads that do it
wait for Python's lock in between, and make the one that receives wait: processes do not. Where there are
processors to spare, or nobody waits for the tree to run on, they begin with the first block, else when the
workers begin. The workers take what is done; when there is none of that, they do themselves what came last,
until they meet.

Pages that are in the tree still are read there again where they are stored, and compared with what was seen
of them: should something have written to the tree meanwhile, an image has no digest of other contents.

Nothing depends on it: what it does not do, the workers do.
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import struct
import threading
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from blake3 import blake3

from crcli import kernel
from crcli.memory.blocks import (
    BLOCK_PAGES,
    DIGEST,
    GROUP_PAGES,
    KEY,
    ZERO_GROUP,
    ZERO_GROUP_DIGEST,
    Found,
    Run,
    Seen,
    heads_of,
    parts_of,
)
from crcli.memory.classify import find_weights
from crcli.memory.extents import PAGE, SpaceKey, SpaceKind
from crcli.memory.reading import read_scattered
from crcli.memory.weights.references import Piece
from crcli.memory.weights.views import View

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Set
    from types import TracebackType

    from crcli.memory.weights.match import Matcher

MOST_RUNS = 16
"""So many runs a block has at most that is looked at here: blocks of more have few whole groups."""

_MOST_GROUPS = BLOCK_PAGES // GROUP_PAGES
_GROUP_BYTES = GROUP_PAGES * PAGE
_BLOCK_BYTES = BLOCK_PAGES * PAGE
_LEAST_BLOCK_BYTES = (_MOST_GROUPS - 1) * _GROUP_BYTES
"""Blocks are hardly ever smaller; those for which there is no record are left to the workers."""

_MOST_BLOCKS = 1 << 16
"""So many are asked for at most (256 GiB): of the rest of a larger tree the workers do all."""

_ASKED = struct.Struct("<QBBI")
"""What is asked for: where the block begins (bytes), whether a worker has taken it, how many runs it has, the
process whose memory they are in still (0: they lie in the file). These follow."""

_TAKEN_AT = 8
_RUN = struct.Struct("<BQQHHB")
_COUNT = struct.Struct("<H")
_STRETCH = struct.Struct(f"<HHH{DIGEST}s")
_PIECE = struct.Struct("<IBQI")
_DIGESTS_AT = _ASKED.size + MOST_RUNS * _RUN.size
_FOUND_AT = _DIGESTS_AT + _MOST_GROUPS * DIGEST
_FOUND_ROOM = 8 << 10
"""For what is found of weights (bytes): 400 pieces. A block of which there is more is left to the workers."""

_PAGES_AT = _FOUND_AT + _FOUND_ROOM
_MOST_CHANGED = 16
"""Of so many groups in a block the pages are hashed: where more of them changed, the workers do the rest."""

_GROUP_PAGES_OF = struct.Struct(f"<H{GROUP_PAGES * DIGEST}s")
_RECORD = -(-(_PAGES_AT + _COUNT.size + _MOST_CHANGED * _GROUP_PAGES_OF.size) // PAGE) * PAGE
_NUMBER = struct.Struct("<I")
_MOST_WRITTEN = 1024
"""Numbers written to a pipe at once: so many the kernel never parts."""

_POPULATED = mmap.MAP_SHARED | mmap.MAP_POPULATE
_COVERED = bytes(DIGEST)
"""In place of the digest of a group of which pages were found in files."""


class Lookahead:
    """See the module. A context manager: leaving it ends the processes."""

    def __init__(
        self,
        fd: int,
        limit: int,
        count: int = 1,
        matcher: Matcher | None = None,
        *,
        in_place: int = 0,
        at_once: bool = False,
    ) -> None:
        """Fork `count` processes, or as many as we may, before any thread is started. Pages lie in the file
        `fd`, of `limit` bytes at most, or (about `in_place` bytes) in the tree still; weights are found by
        `matcher`. `at_once`: they need not wait until the workers begin. Raises OSError where there is no
        room for what is asked and answered."""
        self._room = min(max(limit, in_place) // _LEAST_BLOCK_BYTES + 1, _MOST_BLOCKS)
        self._shared = mmap.mmap(-1, self._room * _RECORD)
        self._known = os.memfd_create("known")
        self._runs: list[Sequence[Run]] = []
        self._handed = 0
        self._has_begun = at_once
        self._waiting: list[int] = []
        """Those that workers may take; `_given` may be among them."""
        self._done: deque[int] = deque()
        self._given: set[int] = set()
        self._lock = threading.Lock()
        tasks, self._tasks = os.pipe()
        self._answers, answers = os.pipe()
        self.pids: list[int] = []
        try:
            files = _Files(fd, self._known, tasks, answers)
            self._fork(count, lambda: _run(files, self._shared, matcher))
        except BaseException:  # a signal or a deadline: nobody would end those that have begun
            self.close()
            raise
        finally:
            os.close(tasks)
            os.close(answers)
        for end in (self._answers, self._tasks):
            os.set_blocking(end, False)

    def _fork(self, count: int, run: Callable[[], NoReturn]) -> None:
        for _ in range(count):
            try:
                pid = kernel.quiet_fork()
            except OSError:
                return
            if pid == 0:
                run()
            self.pids.append(pid)

    def learn(self, keys: bytes) -> None:
        """Take note of the groups that the store has, by the first KEY bytes of their digests, one after
        another. Comes before the first block is asked for, if at all."""
        with suppress(OSError):  # no memory: the workers hash the pages of others
            os.write(self._known, keys)

    def ask(self, offset: int, runs: Sequence[Run], owner: int = 0) -> int | None:
        """Have a block looked at that begins at `offset` (bytes), and stays as it is until `next` gives it
        out. Return its number; None where that will not be done.

        Is there an `owner`, then the block is in the memory of that process.
        """
        if len(self._runs) == self._room or not 0 < len(runs) <= MOST_RUNS or not heads_of(runs):
            return None
        number = len(self._runs)
        at = number * _RECORD
        _ASKED.pack_into(self._shared, at, offset, 0, len(runs), owner)
        for place, run in enumerate(runs):
            where = at + _ASKED.size + place * _RUN.size
            _RUN.pack_into(self._shared, where, *run.space, run.start, run.pages, run.at, run.lazy)
        with self._lock:
            self._runs.append(runs)
            self._waiting.append(number)
            if self._has_begun:
                self._hand_out()
        return number

    def begin(self) -> None:
        """Have them begin, in the background."""
        with self._lock:
            self._has_begun = True
            self._hand_out()

    def _hand_out(self) -> None:
        """Tell them what is asked for, as far as there is room for it."""
        try:
            while self._handed < len(self._runs):
                numbers = range(self._handed, min(len(self._runs), self._handed + _MOST_WRITTEN))
                os.write(self._tasks, b"".join(map(_NUMBER.pack, numbers)))
                self._handed = numbers.stop
        except OSError:
            pass  # the pipe is full for now, or they were killed: the workers do all by themselves

    def hurry(self) -> None:
        """Let them work as we do: the tree has been let go of, or waits for us."""
        for pid in self.pids:
            try:
                os.sched_setscheduler(pid, os.sched_getscheduler(0), os.sched_getparam(0))
            except OSError:
                pass  # it was killed, or stays in the background

    def next(self) -> tuple[int, Seen | None]:
        """A block that was asked for and not given out yet, and what was seen there: one that is done, or
        else the last one, with None: nobody else looks at that one then."""
        with self._lock:
            self._hear()
            if self._has_begun:
                self._hand_out()
            is_done = bool(self._done)
            number = self._done.popleft() if is_done else self._last_waiting()
            self._given.add(number)
        if is_done:
            seen = self._seen(number)
            self._shared.madvise(mmap.MADV_REMOVE, number * _RECORD, _RECORD)
            return number, seen
        self._shared[number * _RECORD + _TAKEN_AT] = 1
        return number, None

    def _hear(self) -> None:
        try:
            said = os.read(self._answers, self._room * _NUMBER.size)
        except OSError:
            return
        self._done.extend(number for (number,) in _NUMBER.iter_unpack(said) if number not in self._given)

    def _last_waiting(self) -> int:
        while (number := self._waiting.pop()) in self._given:
            pass
        return number

    def _seen(self, number: int) -> Seen:
        at = number * _RECORD
        heads = heads_of(self._runs[number])
        places = range(at + _DIGESTS_AT, at + _FOUND_AT, DIGEST)
        digests = [self._shared[place : place + DIGEST] for place, _ in zip(places, heads, strict=False)]
        return Seen(
            {head: digest for head, digest in zip(heads, digests, strict=True) if digest != _COVERED},
            _unpack_found(self._shared, at + _FOUND_AT),
            _unpack_pages(self._shared, at + _PAGES_AT),
        )

    def close(self) -> None:
        """End them; safe to call again."""
        while self.pids:
            pid = self.pids.pop()  # interrupted, this is called again: nobody else's is to be killed then
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if self._tasks >= 0:
            os.close(self._tasks)
            os.close(self._answers)
            os.close(self._known)
            self._shared.close()
        self._tasks = -1

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Files(NamedTuple):
    """Descriptors of what the processes have in common with those who ask."""

    pages: int
    known: int
    tasks: int
    answers: int


def _run(files: _Files, shared: mmap.mmap, matcher: Matcher | None) -> NoReturn:
    """What a process does."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        weights = [file.fd for file in matcher.files] if matcher is not None else []
        kernel.close_all_but(*files, *weights)
        gc.disable()  # it would touch, and so copy, all of the memory that is our parent's too
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        looking = _Looking(files, shared, matcher)
        while task := os.read(files.tasks, _NUMBER.size):
            if looking.look(*_NUMBER.unpack(task)):
                os.write(files.answers, task)
    finally:
        os._exit(0)


class _Looking:
    """One process at work."""

    def __init__(self, files: _Files, shared: mmap.mmap, matcher: Matcher | None) -> None:
        self._files = files
        self._shared = shared
        self._matcher = matcher
        self._block = memoryview(bytearray(_BLOCK_BYTES))
        self._known: frozenset[bytes] | None = None

    def look(self, number: int) -> bool:
        """Look at a block; return whether all of it was seen, and is in its record."""
        at = number * _RECORD
        offset, is_taken, count, owner = _ASKED.unpack_from(self._shared, at)
        if is_taken:
            return False
        places = range(at + _ASKED.size, at + _ASKED.size + count * _RUN.size, _RUN.size)
        runs = [_unpack_run(self._shared, place) for place in places]
        with ExitStack() as held:
            try:
                pages = self._pages(held, owner, offset, runs)
            except (OSError, ValueError):  # no address space, or no such process any more
                return False
            found = [*find_weights(self._matcher, pages, runs)] if self._matcher is not None else []
            if not _pack_found(self._shared, at + _FOUND_AT, found):
                return False
            covered = {page for one in found for page in range(one.at, one.at + one.pages)}
            return self._hash(at, pages, heads_of(runs), covered)

    def _pages(self, held: ExitStack, owner: int, offset: int, runs: Sequence[Run]) -> memoryview:
        """The pages of a block: copied, or as they lie in the file for as long as `held` holds them."""
        size = (runs[-1].at + runs[-1].pages) * PAGE
        if owner:
            block = self._block[:size]
            read_scattered(owner, block, parts_of(runs, 0, BLOCK_PAGES))
            return block
        if self._matcher is not None:  # which looks at single places of many pages
            block = self._block[:size]
            if os.preadv(self._files.pages, [block], offset) != size:
                raise OSError
            return block
        pages = mmap.mmap(self._files.pages, size, _POPULATED, mmap.PROT_READ, offset=offset)
        return held.enter_context(memoryview(held.enter_context(pages)))

    def _hash(self, at: int, pages: memoryview, heads: Sequence[int], covered: Set[int]) -> bool:
        """Note the digests of groups, and those of pages of groups that the store does not have: so near
        behind, these are still in the processor's cache."""
        known = self._keys()
        digests: list[bytes] = []
        changed: list[tuple[int, bytes]] = []
        for head in heads:
            if self._shared[at + _TAKEN_AT]:
                return False
            digest = _COVERED
            if not covered or covered.isdisjoint(range(head, head + GROUP_PAGES)):
                digest = _digest_of_group(pages, head * PAGE)
                is_known = not known or digest[:KEY] in known or digest == ZERO_GROUP_DIGEST
                if not is_known and len(changed) < _MOST_CHANGED:
                    changed.append((head, _digests_of_pages(pages, head * PAGE)))
            digests.append(digest)
        where = at + _DIGESTS_AT
        self._shared[where : where + len(digests) * DIGEST] = b"".join(digests)
        _pack_pages(self._shared, at + _PAGES_AT, changed)
        return True

    def _keys(self) -> frozenset[bytes]:
        """The keys of the groups that the store has; none where it is not known, so that all may be there."""
        if self._known is None:
            known = self._files.known
            keys = os.pread(known, os.fstat(known).st_size, 0)
            self._known = frozenset(keys[at : at + KEY] for at in range(0, len(keys), KEY))
        return self._known


def _digest_of_group(view: memoryview, begin: int) -> bytes:
    group = view[begin : begin + _GROUP_BYTES]
    return ZERO_GROUP_DIGEST if group[0] == 0 and bytes(group) == ZERO_GROUP else blake3(group).digest()


def _digests_of_pages(view: memoryview, begin: int) -> bytes:
    return b"".join(blake3(view[at : at + PAGE]).digest() for at in range(begin, begin + _GROUP_BYTES, PAGE))


def _unpack_run(shared: mmap.mmap, at: int) -> Run:
    kind, number, start, pages, place, is_lazy = _RUN.unpack_from(shared, at)
    return Run(SpaceKey(SpaceKind(kind), number), start, pages, bool(is_lazy), place)


def _pack_found(shared: mmap.mmap, at: int, found: Sequence[Found]) -> bool:
    """Note what was found from `at` on; return whether there is room for it."""
    words = [_COUNT.pack(len(found))]
    for one in found:
        words.append(_STRETCH.pack(one.at, one.pages, len(one.pieces), one.digest))
        words += (_PIECE.pack(*piece) for piece in one.pieces)
    packed = b"".join(words)
    if len(packed) <= _FOUND_ROOM:
        shared[at : at + len(packed)] = packed
    return len(packed) <= _FOUND_ROOM


def _unpack_found(shared: mmap.mmap, at: int) -> list[Found]:
    (count,) = _COUNT.unpack_from(shared, at)
    at += _COUNT.size
    found = []
    for _ in range(count):
        first, pages, parts, digest = _STRETCH.unpack_from(shared, at)
        at += _STRETCH.size
        pieces = [_PIECE.unpack_from(shared, at + number * _PIECE.size) for number in range(parts)]
        at += parts * _PIECE.size
        found.append(
            Found(first, pages, tuple(Piece(file, View(view), *rest) for file, view, *rest in pieces), digest)
        )
    return found


def _pack_pages(shared: mmap.mmap, at: int, changed: Sequence[tuple[int, bytes]]) -> None:
    """Note the digests of the pages of groups, by the first page of each, from `at` on."""
    _COUNT.pack_into(shared, at, len(changed))
    for number, group in enumerate(changed):
        _GROUP_PAGES_OF.pack_into(shared, at + _COUNT.size + number * _GROUP_PAGES_OF.size, *group)


def _unpack_pages(shared: mmap.mmap, at: int) -> dict[int, bytes]:
    """The digests that were noted, by page."""
    (count,) = _COUNT.unpack_from(shared, at)
    at += _COUNT.size
    return {
        head + page: digests[page * DIGEST : (page + 1) * DIGEST]
        for head, digests in _GROUP_PAGES_OF.iter_unpack(shared[at : at + count * _GROUP_PAGES_OF.size])
        for page in range(GROUP_PAGES)
    }
