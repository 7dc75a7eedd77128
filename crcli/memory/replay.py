"""Memory put back: which pages CRIU must find in its images, and all others written by us.

CRIU reads pages with one thread, one system call a run. So it is given only those that it needs itself:
pages that are not private anonymous memory, pages that a parent and its child still share since the fork
(restored through CRIU they stay shared), and pages that the kernel writes to while CRIU works. All others
are written straight into `/proc/PID/mem`, or filled in through userfaultfd(2), by several threads while CRIU
holds the finished tree still.
"""

from __future__ import annotations

import os
import queue
import threading
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

from crcli.memory.extents import PAGE, Extent, Origin, Source, SpaceKey, SpaceKind
from crcli.memory.weights.views import source_bytes
from crcli.memory.writing import write_all, write_scattered
from crcli.threads import Worker, start_workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from crcli.memory.huge import HugeMemory
    from crcli.memory.userfault import Userfault
    from crcli.memory.weights.references import Reference
    from crcli.store.base import Buffer

AMOUNT_EVERY_S = 0.25
"""How often those who watch are told how far it is (seconds)."""

FILL_IN_BYTES = int(os.environ.get("CRCLI_FILL_IN_BYTES", 256 << 20))
"""How much memory a process must have (bytes) for it to be filled in rather than written: for less, the
arrangements take longer than they save. Only one process's is: children share pages with their parents."""

FILL_IN_PAGES = 16
"""And so many pages must lie together on average: to fill in a few takes longer than to write them, by
hundreds at a time."""

_SCATTERED = 4
"""Where more parts of a chunk than this are wanted, they are written at once."""

_TOUCHED_AT_ONCE = 32
"""Huge pages that one thread brings in one go."""

AHEAD_BYTES = 256 << 20
"""Raw bytes that are fetched and held before the tree is ready to take them, at most."""


class Run(NamedTuple):
    """Pages `start` to `start + pages` of something."""

    start: int
    pages: int


class Target(NamedTuple):
    """Where a part of a source goes: `pages` pages from its page `offset` on, to page `start` of a space."""

    space: SpaceKey
    start: int
    offset: int
    pages: int


class Inherited(NamedTuple):
    """What a process still has as its `parent` has it: these runs, ascending."""

    parent: SpaceKey
    runs: list[Run]


class Split(NamedTuple):
    """The memory map in three: what CRIU must find in a process's own images, what it finds in its parent's,
    and what is written afterwards."""

    early: dict[SpaceKey, list[Extent]]
    inherited: dict[SpaceKey, Inherited]
    late: dict[SpaceKey, list[Extent]]


def split(
    spaces: Mapping[SpaceKey, list[Extent]],
    parents: Iterable[tuple[int, int]],
    kernel_pages: Mapping[int, Iterable[int]],
    references: Sequence[Reference] = (),
) -> Split:
    """Divide the memory map.

    `parents` are (child, parent) pids of the tree, `kernel_pages` the page numbers, by pid, that the kernel
    writes to during the restore, `references` the image's, into files of weights. What a process shares with
    its parent is early; it is inherited where that process has no children itself.
    """
    early_runs: dict[SpaceKey, list[Run]] = {
        SpaceKey(SpaceKind.PROCESS, pid): [Run(page, 1) for page in pages]
        for pid, pages in kernel_pages.items()
    }
    parent_of = {
        SpaceKey(SpaceKind.PROCESS, child): SpaceKey(SpaceKind.PROCESS, parent) for child, parent in parents
    }
    relatives = {parent: _Parent(spaces.get(parent, ()), references) for parent in set(parent_of.values())}
    inherited: dict[SpaceKey, Inherited] = {}
    others: dict[SpaceKey, list[Extent]] = {}
    for child, parent in parent_of.items():
        runs, rest = relatives[parent].divide(spaces.get(child, ()))
        if child in relatives:
            early_runs.setdefault(child, []).extend(runs)
        elif runs:
            inherited[child], others[child] = Inherited(parent, runs), rest
    early: dict[SpaceKey, list[Extent]] = {}
    late: dict[SpaceKey, list[Extent]] = {}
    for space, extents in spaces.items():
        if space.kind == SpaceKind.SHARED:
            early[space], late[space] = extents, []
            continue
        wanted = early_runs.get(space, [])
        if space in relatives:
            wanted = [*wanted, *relatives[space].shared()]
        early[space], late[space] = _divide(others.get(space, extents), _joined(wanted))
    return Split(early, inherited, late)


