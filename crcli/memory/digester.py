"""A process that hashes groups of pages beside the workers, from before they may begin.

To move a tree's memory aside takes one core, and half of another: CRIU mostly waits. What is left of that one
hashes what has come so far, at the lowest priority that there is. It is a process, not a thread, so that the
thread that receives never waits for Python's lock meanwhile. Once the workers begin, with what came first, it
goes on with what came last, until they meet.

Nothing depends on it: what it has not done when a worker comes to it, the worker does.
"""

from __future__ import annotations

import gc
import mmap
import os
import select
import signal
import struct
import threading
from typing import TYPE_CHECKING, NamedTuple

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

_REQUEST = struct.Struct(f"<IIQ{MOST_GROUPS}H")
_DONE = struct.Struct("<I")
_RECORD = MOST_GROUPS * DIGEST
_READ_REQUESTS = 64


class _Request(NamedTuple):
    """A block: which one, where it begins (bytes), and the first pages of its groups, counted from there."""

    number: int
    offset: int
    heads: tuple[int, ...]


class Digester:
    """See the module. A context manager: leaving it ends the process."""

    def __init__(self, fd: int, limit: int) -> None:
        """Fork it, before any thread is started. Pages lie in the file `fd`, of `limit` bytes at most."""
        self._count = limit // _LEAST_BLOCK_BYTES + 1
        self._shared = mmap.mmap(-1, self._count * (_RECORD + 1))  # the records, then a byte for each: taken
        self._asked = 0
        self._done: set[int] = set()
        self._lock = threading.Lock()
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = kernel.quiet_fork()
        if self._pid == 0:
            _run(fd, requests, answers, self._shared, self._count)
        os.close(requests)
        os.close(answers)
        os.set_blocking(self._requests, False)
        os.set_blocking(self._answers, False)

    @property
    def pid(self) -> int:
        """Its pid; 0 once it was ended."""
        return self._pid

    def ask(self, offset: int, heads: Sequence[int]) -> int | None:
        """Have groups hashed: those that begin at the pages `heads` of a block, which begins at `offset`
        (bytes) and stays as it is until it is taken. Return the number to take them by; None where it will
        not be done. Never waits."""
        if self._asked == self._count or not heads or len(heads) > MOST_GROUPS:
            return None
        padding = (0,) * (MOST_GROUPS - len(heads))
        try:
            os.write(self._requests, _REQUEST.pack(self._asked, len(heads), offset, *heads, *padding))
        except OSError:  # it is behind, or was killed
            return None
        self._asked += 1
        return self._asked - 1

    def hurry(self) -> None:
        """Let it work as we do: nobody waits for the core that it needs any more."""
        try:
            os.sched_setscheduler(self._pid, os.sched_getscheduler(0), os.sched_getparam(0))
        except OSError:
            pass  # it was killed, or stays in the background

    def take(self, number: int, count: int) -> list[bytes] | None:
        """The digests of the `count` groups of a block, if they are there. It is not worked on any more."""
        with self._lock:
            self._shared[self._count * _RECORD + number] = 1
            self._hear()
            if number not in self._done:
                return None
        at = number * _RECORD
        return [self._shared[place : place + DIGEST] for place in range(at, at + count * DIGEST, DIGEST)]

    def _hear(self) -> None:
        try:
            said = os.read(self._answers, self._count * _DONE.size)
        except OSError:
            return
        self._done.update(number for (number,) in _DONE.iter_unpack(said))

    def close(self) -> None:
        """End it; safe to call again."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
            os.close(self._requests)
            os.close(self._answers)
            self._shared.close()

    def __enter__(self) -> Digester:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# The process itself.


def _run(fd: int, requests: int, answers: int, shared: mmap.mmap, count: int) -> None:
    """What it does until nobody can ask any more. Never returns."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        kernel.close_all_but(fd, requests, answers)
        gc.disable()  # it would touch, and so copy, all of the memory that we share with our parent
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        _serve(fd, requests, answers, shared, count)
    finally:
        os._exit(0)


def _serve(fd: int, requests: int, answers: int, shared: mmap.mmap, count: int) -> None:
    group = bytearray(_GROUP_BYTES)
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    left: list[_Request] = []
    while True:
        while poll.poll(0 if left else None):
            said = os.read(requests, _READ_REQUESTS * _REQUEST.size)
            if not said:
                return
            left += map(_request, _REQUEST.iter_unpack(said))
        number, offset, heads = left.pop()  # the newest: it may still be in the processor's cache
        if shared[count * _RECORD + number]:
            continue
        at = number * _RECORD
        for head in heads:
            if os.preadv(fd, [group], offset + head * PAGE) != _GROUP_BYTES:
                return
            is_zero = group.startswith(ZERO_GROUP)
            shared[at : at + DIGEST] = ZERO_GROUP_DIGEST if is_zero else blake3(group).digest()
            at += DIGEST
        os.write(answers, _DONE.pack(number))


def _request(fields: tuple[int, ...]) -> _Request:
    number, groups, offset, *heads = fields
    return _Request(number, offset, tuple(heads[:groups]))
