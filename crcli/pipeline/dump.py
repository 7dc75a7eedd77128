"""The story of a dump, from a pid to a durable image. Each stage says what is true when it ends.

Until CRIU is answered "yes" in `_hold`, whatever fails, the tree runs on: CRIU thaws it when we say no, when
our connection ends, when it fails itself; and when CRIU is killed, the standby sets the tree right before
the kernel lets go of it. After the "yes" the image is durable, and the standby finishes what CRIU began.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import crcli
from crcli import kernel
from crcli.criu import kerndat, left_pages, messages, netlock
from crcli.criu.connections import has_connections
from crcli.criu.images import free_reservations, read_tree, rename_link_remaps, rename_sockets, run_id
from crcli.criu.inspect import joined_inside
from crcli.criu.log import version_in
from crcli.criu.netlock import other_network
from crcli.criu.options import LOG_NAME, PARENT_LINK, dump_options
from crcli.criu.page_server import socket_pair
from crcli.criu.rescue import free_sockets, remove_tables
from crcli.criu.rpc import CriuProcess, rpc
from crcli.criu.sandbox import Sandbox
from crcli.criu.skeleton import named_files
from crcli.criu.standby import Standby
from crcli.criu.unread import give_back_unread
from crcli.criu.workspace import Workspace
from crcli.errors import DumpFailed, PreflightRefused, TreeState
from crcli.findings import Finding, Severity, note
from crcli.image.claims import is_held_by
from crcli.image.index import KnownPagesOf
from crcli.image.manifest import Manifest
from crcli.image.names import new_image_id
from crcli.image.packs import PackWriter
from crcli.image.session import Session
from crcli.image.weights import only_used, weights_report
from crcli.memory.classify import MemoryCounts
from crcli.memory.intake import Intake
from crcli.memory.lookahead import Lookahead
from crcli.memory.overflow import Overflow
from crcli.memory.pagemap import tracks_writes
from crcli.pipeline.aftermath import (
    CRIU_GONE,
    CriuKilled,
    Outrun,
    died_with_criu,
    explained,
    failing_at_its_deadline,
    failure,
    set_right,
)
from crcli.pipeline.alone import alone
from crcli.pipeline.capture import capture_files, folders_of, missing_includes, store_skeleton
from crcli.pipeline.facts import describe_host, describe_tree
from crcli.pipeline.forecast import known_for, look_ahead
from crcli.pipeline.foresight import Foresight
from crcli.pipeline.hashing import Hashing, describe_mounts
from crcli.pipeline.in_place import FrozenTree
from crcli.pipeline.interrupts import Interrupted, Interrupts, interruptible, seconds_left
from crcli.pipeline.knowing import Knowing
from crcli.pipeline.links import Links
from crcli.pipeline.own_limits import limits_lifted
from crcli.pipeline.pids import interrupted_threads
from crcli.pipeline.plan import NO_LOCK
from crcli.pipeline.publishing import publish_whole
from crcli.pipeline.rates import load_rates
from crcli.pipeline.receiver import Receiver
from crcli.pipeline.rounds import Rounds, rounds_here
from crcli.pipeline.shared import Shared
from crcli.pipeline.stages import DumpReport, Outcome, Silent, Stopwatch
from crcli.pipeline.target import gpus_ahead, look, refuse_blockers
from crcli.pipeline.terminals import settle_terminals
from crcli.pipeline.trial import is_harmless, may_try_later, try_skeleton
from crcli.pipeline.watch import tree_state, wait_until_dead
from crcli.pipeline.weights import WeightsInUse
from crcli.plugins.loader import load_hooks
from crcli.process import aio, notify
from crcli.process.identity import identify
from crcli.process.memory_room import spare_memory
from crcli.process.processors import usable_processors
from crcli.process.tree import scan_tree
from crcli.process.tree_lock import TreeLock
from crcli.process.waits import waited_ms
from crcli.process.wording import first_of, how_to_continue, process_list
from crcli.records import asdict, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from crcli.image.index import Expect, KnownChunks
    from crcli.image.manifest import StoredFile
    from crcli.memory.extents import Extent, SpaceKey
    from crcli.pipeline.gpu import DumpSide
    from crcli.pipeline.stages import DumpOptions, Progress
    from crcli.pipeline.target import Target
    from crcli.plugins.loader import Hooks
    from crcli.plugins.spec import DumpTarget
    from crcli.process.tree import Process
    from crcli.store.base import Store

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads would only spin beside ours

_RECORD_BYTES = 40
"""What a chunk or an extent takes in a manifest, about."""

CRIU_LIMIT_S = 600.0
"""How long CRIU itself may work on a dump without sending a page (seconds), the time that it waits for us
left out."""

_LARGE_BYTES = 128 << 20
"""So much memory takes 30 ms to hash, ten times as long as to start a process for it."""

_BUSY_PROCESSORS = 2
"""What a tree keeps busy that is being copied: CRIU, and our thread that receives."""

_MOST_LOOKAHEADS, _MOST_WORKERS = 8, 8
"""Processes that look at pages ahead, and threads that work on them, at most: more wait for each other."""

_DEATH_S, _DEATH_S_PER_BYTE = 3.0, 0.25 / (1 << 30)
"""How long a killed tree is waited for (seconds): the kernel gives its memory back first."""

_LOOPS_S, _MOST_LOOKS_FOR_RINGS = 5.0, 4
"""How long event loops may take to wait for events (seconds), and how often new ones are looked for."""

_MOMENTARY = frozenset(("process-ended", "socket-corked", "unix-unaccepted"))
"""Causes of CRIU's that are mostly over a moment later."""

_FRESH_S = 1.0
"""What was seen of a tree longer ago than this (seconds) is looked at again before it is frozen."""

_AIO_S = 5.0
"""How long reads and writes of a frozen tree may take to end that it has begun with libaio (seconds)."""

