"""The memory of a tree that is being restored: what CRIU must find in its images, and what is written into
the finished tree.

Early memory is in its place before CRIU reads it, late memory before the tree runs, unless a pager brings it.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

from crcli.criu.skeleton import laid_out_memory
from crcli.image.packs import READ_BYTES
from crcli.memory.extents import PAGE, Source
from crcli.memory.replay import FILL_IN_BYTES, FILL_IN_PAGES, Replay, targets
from crcli.process.processors import usable_processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from crcli.criu.workspace import Workspace
    from crcli.image.packs import ChunkReader
    from crcli.image.weights import MemoryReader
    from crcli.memory.extents import Extent, Origin, SpaceKey
    from crcli.memory.huge import HugeMemory, Runs
    from crcli.memory.replay import Split
    from crcli.pipeline.handover import Handover

_MOST_THREADS = 16
"""Threads that fetch memory from nearby and write it, at most."""

_FEW_READS = 2
"""So many, of what is near, are made while CRIU gets ready: threads would hold up the laying out before."""

_FAR_THREADS = 8
"""So many fetch it from a store far away, which answers many in the time of one."""


class Refill:
    """Brings back the memory map `spaces`, which was `divided` so. What it needs until the end is `held`.

    Where a pager brings the late memory (`is_paged`), nothing of that is fetched here.
    """

    def __init__(
        self,
        spaces: Mapping[SpaceKey, list[Extent]],
        divided: Split,
        memory: MemoryReader,
        reader: ChunkReader,
        held: ExitStack,
        *,
        is_paged: bool,
    ) -> None:
        self._spaces = spaces
        self._divided = divided
        self._memory = memory
        self._reader = reader
        self._held = held
        self._is_paged = is_paged
        self._early: Replay | None = None
        self._late: Replay | None = None

    @property
    def late(self) -> Mapping[SpaceKey, list[Extent]]:
        """What is written when the tree is finished."""
        return self._divided.late

    def begin(self, images: Workspace) -> None:
        """Make files that have room for what CRIU must find; begin to fetch it, where that takes long."""
        early, inherited, _ = self._divided
        wanted = targets(early)
        places = self._held.enter_context(laid_out_memory(images, early, inherited))
        in_files = {
            origin: [one._replace(start=places[one.space][1][one.start] // PAGE) for one in whither]
            for origin, whither in wanted.items()
        }
        self._early_files = {space: fd for space, (fd, _) in places.items()}
        plan = self._memory.plan(wanted)
        self._begin_early = partial(Replay, in_files, plan, self._memory.read, self.threads(wanted))
        is_near = self._is_near(wanted)
        if len(plan) > _FEW_READS or not is_near:
            self._fetch_early()
        if not is_near:
            self._fetch_late()  # a store far away is waited for: the rest is asked for right behind

    def _fetch_early(self) -> Replay:
        """Begin to fetch what CRIU must find, if that was not begun."""
        if self._early is None:
            self._early = self._begin_early()
            self._held.callback(self._early.abandon)  # nobody may write into a file that is closed
        return self._early

    def finish_early(self) -> None:
        """CRIU has its request, and finds out about this kernel, which takes it 50 ms where it may not keep
        what it found: it reads no page before its "pre-restore" is answered."""
        self._fetch_early().write_to(self._early_files)
        self._fetch_late()

    def _fetch_late(self) -> None:
        """Begin to fetch what CRIU need not find, if that is to be here before the tree runs; once.

        What is near is fetched when CRIU has its own: before, it would only hold that up.
        """
        if self._is_paged or self._late is not None:
            return
        wanted = targets(self.late)
        plan = self._memory.plan(wanted, READ_BYTES)
        self._late = Replay(wanted, plan, self._memory.read, self.threads(wanted))

    def threads(self, wanted: Iterable[Origin]) -> int:
        """How many fetch memory at once: a store far away answers many in the time of one."""
        if self._is_near(wanted):
            return min(max(2, usable_processors()), _MOST_THREADS)
        return _FAR_THREADS

    def _is_near(self, wanted: Iterable[Origin]) -> bool:
        """Whether this host has all of this memory, in a directory store or its cache."""
        chunks = self._reader.plan(origin.number for origin in wanted if origin.source == Source.CHUNK)
        return self._reader.is_near(chunks)

    def is_worth_a_handover(self) -> bool:
        """Whether late memory is so much, and in so large pieces, that it is filled in, not written."""
        count = sum(map(len, self.late.values()))
        pages = sum(extent.pages for extents in self.late.values() for extent in extents)
        return pages * PAGE >= FILL_IN_BYTES and pages >= FILL_IN_PAGES * count

    def finish(
        self,
        host: Mapping[int, int],
        asked_for: Mapping[SpaceKey, Runs],
        handover: Handover | None,
        amount: Callable[[int, int], None],
    ) -> None:
        """The tree is whole but for its late memory, and stands still: write that, or fill it in where CRIU
        has handed the memory over; huge pages were `asked_for`. `host` are the tree's pids here."""
        assert self._late is not None
        memories: dict[SpaceKey, int] = {}
        with ExitStack() as files:
            try:
                for space in (space for space, extents in self.late.items() if extents):
                    fd = os.open(f"/proc/{host[space.number]}/mem", os.O_WRONLY | os.O_CLOEXEC)
                    files.callback(os.close, fd)
                    memories[space] = fd
                missing = handover.take() if handover is not None else {}
                huge = {
                    space: self._huge_memory(space, host[space.number], memories[space], asked_for[space])
                    for space in asked_for.keys() & memories.keys()
                }
                for space in huge.keys() & missing.keys():
                    missing[space].leave(huge[space].runs)
                pids = {space: host[space.number] for space in memories}
                self._late.write_to(memories, amount, missing, huge, pids)
            except BaseException:
                self._held.push(files.pop_all())  # threads may still write there, until `abandon` ends them
                raise
        if handover is not None:
            handover.let_go()

    def _huge_memory(self, space: SpaceKey, pid: int, file: int, runs: Runs) -> HugeMemory:
        from crcli.memory.huge import HugeMemory, empty_blocks

        return HugeMemory(pid, file, runs, empty_blocks(runs, self._spaces[space]))

    def abandon(self) -> None:
        """Write nothing more into the tree."""
        if self._late is not None:
            self._late.abandon()