class _Parent:
    """A process's memory, with which that of its children is compared: an extent that several have, once."""

    def __init__(self, extents: Sequence[Extent], references: Sequence[Reference]) -> None:
        self._extents = extents
        self._ends = [extent.end for extent in extents]
        self._references = references
        self._found: dict[Extent, tuple[list[Run], list[Extent]]] = {}

    def divide(self, extents: Iterable[Extent]) -> tuple[list[Run], list[Extent]]:
        """The runs that hold the same pages of the same chunks or files here, at the same addresses, and
        what is left of these extents."""
        shared: list[Run] = []
        rest: list[Extent] = []
        for extent in extents:
            if (found := self._found.get(extent)) is None:
                found = self._found[extent] = self._compare(extent)
            shared += found[0]
            rest += found[1]
        return shared, rest

    def shared(self) -> list[Run]:
        """What children have been found to share."""
        return [run for runs, _ in self._found.values() for run in runs]

    def _compare(self, extent: Extent) -> tuple[list[Run], list[Extent]]:
        if extent.source == Source.ZERO:
            return [], [extent]
        shared: list[Run] = []
        line = _line(extent, self._references)
        for at in range(bisect_right(self._ends, extent.start), len(self._extents)):
            found = self._extents[at]
            if found.start >= extent.end:
                break
            if found.source == extent.source and _line(found, self._references) == line:
                start = max(extent.start, found.start)
                shared.append(Run(start, min(extent.end, found.end) - start))
        return shared, _cut(extent, shared)[1]


def _line(extent: Extent, references: Sequence[Reference]) -> tuple[int, ...]:
    """What is equal for two extents exactly if they have the same page of the same source at each address.

    How two processes' memory was divided into references does not matter, for those that are one piece.
    """
    if extent.source == Source.WEIGHTS and len(references[extent.chunk].pieces) == 1:
        piece = references[extent.chunk].pieces[0]
        origin = source_bytes(piece.view, (extent.start - extent.offset) * PAGE)
        return (-1 - piece.file, piece.view, piece.offset - origin)
    return (extent.chunk, extent.offset - extent.start)


def _joined(runs: list[Run]) -> list[Run]:
    joined: list[Run] = []
    for run in sorted(runs):
        if joined and run.start <= joined[-1].start + joined[-1].pages:
            last = joined.pop()
            run = Run(last.start, max(last.start + last.pages, run.start + run.pages) - last.start)
        joined.append(run)
    return joined


def _divide(extents: Sequence[Extent], runs: Sequence[Run]) -> tuple[list[Extent], list[Extent]]:
    """Extents that are not lazy, or lie in `runs` (sorted, disjoint), and all others."""
    inside: list[Extent] = []
    outside: list[Extent] = []
    at = 0
    for extent in extents:
        if not extent.lazy:
            inside.append(extent)
            continue
        while at < len(runs) and runs[at].start + runs[at].pages <= extent.start:
            at += 1
        if at == len(runs) or runs[at].start >= extent.end:  # most are whole: there may be many
            outside.append(extent)
            continue
        end = at
        while end < len(runs) and runs[end].start < extent.end:
            end += 1
        within, without = _cut(extent, runs[at:end])
        inside += within
        outside += without
    return inside, outside