_NO_TIME_TO_TELL_S = 10.0
"""With less time than this (seconds) before its deadline a dump announces itself to nobody."""


def dump(options: DumpOptions, progress: Progress | None = None, shared: Shared | None = None) -> DumpReport:
    """Dump the tree of `options.pid` into the store; return what was done.

    The image is durable on return. Another dump of the same tree is waited for first. `shared` is what the
    dumps of one call have in common. Raises PreflightRefused (tree untouched), DumpFailed (its `state` says
    what the tree does), StoreError (tree running), HostLacks.
    """
    progress = progress or Silent()
    watch = Stopwatch(progress)
    shared = shared or Shared()
    with limits_lifted(), kernel.gone_first_without_memory():
        try:
            return _dump_once(options, progress, watch, shared)
        except Outrun as error:
            outrun = error.alone()
        return _dump_again(options, progress, watch.again(), shared, outrun)


def _dump_again(
    options: DumpOptions, progress: Progress, watch: Stopwatch, shared: Shared, outrun: Outrun
) -> DumpReport:
    """Dump a tree again that has outrun a dump, carefully; `frozen_ms` is of both freezes."""
    options = replace(options, start_time=outrun.root.start_time)
    try:
        report = _dump_once(options, progress, watch, shared, outrun)
    except PreflightRefused as refusal:
        raise DumpFailed(
            f"{outrun.message}; and when it was to be dumped again: {refusal.message}",
            hint=refusal.hint or outrun.hint,
            state=TreeState.RUNNING if outrun.root.alive() else TreeState.DEAD,
            cause=outrun.cause,
        ) from refusal
    report.frozen_ms = round(report.frozen_ms + outrun.frozen_ms, 2)
    return report


def _dump_once(
    options: DumpOptions,
    progress: Progress,
    watch: Stopwatch,
    shared: Shared,
    outrun: Outrun | None = None,
) -> DumpReport:
    """The dump; `outrun` is how it went before, where it is made again."""
    with alone(options, watch, shared) as lock:
        return _dump_alone(options, progress, watch, shared, lock, outrun)


def _dump_alone(
    options: DumpOptions,
    progress: Progress,
    watch: Stopwatch,
    shared: Shared,
    lock: TreeLock,
    outrun: Outrun | None,
) -> DumpReport:
    """The dump, with nobody else at the tree until the lock is released."""
    wish, found = rounds_here(options.pre_copy)
    options = replace(options, pre_copy=wish)
    with watch.phase("look"):
        target = look(options, careful=outrun is not None)
        found = (*found, *([outrun.finding] if outrun is not None else []))
        target = replace(target, findings=(*target.findings, *found))
    told = outrun.told if outrun is not None else frozenset()
    for finding in target.findings:
        if finding.message not in told:
            progress.finding(finding)
    report = _begin_report(options, target)
    if options.dry_run:
        lock.release()
        gpu_findings, gpu_bytes = gpus_ahead(target.evidence, options)
        with watch.phase("forecast"):
            report.forecast, findings = look_ahead(target.evidence, options, target.name, gpu_bytes)
        missing = missing_includes(options.pid, options.include)
        report.findings = (*report.findings, *missing, *gpu_findings, *findings)
        refuse_blockers(options.pid, report.findings)
        report.total_ms = watch.since_start_ms()
        report.phases = watch.phases
        return report
    hooks = load_hooks()
    with (
        failing_at_its_deadline(target.evidence.tree),
        interruptible(watch.left_s(options.deadline_s)) as interrupts,
    ):
        work = _Dump(options, target, watch, report, interrupts, progress, shared, lock, hooks)
        work.found = found
        work.is_careful = outrun is not None
        shared.see_caller()
        try:
            work.tell("dump_before_freeze")
            work.run()
        except BaseException as error:
            work.tell_of_failure(error)
            raise
    report.phases = watch.phases
    report.total_ms = watch.since_start_ms()
    if outrun is None:
        work.learn()
    work.tell("dump_finished", report=report.as_json())
    report.findings = (*report.findings, *hooks.findings)
    return report


def _begin_report(options: DumpOptions, target: Target) -> DumpReport:
    return DumpReport(
        image=f"{target.name}@{target.image_id}",
        name=target.name,
        id=target.image_id,
        store=options.store,
        pid=options.pid,
        processes=len(target.evidence.tree),
        findings=target.findings,
    )


