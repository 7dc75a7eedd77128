"""Memory that comes while its processes run: what is touched comes first, all the rest in the background.

The kernel stops whoever touches a missing page and tells us (see userfault.py). One thread listens; others
fetch chunks and put their pages wherever they belong by now (see missing.py). What is fetched goes straight
to where it is wanted, the tree's own memory, so that nothing is held twice.
"""

from __future__ import annotations

import select
import threading
import time
from bisect import bisect_right
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING

from crcli.memory.extents import PAGE, Extent, Origin, Source, SpaceKey
from crcli.memory.missing import Missing, Stretch
from crcli.memory.replay import targets
from crcli.memory.userfault import Event, EventKind, MemoryGone, MemoryMoves, NoPlace, Userfault
from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from crcli.store.base import Buffer

DEMAND_THREADS = 2
"""Threads that fetch only what somebody waits for."""

_LOOK_EVERY_S = 1.0
"""How often the pager looks whether the processes are still there (seconds)."""

_FEW = 64
"""It looks at once when there are more than twice as many memories, and so many, as it left the last time."""

_MOVE_S = 0.0001
"""How long a process may take to go on once we have read what it told (seconds), before we look again."""


SMALL_PAGES = 1024
"""Memory in pieces no larger than this (4 MiB) is what programs touch first: stacks, data, small heaps."""

SMALL_LIMIT = 8192
"""Pages of such pieces that come before all else (32 MiB), the smallest first."""


def first_wanted(spaces: Mapping[SpaceKey, list[Extent]]) -> set[Origin]:
    """The sources that a tree will most likely need at once: those of its small pieces of memory.

    They are fetched while CRIU still works. Each would cost a wait of its own when the tree runs.
    """
    pieces = sorted((piece for extents in spaces.values() for piece in _pieces(extents)), key=_pages)
    found: set[Origin] = set()
    left = SMALL_LIMIT
    for piece in pieces:
        left -= _pages(piece)
        if left < 0 or _pages(piece) > SMALL_PAGES:
            break
        found.update(Origin(part.source, part.chunk) for part in piece if part.source != Source.ZERO)
    return found