def _cut(extent: Extent, runs: Iterable[Run]) -> tuple[list[Extent], list[Extent]]:
    """The parts of an extent that lie in `runs` (sorted, disjoint, each of them in it at least in part), and
    all others."""
    inside: list[Extent] = []
    outside: list[Extent] = []
    position = extent.start
    for run in runs:
        if position < run.start:
            outside.append(part(extent, position, run.start))
            position = run.start
        end = min(extent.end, run.start + run.pages)
        inside.append(part(extent, position, end))
        position = end
    if position < extent.end:
        outside.append(part(extent, position, extent.end))
    return inside, outside


def part(extent: Extent, start: int, end: int) -> Extent:
    """The pages `start` to `end` of an extent."""
    return extent._replace(start=start, pages=end - start, offset=extent.offset + start - extent.start)


def targets(spaces: Mapping[SpaceKey, Iterable[Extent]]) -> dict[Origin, list[Target]]:
    """For each chunk and reference, where its pages go."""
    chunks: dict[int, list[Target]] = {}
    references: dict[int, list[Target]] = {}
    for space, extents in spaces.items():
        for start, pages, source, number, offset, _ in extents:  # a hundred thousand: little is called here
            if source != Source.ZERO:
                of_source = chunks if source == Source.CHUNK else references
                target = Target(space, start, offset, pages)
                if (there := of_source.get(number)) is not None:
                    there.append(target)
                else:
                    of_source[number] = [target]
    found = {Origin(Source.CHUNK, number): listed for number, listed in chunks.items()}
    return found | {Origin(Source.WEIGHTS, number): listed for number, listed in references.items()}


