"""Pages taken in: first out of the tree's way, then classified and handed on.

One thread receives. What it receives goes into an overflow area (memory of a file that is mounted nowhere,
bounded by what the host has to spare) without passing through this process and, when that is full, into a
few blocks of our own. Until all pages are here the workers wait at a gate, so that the tree stands frozen
for little more than one copy of its memory. Then (or as soon as all blocks are full) one block after
another is classified (see classify.py), and what is new is handed to the sink. Without a free block the
receiver waits, the socket fills, and CRIU waits too: memory stays bounded and nothing is dropped. Blocks go
before what lies in the overflow, so that a tree that does not fit stands frozen until the rest is stored, and
not until all is.

Where the tree stands still until all is done, a process's own anonymous pages are not taken out of it: a list
of them is kept, and each block is read in the process. Where CRIU can be had to leave pages in the tree
(crcli.criu.left_pages) it only names them. What is there still a second after `finish` was called is copied
after all, as far as there is room: who kills the tree once that is done takes no image with him.

A dump may come in rounds, the last of which alone finds the tree frozen. Those before it use neither the gate
nor the overflow.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from crcli.errors import DumpFailed, TreeState
from crcli.kernel import signals_held
from crcli.memory.blocks import BLOCK_PAGES, GROUP_PAGES, Ahead, Run, Seen, parts_of
from crcli.memory.classify import Classified, Classifier, MemoryCounts
from crcli.memory.extents import PAGE, Extent, SpaceKey, SpaceKind, join
from crcli.memory.pagemap import PageRun
from crcli.memory.reading import read_scattered
from crcli.memory.replay import AMOUNT_EVERY_S
from crcli.memory.spill import Overflow, Spill
from crcli.process.identity import ProcessId, identify
from crcli.records import Struct, field
from crcli.threads import Worker, start_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence

    from crcli.memory.chunking import ChunkSink
    from crcli.memory.classify import KnownPages
    from crcli.memory.huge import Runs
    from crcli.memory.lookahead import Lookahead
    from crcli.memory.scattered import Part
    from crcli.memory.weights.match import Matcher

BLOCK_COUNT = 16
"""Blocks of crcli's own memory: with 4 MiB each, what it holds of a tree's pages beyond the overflow."""

_SAVE_AFTER_S = 1.0
"""What is in the tree still when `finish` has waited for so long (seconds), because the store takes its time,
is copied out of it as far as there is room: should somebody kill the tree by then, its image comes to be all
the same."""

_KEEP_RUN, _KEEP_PAGES = 64, 16 << 10
"""Early pages that are kept for the trial: runs up to this long, and so many pages in all (64 MiB)."""

_LONGEST_VDSO, _ELF = 8, b"\x7fELF"
"""How many pages the kernel's own code in each process (vdso) has at most, and how it begins."""


class _Pages(Struct):
    """Pages that go the same way: what is known of each run, and how many there are."""

    runs: list[Run] = field(default_factory=list)
    used: int = 0
    owner: ProcessId | None = None
    """The process whose memory they are in still; None: they were taken out of it."""

    def next_run(self, space: SpaceKey, start: int, pages: int, lazy: bool) -> Run:
        """As much of a run as there is room for; if that is not all of it, it ends with a whole group."""
        room = BLOCK_PAGES - self.used
        if pages > room:
            pages = max(0, room - (start + room) % GROUP_PAGES)
        return Run(space, start, pages, lazy, self.used)

    def add(self, run: Run) -> None:
        """Note that the pages of a run are here."""
        last = self.runs[-1] if self.runs else None
        if last is not None and run == last._replace(
            start=last.start + last.pages, at=last.at + last.pages, pages=run.pages
        ):
            self.runs[-1] = last._replace(pages=last.pages + run.pages)
        else:
            self.runs.append(run)
        self.used += run.pages