def _pieces(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    """Extents that follow one another without a gap."""
    piece: list[Extent] = []
    for extent in sorted(extents):
        if piece and piece[-1].end != extent.start:
            yield piece
            piece = []
        piece.append(extent)
    if piece:
        yield piece


def _pages(piece: Iterable[Extent]) -> int:
    return sum(extent.pages for extent in piece)


_PATIENCE_S = 0.1
"""How long who waits for a page waits for the long read that brings it (seconds), before it is fetched once
more by itself."""


class _State(IntEnum):
    """How far a source is: nobody fetches it, it comes in a long read, it is fetched for who waits, here."""

    WANTED = 0
    COMING = 1
    ASKED_FOR = 2
    HERE = 3


class _Memory(Struct, eq=False):
    """The memory of one process: of one of the image, or of one that was forked meanwhile."""

    fault: Userfault
    missing: Missing
    is_forked: bool = False
    """Whether it is of no process of the image: what its parent keeps to itself (MADV_DONTFORK) has no place
    in it."""


class _Space(Struct):
    """An address space of the image, and all memories that descend from it."""

    extents: list[Extent]
    missing: Missing
    """What is missing of the process of the image."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while pages are filled in or an event is read: no page goes where it does not belong any more."""
    memories: list[_Memory] = field(default_factory=list)

    @classmethod
    def of(cls, extents: Iterable[Extent]) -> _Space:
        """A space of which all that is not zero is missing."""
        kept = sorted(extent for extent in extents if extent.source != Source.ZERO)
        return cls(kept, Missing((extent.start, extent.pages) for extent in kept))

    def source_of(self, page: int) -> Origin | None:
        """Where the bytes of a page are kept."""
        at = bisect_right(self.extents, page, key=lambda extent: extent.start) - 1
        if at < 0 or page >= self.extents[at].end:
            return None
        return Origin(self.extents[at].source, self.extents[at].chunk)


class LazyFill:
    """Fills in what is missing of running processes. `add` each, then `go`, then `wait`."""

    def __init__(
        self,
        spaces: Mapping[SpaceKey, list[Extent]],
        plan: Sequence[Sequence[Origin]],
        read: Callable[[Sequence[Origin]], Iterable[tuple[Origin, Buffer]]],
        threads: int,
        adopted: Callable[[int], None] = lambda fd: None,
    ) -> None:
        """`spaces` are the missing extents, `plan` is the order in which groups of sources are fetched.

        `adopted` is told the descriptor of each process that is forked before all is here.
        """
        self._spaces = {key: _Space.of(extents) for key, extents in spaces.items()}
        self._wanted = targets(spaces)
        self._states = dict.fromkeys(self._wanted, _State.WANTED)
        self._left = len(self._wanted)
        self._plan = deque(plan)
        self._group_of = {origin: group for group in plan for origin in group}
        self._forward: deque[Sequence[Origin]] = deque()
        """Groups of which something was touched: their neighbours most likely will be next."""
        self._waited_for: dict[Origin, float] = {}
        self._slow: set[int] = set()
        """The groups (by identity) that take long: nobody is patient with them any more."""
        self._demand: deque[Origin] = deque()
        self._read = read
        self._adopted = adopted
        self._changed = threading.Condition()
        self._may_fill = threading.Event()
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._poll = select.epoll()
        self._memory_of: dict[int, tuple[_Space, _Memory]] = {}
        if not self._left:
            self._over.set()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work, *arguments), name=name, daemon=True)
            for name, work, arguments in (
                ("events", self._listen, ()),
                *((f"demand-{number}", self._fetch, (True,)) for number in range(DEMAND_THREADS)),
                *((f"fill-{number}", self._fetch, (False,)) for number in range(threads)),
            )
        ]
        for thread in self._threads:
            thread.start()

    @property
    def missing_bytes(self) -> int:
        """How much is still to come, over all processes of the image."""
        return PAGE * sum(
            target.pages
            for origin, state in list(self._states.items())
            if state != _State.HERE
            for target in self._wanted[origin]
        )

    def add(self, key: SpaceKey, fd: int) -> None:
        """Take over the descriptor of a process of the image, which stands still as yet."""
        space = self._spaces.setdefault(key, _Space.of([]))
        with space.lock:
            self._take_in(space, _Memory(Userfault(fd), space.missing))

    def go(self) -> None:
        """From now on pages may be filled in: all processes were added, and their memory is in its place."""
        self._may_fill.set()

    def wait(self) -> None:
        """Return when nothing is missing any more, or nobody is left who misses it.

        Raises what fetching or filling raised, upon which some pages will never come.
        """
        self._over.wait()
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """Stop filling in."""
        self._over.set()
        self._may_fill.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Callable[..., None], *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as error:
            self._failure = self._failure or error
            self._over.set()

    # One thread hears of faults, and of what moves memory.

    def _listen(self) -> None:
        looked_at, many = time.monotonic(), _FEW
        while not self._over.is_set():
            for fd, _ in self._poll.poll(0.1):
                if fd in (memories := self._memory_of):
                    space, memory = memories[fd]
                    with space.lock:
                        self._read_events(space, memory)
            if self._waited_for:
                self._lose_patience()
            if time.monotonic() > looked_at + _LOOK_EVERY_S or len(self._memory_of) > many:
                self._forget_the_dead()
                looked_at = time.monotonic()
                many = 2 * len(self._memory_of) + _FEW

    def _forget_the_dead(self) -> None:
        """Let go of what has ended: the kernel does not tell, and with the store away nobody would notice."""
        for space in list(self._spaces.values()):
            with space.lock:
                for memory in [one for one in space.memories if one.fault.is_gone()]:
                    self._let_go(space, memory)

    def _read_events(self, space: _Space, memory: _Memory) -> None:
        """Read and heed all that the kernel has to tell of a memory; its space is locked."""
        try:
            faults = []
            while (event := memory.fault.read()) is not None:
                if event.kind == EventKind.PAGE_FAULT:
                    faults.append(event.start)
                else:
                    self._heed(space, memory, event)
            for page in faults:
                self._heed_fault(space, memory, page)
        except MemoryGone:
            self._let_go(space, memory)

    def _heed(self, space: _Space, memory: _Memory, event: Event) -> None:
        if event.kind == EventKind.FORK:
            self._take_in(space, _Memory(Userfault(event.fd), memory.missing.copy(), is_forked=True))
            self._adopted(event.fd)
            return
        if event.kind == EventKind.REMAP:
            memory.missing.move(event.start, event.pages, event.to)
        else:
            memory.missing.remove(event.start, event.pages)
        # Nothing comes there now: who waits there is to see that it is zero, or gone.
        memory.fault.wake(event.start, event.pages)

    def _heed_fault(self, space: _Space, memory: _Memory, page: int) -> None:
        """Have a page fetched that somebody waits for; one that was never filled is zero."""
        while (origin := memory.missing.origin_of(page)) is None:
            try:
                memory.fault.zero(page)
                return
            except MemoryMoves:
                time.sleep(_MOVE_S)
                self._read_events(space, memory)
            except NoPlace:
                return  # gone since, which is an event that woke whoever waited
        source = space.source_of(origin)
        assert source is not None
        self._ask_for(source)

    def _ask_for(self, source: Origin) -> None:
        with self._changed:
            group = self._group_of.get(source, ())
            if self._states[source] == _State.COMING and id(group) not in self._slow:
                self._waited_for.setdefault(source, time.monotonic() + _PATIENCE_S)
            elif self._states[source] < _State.ASKED_FOR:
                if self._states[source] == _State.WANTED:
                    self._forward.append(group)
                self._demand_now(source)

    def _demand_now(self, source: Origin) -> None:
        self._states[source] = _State.ASKED_FOR
        self._demand.append(source)
        self._changed.notify_all()

    def _lose_patience(self) -> None:
        """Fetch by itself what somebody waits for, and a long read has not brought for a while."""
        with self._changed:
            for source, until in list(self._waited_for.items()):
                if self._states[source] != _State.COMING:
                    del self._waited_for[source]
                elif time.monotonic() > until:
                    del self._waited_for[source]
                    self._slow.add(id(self._group_of.get(source, ())))
                    self._demand_now(source)

    def _take_in(self, space: _Space, memory: _Memory) -> None:
        space.memories.append(memory)
        self._memory_of[memory.fault.fd] = (space, memory)
        self._poll.register(memory.fault.fd, select.EPOLLIN)

    def _let_go(self, space: _Space, memory: _Memory) -> None:
        """Forget the memory of a process that has ended; its space is locked."""
        if memory in space.memories:
            space.memories.remove(memory)
            self._poll.unregister(memory.fault.fd)
            del self._memory_of[memory.fault.fd]
            memory.fault.close()
            memory.missing = Missing()
            if not any(other.memories for other in self._spaces.values()):
                self._over.set()

    # Others fetch: some only what is waited for, the rest also all that will be.

    def _fetch(self, only_demand: bool) -> None:
        while group := self._next(only_demand):
            for origin, raw in self._read(group):
                self._may_fill.wait()
                if self._over.is_set():
                    return
                self._deliver(origin, raw)

    def _next(self, only_demand: bool) -> list[Origin]:
        """What to fetch next; nothing once it is over."""
        with self._changed:
            while not self._over.is_set() and self._left:
                if group := self._choose(only_demand):
                    return group
                self._changed.wait(0.5)
        return []

    def _choose(self, only_demand: bool) -> list[Origin]:
        if self._demand:
            return [self._demand.popleft()]
        while (self._forward or self._plan) and not only_demand:
            candidates = (self._forward or self._plan).popleft()
            if group := [one for one in candidates if self._states[one] == _State.WANTED]:
                self._states.update(dict.fromkeys(group, _State.COMING))
                return group
        return []

    def _deliver(self, origin: Origin, raw: Buffer) -> None:
        """Put the pages of one source wherever they are missing."""
        view = memoryview(raw)
        for target in self._wanted[origin]:
            space = self._spaces[target.space]
            piece = view[target.offset * PAGE : (target.offset + target.pages) * PAGE]
            with space.lock:
                filled = set[_Memory]()
                while left := [one for one in space.memories if one not in filled]:
                    for memory in left:  # meanwhile they may fork: more are left then
                        self._fill(space, memory, target.start, piece)
                    filled.update(left)
        with self._changed:
            self._left -= self._states[origin] != _State.HERE
            self._states[origin] = _State.HERE
            if not self._left:
                self._over.set()
                self._changed.notify_all()

    def _fill(self, space: _Space, memory: _Memory, page: int, data: memoryview) -> None:
        """Fill in what a memory misses of these pages; its space is locked."""
        try:
            while found := memory.missing.within(page, len(data) // PAGE):
                stretch = found[0]
                begin = (stretch.origin - page) * PAGE
                try:
                    done = _copy(memory, stretch, data[begin : begin + stretch.pages * PAGE])
                except MemoryMoves as moves:
                    memory.missing.drop(stretch.origin, moves.pages)
                    self._read_events(space, memory)
                    time.sleep(_MOVE_S)
                else:
                    memory.missing.drop(stretch.origin, done)
        except MemoryGone:
            self._let_go(space, memory)

    def close(self) -> None:
        """Let go of all memories: whatever is still missing in them becomes zeros."""
        for _, memory in self._memory_of.values():
            memory.fault.close()
        self._memory_of.clear()
        self._poll.close()


def _copy(memory: _Memory, stretch: Stretch, data: memoryview) -> int:
    """Fill in the beginning of a stretch, as much as the kernel takes at once; return how many pages.

    It takes nothing that reaches beyond one mapping, so less is tried then.
    """
    pages = stretch.pages
    while True:
        try:
            done = memory.fault.copy(stretch.start, data[: pages * PAGE])
            break
        except NoPlace:
            if pages == 1 and not memory.is_forked:
                raise
            if pages == 1:
                return 1
            pages //= 2
    if not done:
        memory.fault.wake(stretch.start, 1)
    return max(done, 1)