class Replay:
    """Fetches what is `wanted` at once, and writes it where it goes as soon as that is known."""

    def __init__(
        self,
        wanted: Mapping[Origin, list[Target]],
        plan: Sequence[Sequence[Origin]],
        read: Callable[[Sequence[Origin]], Iterable[tuple[Origin, Buffer]]],
        threads: int,
    ) -> None:
        self._wanted = wanted
        self._read = read
        self._groups: queue.SimpleQueue[Sequence[Origin]] = queue.SimpleQueue()
        for group in plan:
            self._groups.put(group)
        self._touches: queue.SimpleQueue[tuple[HugeMemory, Sequence[int]]] = queue.SimpleQueue()
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._held = 0
        self._memories: Mapping[SpaceKey, int] = {}
        self._pids: Mapping[SpaceKey, int] = {}
        self._missing: Mapping[SpaceKey, Userfault] = {}
        self._huge: Mapping[SpaceKey, HugeMemory] = {}
        self.written_bytes = 0
        self._failure: BaseException | None = None
        count = min(threads, len(plan))
        self._threads: list[Worker] = []
        start_workers(self._threads, count, self._work, "replay", self.abandon)

    def write_to(
        self,
        memories: Mapping[SpaceKey, int],
        amount: Callable[[int, int], None] = lambda done, total: None,
        missing: Mapping[SpaceKey, Userfault] | None = None,
        huge: Mapping[SpaceKey, HugeMemory] | None = None,
        pids: Mapping[SpaceKey, int] | None = None,
    ) -> None:
        """Write everything into these files, the `/proc/PID/mem` of the processes `pids` where there are
        these; return when all of it is there.

        Memory that is `missing` is filled in instead, where it can be. Of memory that is `huge`, and not
        missing, the kernel brings also what is zeros. `amount` is told now and then how many bytes are
        written, of how many. Raises whatever fetching, checking or writing raised first.
        """
        self._memories = memories
        self._missing = missing or {}
        self._huge = huge or {}
        special = self._missing.keys() | self._huge.keys()
        self._pids = {space: pid for space, pid in (pids or {}).items() if space not in special}
        for one in self._huge.values():
            for at in range(0, len(one.empty), _TOUCHED_AT_ONCE):
                self._touches.put((one, one.empty[at : at + _TOUCHED_AT_ONCE]))
        self._ready.set()
        total = sum(target.pages * PAGE for wanted in self._wanted.values() for target in wanted)
        for thread in self._threads:
            while thread.is_alive():
                thread.join(AMOUNT_EVERY_S)
                amount(self.written_bytes, total)
        if self._failure is None:
            self._touch()  # where there was nothing to be written
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """End the threads without writing anything more."""
        self._stop.set()
        self._ready.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        try:
            held: list[tuple[Origin, Buffer]] = []
            while not self._stop.is_set() and (group := self._next()) is not None:
                for origin, raw in self._read(group):
                    if not self._ready.is_set() and self._hold(len(raw)):
                        held.append((origin, raw))
                    else:
                        self._ready.wait()
                        self._write(origin, raw)
            self._ready.wait()
            for origin, raw in held:
                self._write(origin, raw)
            self._touch()
        except BaseException as error:  # raised again by write_to
            self._failure = self._failure or error
            self._stop.set()

    def _touch(self) -> None:
        """Have the kernel bring huge pages that hold zeros."""
        while not self._stop.is_set():
            try:
                memory, blocks = self._touches.get_nowait()
            except queue.Empty:
                return
            memory.touch(blocks)

    def _next(self) -> Sequence[Origin] | None:
        try:
            return self._groups.get_nowait()
        except queue.Empty:
            return None

    def _hold(self, size: int) -> bool:
        with self._lock:
            if self._held + size > AHEAD_BYTES:
                return False
            self._held += size
            return True

    def _write(self, origin: Origin, raw: Buffer) -> None:
        if self._stop.is_set():
            return
        view = memoryview(raw)
        wanted: Sequence[Target] = self._wanted[origin]
        if len(wanted) > _SCATTERED:
            wanted = self._scatter(view, wanted)
        for target in wanted:
            piece = view[target.offset * PAGE : (target.offset + target.pages) * PAGE]
            if (huge := self._huge.get(target.space)) is None:
                self._put(target.space, piece, target.start)
            else:
                for start, end, is_huge in huge.runs.divide(target.start, target.start + target.pages):
                    part = piece[(start - target.start) * PAGE : (end - target.start) * PAGE]
                    if is_huge:
                        huge.write(part, start)
                    else:
                        self._put(target.space, part, start)
        with self._lock:
            self.written_bytes += sum(target.pages for target in self._wanted[origin]) * PAGE

    def _scatter(self, view: memoryview, wanted: Sequence[Target]) -> Sequence[Target]:
        """Write the parts that go into processes, those of each at once; return the others."""
        parts: dict[SpaceKey, list[tuple[int, int, int]]] = {}
        others: list[Target] = []
        for target in wanted:
            space, start, offset, pages = target
            if space in self._pids:
                parts.setdefault(space, []).append((offset * PAGE, start * PAGE, pages * PAGE))
            else:
                others.append(target)
        for space, some in parts.items():
            write_scattered(self._pids[space], self._memories[space], view, some)
        return others

    def _put(self, space: SpaceKey, piece: memoryview, start: int) -> None:
        memory = self._memories[space]
        if (gap := self._missing.get(space)) is not None:
            _fill_in(gap, memory, piece, start)
        else:
            write_all(memory, piece, start * PAGE)


def _fill_in(gap: Userfault, memory: int, piece: memoryview, start: int) -> None:
    """Fill in pages from `start` on; one that is there, or that nothing can be filled in for, is written."""
    from crcli.memory.userfault import MemoryMoves, NoPlace

    while piece:
        pages = len(piece) // PAGE
        try:
            done = gap.copy(start, piece)
        except NoPlace:
            done = 0
            if pages > 1:  # in several mappings: each is filled in by itself
                done = pages // 2
                _fill_in(gap, memory, piece[: done * PAGE], start)
        except MemoryMoves as stop:  # before a page that is there
            if not (done := stop.pages):
                raise OSError("the memory of a process that stands still moves") from None
        if not done:
            write_all(memory, piece[:PAGE], start * PAGE)
            done = 1
        piece = piece[done * PAGE :]
        start += done