class _Dump:
    """One dump under way: what the stages share, and in which order everything is given back."""

    def __init__(
        self,
        options: DumpOptions,
        target: Target,
        watch: Stopwatch,
        report: DumpReport,
        interrupts: Interrupts,
        progress: Progress,
        shared: Shared,
        lock: TreeLock,
        hooks: Hooks,
    ) -> None:
        self.options = options
        self.target = target
        self.watch = watch
        self.shared = shared
        self.lock = lock
        self.report = report
        self.interrupts = interrupts
        self.progress = progress
        self.hooks = hooks
        self.stays = options.outcome != Outcome.RUNNING
        """Whether the tree stands still until its image is durable, so that its pages may be read where they
        are: copied out of its way, as those of one that runs on, they would take memory and time."""
        self.look_ahead: Callable[[], None] = lambda: None
        """What is left to do before the freeze when CRIU is called."""
        self.nice = 0
        """The nice value of our thread while no tree stands still."""
        self.store: Store | None = None
        self.lookahead: Lookahead | None = None
        self.vouched_by: list[str] = []
        """The manifests of earlier images on whose word we rely."""
        self.published = False
        self.is_holding = False
        self.is_careful = False
        """Whether the tree was dumped before, and had outrun what was decided when it was looked at."""
        self.tries_later = False
        """Whether the trial takes place beside the running tree."""
        self.criu_pid = 0
        self.waited_ms: dict[int, int] = {}
        self.frozen_at = 0.0
        self.skeleton: list[StoredFile] = []
        self.files: list[StoredFile] = []
        self.folders: list[dict[str, Any]] = []
        self.run_id = ""
        self.keeps_lock = True
        """Whether the lock on connections is to stay after the kill: as of the freeze."""
        self.gpu: DumpSide | None = None
        self.network: int | None = None
        """The network of a tree that does not share ours, for as long as the dump lasts."""
        self.found: tuple[Finding, ...] = ()
        """What was found otherwise than by looking at the tree, or is not to be seen of it any more."""
        self.aio: aio.Rings | None = None
        self.links = Links(target.evidence.root.pid)
        self.outside = target.links
        self.frozen = FrozenTree(target.evidence.root)
        self.answers = b""
        """What CRIU is to take for what it has found out about the kernel; empty: what it has."""
        self.looked_at = time.monotonic()
        """When it was seen what the plan is made for."""
        self.tree = target.evidence.tree
        """The tree as last seen: before the freeze it may still have grown, once frozen it is exact."""

    def run(self) -> None:
        """Prepare, announce, freeze, take, prove, publish, let go, finish."""
        with ExitStack() as held:
            try:
                self._leave_rings()
                self._begin_gpus(held)
                self._prepare(held)
                self._copy_ahead()
                self._look_if_long_ago()
                boards = held.enter_context(notify.Boards(self._notifiable()))
                self._announce(boards)
                with self._off_its_gpus():
                    try:
                        self._freeze_and_take()
                    except BaseException as error:
                        self._after_failure(error)
                    self._back_to_its_gpus()
                    boards.resumed()
                    if self.options.outcome == Outcome.RUNNING:
                        self.lock.release()
                    self._finish()
                if self.store is not None:
                    self.store.give_up()  # what is left is to clear away there
            except BaseException as error:
                if not isinstance(error, Outrun):
                    self.interrupts.past_return()
                self.shared.end_turn()
                if self.store is not None:
                    self.store.give_up()  # it may be what failed: nobody waits for it a second time
                raise

    def tell(self, hook: str, **arguments: Any) -> None:
        """Call a hook of the plug-ins, where there are any."""
        if not self.hooks.is_empty:
            self.hooks.call(hook, target=self._described(), **arguments)

    def tell_of_failure(self, error: BaseException) -> None:
        """Tell them how the dump failed."""
        if not self.hooks.is_empty:
            from crcli.plugins.spec import failure_of

            self.tell("dump_failed", failure=failure_of(error))

    def _described(self) -> DumpTarget:
        """The dump as plug-ins are told of it."""
        from crcli.plugins.spec import DumpTarget

        return DumpTarget(
            pid=self.options.pid,
            processes=tuple(process.pid for process in self.target.evidence.tree),
            image=self.report.image,
            store=self.options.store,
            outcome=self.options.outcome.value,
        )

    # No ring of io_uring can be saved, and event loops do without: see criu/rings.py.

    def _leave_rings(self) -> None:
        """Have event loops leave their rings; a loop that was made meanwhile as well."""
        for _ in range(_MOST_LOOKS_FOR_RINGS):
            if not (rings := self.target.evidence.event_rings):
                return
            from crcli.criu.rings import leave_rings

            told = [finding for finding in self.target.findings if finding.name == "io-uring-left"]
            self.found = (*self.found, *told)
            with self.watch.phase("rings"):
                left_s = seconds_left()
                is_done = leave_rings(rings, _LOOPS_S if left_s is None else min(_LOOPS_S, left_s / 3))
                self._look_again()
            if not is_done and self.target.evidence.event_rings:
                pid = self.target.evidence.event_rings[0].pid
                raise PreflightRefused(
                    f"{self.target.evidence.label(pid)} did not come to wait for events, so its event loop's "
                    "io_uring could not be taken from it",
                    hint="try again when it is less busy (and thawed, if its cgroup is frozen), or start it "
                    "where io_uring is off: set the sysctl kernel.io_uring_disabled=2",
                )

    # A tree that uses GPUs is put to sleep by CUDA's driver before CRIU takes it: see gpu.py.

    def _begin_gpus(self, held: ExitStack) -> None:
        if self.target.evidence.may_use_gpus:
            from crcli.pipeline.gpu import DumpSide

            self.gpu = held.enter_context(DumpSide(self.target.evidence, self.options, self.shared))

    def _look_at_gpus(self) -> int:
        """The bytes of GPU memory that will come to lie in the host's."""
        if self.gpu is None:
            return 0
        self._find(self.gpu.look())
        if not self.gpu.processes:
            self.gpu = None
            self._reserve()
            return 0
        return self.gpu.memory_bytes

    def _off_its_gpus(self) -> AbstractContextManager[None]:
        if self.gpu is None:
            return nullcontext()
        self.shared.take_turn()
        return self.gpu.asleep(self)

    def _back_to_its_gpus(self) -> None:
        if self.gpu is not None and self.options.outcome == Outcome.RUNNING:
            self.gpu.wake(self)

    # Everything that takes time and does not need the tree frozen comes first.

    def _reserve(self, *, may_fork: bool = False) -> None:
        """Begin to get memory for the pages that are taken out of the tree, of one without GPUs: theirs needs
        all the room.

        After rounds little is left for the freeze.
        """
        if not self.options.pre_copy:
            self.overflow.reserve(self._taken_bytes(), may_fork=may_fork)

    def _taken_bytes(self) -> int:
        """So much of the tree is expected to be taken out of it, and not read there: see `Intake`."""
        evidence = self.target.evidence
        if not self.stays:
            return evidence.expected_bytes
        locked = sum(process.locked_bytes for process in evidence.tree)
        return min(evidence.shared_bytes + locked, evidence.expected_bytes)

    def reserve_for_gpus(self) -> None:
        """Begin to get memory for the pages of a tree that leaves its GPUs, beside what comes from there."""
        if self.gpu is not None:
            coming = self.gpu.memory_bytes
            room = max(0, spare_memory() - coming) // 2
            self.overflow.reserve(min(self._taken_bytes() + (0 if self.stays else coming), room))

    def _start_lookahead(self, held: ExitStack) -> Lookahead | None:
        """Start processes that look at pages beside us, where they are worth it: for one tree, all sent at
        once. Of few processors none is taken from who copies pages out of a frozen tree."""
        evidence, spare = self.target.evidence, usable_processors() - _BUSY_PROCESSORS
        worth = _MOST_LOOKAHEADS if evidence.may_use_gpus else evidence.expected_bytes // _LARGE_BYTES
        if not worth or self.shared.at_once > 1 or self.options.pre_copy:
            return None
        overflow, matcher = self.overflow, self.weights.matcher
        count = min(worth, max(1, spare), _MOST_LOOKAHEADS)
        try:
            ahead = Lookahead(
                overflow.fd,
                overflow.limit,
                count,
                matcher,
                in_place=evidence.expected_bytes if self.stays else 0,
                at_once=spare > 0 or self.stays,
            )
        except OSError:  # no address space is left, or no descriptor: the workers do all
            return None
        return held.enter_context(ahead)

    def _prepare(self, held: ExitStack) -> None:
        with self.watch.phase("prepare"):
            for_weights, for_hashes = _times_to_read(self.options.deadline_s)
            self.workspace = held.enter_context(Workspace.create())
            overflow = self.overflow = Overflow(self.workspace, self.shared.at_once)
            held.callback(overflow.close)
            if self.gpu is None:
                self._reserve(may_fork=True)
            self.images = held.enter_context(self.workspace.folder("images"))
            self.trial = held.enter_context(self.workspace.folder("trial"))
            wants_trial = self.options.trial and is_harmless(self.target.evidence)
            self.sandbox = held.enter_context(Sandbox(self.trial.fd)) if wants_trial else None
            self.standby = held.enter_context(
                Standby(self.target.evidence.root.pid, self.images.fd, self.lock.fds)
            )
            self.weights = held.enter_context(WeightsInUse(self.target.weights))
            self.weights.index(self.progress.amount, for_weights)
            self.lookahead = self._start_lookahead(held)
            self.hashing = Hashing(self.target.evidence, for_hashes)
            self.hashing.start()  # a thread: no more forks from here on
            self.network = other_network(self.target.evidence.root.pid)
            if self.network is not None:
                held.callback(os.close, self.network)
            self._find(self.weights.findings())
            store = self.shared.open_store(self.options)
            held.callback(store.close)
            self.store = store
            gpu_bytes = self._look_at_gpus()
            self._begin_knowing(held, store, gpu_bytes)
            self.session = held.enter_context(Session(store, self.target.image_id))
            self.knowing.announced()
            self.writer = PackWriter(store, self.target.image_id, name=self.target.name)
            held.callback(self.writer.close)
            workers = min(max(2, usable_processors() // 2 // self.shared.at_once), _MOST_WORKERS)
            self.intake = Intake(
                None,
                self.writer,
                overflow,
                self.weights.matcher,
                workers,
                self.lookahead,
                self.frozen.owner_of if self.stays else None,
            )
            held.callback(self.intake.abandon)
            self.rounds = Rounds(
                self.workspace,
                self.intake,
                self.target.evidence.root.identity,
                self.target.plan,
                answer_limits=self.target.must_answer_limits,
            )
            matcher = self.weights.matcher
            self.foresight = Foresight(self.options, self.report, overflow, matcher, gpu_bytes)
            held.callback(self.foresight.end)
            if self._acts_on_forecast():
                self.foresight.look(self.target.evidence, self._take_in_known())
            self.hashing.finish()
            if self.sandbox is not None:
                self.sandbox.wait_until_ready()
            spent_ms = self.watch.since_start_ms()
            if self._acts_on_forecast():
                self.foresight.predict(spent_ms)
                self._compare_with_deadline()
            else:
                self.look_ahead = partial(self._look_ahead, spent_ms)

    def _begin_knowing(self, held: ExitStack, store: Store, gpu_bytes: int) -> None:
        evidence, name = self.target.evidence, self.target.name

        def read(expect: Expect | None) -> KnownChunks:
            return known_for(evidence, store, name, gpu_bytes=gpu_bytes, expect=expect)

        self.knowing = Knowing(store, read)
        self.knowing.start()
        held.callback(self.knowing.end)

    def _take_in_known(self) -> KnownChunks:
        """Have what the store has already be referred to, and return it. The dump is announced."""
        known = self.knowing.finish()
        self._date_after(known.newest_image)
        self.writer.learn(known, self.target.image_id)
        self.vouched_by = known.vouched_by
        if known.page_count:
            self.intake.learn(KnownPagesOf(known, self.writer.adopt), known.group_keys())
        return known

    def _date_after(self, newest: str) -> None:
        """Have the image be newer than the newest of its name, though another host's clock was ahead."""
        if self.target.image_id <= newest:
            self.target = replace(self.target, image_id=new_image_id(newest))
            self.report.id = self.target.image_id
            self.report.image = f"{self.target.name}@{self.report.id}"
            self.session.rename(self.report.id)

    # Where nothing depends on the forecast, what the store has is waited for, and the memory looked at, while
    # CRIU gets ready, and not before CRIU is called. The memory of a tree that stays can be looked at while
    # CRIU takes it as well: of others, no processor is taken from who copies their pages.

    def _acts_on_forecast(self) -> bool:
        return self.options.deadline_s is not None or bool(self.options.pre_copy) or self.gpu is not None

    def _look_ahead(self, spent_ms: float) -> None:
        known = self._take_in_known()

        def look() -> None:
            self.foresight.look(self.target.evidence, known)
            self.foresight.predict(spent_ms)

        if self.stays:
            self.foresight.beside(look)
        else:
            look()

    def _while_criu_gets_ready(self) -> None:
        """Do what is to be done before the freeze: some ms pass before CRIU asks whether it may."""
        if not self.stays:
            messages.import_all()
        self.look_ahead()

    def _compare_with_deadline(self) -> None:
        if self.gpu is not None:
            self.gpu.see_time_left()
        if (left_s := seconds_left()) is not None:
            found = self.foresight.see_deadline(self.target.evidence, self.watch.since_start_ms(), left_s)
            self._find([found] if found is not None else [])

    # Where rounds are wished for, they send most of the memory while the tree runs.

    def _copy_ahead(self) -> None:
        if not self.options.pre_copy or self.gpu is not None:
            return
        expected = self.target.evidence.expected_bytes
        try:
            with self.watch.phase("pre-copy"):
                self._find(self.rounds.make(self.options.pre_copy, expected, self._copy_ms, self._is_late))
        except BaseException as error:
            raise self.failure(error) from error
        self.report.rounds = [one.as_json() for one in self.rounds.done]
        self.report.pre_copied_bytes = self.rounds.sent_bytes
        self.foresight.after_rounds(self.rounds.left_of, self.watch.since_start_ms())

    def _copy_ms(self, size: int) -> float:
        """How long so many bytes take this host to copy out of a frozen tree."""
        return load_rates().step("take").takes({"mib": size / (1 << 20)})

    def _is_late(self, seconds: float) -> bool:
        """Whether the deadline leaves no time for a round of so many seconds (0: the first) and a dump."""
        left_s = seconds_left()
        if left_s is None:
            return False
        dump_s = self.report.forecast.total_ms / 1000 if self.report.forecast is not None else 0.0
        return left_s < dump_s + max(seconds, dump_s)

    def learn(self) -> None:
        """Keep how long this dump took, for the forecasts of others."""
        file_bytes = sum(file.size for file in self.files)
        self.foresight.learn(self.tree, file_bytes, weights=bool(self.target.weights))

    # Programs that use crcli.notify get a moment to flush and close; they hear of the end whatever happens.

    def _notifiable(self) -> list[tuple[int, int]]:
        """The (pid, descriptor) of what may be boards of crcli.notify; who is stopped cannot answer."""
        evidence = self.target.evidence
        stopped = {process.pid for process in evidence.stopped}
        return [
            (file.pid, file.fd)
            for file in evidence.files
            if file.target == notify.LINK and file.pid not in stopped
        ]

    def _announce(self, boards: notify.Boards) -> None:
        limit_s = self._notify_limit_s()
        if limit_s <= 0 or not boards.want_word:
            return
        with self.watch.phase("notify"):
            late = boards.checkpoint(limit_s)
            labels = {process.pid: process.label for process in self.tree}
            self._look_again()
        findings = tuple(_late_finding(labels[one.pid], one.pid, limit_s) for one in late)
        self._find(findings)

    def _find(self, findings: Iterable[Finding]) -> None:
        """Report what was found on the way."""
        for finding in findings:
            self.found = (*self.found, finding)
            self.report.findings = (*self.report.findings, finding)
            self.progress.finding(finding)

    def _look_if_long_ago(self) -> None:
        """What was seen may be true no more: large files of weights were indexed meanwhile, or rounds made.
        Some of what stands in the way of a dump nobody but us finds."""
        if time.monotonic() - self.looked_at > _FRESH_S:
            with self.watch.phase("look"):
                self._look_again()
            self._leave_rings()

    def _look_again(self) -> None:
        """Things that the plan was made for have changed: by callbacks, which close connections and files,
        by us, or by themselves."""
        self.looked_at = time.monotonic()
        fresh = look(self.options, careful=self.is_careful)
        if fresh.evidence.root.identity != self.target.evidence.root.identity:
            raise PreflightRefused(f"process {self.options.pid} ended before it could be frozen")
        self.target = replace(fresh, name=self.target.name, image_id=self.target.image_id)
        self.tree = fresh.evidence.tree
        self.report.processes = len(self.tree)
        self.report.findings = (*fresh.findings, *self.found)

    def _notify_limit_s(self) -> float:
        """How long callbacks may take: a tenth of the time that is left, and nothing when that is short."""
        if self.options.deadline_s is None:
            return self.options.notify_wait_s
        left = self.options.deadline_s - self.watch.since_start_ms() / 1000
        return min(self.options.notify_wait_s, left / 10) if left >= _NO_TIME_TO_TELL_S else 0.0

    # From here on CRIU holds the tree, and lets it go unless we say otherwise.

    def _freeze_and_take(self) -> None:
        self.nice = kernel.hurry()
        try:
            self._dump_with_criu()
        finally:
            kernel.set_nice(self.nice)

    def _dump_with_criu(self) -> None:
        ours, theirs = socket_pair()
        passed = [theirs.fileno(), self.images.fd]
        with (
            ours,
            CriuProcess.start(passed, self.target.must_answer_limits, self.target.plan.enter) as criu,
        ):
            self.criu_pid = criu.host_pid()
            with suppress(ProcessLookupError):  # not known, or ended: its request will say so
                self.frozen.criu = identify(self.criu_pid)
            self.standby.watch(
                self.criu_pid,
                self._on_criu_death,
                kills=self.options.outcome == Outcome.KILLED,
                stays=self.stays,
            )
            receiver = Receiver(ours, self.intake)
            receiver.start()
            parent = self.rounds.parent or self._leave_pages()
            options = dump_options(self.target.plan, self.images.fd, theirs.fileno(), parent)
            theirs.close()
            if not self.target.plan.enter:
                kerndat.lend(self.images, self.answers)
            try:
                answer = criu.request(
                    rpc.DUMP,
                    options,
                    lambda script, _: self._on_notify(script, receiver),
                    CRIU_LIMIT_S,
                    receiver.idle_since,
                    self._while_criu_gets_ready,
                    self._on_answered,
                )
            except BaseException:
                self.intake.give_up()
                raise
            finally:
                kerndat.take_back(self.images)
                receiver.end()
                self.links.end_turn()
                if not self.tries_later:
                    self.shared.end_turn()
        if not answer.success:
            if self.intake.leaves_pages and left_pages.was_refused(self.images):
                failure = DumpFailed("another crcli took away what CRIU was to be told of this kernel")
                raise self._outrun("pages-again", failure, "before anything was frozen")
            receiver.raise_failure()  # CRIU fails when nobody takes its pages: it is not to blame
            failure = explained(self.images, "CRIU could not dump the tree", TreeState.RUNNING)
            if not self.is_careful and failure.cause is not None and failure.cause.name in _MOMENTARY:
                raise self._outrun("moment-again", failure, "which is over a moment later")
            raise failure
        self._begin_work()

    def _leave_pages(self) -> str:
        """Have CRIU leave pages in a tree that stays until they are stored, where that is possible; return
        where it finds the dump that it is to go on from.

        Out of others CRIU takes them no more slowly than we would.
        """
        plan = self.target.plan
        is_excluded = self.options.pre_copy or self.is_careful or plan.enter or plan.unprivileged
        living = (process.pid for process in self.tree.living)
        if is_excluded or not self.stays or not left_pages.is_possible(living):
            return ""
        known = self.sandbox.answers() if self.sandbox is not None else kerndat.answers_here()
        if (answers := left_pages.answers_for(known)) is None:
            return ""
        self.answers = answers
        self.intake.leaves_pages = True
        return left_pages.make_parent(self.workspace)

    def _begin_work(self) -> None:
        """Have what was taken worked on, by threads that take every processor: nobody waits for us to let a
        tree go on any more."""
        kernel.set_nice(self.nice)
        self.intake.open_gate()

    def _on_notify(self, script: str, receiver: Receiver) -> bool:
        if script == "pre-dump":
            kerndat.take_back(self.images)
            with self.watch.phase("reserve"):
                may_wait = (
                    self.options.deadline_s is None and self.gpu is None
                )  # off its GPUs it stands still
                self.overflow.settle(wait=may_wait)
            self.overflow.measure_again()  # others take memory too; that of GPUs lies in the host's by now
            with self.watch.phase("turn"):
                self.shared.take_turn()
                if any(file.needs_link_remap for file in self.target.evidence.deleted):
                    self.links.take_turn()
            self.standby.wait_until_watching()
            self._check_identity()
            if self.options.outcome != Outcome.KILLED:
                self.waited_ms = waited_ms(process.pid for process in self.tree)
            self.frozen_at = time.monotonic()
        elif script == "query-ext-files":  # CRIU has stopped the tree, and taken nothing yet
            self._wait_for_aio()
            if self.intake.leaves_pages and tracks_writes():
                tree = scan_tree(self.target.evidence.root.identity)
                left_pages.clear_bits(process.pid for process in tree.living)
        elif script == "post-dump":
            self.is_holding = True
            try:
                self._hold(receiver)
            except BaseException as error:
                if not self.published:
                    self.links.remove()
                if not isinstance(error, CriuKilled):
                    with suppress(PreflightRefused):  # its root is gone
                        self._resume_calls()  # the tree runs on
                    if self.options.outcome == Outcome.KILLED:
                        give_back_unread(self.images, self.target.evidence.root.pid)
                raise
            self.is_holding = False
        return True

    # What the tree has begun with libaio goes on without it, and writes to its memory: see process/aio.py.

    def _wait_for_aio(self) -> None:
        evidence = self.target.evidence
        if any(mapping.path == aio.NAME for mapping in evidence.mappings):
            tree = scan_tree(evidence.root.identity)
            self.aio = aio.Rings(process.pid for process in tree.living)
            if not self.aio.settle(_AIO_S, aio.LONG_QUIET_S if self.is_careful else aio.QUIET_S):
                raise _aio_under_way(f"after {_AIO_S:g} s")

    def _see_that_aio_was_over(self) -> None:
        if self.aio is not None and self.aio.have_moved():
            failure = _aio_under_way("while its memory was taken")
            if self.is_careful:
                raise failure
            raise self._outrun("aio-again", failure, "which may have changed it")

    def _on_answered(self, script: str) -> None:
        """CRIU works on. While it looks at the tree that it has frozen, nobody wants our processor; while it
        kills a tree, which takes the kernel 70 ms for each GiB, we clear away what nobody needs now that the
        image is durable."""
        if script == "query-ext-files" and self.stays:
            messages.import_all()
        elif script == "post-dump" and self.published and self.store is not None:
            self.store.give_up()
            self.session.end()
            self.intake.close()
            if self.lookahead is not None:
                self.lookahead.close()

    def _on_criu_death(self) -> None:
        """CRIU was killed (we are told in another thread): what we do while it waits for us is in vain."""
        if self.is_holding:
            self.interrupts.abort(CriuKilled("CRIU was killed"))

    def _check_identity(self) -> None:
        if not self.target.evidence.root.identity.alive():
            raise PreflightRefused(f"process {self.options.pid} ended before it could be frozen")

    # All images are written, the tree stands frozen, CRIU waits for our answer.

    def _hold(self, receiver: Receiver) -> None:
        receiver.join()
        self.images.remove(PARENT_LINK)
        if self.rounds.done:
            self.rounds.prove(scan_tree(self.target.evidence.root.identity))
        if self.intake.leaves_pages:
            self.intake.take_left(lambda space: left_pages.lazy_areas(self.images, space.number))
            self.frozen.see_that_it_stood_still()
        self.watch.add("take", time.monotonic() - self.frozen_at)
        self.tell("dump_frozen")
        evidence = self.target.evidence
        if self.outside:  # when we looked, another end may have been on its way, or with a child just born
            inside = joined_inside(self.images)
            self.outside = tuple(link for link in self.outside if link.key not in inside)
        if evidence.reopened_terminals or evidence.outside_terminals:
            settle_terminals(self.images, evidence.root.identity, self.outside)
        if renamed := evidence.renamed_sockets:
            rename_sockets(self.images, {one.socket.socket.inode: one.path for one in renamed})
        free_reservations(self.images)
        if self.stays:
            self.links.keep(self.images, self.target.image_id)
        self._capture()
        if self.keeps_lock and self.target.plan.network_lock == NO_LOCK:
            self._stood_still()
            failure = DumpFailed("the tree has opened a connection since it was looked at")
            raise self._outrun("connection-again", failure, "and nobody held its packets back")
        may_be_later = not self.stays and not self.is_careful
        self.tries_later = may_be_later and may_try_later(evidence, self.images)
        if self.stays:
            self._stood_still()
            self._begin_work()
        if not self.tries_later:
            self._try()
            if not self.stays:
                self._end_trial()
            self.shared.end_turn()
        if self.options.outcome != Outcome.KILLED:
            self._resume_calls()
        if self.stays:
            with self.watch.phase("hold"):
                self._publish()
                self.foresight.end()
            self.standby.settle(self.options.outcome.value, self.tree.identities, self.keeps_lock)
        else:
            self._see_that_aio_was_over()
            self._stood_still()

    def _stood_still(self) -> None:
        """Note for how long the tree does."""
        since = self.gpu.asleep_since if self.gpu is not None else self.frozen_at
        self.report.frozen_ms = round((time.monotonic() - since) * 1000, 2)

    def _outrun(self, name: str, failure: DumpFailed, why: str) -> Outrun:
        """The tree did something since it was looked at that was not counted on."""
        return Outrun(name, failure, why, self.report, self.target.evidence.root.identity)

    def _try(self) -> None:
        if self.sandbox is None:
            return
        with self.watch.phase("trial"):
            plan, kept = self.target.plan, self.intake.kept
            try_skeleton(self.sandbox, self.trial, self.images, kept, plan, self.outside)

    def _end_trial(self) -> None:
        """End what the trial has restored, which has open what the tree has: a program that it is writing
        could not be started meanwhile."""
        if self.sandbox is not None:
            self.sandbox.learn()
            self.sandbox.close()
            self.sandbox = None

    def _try_beside(self) -> None:
        """The trial, with the tree running. A failure may mean that the tree has outrun it."""
        try:
            self._try()
        except DumpFailed as failure:
            raise self._outrun("trial-again", failure, "and it may have removed what it had open") from None
        finally:
            self.shared.end_turn()

    def _resume_calls(self) -> None:
        """Have threads of the frozen tree make the calls again that they would see interrupted."""
        evidence = self.target.evidence
        if threads := interrupted_threads(
            self.images, evidence.root.identity, self.waited_ms, as_inside=evidence.entered
        ):
            self.standby.poke(self.criu_pid, threads)

    def _capture(self) -> None:
        with self.watch.phase("files"):
            evidence = self.target.evidence
            self.tree = scan_tree(evidence.root.identity)
            self.run_id = run_id(self.images)
            self.keeps_lock = has_connections(self.images)
            self.files, findings = capture_files(
                self.images, evidence.root.pid, evidence.mounts, self.options.include, self.writer
            )
            self.folders = folders_of(evidence.root.pid, self.files)
        self._find(findings)

    def _publish(self) -> None:
        """Finish the memory, make everything durable, write the manifest: the image exists on return."""
        assert self.store is not None
        self._end_trial()
        taken = self.intake.finish(self.progress.amount)
        self._see_that_it_stood_still()
        spaces, counts, references = self.rounds.whole(*taken, self.writer)
        self.report.wasted_bytes = self.rounds.wasted_bytes
        if not self.stays:  # CRIU has removed what it made
            renamed = rename_link_remaps(self.images, self.target.image_id)
            self.files = [
                replace(
                    file,
                    name=renamed.get(file.name, file.name),
                    same_as=renamed.get(file.same_as, file.same_as),
                )
                for file in self.files
            ]
        self.skeleton = store_skeleton(self.images, self.writer)
        self.writer.end()  # it is on its way while the manifest is made
        self._count(counts)
        described = self.weights.described()
        self.report.weights = weights_report(described, references)
        weights, references = only_used(described, references)
        manifest = Manifest(
            name=self.target.name,
            id=self.target.image_id,
            packs=self.writer.packs,
            chunks=self.writer.chunks,
            spaces=spaces,
            skeleton=self.skeleton,
            files=self.files,
            meta=self._meta(counts, spaces),
            weights=weights,
            references=references,
        )
        encoded = manifest.encode()
        self.writer.seal()
        self._see_that_the_name_is_ours(self.store)
        self._see_time_left(len(manifest.chunks) + sum(map(len, spaces.values())))
        self._see_that_it_stood_still()  # still: a tree that runs on is no tree that was killed
        if self.stays:
            self._see_that_aio_was_over()
        self.interrupts.past_return(self.store.give_up)  # nothing to be undone, but not to be waited for long
        size = publish_whole(self.store, manifest, encoded, self.session, self.vouched_by)
        self.report.stored_bytes = self.writer.stored_bytes + size
        self.published = True

    def _see_that_it_stood_still(self) -> None:
        if self.intake.has_left_pages:
            self.frozen.see_that_it_stood_still()

    def _see_that_the_name_is_ours(self, store: Store) -> None:
        """A job that was taken over publishes nothing more: its image would be newer than those of the one
        that counts. A dump that was suspended gets here before anybody has told it."""
        holder = (self.options.job or {}).get("holder")
        if holder and not is_held_by(store, self.target.name, holder):
            raise DumpFailed(
                f"the name {self.target.name} was taken over by another, so nothing was published",
                hint="`crcli lease ls` says who has it",
                state=TreeState.RUNNING,
            )

    def _see_time_left(self, records: int) -> None:
        """Raise Interrupted when the deadline leaves no time for the manifest, which is only hurried: it
        has so many records, and goes to the store as fast as all that went there since the freeze."""
        left_s = seconds_left()
        if left_s is None:
            return
        rate = self.writer.stored_bytes / (time.monotonic() - self.frozen_at)
        if left_s < records * _RECORD_BYTES / max(rate, 1.0):
            raise Interrupted(signal.SIGALRM)

    def _count(self, counts: MemoryCounts) -> None:
        self.report.memory_bytes = counts.total
        self.report.zero_bytes = counts.zero
        self.report.weights_bytes = counts.weights
        self.report.reused_bytes = counts.reused

    def _meta(self, counts: MemoryCounts, spaces: Mapping[SpaceKey, Sequence[Extent]]) -> dict[str, Any]:
        members = read_tree(self.images)
        return {
            "crcli": crcli.__version__,
            "created": time.time(),
            "host": describe_host(version_in(self.images.read(LOG_NAME))),
            "tree": describe_tree(self.target.evidence),
            "members": [{"pid": m.pid, "ppid": m.ppid, "comm": m.comm, "alive": m.alive} for m in members],
            "plan": {
                "shell_job": self.target.plan.shell_job,
                "manage_cgroups": self.target.plan.manage_cgroups,
            },
            "links": [link.as_json() for link in self.outside],
            "run_id": self.run_id,
            "own_packs": self.writer.own_packs(),
            "counts": asdict(counts),
            **self.writer.indexes(chain.from_iterable(spaces.values())),
            "frozen_ms": self.report.frozen_ms,
            "phases": dict(self.watch.phases),
            "opened": self.hashing.add_to(named_files(self.images)),
            "folders": self.folders,
            "databases": [
                {"path": one.path, "device": one.id.dev, "inode": one.id.ino}
                for one in self.target.evidence.databases
            ],
            "mounts": describe_mounts(self.target.evidence),
            "cgroups": self.target.evidence.root.cgroups.splitlines(),
            "plugins": [
                {"name": one.name, "package": one.package, "version": one.version}
                for one in self.hooks.plugins
                if not one.error
            ],
            **({"job": dict(self.options.job)} if self.options.job else {}),
            **({"gpu": self.gpu.described(self.tree)} if self.gpu is not None else {}),
        }

    # CRIU has answered, or is gone.

    def _finish(self) -> None:
        outcome = self.options.outcome
        if outcome == Outcome.RUNNING:
            try:
                if self.tries_later:
                    self._try_beside()
                with self.watch.phase("store"):
                    self._publish()
            except BaseException as error:
                raise self.failure(error) from error
        elif outcome == Outcome.KILLED:
            with self.watch.phase("reap"):
                self._clear_away()
        else:
            self.standby.wait()  # it gives the stopped tree back its sockets, which CRIU does not
            self._free_stopped()
            self.report.findings = (*self.report.findings, _left_stopped(self.tree.living))
        self.report.outcome = outcome.value
        if self.gpu is not None:
            self.report.gpu = self.gpu.as_json()

    def _free_stopped(self) -> None:
        """Should the standby not have lived to do its work: nothing, where it has."""
        pids = [process.pid for process in self.tree.living]
        free_sockets(pids)
        remove_tables(self.images.read(LOG_NAME), pids[0])

    def _clear_away(self) -> None:
        """CRIU has killed the tree: see it dead, and remove what nobody needs any more.

        Two things stay for a restore here: the temporary names of files that had none (they travel
        in the image too, but only the name keeps the same file), and the lock on TCP connections, without
        which the kernel answers for sockets that are not back yet, and resets them. A restore, `rm` and
        `doctor` remove the lock.
        """
        most_s = _DEATH_S + _DEATH_S_PER_BYTE * self.report.memory_bytes
        wait_until_dead(self.tree.identities, most_s)
        if self.network is not None:
            netlock.remove_in(self.network, self.run_id)
        if not self.keeps_lock:
            netlock.remove_for(self.run_id)

    def _after_failure(self, error: BaseException) -> None:
        """Decide what a failure means: raise, or go on where the image stands all the same."""
        if not isinstance(error, Outrun):
            self.interrupts.past_return()
        after = self.standby.wait()
        if after is None and isinstance(error, CRIU_GONE):
            after = set_right(self.tree, self.images, self.network, is_durable=self.published)
        if after is not None and after.finished:
            return
        victims = died_with_criu(self.tree, after) if after is not None else ""
        raise self.failure(error, victims) from error

    def failure(self, error: BaseException, victims: str = "") -> BaseException:
        """The error to raise, saying what the tree does now."""
        return failure(
            error,
            tree_state(self.target.evidence.tree),  # before the freeze: its states are the ones to return to
            self.images,
            durable=self.report.image if self.published else "",
            is_holding=self.is_holding,
            victims=victims,
        )


def _times_to_read(deadline_s: float | None) -> tuple[float | None, float | None]:
    """Until when files of weights may be indexed, then opened files hashed (time.monotonic; None: no limit).

    A tenth of a limited time is for both together, and a quarter of that at least for hashes.
    """
    if deadline_s is None:
        return None, None
    now = time.monotonic()
    return now + 0.075 * deadline_s, now + 0.1 * deadline_s


def _aio_under_way(when: str) -> DumpFailed:
    return DumpFailed(
        f"reads or writes that the tree has begun with libaio were still under way {when}",
        hint="try again when its disks are less busy",
        state=TreeState.RUNNING,
    )


def _late_finding(label: str, pid: int, limit_s: float) -> Finding:
    return Finding(
        "notify-late",
        Severity.NOTE,
        f"{label} was told of the dump, and its callbacks were not done after {limit_s:g} s",
        {"pid": pid, "seconds": limit_s},
        action="went on without it; the callbacks go on after the dump, or the restore",
        remedy="make them quicker, or give them longer with --notify-wait",
    )


def _left_stopped(processes: Sequence[Process]) -> Finding:
    return note(
        "left-stopped",
        f"{first_of(processes)} was left stopped",
        process_list(processes),
        "left it so, as it was told",
        how_to_continue(processes),
    )