class _Block(_Pages):
    """Pages in memory of our own."""

    memory: bytearray = field(default_factory=lambda: bytearray(BLOCK_PAGES * PAGE))


class _Aside(_Pages):
    """A block's worth of pages that was spilled, to `offset` (bytes), unless it has an owner."""

    offset: int = 0
    number: int | None = None
    """Its number among the blocks that are looked at ahead, if it is one of them."""
    seen_in: ProcessId | None = None
    """The owner that it had when it was asked that it be looked at."""
    is_begun: bool = False
    """Whether a worker has it."""


class _Changed(Exception):
    """Pages that are needed are not what was seen of them ahead: something writes to memory that stands
    still."""


class Taken(NamedTuple):
    """What a round brought: the extents of each space, sorted and joined, pages left as they were, counts."""

    spaces: dict[SpaceKey, list[Extent]]
    inherited: dict[SpaceKey, list[PageRun]]
    counts: MemoryCounts


class Intake:
    """Turns runs of pages into extents and chunks. `receive` and `flush` belong to one receiving thread."""

    def __init__(
        self,
        known: KnownPages | None,
        sink: ChunkSink,
        overflow: Overflow | None = None,
        matcher: Matcher | None = None,
        workers: int = 2,
        lookahead: Lookahead | None = None,
        owner_of: Callable[[SpaceKey], int] | None = None,
    ) -> None:
        """`owner_of` names the process that a space belongs to (0: none that is known). Is it given, the tree
        stands still until `finish` has returned, and what can be read there is not taken out of it."""
        self._classifier = Classifier(known, sink, matcher)
        self._matcher = matcher
        self._doubtful: list[tuple[_Aside, Classified]] = []
        self._believed: set[int] = set()
        self._spill = Spill(overflow)
        self._lookahead = lookahead
        self._asked: dict[int, _Aside] = {}
        self._owner_of = owner_of
        self._owners: dict[SpaceKey, ProcessId | None] = {}
        self._unproven: set[ProcessId] = set()
        """Processes that CRIU's own code ran in when they had been read: they must stand still at the end."""
        self._is_worth_a_look = matcher is not None
        """Whether to look ahead at pages that are in the tree: some are to be found elsewhere."""
        self.has_left_pages = False
        """Whether pages were read in the tree, or will be, which so must have stood still."""
        self._in_place: list[_Aside] = []
        """Blocks that were left where they are, until they are copied out of the tree."""
        self._saver: Worker | None = None
        self._gate = threading.Event()
        self._blocks = threading.Semaphore(BLOCK_COUNT)
        self._spare: list[_Block] = []
        self._full: queue.SimpleQueue[_Block] = queue.SimpleQueue()
        self._aside: queue.SimpleQueue[_Aside | None] = queue.SimpleQueue()
        self._waiting = threading.Semaphore(0)
        """As many as there are in both."""
        self._open: dict[ProcessId | None, _Block | _Aside] = {}
        """What is being filled, by its owner."""
        self._lock = threading.Lock()
        self._spaces: dict[SpaceKey, list[list[Extent]]] = {}
        self._counts = MemoryCounts()
        self._failure: BaseException | None = None
        self.kept: dict[SpaceKey, list[tuple[int, bytes]]] = {}
        """Short runs of pages that CRIU itself looks at (the vdso among them), by first page number."""
        self._kept_pages = 0
        self._received = 0
        self._worker_count = workers
        self._workers: list[Worker] = []
        self._start_workers()
        self._is_last = True
        self._parents: Container[SpaceKey] = ()
        self.inherited: dict[SpaceKey, list[PageRun]] = {}
        """Pages of which CRIU says that they are as the round before sent them."""
        self._kept_before: dict[SpaceKey, list[tuple[int, bytes]]] = {}
        self.leaves_pages = False
        """Whether CRIU was told that an earlier round has sent all pages: `take_left` reads them."""
        self._left: dict[SpaceKey, list[PageRun]] = {}

    def learn(self, known: KnownPages, group_keys: bytes = b"") -> None:
        """Take note of what the store has, before the first page comes. `group_keys` are the first bytes of
        its groups' digests, by which it is seen ahead of which groups the pages will be asked for."""
        self._classifier.known = known
        self._is_worth_a_look |= bool(group_keys)
        if self._lookahead is not None:
            self._lookahead.learn(group_keys)

    def _start_workers(self) -> None:
        start_workers(self._workers, self._worker_count, self._work, "intake", self.close)

    # A dump in rounds.

    def begin_round(self, parents: Container[SpaceKey], *, is_last: bool) -> None:
        """Expect a round: of the spaces in `parents`, an earlier one's pages may be inherited.

        Shared memory counts in the last round only: who writes to it other than through a mapping of the
        tree's own leaves no trace that could be tracked.
        """
        self._parents = parents
        self._is_last = is_last
        if not is_last:
            self.open_gate()  # nobody waits for us

    def end_round(self) -> Taken:
        """Wait for the workers; return what this round brought. The next one starts afresh."""
        self.flush()
        self.close()
        self._raise_failure()
        self._classifier.finish()
        taken = Taken(self._joined(), self.inherited, self._counts)
        self._kept_before, self.kept = self.kept, {}
        self._spaces, self.inherited, self._counts = {}, {}, MemoryCounts()
        self._kept_pages = self._received = 0
        self._gate.clear()
        self._start_workers()
        return taken

    def has_parent(self, space: SpaceKey) -> bool:
        """Whether pages of this space may be inherited, or left in the tree."""
        if space.kind != SpaceKind.PROCESS:
            return False
        return space in self._parents or (self.leaves_pages and self._owner(space) is not None)

    def inherit(self, space: SpaceKey, start: int, pages: int) -> None:
        """Note pages that are as the round before sent them, or that are left in the tree."""
        run = PageRun(start, start + pages)
        if self.leaves_pages:
            self._left.setdefault(space, []).append(run)
            return
        self.inherited.setdefault(space, []).append(run)
        self.kept[space] += _within(self._kept_before.get(space, []), run)

    # What comes.

    def begin_space(self, space: SpaceKey) -> None:
        """Note that an address space exists, even if no page of it should come."""
        with self._lock:
            self._spaces.setdefault(space, [])
        self.kept.setdefault(space, [])

    def receive(self, channel: socket.socket, space: SpaceKey, start: int, pages: int, lazy: bool) -> None:
        """Take `pages` pages of a run out of `channel`, in which nothing but their bytes comes next.

        Blocks while all memory is in use. Raises what a worker has died of, if one has, and
        ConnectionError when the channel ends.
        """
        if space.kind == SpaceKind.SHARED and not self._is_last:
            self._pass_over(channel, pages)
            return
        for into, run in self._places(space, start, pages, lazy, may_stay=lazy):
            if into.owner:
                self._spill.discard(channel.fileno(), run.pages * PAGE)
            else:
                self._keep_early(run, self._receive_run(into, channel, run))

    def _pass_over(self, channel: socket.socket, pages: int) -> None:
        nowhere = memoryview(bytearray(min(pages, BLOCK_PAGES) * PAGE))
        while pages:
            view = nowhere[: pages * PAGE]
            receive_exactly(channel, view)
            pages -= len(view) // PAGE

    def take(self, space: SpaceKey, start: int, data: bytes, lazy: bool) -> None:
        """Take pages that were read elsewhere, as `receive` takes them out of a channel."""
        for into, run in self._places(space, start, len(data) // PAGE, lazy):
            self._put(into, run, memoryview(data)[(run.start - start) * PAGE :][: run.pages * PAGE])

    def take_left(self, lazy_of: Callable[[SpaceKey], Runs]) -> None:
        """Take note of the pages that CRIU has left, now that it waits for us, and take those that it needs
        itself: all but the lazy ones, which `lazy_of` tells for each space."""
        left, self._left = self._left, {}
        self.has_left_pages |= bool(left)
        for space, runs in left.items():
            owner, lazy = self._owner(space), lazy_of(space)
            assert owner is not None
            for start, end, is_lazy in (part for run in runs for part in lazy.divide(*run)):
                for into, run in self._places(space, start, end - start, is_lazy, may_stay=is_lazy):
                    if not into.owner:
                        data = _bytes_of(owner, run)
                        self._put(into, run, memoryview(data))
                        self._keep_early(run, partial(bytes, data))

    def _places(
        self, space: SpaceKey, start: int, pages: int, lazy: bool, *, may_stay: bool = False
    ) -> Iterator[tuple[_Block | _Aside, Run]]:
        """Where the pages of a run go, piece by piece; each is there when the next is asked for."""
        while pages:
            self._raise_failure()
            owner = self._owner(space) if may_stay else None
            place = self._open.get(owner)
            if place is None:
                place = self._open[owner] = self._next_place(owner)
            run = place.next_run(space, start, pages, lazy)
            if run.pages:
                yield place, run
                place.add(run)
            if place.used == BLOCK_PAGES or not run.pages:
                self._close(owner)
            start += run.pages
            pages -= run.pages
            self._received += run.pages

    def _owner(self, space: SpaceKey) -> ProcessId | None:
        """The process in which the next pages of a space may stay, and shall; None: they are taken out."""
        if self._owner_of is None or not self._is_last:
            return None
        if space not in self._owners:
            self._owners[space] = None
            with suppress(ProcessLookupError):
                pid = self._owner_of(space)
                self._owners[space] = identify(pid) if pid else None
        return self._owners[space]

    def open_gate(self) -> None:
        """Let the workers begin: the tree's state is here, or there is no more room for it."""
        if self._lookahead is not None:
            self._lookahead.begin()
        self._gate.set()

    def flush(self) -> None:
        """Hand on what has been received so far."""
        for owner in list(self._open):
            self._close(owner)

    def _close(self, owner: ProcessId | None) -> None:
        """Hand on what was being filled."""
        place = self._open.pop(owner)
        if isinstance(place, _Aside) and self._lookahead is not None and (self._is_worth_a_look or not owner):
            with self._lock:
                place.number = self._lookahead.ask(place.offset, place.runs, owner.pid if owner else 0)
                if place.number is not None:
                    self._asked[place.number] = place
                    place.seen_in = owner
        if isinstance(place, _Aside) and owner:
            self._in_place.append(place)
        self._hand_on(place)

    def _hand_on(self, item: _Block | _Aside | None) -> None:
        if isinstance(item, _Block):
            self._full.put(item)
        else:
            self._aside.put(item)
        self._waiting.release()

    def _next_item(self) -> _Block | _Aside | None:
        """What is to be worked on next; None when there will be no more."""
        self._waiting.acquire()
        try:
            return self._full.get_nowait()
        except queue.Empty:
            return self._aside.get_nowait()

    def finish(
        self, amount: Callable[[int, int], None] = lambda done, total: None
    ) -> tuple[dict[SpaceKey, list[Extent]], MemoryCounts]:
        """Wait for the workers, and return every space's extents, sorted and joined, and the counts.

        `amount` is told now and then how many bytes are done, of how many.
        """
        self.flush()
        self._end_workers()
        if self._lookahead is not None:
            self._lookahead.hurry()
        save_at = time.monotonic() + _SAVE_AFTER_S
        for worker in self._workers:
            while worker.is_alive():
                worker.join(AMOUNT_EVERY_S)
                amount(self._counts.total, self._received * PAGE)
                if self._saver is None and self._in_place and time.monotonic() > save_at:
                    self._begin_to_save()
        self._raise_failure()
        self._believe_or_store()
        for owner in self._unproven:
            _see_that_it_stands_still(owner)
        self._classifier.finish()
        self.close()
        return self._joined(), self._counts

    def _joined(self) -> dict[SpaceKey, list[Extent]]:
        """Every space's extents: those of each run ascend, and no page was in two."""
        return {space: join(sorted(runs)) for space, runs in self._spaces.items()}

    def _believe_or_store(self) -> None:
        """Take what was found in files that are still as they were; store what was found in others."""
        changed = self._matcher.changed() if self._matcher is not None else set()
        if lost := changed & self._believed:
            assert self._matcher is not None
            path = self._matcher.files[min(lost)].path
            raise DumpFailed(
                f"{path} changed while the dump read it",
                hint="run it again, or without that file",
                state=TreeState.RUNNING,
            )
        own = _Block()
        for item, found in self._doubtful:
            if found.files & changed:
                block = self._fetch(item, own)
                found = self._classifier.classify(block.memory, block.runs, weights=False)
            self._accept(found)
            self._give_back(item)
        self._doubtful.clear()

    def abandon(self) -> None:
        """End without finishing: what is still queued is dropped."""
        self.give_up()
        self.close()

    def give_up(self) -> None:
        """Have nobody wait any more, for room or for pages; nothing is finished from now on."""
        self._failure = self._failure or InterruptedError("the dump was given up")

    def close(self) -> None:
        """End the workers (after what is queued); safe to call again."""
        self._end_workers()
        for worker in self._workers:
            worker.join()
        self._workers = []
        if self._saver is not None:
            self._saver.join()
            self._saver = None
        self._spill.close()

    def _end_workers(self) -> None:
        self.open_gate()
        for _ in self._workers:
            self._hand_on(None)

    def _begin_to_save(self) -> None:
        saver = Worker(self._save, name="intake-save")
        with signals_held(), suppress(RuntimeError):  # no more threads can be had: it is for more safety
            saver.start()
            self._saver = saver

    def _save(self) -> None:
        """Copy what no worker has begun out of the tree, as far as there is room: what comes last first."""
        try:
            own = _Block()
        except MemoryError:
            return
        while self._in_place and self._spill.has_room() and self._failure is None:
            item = self._in_place.pop()
            if item.is_begun:
                continue
            begin = self._spill.end
            try:
                self._fetch(item, own)
                self._spill.append(memoryview(own.memory)[: item.used * PAGE])
            except (OSError, DumpFailed):  # no memory, or no process: whoever is to read it will be told
                return
            with self._lock:
                if not item.is_begun:
                    item.owner, item.offset = None, begin
            if item.owner:
                self._spill.give_back(begin, item.used * PAGE)

    def _next_place(self, owner: ProcessId | None) -> _Block | _Aside:
        """Where the next pages go: aside as long as nobody works on them, else where they are worked on."""
        if owner:
            self.has_left_pages = True
            return _Aside(owner=owner)
        if self._gate.is_set() and self._blocks.acquire(blocking=False):
            return self._spare.pop() if self._spare else _Block()
        return _Aside(offset=self._spill.end) if self._has_room() else self._free_block()

    def _has_room(self) -> bool:
        """Whether more may be spilled: nobody waits for those who come before the last round."""
        return self._is_last and self._spill.has_room()

    def _free_block(self) -> _Block:
        """A block that nobody uses; when there is none, the workers are let in, and one is waited for."""
        if not self._blocks.acquire(blocking=False):
            self.open_gate()
            while not self._blocks.acquire(timeout=0.5):
                self._raise_failure()
        return self._spare.pop() if self._spare else _Block()

    def _receive_run(self, into: _Block | _Aside, channel: socket.socket, run: Run) -> Callable[[], bytes]:
        """Move a run out of the channel; return what reads it again."""
        size = run.pages * PAGE
        if isinstance(into, _Block):
            view = memoryview(into.memory)[run.at * PAGE :][:size]
            receive_exactly(channel, view)
            return view.tobytes
        begin = self._spill.end
        self._spill.take(channel.fileno(), size)
        return lambda: self._spill.read(begin, size)

    def _put(self, into: _Block | _Aside, run: Run, data: memoryview) -> None:
        if isinstance(into, _Block):
            memoryview(into.memory)[run.at * PAGE :][: len(data)] = data
        else:
            self._spill.append(data)

    def _keep_early(self, run: Run, read: Callable[[], bytes]) -> None:
        """Keep a copy of pages that the trial needs.

        Of each process it needs the vdso: CRIU looks at it, and crashes (4.2) at a process that has no pages.
        """
        if run.lazy or run.space.kind != SpaceKind.PROCESS or run.pages > _KEEP_RUN:
            return
        if self._kept_pages + run.pages <= _KEEP_PAGES:
            self._kept_pages += run.pages
            self.kept[run.space].append((run.start, read()))
        elif run.pages <= _LONGEST_VDSO and (data := read()).startswith(_ELF):
            self.kept[run.space].append((run.start, data))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _under_pressure(self) -> bool:
        """Whether the receiver is being held back, or would be next, while the tree stands still."""
        return self._is_last and not self._has_room() and self._full.qsize() >= BLOCK_COUNT // 2

    def _work(self) -> None:
        self._gate.wait()
        own: _Block | None = None
        while (item := self._next_item()) is not None:
            if self._failure is None:
                try:
                    if isinstance(item, _Block):
                        self._take(item)
                    else:
                        own = own or _Block()
                        self._take_aside(item, own)
                except BaseException as error:  # raised again in the receiving thread, or by finish
                    self._failure = error
            if isinstance(item, _Block):
                item.runs = []
                item.used = 0
                self._spare.append(item)
                self._blocks.release()

    def _take(self, block: _Block) -> None:
        found = self._classify(block)
        self._accept(found)
        with self._lock:
            self._believed |= found.files

    def _take_aside(self, item: _Aside, own: _Block) -> None:
        """The pages stay where they are for as long as a file that they were found in may change."""
        seen = None
        if item.number is not None and self._lookahead is not None:  # it says which of those was looked at
            number, seen = self._lookahead.next()
            with self._lock:
                item = self._asked.pop(number)
        with self._lock:
            item.is_begun = True
        if seen is not None and item.seen_in is not None and item.owner is None:
            seen = seen if item.seen_in.stands_still() else None  # it may have been looked at too late
        found = self._classify(self._fetch(item, own)) if seen is None else self._reuse(item, own, seen)
        if found.files:
            with self._lock:
                self._doubtful.append((item, found))
        else:
            self._accept(found)
            self._give_back(item)

    def _reuse(self, item: _Aside, own: _Block, seen: Seen) -> Classified:
        """Classify pages that were looked at."""
        try:
            found = self._classify(own, self._ahead(item, own, seen))
            self._prove(item)
            return found
        except _Changed:
            all_are_here = Ahead(Seen({}, seen.found, {}), lambda ranges: None)
            return self._classify(self._fetch(item, own), all_are_here)

    def _ahead(self, aside: _Aside, block: _Block, seen: Seen) -> Ahead:
        """Pages that were looked at; those that are needed nevertheless are read into `block`."""
        block.runs, block.used = aside.runs, aside.used

        def fetch(ranges: Sequence[tuple[int, int]]) -> None:
            self._read(aside, block, ranges)
            if aside.seen_in and not all(_is_as_seen(block, seen, *one) for one in ranges):
                raise _Changed

        return Ahead(seen, fetch)

    def _fetch(self, aside: _Aside, block: _Block) -> _Block:
        """Read all pages of a block into a worker's own."""
        self._read(aside, block, [(0, aside.used)])
        self._prove(aside)
        block.runs, block.used = aside.runs, aside.used
        return block

    def _prove(self, aside: _Aside) -> None:
        """See that the process whose memory was read stood still meanwhile, or note that it is to be seen."""
        owner = aside.owner
        if owner is None or owner.stands_still():
            return
        if not owner.is_at_work():
            raise _unreadable(owner, "it has ended")
        with self._lock:
            self._unproven.add(owner)

    def _read(self, aside: _Aside, block: _Block, ranges: Sequence[tuple[int, int]]) -> None:
        """Read ranges of pages where they are, to where they belong in a block."""
        if not aside.owner:
            for begin, end in ranges:
                view = memoryview(block.memory)[begin * PAGE : end * PAGE]
                self._spill.read_into(view, aside.offset + begin * PAGE)
            return
        parts = [part for one in ranges for part in parts_of(aside.runs, *one)]
        _read(aside.owner, memoryview(block.memory), parts)

    def _give_back(self, aside: _Aside) -> None:
        """Free the memory of pages that are stored, or need not be."""
        if not aside.owner:
            self._spill.give_back(aside.offset, aside.used * PAGE)

    def _classify(self, block: _Block, ahead: Ahead | None = None) -> Classified:
        hurry = self._under_pressure()
        return self._classifier.classify(block.memory, block.runs, hurry=hurry, ahead=ahead)

    def _accept(self, found: Classified) -> None:
        with self._lock:
            self._counts += found.counts
            for space, extents in found.extents:
                self._spaces.setdefault(space, []).append(extents)


def _is_as_seen(block: _Block, seen: Seen, begin: int, end: int) -> bool:
    """Whether pages of a block, which have come from page `begin` to `end`, are what was seen of them: single
    ones, or whole groups. Of pages in no group nothing was."""
    view = memoryview(block.memory)
    pages, page = seen.pages, begin
    while page < end:
        digest, count = (pages[page], 1) if page in pages else (seen.digests.get(page), GROUP_PAGES)
        if digest is None:
            page += 1
        elif blake3(view[page * PAGE : (page + count) * PAGE]).digest() == digest:
            page += count
        else:
            return False
    return True


def _bytes_of(owner: ProcessId, run: Run) -> bytearray:
    """The pages of a run, read in the process that has them."""
    data = bytearray(run.pages * PAGE)
    _read(owner, memoryview(data), [(0, run.start * PAGE, len(data))])
    return data


def _read(owner: ProcessId, into: memoryview, parts: Sequence[Part]) -> None:
    try:
        read_scattered(owner.pid, into, parts)
    except OSError as error:
        raise _unreadable(owner, str(error.strerror)) from error


def _see_that_it_stands_still(owner: ProcessId) -> None:
    if not owner.stands_still():
        raise _unreadable(owner, "it was woken")


def _unreadable(owner: ProcessId, why: str) -> DumpFailed:
    return DumpFailed(
        f"the memory of process {owner.pid}, which stands still, cannot be read: {why}",
        hint="if somebody has killed it: wait until `crcli dump` has ended",
        state=TreeState.RUNNING,
    )


def _within(kept: list[tuple[int, bytes]], run: PageRun) -> Iterator[tuple[int, bytes]]:
    """The pages of `run` that are among these runs of pages."""
    for start, data in kept:
        first, last = max(start, run.start), min(start + len(data) // PAGE, run.end)
        if first < last:
            yield first, data[(first - start) * PAGE : (last - start) * PAGE]


def receive_exactly(channel: socket.socket, view: memoryview, *, end_allowed: bool = False) -> bool:
    """Fill `view`; return False when the channel ended before its first byte and that is allowed."""
    got = channel.recv_into(view, 0, socket.MSG_WAITALL)
    if got == 0 and end_allowed:
        return False
    while got < len(view):
        more = channel.recv_into(view[got:], 0, socket.MSG_WAITALL)
        if not more:
            raise ConnectionError("CRIU closed the page connection in the middle of a run")
        got += more
    return True
