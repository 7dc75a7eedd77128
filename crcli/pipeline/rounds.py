"""Rounds before the freeze: most of a tree's memory is copied while it runs (`crcli dump --pre-copy`).

A round is a pre-dump of CRIU's. It stops the tree for as long as it takes to lay hold of the pages that were
written to since the round before (the first: of all pages), lets it run, and sends them then. So the dump
that follows finds little left to send. Nothing but the tree's memory is looked at, nothing is locked, and a
round that fails, or is cut off, leaves the tree running.

What a round sent counts for as long as the kernel says that the page was not written to, and as it is still
the same page (memory/frames.py): what is not, is read once more while the tree stands still.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from crcli.criu.images import frozen_ms
from crcli.criu.options import pre_dump_options
from crcli.criu.page_server import PageProtocolError, socket_pair
from crcli.criu.rpc import CriuDied, CriuProcess, CriuTimeout, rpc
from crcli.errors import DumpFailed, HostLacks, TreeState
from crcli.findings import Finding, Severity
from crcli.memory.blocks import BLOCK_PAGES
from crcli.memory.extents import PAGE
from crcli.memory.frames import Frames, changed
from crcli.memory.layers import Layers, count, only_referred, without
from crcli.memory.pagemap import AddressSpace, PageRun, tracks_writes, zero_frame
from crcli.memory.sample import Makeup
from crcli.pipeline.logs import explain_failure
from crcli.pipeline.receiver import Receiver
from crcli.pipeline.stages import PRE_COPY_AUTO
from crcli.process.tree import scan_tree
from crcli.records import Struct, asdict, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from crcli.criu.options import DumpPlan
    from crcli.criu.workspace import Workspace
    from crcli.image.packs import PackWriter
    from crcli.memory.classify import MemoryCounts
    from crcli.memory.extents import Extent, SpaceKey
    from crcli.memory.intake import Intake
    from crcli.memory.weights.references import Reference
    from crcli.pipeline.forecast import Load
    from crcli.process.identity import ProcessId
    from crcli.process.tree import Process

MOST_AUTO_ROUNDS = 5
"""Rounds that `auto` makes at most."""

SHORT_MS = 50.0
"""What can be copied within this time (ms) is left to the freeze by `auto`."""

_LIMIT_S = 600.0


class Round(Struct, frozen=True):
    """One round: the memory that it sent (bytes), and for how long the tree stood still (ms)."""

    bytes: int
    frozen_ms: float

    def as_json(self) -> dict[str, Any]:
        """As it stands in a report."""
        return asdict(self)


def why_none() -> str:
    """What this host lacks for rounds; empty where it lacks nothing."""
    if not tracks_writes():
        return "this kernel does not track which pages a process writes to (CONFIG_MEM_SOFT_DIRTY)"
    if not zero_frame():
        return "this kernel does not show us where pages are (that takes CAP_SYS_ADMIN)"
    return ""


def rounds_here(wish: int) -> tuple[int, tuple[Finding, ...]]:
    """The wish as far as it can be met on this host, and what there is to say of that.

    Raises HostLacks where a number of rounds is asked for, and none are possible.
    """
    if not wish or not (why := why_none()):
        return wish, ()
    if wish != PRE_COPY_AUTO:
        raise HostLacks(
            f"no memory can be copied before the freeze: {why}",
            hint="leave --pre-copy out, or say --pre-copy auto, which goes without where it has to",
        )
    return 0, (_went_without(why),)


class Rounds:
    """The rounds of one dump: made one after another, then laid under what the freeze brings."""

    def __init__(
        self,
        workspace: Workspace,
        intake: Intake,
        root: ProcessId,
        plan: DumpPlan,
        *,
        answer_limits: bool,
    ) -> None:
        """`root` is the tree's; `answer_limits` is as for CriuProcess.start."""
        self._workspace = workspace
        self._intake = intake
        self._root = root
        self._plan = plan
        self._answer_limits = answer_limits
        self._has_begun = False
        self._layers = Layers()
        self._frames: list[dict[int, Frames]] = []
        self.done: list[Round] = []
        self.parent = ""
        """Where the last round's images are, seen from a folder beside them; empty without one."""
        self.wasted_bytes = 0
        """Memory that was sent in a round, and that the image does not use."""

    @property
    def sent_bytes(self) -> int:
        """Memory that all rounds have sent."""
        return sum(one.bytes for one in self.done)

    # While the tree runs.

    def make(
        self,
        wish: int,
        expected: int,
        copy_ms: Callable[[int], float],
        is_late: Callable[[float], bool],
    ) -> tuple[Finding, ...]:
        """Make so many rounds (PRE_COPY_AUTO: as many as pay), and expect the last one.

        `expected` is about how much memory the tree has (bytes); `copy_ms` says how long so many bytes take
        the freeze; `is_late` whether something of so many seconds does not fit before a deadline. When a
        round fails, PRE_COPY_AUTO goes on without any; otherwise raises DumpFailed, with the tree running.
        """
        findings: tuple[Finding, ...] = ()
        took_s = 0.0
        try:
            while len(self.done) < (MOST_AUTO_ROUNDS if wish == PRE_COPY_AUTO else wish):
                if is_late(took_s) or (wish == PRE_COPY_AUTO and self._is_enough(expected, copy_ms)):
                    break
                began = time.monotonic()
                self._make_one()
                took_s = time.monotonic() - began
        except (DumpFailed, CriuDied, CriuTimeout, ConnectionError, PageProtocolError) as error:
            if wish != PRE_COPY_AUTO:
                raise
            self._forget()
            findings = (_went_without(f"a round failed: {error}"),)
        self._intake.begin_round(self._layers, is_last=True)
        return findings

    def _is_enough(self, expected: int, copy_ms: Callable[[int], float]) -> bool:
        """Whether another round would gain little: there is not much to copy, or it does not get less."""
        *before, last = [expected, *(one.bytes for one in self.done)]
        return copy_ms(last) < SHORT_MS or (len(before) > 1 and last > before[-1] / 2)

    def _make_one(self) -> None:
        name = f"round-{len(self.done)}"
        self._has_begun = True
        frames = self._look()
        self._intake.begin_round(self._layers, is_last=False)
        with self._workspace.folder(name) as images:
            try:
                self._pre_dump(images)
            except Exception:
                self._intake.end_round()
                raise
            taken = self._intake.end_round()
            self._layers.add(taken.spaces, taken.inherited)
            self._frames.append(frames)
            self.done.append(Round(taken.counts.total, frozen_ms(images)))
        self.parent = f"../{name}"

    def _look(self) -> dict[int, Frames]:
        """Where the tree's pages are, by pid. Who ends or begins meanwhile is left out."""
        found = {}
        for process in scan_tree(self._root).living:
            try:
                memory = AddressSpace(process.pid)
            except OSError:
                continue
            try:
                found[process.pid] = Frames.of(memory)
            except OSError:
                continue
            finally:
                memory.close()
        return found

    def _pre_dump(self, images: Workspace) -> None:
        ours, theirs = socket_pair()
        passed = [theirs.fileno(), images.fd]
        with ours, CriuProcess.start(passed, self._answer_limits, self._plan.enter) as criu:
            receiver = Receiver(ours, self._intake)
            receiver.start()
            options = pre_dump_options(self._plan, images.fd, theirs.fileno(), self.parent)
            theirs.close()
            try:
                answer = criu.request(rpc.SINGLE_PRE_DUMP, options, lambda *_: True, _LIMIT_S)
            except BaseException as error:
                receiver.hang_up()  # CRIU fails at its next page, and lets the tree go
                if not isinstance(error, Exception):  # an interrupt: nobody goes on
                    self._intake.give_up()
                raise
            finally:
                receiver.end()
        if not answer.success:
            receiver.raise_failure()  # CRIU fails when nobody takes its pages: it is not to blame
            cause = explain_failure(images, "pre-dump", answer.message)
            raise DumpFailed(
                f"CRIU could not copy the tree's memory ahead: {cause.meaning}",
                hint=cause.remedy or "run it again without --pre-copy",
                state=TreeState.RUNNING,
                cause=cause,
            )

    def _forget(self) -> None:
        """Go on as if there had been no round: the bits that tell of writes cannot be relied on any more."""
        self._layers, self._frames, self.parent = Layers(), [], ""

    # While it stands still.

    def prove(self, tree: Iterable[Process]) -> None:
        """Read again what is inherited, and may be another page than the one that was sent."""
        pids = {process.nspid[-1]: process.pid for process in tree}
        for space, runs in self._intake.inherited.items():
            memory = AddressSpace(pids[space.number])
            try:
                known, unknown = self._layers.within(space, runs)
                frames = [seen.get(memory.pid) for seen in self._frames]
                doubtful = sorted([*changed(memory, known, frames), *unknown])
                for part in _parts(doubtful):
                    self._intake.take(space, part.start, _whole(memory, part), lazy=False)
            finally:
                memory.close()
            self._intake.inherited[space] = without(sorted(runs), doubtful)

    # After it.

    def whole(
        self,
        spaces: dict[SpaceKey, list[Extent]],
        counts: MemoryCounts,
        writer: PackWriter,
    ) -> tuple[dict[SpaceKey, list[Extent]], MemoryCounts, list[Reference]]:
        """All memory, from what the last round brought and what all have given to the `writer`; its counts;
        the references that it has."""
        if not self._has_begun:
            return spaces, counts, writer.references
        whole = self._layers.under(spaces, self._intake.inherited)
        all_counts = count(whole, writer.adopted)
        self.wasted_bytes = self.sent_bytes - (all_counts.total - counts.total)
        whole, references = only_referred(whole, writer.references)
        return whole, all_counts, references

    def left_of(self, load: Load) -> Load:
        """What is left to do of a dump once the rounds are made, if all goes on as it did in the last one."""
        if not self.parent or not load.memory.total:
            return load
        left = self.done[-1].bytes
        share = left / load.memory.total
        return replace(
            load,
            memory=Makeup(total=left, new=left, stored=round(load.memory.stored * share)),
            stored_bytes=round(load.stored_bytes * share),
        )


def _whole(memory: AddressSpace, run: PageRun) -> bytes:
    data = memory.read(run)
    if len(data) != (run.end - run.start) * PAGE:
        raise OSError(f"memory at {run.start * PAGE:#x} cannot be read")
    return data


def _parts(runs: Iterable[PageRun]) -> Iterator[PageRun]:
    """Runs cut into pieces that can be held."""
    for run in runs:
        for start in range(run.start, run.end, BLOCK_PAGES):
            yield PageRun(start, min(start + BLOCK_PAGES, run.end))


def _went_without(why: str) -> Finding:
    return Finding(
        "pre-copy-left-out",
        Severity.NOTE,
        f"no memory was copied before the freeze: {why}",
        action="takes all of it while the tree stands still",
    )
