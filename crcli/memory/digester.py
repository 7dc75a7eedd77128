"""A process that hashes groups of pages beside the workers.

Hashing takes most of the work on a tree that was dumped before, and threads that do it wait for Python's lock
in between: a process does not. It begins when the workers begin, with what came first. They take what it has
done; when there is none of that, they do themselves what came last, until they meet.

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
from typing import TYPE_CHECKING

from blake3 import blake3

from crcli import kernel
from crcli.memory.classify import DIGEST, GROUP_PAGES, ZERO_GROUP, ZERO_GROUP_DIGEST
from crcli.memory.extents import PAGE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

MOST_GROUPS = 64
"""So many groups a block has at most that is hashed here (4 MiB)."""

_GROUP_BYTES = GROUP_PAGES * PAGE
_LEAST_BLOCK_BYTES = (MOST_GROUPS - 1) * _GROUP_BYTES
"""Blocks are hardly ever smaller; those for which there is no record are left to the workers."""

_BLOCK = struct.Struct(f"<QII{MOST_GROUPS}H")
"""What is asked for: where the block begins (bytes), whether a worker has taken it, how many groups it has,
and the first page of each, counted from the beginning. In a record the digests follow, in the same order."""

_TAKEN_AT = 8
_NUMBER = struct.Struct("<I")
_RECORD = _BLOCK.size + MOST_GROUPS * DIGEST


class Digester:
    """See the module. A context manager: leaving it ends the process."""

    def __init__(self, fd: int, limit: int) -> None:
        """Fork it, before any thread is started. Pages lie in the file `fd`, of `limit` bytes at most."""
        self._room = limit // _LEAST_BLOCK_BYTES + 1
        self._shared = mmap.mmap(-1, self._room * _RECORD)
        self._asked = 0
        self._has_begun = False
        self._done: deque[int] = deque()
        self._end = 0
        self._lock = threading.Lock()
        go, self._go = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = kernel.quiet_fork()
        if self._pid == 0:
            _run(fd, self._shared, go, answers)
        os.close(go)
        os.close(answers)
        os.set_blocking(self._answers, False)

    @property
    def pid(self) -> int:
        """Its pid; 0 once it was ended."""
        return self._pid

    def ask(self, offset: int, heads: Sequence[int]) -> int | None:
        """Note groups to be hashed: those that begin at the pages `heads` of a block, which begins at
        `offset` (bytes) and stays as it is until `next` gives it out. Return the block's number; None where
        that will not be done."""
        if self._has_begun or self._asked == self._room or not 0 < len(heads) <= MOST_GROUPS:
            return None
        padding = (0,) * (MOST_GROUPS - len(heads))
        _BLOCK.pack_into(self._shared, self._asked * _RECORD, offset, 0, len(heads), *heads, *padding)
        self._asked = self._end = self._asked + 1
        return self._asked - 1

    def begin(self) -> None:
        """Have it begin, in the background; no more can be asked for."""
        if not self._has_begun:
            self._has_begun = True
            try:
                os.write(self._go, _NUMBER.pack(self._asked))
            except OSError:
                pass  # it was killed: the workers do all by themselves

    def hurry(self) -> None:
        """Let it work as we do: the tree has been let go of, or waits for us."""
        try:
            os.sched_setscheduler(self._pid, os.sched_getscheduler(0), os.sched_getparam(0))
        except OSError:
            pass  # it was killed, or stays in the background

    def next(self) -> tuple[int, list[bytes]]:
        """A block that was asked for and not given out yet, and the digests of its groups: one that is done,
        or else the last one, without digests, which will not be done then."""
        with self._lock:
            self._hear()
            if self._done:
                number = self._done.popleft()
            else:
                number = self._end = self._end - 1
                self._shared[number * _RECORD + _TAKEN_AT] = 1
                return number, []
        at = number * _RECORD
        groups = _BLOCK.unpack_from(self._shared, at)[2]
        first = at + _BLOCK.size
        places = range(first, first + groups * DIGEST, DIGEST)
        return number, [self._shared[place : place + DIGEST] for place in places]

    def _hear(self) -> None:
        try:
            said = os.read(self._answers, self._room * _NUMBER.size)
        except OSError:
            return
        self._done.extend(number for (number,) in _NUMBER.iter_unpack(said) if number < self._end)

    def close(self) -> None:
        """End it; safe to call again."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
            os.close(self._go)
            os.close(self._answers)
            self._shared.close()

    def __enter__(self) -> Digester:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run(fd: int, shared: mmap.mmap, go: int, answers: int) -> None:
    """What the process does. Never returns."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        kernel.close_all_but(fd, go, answers)
        gc.disable()  # it would touch, and so copy, all of the memory that is our parent's too
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        if asked := os.read(go, _NUMBER.size):
            for number in range(*_NUMBER.unpack(asked)):
                if _hash_groups(fd, shared, number * _RECORD):
                    os.write(answers, _NUMBER.pack(number))
    finally:
        os._exit(0)


def _hash_groups(fd: int, shared: mmap.mmap, at: int) -> bool:
    """Hash the groups of the block whose record is here; return whether all are."""
    offset, is_taken, groups, *heads = _BLOCK.unpack_from(shared, at)
    group = bytearray(_GROUP_BYTES)
    place = at + _BLOCK.size
    for head in heads[:groups]:
        if is_taken or os.preadv(fd, [group], offset + head * PAGE) != _GROUP_BYTES:
            return False
        is_zero = group.startswith(ZERO_GROUP)
        shared[place : place + DIGEST] = ZERO_GROUP_DIGEST if is_zero else blake3(group).digest()
        place += DIGEST
        is_taken = shared[at + _TAKEN_AT]
    return True
