"""The kinds of memory that are measured. Each can be read, hashed and changed by its owner, and by no other.

`random` cannot be compressed; `half-zero` has zeros in every other 64 KiB, resident like the rest; `heap` is
what Python makes of records (millions of small objects, whose bytes compress); `mappings` are so many small
ones that no run of pages is long; the memory of `threads` and of `processes` is shared out, and each of them
answers for its own.
"""

from __future__ import annotations

import ctypes
import json
import marshal
import mmap
import os
import random
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from blake3 import blake3

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
MIB = 1 << 20
CHANGED_SHARE = 0.01

MAPPINGS = 2000
THREADS = 500
PROCESSES = 50
ZERO_RUN = 64 << 10


class Memory(Protocol):
    """Memory of a subject."""

    def read(self) -> None:
        """Read all of it, at least one byte of each page."""

    def digest(self) -> bytes:
        """The hash of all of it."""

    def change(self) -> None:
        """Change one page in a hundred, anywhere."""


class Mapped:
    """Anonymous mappings, hashed in their order."""

    def __init__(self, parts: list[memoryview]) -> None:
        self.parts = parts

    def read(self) -> None:
        """Read one byte of each page."""
        for part in self.parts:
            part[::PAGE].tobytes()

    def digest(self) -> bytes:
        """The hash of all bytes."""
        found = blake3()
        for part in self.parts:
            found.update(part)
        return found.digest()

    def change(self) -> None:
        """Give pages anywhere new random bytes."""
        pages = [(part, at) for part in self.parts for at in range(0, len(part), PAGE)]
        for part, at in random.sample(pages, _one_in_a_hundred(len(pages))):
            part[at : at + PAGE] = os.urandom(PAGE)


class Heap:
    """Records as a program has them, in batches."""

    WORDS = ("state", "token", "prompt", "answer", "value", "agent", "memory", "tool", "result", "error")
    BATCH = 200

    def __init__(self, size: int) -> None:
        end = _resident_bytes() + size
        self.batches: list[list[dict[str, Any]]] = []
        while _resident_bytes() < end:
            self.batches.append(self._batch())

    def read(self) -> None:
        """Walk through every object."""
        self.digest()

    def digest(self) -> bytes:
        """The hash of all values; references are not counted on the way, so no page is written."""
        found = blake3()
        for batch in self.batches:
            found.update(marshal.dumps(batch, 2))
        return found.digest()

    def change(self) -> None:
        """Give one record in a hundred, side by side, other values."""
        count = max(1, round(len(self.batches) * CHANGED_SHARE))
        first = random.randrange(len(self.batches) - count + 1)
        for batch in self.batches[first : first + count]:
            for record in batch:
                record["score"], record["text"] = random.random(), self._text()

    def _batch(self) -> list[dict[str, Any]]:
        return [
            {
                "id": number,
                "role": "user",
                "text": self._text(),
                "score": random.random(),
                "tokens": random.choices(range(1000, 50_000), k=16),
            }
            for number in range(self.BATCH)
        ]

    def _text(self) -> str:
        return " ".join(random.choices(self.WORDS, k=20))


class Threads:
    """Memory of so many threads. Each waits, and handles its own memory when it is asked."""

    def __init__(self, count: int, make: Callable[[], Memory]) -> None:
        self.owners = [_Owner(make()) for _ in range(count)]

    def read(self) -> None:
        """Have each thread read its memory."""
        self._all("read")

    def digest(self) -> bytes:
        """The hash of all threads' hashes."""
        return blake3(b"".join(self._all("digest"))).digest()

    def change(self) -> None:
        """Have each thread change a part of its memory."""
        self._all("change")

    def _all(self, task: str) -> list[Any]:
        for owner in self.owners:
            owner.begin(task)
        return [owner.end() for owner in self.owners]


class _Owner(threading.Thread):
    """A thread with memory of its own."""

    def __init__(self, memory: Memory) -> None:
        super().__init__(daemon=True)
        self.memory = memory
        self._task = ""
        self._found: Any = None
        self._asked, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def begin(self, task: str) -> None:
        self._task = task
        self._asked.release()

    def end(self) -> Any:
        self._done.acquire()
        return self._found

    def run(self) -> None:
        while True:
            self._asked.acquire()
            self._found = getattr(self.memory, self._task)()
            self._done.release()


class Processes:
    """Memory of so many children: each is a subject of its own, and is asked as a subject is."""

    def __init__(self, count: int, report_path: str, serve: Callable[[str], None]) -> None:
        self.children: list[tuple[int, str]] = []
        for number in range(count):
            path = f"{report_path}.{number}"
            pid = os.fork()
            if not pid:
                serve(path)
            self.children.append((pid, path))
        self.reports = [_appeared(path) for _, path in self.children]

    def read(self) -> None:
        """Nothing: each child reads its memory when it notices that it stood still."""

    def digest(self) -> bytes:
        """The hash of all children's hashes; `reports` are what they said."""
        self._ask(signal.SIGUSR2)
        return blake3("".join(report["hash"] for report in self.reports).encode()).digest()

    def change(self) -> None:
        """Have each child change a part of its memory."""
        self._ask(signal.SIGUSR1)

    def _ask(self, how: signal.Signals) -> None:
        for pid, path in self.children:
            if os.path.exists(path):
                os.unlink(path)
            os.kill(pid, how)
        self.reports = [_appeared(path) for _, path in self.children]


def _appeared(path: str) -> dict[str, Any]:
    """What a child reports, once it does."""
    while True:
        try:
            with open(path) as file:
                report: dict[str, Any] = json.load(file)
                return report
        except FileNotFoundError:
            time.sleep(0.002)


def random_bytes(size: int) -> Mapped:
    """One mapping of random bytes."""
    return Mapped([_filled(size)])


def half_zero(size: int) -> Mapped:
    """One mapping: random bytes and zeros by turns, all of them written."""
    memory = _filled(size)
    for at in range(0, size, 2 * ZERO_RUN):
        memory[at : at + ZERO_RUN] = bytes(ZERO_RUN)
    return Mapped([memory])


def small_mappings(size: int) -> Mapped:
    """MAPPINGS mappings of random bytes, each with a page behind it that nobody may touch."""
    return Mapped([_filled(_share(size, MAPPINGS), guard=True) for _ in range(MAPPINGS)])


def threads(size: int) -> Threads:
    """THREADS threads that share the size."""
    return Threads(THREADS, lambda: random_bytes(_share(size, THREADS)))


MAKERS: dict[str, Callable[[int], Memory]] = {
    "random": random_bytes,
    "half-zero": half_zero,
    "heap": Heap,
    "mappings": small_mappings,
    "threads": threads,
}
"""What makes so many bytes of each kind; `processes` are made by the subject itself."""

KINDS = (*MAKERS, "processes")


def share_of_process(size: int) -> int:
    """How many bytes each of the PROCESSES has."""
    return _share(size, PROCESSES)


def _share(size: int, owners: int) -> int:
    return max(PAGE, size // owners // PAGE * PAGE)


def _one_in_a_hundred(count: int) -> int:
    """On the average exactly that many, also where many owners have a few each."""
    return int(count * CHANGED_SHARE + random.random())


def _filled(size: int, *, guard: bool = False) -> memoryview:
    """A new mapping of random bytes; with a guard, one that the kernel cannot join with its neighbours."""
    memory = mmap.mmap(-1, size + guard * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if guard:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(PAGE), 0):
            raise OSError("mprotect")
    view = memoryview(memory)[:size]
    for at in range(0, size, MIB):
        view[at : at + MIB] = os.urandom(min(MIB, size - at))
    return view


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE
