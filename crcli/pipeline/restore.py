"""The story of a restore, from a name to a running tree. Each stage says what is true when it ends.

Nothing of the image reaches CRIU, a process or a disk before its hash has been checked. Until CRIU has
finished, whatever fails leaves nothing running and no file that was not there.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from crcli import kernel
from crcli.criu import kerndat, netlock
from crcli.criu.binary import DOES_IT_START, see_criu
from crcli.criu.connections import (
    close_outside_connections,
    forget_network_lock,
    free_lost_addresses,
    has_connections,
    mend_connections,
)
from crcli.criu.images import memfd_names, read_tree, wiped_on_fork
from crcli.criu.inspect import own_namespaces
from crcli.criu.interrupted import resume_interrupted_calls
from crcli.criu.locks import FileLock, lost_locks, take_again
from crcli.criu.options import LOG_NAME, RestorePlan, restore_options
from crcli.criu.residence import Residence
from crcli.criu.rpc import CriuDied, CriuTimeout, rpc
from crcli.criu.skeleton import (
    accept_growth,
    ask_for_huge_pages,
    forget_death_of_parent,
    forget_files,
    forget_sizes,
    keep_orphans,
    make_room_for_deleted,
)
from crcli.criu.terminals import forget_foreign_sessions, hung_up_terminals, move_terminals
from crcli.criu.workspace import Workspace, temporary_folder
from crcli.errors import CrcliError, RestoreFailed, TreeState
from crcli.findings import Finding, Severity
from crcli.guard.here import Here
from crcli.guard.host import forced_paths, guard, guard_machine
from crcli.guard.needs import Asked, cpu_promise, needs_of, places_of
from crcli.guard.places import has_address
from crcli.image.names import parse_image
from crcli.image.weights import MemoryReader
from crcli.memory.extents import PAGE, SpaceKey, SpaceKind, filled_spans
from crcli.memory.replay import Split, split, targets
from crcli.pipeline.claims import WhoHolds
from crcli.pipeline.interrupts import Interrupted, Interrupts, interruptible
from crcli.pipeline.logs import explain_failure
from crcli.pipeline.opening import Opening
from crcli.pipeline.own_limits import limits_lifted, see_file_size, shortage
from crcli.pipeline.pids import host_pids, host_threads, namespace_depth, namespace_for
from crcli.pipeline.place import Change, place_files, undo
from crcli.pipeline.plan import OutsideLink
from crcli.pipeline.refill import Refill
from crcli.pipeline.stages import ChangedFiles, PidNamespace, RestoreReport, Silent, Stopwatch, TcpPolicy
from crcli.pipeline.stdio import Replacements, replace_links
from crcli.plugins.loader import load_hooks
from crcli.process.files import FileId
from crcli.process.here import established_here
from crcli.process.identity import ProcessId, identify
from crcli.process.place_turn import LIMIT_S, PlaceTurn
from crcli.process.settings import give_back, give_core_filter, give_oom_score
from crcli.process.tree import child_pids
from crcli.process.warden import kill_descendants
from crcli.records import Struct, asdict, replace
from crcli.store.caching import CachingStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import FrameType

    from crcli.cause import Cause
    from crcli.job.relay import Relay
    from crcli.memory.huge import Runs
    from crcli.pipeline.gpu import RestoreSide
    from crcli.pipeline.handover import Handover
    from crcli.pipeline.pager import Pager
    from crcli.pipeline.stages import Progress, RestoreOptions
    from crcli.plugins.loader import Hooks
    from crcli.plugins.spec import RestoreTarget
    from crcli.process.databases import Moved
    from crcli.process.host_turn import HostTurn
    from crcli.store.base import Store

CRIU_LIMIT_S = float(os.environ.get("CRCLI_RESTORE_LIMIT", "120"))
"""How long CRIU itself may work on a restore (seconds), the time that it waits for us left out.

It waits for ever for a file lock that another process holds.
"""

_PASSED_ON = tuple(
    signal.Signals[f"SIG{name}"] for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "WINCH", "CONT")
)

_BOARD = "crcli-notify"
"""The name of the memory through which crcli.notify is told (importing it costs a restore that needs it)."""

_SPARED, _MOST_SPARED = 8, 24
"""When a terminal's number was lost to somebody, so many more of the lowest that are free are left to others,
at most so many: whoever opens a terminal gets the lowest."""

_WARDEN_LIMIT_S = 1.0
"""How long the word of a root's end may take that has ended (seconds)."""

SECOND_LOOK_S = 1.0
"""A tree can die of its first instructions: its root is watched for this long (seconds)."""


class Restored(Struct, frozen=True):
    """A tree that runs: its report, its root on this host, and our child whose end tells of the root's.

    `relay` passes on what it writes, when that is to come here. `ended` becomes readable when the root has
    ended, and then says how, where we stay with it (else -1): its exit code in decimal, negative for a
    signal's number; nothing when its warden was killed. `stopped` says whether job control had stopped the
    root.
    """

    report: RestoreReport
    root: ProcessId
    child: int
    relay: Relay
    ended: int
    stopped: bool


class _PassedOn:
    """Signals that we get for the root: kept until it is there, then sent to it."""

    def __init__(self) -> None:
        self._kept: list[int] = []
        self._root: ProcessId | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._root is None:
            self._kept.append(number)
        else:
            self._root.send(number)

    def to(self, root: ProcessId) -> None:
        """Send what was kept, and from now on whatever comes."""
        self._root = root
        for number in self._kept:
            self.handle(number, None)


def restore(
    options: RestoreOptions, progress: Progress | None = None, opening: Opening | None = None
) -> RestoreReport:
    """Bring a tree back, detached from us; return when it runs and was still there a second later.

    `opening` is its image, which is closed in any case, where that was begun to be opened before.
    Raises NotFound, ImageDamaged, GuardRefused (nothing started), RestoreFailed (nothing left running),
    StoreError, HostLacks.
    """
    return bring_back(options, progress or Silent(), None, opening).report


def restore_and_wait(
    options: RestoreOptions,
    progress: Progress | None,
    running: Callable[[RestoreReport], None],
    opening: Opening | None = None,
) -> int:
    """Bring a tree back, call `running` once it runs, stay until its root ends, and return its exit code.

    Signals that we get once it is restored are passed on to the root, but for those that are ignored (by
    nohup, or a shell's &). A root that a signal ended gives 128 + its number.
    """
    passed_on = _PassedOn()
    heard = [number for number in _PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, passed_on.handle) for number in heard}
    try:
        restored = bring_back(options, progress or Silent(), Stay(passed_on.handle), opening)
        passed_on.to(restored.root)
        if restored.relay.masters and signal.SIGWINCH in before:
            signal.signal(signal.SIGWINCH, lambda *_: restored.relay.resize())
        running(restored.report)
        with restored.relay.raw_terminal():
            _, status = os.waitpid(restored.child, 0)
            restored.relay.finish()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


class Stay(Struct, frozen=True):
    """We stay with the tree: `later` handles the signals that come too late to interrupt the restore.

    A tree that is `bound` to us lives no longer than its root, nor than we do, should we be killed.
    """

    later: Callable[[int, FrameType | None], None]
    bound: bool = False


def bring_back(
    options: RestoreOptions, progress: Progress, stay: Stay | None = None, opening: Opening | None = None
) -> Restored:
    """Restore; again where another process took meanwhile what the tree was about to get.

    When that was a pid, once, in a pid namespace of its own; when it was the number of a terminal, a few
    times, under numbers that are less in demand.
    """
    url, ref = parse_image(options.image)
    options = replace(options, store=url or options.store, image=str(ref))
    spared = 0
    while True:
        try:
            return _attempt(options, progress, stay, spared, opening)
        except RestoreFailed as error:
            opening = None
            lost = error.cause.name if error.cause is not None else ""
            options = replace(options, image=error.image or options.image)
            if lost == "pid-taken" and options.pid_namespace == PidNamespace.AUTO:
                options = replace(options, pid_namespace=PidNamespace.NEW)
            elif lost == "terminal-taken" and spared < _MOST_SPARED:
                spared += _SPARED
            else:
                raise


def _attempt(
    options: RestoreOptions,
    progress: Progress,
    stay: Stay | None,
    spared_terminals: int,
    opening: Opening | None,
) -> Restored:
    watch = Stopwatch(progress)
    kernel.become_subreaper()  # what CRIU leaves behind when it dies comes to us
    hooks = load_hooks()
    later = stay.later if stay is not None else None
    with limits_lifted(), interruptible(later=later) as interrupts, ExitStack() as held:
        if opening is not None:
            held.callback(opening.close)
        work = _Restore(options, watch, interrupts, held, hooks, stay, spared_terminals, opening)
        try:
            restored = work.run()
        except BaseException as error:
            raised = work.failure(error)
            if work.described is not None:
                from crcli.plugins.spec import failure_of

                hooks.call("restore_failed", target=work.described, failure=failure_of(raised))
            raise raised from error
    hooks.call("restore_finished", target=work.described, report=restored.report.as_json())
    restored.report.findings = (*restored.report.findings, *hooks.findings)
    return restored


class _Restore:
    """One restore under way: what the stages share."""

    def __init__(
        self,
        options: RestoreOptions,
        watch: Stopwatch,
        interrupts: Interrupts,
        held: ExitStack,
        hooks: Hooks,
        stay: Stay | None,
        spared_terminals: int,
        opening: Opening | None,
    ) -> None:
        self.options = options
        self.spared_terminals = spared_terminals
        self.opening = opening
        self.watch = watch
        self.interrupts = interrupts
        self.held = held
        self.hooks = hooks
        self.described: RestoreTarget | None = None
        self.refill: Refill | None = None
        self.pager: Pager | None = None
        self.handover: Handover | None = None
        self.missing_bytes = 0
        self.residence: Residence | None = None
        self.gpu: RestoreSide | None = None
        self.huge: dict[SpaceKey, Runs] = {}
        """Where huge pages were asked for."""
        self.stay = stay
        self.changes: list[dict[str, Any]] = []
        self.host: dict[int, int] = {}
        self.init = 0
        """The first process of the pid namespace that the tree was restored in, 0 where that is ours."""
        self.processes: list[ProcessId] = []
        self.locks: dict[int, list[FileLock]] = {}
        self.terminals: HostTurn | None = None
        self.logs: Workspace | None = None
        self.store: Store | None = None
        self.children_before: set[int] = set()
        self.is_settled = False
        self.oom_score = ""
        """What oom_score_adj is here (empty: not known), but for us and CRIU while that restores."""
        self.ready_ms = 0.0

    def run(self) -> Restored:
        """Resolve, check, lay out, restore, fill, look, report."""
        if self.options.lazy:
            from crcli.pipeline.pager import Pager

            self.pager = Pager()  # forked while we have nothing yet that it must not keep open
        with self.watch.phase("manifest"):
            self._load()
        with self.watch.phase("guard"):
            self._guard()
        with self.watch.phase("lay out"):
            self._lay_out()
        with self.watch.phase("criu"):
            root = self._restore()
        with self.watch.phase("look again"):
            first = self._look()
        if self.options.signal:
            self._signal(first)
        ended = self.residence.end_of_root() if self.residence is not None and self.stay is not None else -1
        report, stopped = self._report(root), self.members[0].stopped
        return Restored(report, first, self.child, self.replacements.relay, ended, stopped)

    # The manifest is whole, and this host can take the image.

    def _load(self) -> None:
        if self.opening is None:
            self.opening = Opening(self.options)
            self.held.callback(self.opening.close)
        opened = self.opening.result()
        store = self.store = opened.store
        self.manifest, self.reader, self.skeleton = opened.manifest, opened.reader, opened.skeleton
        self.claim = WhoHolds(store, self.manifest.name)
        self.memory = MemoryReader(
            store, self.manifest, self.reader, self.options.weights_map, self.options.weights_folders
        )
        self.held.callback(self.memory.close)
        if self.manifest.meta.get("gpu"):
            from crcli.guard.gpus import check_facts
            from crcli.pipeline.gpu import RestoreSide

            check_facts(self.manifest.meta)
            self.gpu = self.held.enter_context(RestoreSide(self.manifest.meta["gpu"], self.options.gpu_map))

    def _guard(self) -> None:
        see_criu()  # what is lacking here is said before anything is begun
        extents = (extent for extents in self.manifest.spaces.values() for extent in extents)
        see_file_size(PAGE * sum(extent.pages for extent in extents))
        self.workspace = self.held.enter_context(Workspace.create())
        self.images = self.logs = self.held.enter_context(self.workspace.folder("images"))
        for name, data in self.skeleton.items():
            self.images.write(name, data)
        self.here = Here()
        if self.options.ports:
            from crcli.pipeline.ports import remap_ports

            remap_ports(self.images, self.options.ports)
        needs = needs_of(self.manifest, self.images, asked_of(self.options))
        needs = replace(needs, missing_weights=tuple(self.memory.missing()))
        if self.options.root:
            from crcli.pipeline.roots import check_root, needs_below

            check_root(self.options.root, self.manifest)
            needs = needs_below(self.options.root, needs)
        self.manifest_here = needs.manifest
        guard_machine(needs, self.here)
        self._describe_target()
        self.hooks.call("restore_before", target=self.described)
        if self.gpu is not None:
            self.gpu.tell(self.here)
        self._take_turn(PlaceTurn(places_of(needs)))
        self.findings = [*guard(needs, self.here), *self.claim.findings()]
        self.members = read_tree(self.images)
        for finding in self.findings:
            self.watch.progress.finding(finding)

    def _take_turn(self, turn: PlaceTurn) -> None:
        """What is seen to be free from here on nobody else takes before CRIU has it."""
        self.turn = turn
        self.held.callback(turn.end)
        if not turn.take():
            self.watch.progress.phase("turn")
            began = time.monotonic()
            turn.take(LIMIT_S)
            waited_s = time.monotonic() - began
            self.watch.add("turn", waited_s)
            self.watch.add("guard", -waited_s)

    # CRIU's images stand in the workspace, edited for this place; files stand where they were.

    def _lay_out(self) -> None:
        refill = self.refill = Refill(
            self.manifest.spaces,
            self._split(),
            self.memory,
            self.reader,
            self.held,
            is_paged=self.pager is not None,
        )
        if self.pager is not None:
            self._prepare_pager(self.pager, refill)
        self.namespace = self._namespace()
        links = [OutsideLink.from_json(link) for link in self.manifest.meta.get("links", [])]
        links = [
            replace(link, path=self._host_path(link.path)) if link.kind == "unix" else link for link in links
        ]
        self.replacements: Replacements = replace_links(
            links, self.options.stdio, f"{self.manifest.name}@{self.manifest.id}"
        )
        self.held.callback(self.replacements.close)
        self._move_in()
        place_files(self.manifest_here, self.reader, self._changed_files(), self.here, self._note)
        refill.begin(self.images)
        forget_sizes(self.images, {file.name for file in self.manifest.files})
        accept_growth(self.images, self._host_path)
        for path in make_room_for_deleted(self.images, self._host_path):
            self._note(Change("moment", path))
        if paths := forced_paths(self.findings):
            forget_files(self.images, paths, self._host_path)
        mend_connections(self.images)
        resume_interrupted_calls(self.images)
        self.locks = lost_locks(self.images)
        if not netlock.tables_of(str(self.manifest.meta.get("run_id", ""))):
            forget_network_lock(self.images)
        forget_foreign_sessions(self.images, {member.pid for member in self.members})
        if "tty-info.img" in self.images.names():
            from crcli.process.terminals import free_terminals, terminal_turn

            self.terminals = terminal_turn()
            self.held.callback(self.terminals.end)
            spared = self.spared_terminals
            move_terminals(self.images, partial(free_terminals, more=spared), spared)
        keep_orphans(self.images)
        self._ask_for_huge_pages()
        if self.options.tcp == TcpPolicy.AUTO and has_connections(self.images):
            close_outside_connections(self.images, established_here())
        if self.stay is None and self.namespace != PidNamespace.NEW:
            self._leave_parent()
        if "net" not in own_namespaces(self.images.names()):
            free_lost_addresses(self.images, has_address)

    def _ask_for_huge_pages(self) -> None:
        """What goes to GPUs as soon as it is here comes and goes in huge pages, where the kernel has them."""
        if self.gpu is None:
            return
        from crcli.memory.huge import Runs, aligned, can_be_had

        if not can_be_had():
            return
        for pid, runs in self.gpu.saved().items():
            if found := ask_for_huge_pages(self.images, pid, Runs(aligned(runs))):
                self.huge[SpaceKey(SpaceKind.PROCESS, pid)] = found

    def _leave_parent(self) -> None:
        """The root's parent would be us, and we end soon: let it not mind."""
        root = self.members[0]
        if number := forget_death_of_parent(self.images, root.pid):
            self.findings.append(_parent_forgotten(root.comm, number))

    def _prepare_pager(self, pager: Pager, refill: Refill) -> None:
        from crcli.pipeline.pager import Missing

        pager.prepare(
            Missing(
                refill.late,
                self.manifest,
                self.options.store,
                self.options.endpoint_url,
                [(old, os.path.abspath(new)) for old, new in self.options.weights_map],
                [os.path.abspath(folder) for folder in self.options.weights_folders],
                refill.threads(targets(refill.late)),
            )
        )

    def _move_in(self) -> None:
        """From here on whatever is started or changed is cleared away by the warden, should we die."""
        self.children_before = set(child_pids(os.getpid()))
        pids = [pid for member in self.members for pid in (member.pid, *member.threads)]
        keep = [self.images.fd, *self.replacements.inherit.values()]
        taken = pids if self.namespace == PidNamespace.NEW else None
        first = self.gpu.last_words() if self.gpu is not None else -1
        self.residence = Residence(keep, undo, taken, self.options.root, first)
        self.held.callback(self.residence.close)

    def _host_path(self, path: str) -> str:
        if not self.options.root:
            return path
        from crcli.pipeline.roots import below

        return below(self.options.root, path)

    def _note(self, change: Change) -> None:
        self.changes.append(asdict(change))
        if self.residence is not None:
            self.residence.note(asdict(change))

    def _changed_files(self) -> ChangedFiles:
        asked = self.options.changed_files
        is_forced = asked == ChangedFiles.REFUSE and "file-changed" in self.options.forced
        return ChangedFiles.HOST if is_forced else asked

    def _namespace(self) -> PidNamespace:
        numbers = {pid for member in self.members for pid in (member.pid, *member.threads)}
        asked = PidNamespace.NEW if self.options.root else self.options.pid_namespace
        return namespace_for(asked, self.members[0].pid, numbers)

    def _split(self) -> Split:
        alive = {member.pid for member in self.members if member.alive}
        parents = [(m.pid, m.ppid) for m in self.members if m.pid in alive and m.ppid in alive]
        kernel_pages = {member.pid: list(member.rseq_pages) for member in self.members}
        if self.options.lazy:  # a child must find these pages empty, not missing
            for pid in alive:
                kernel_pages[pid] += wiped_on_fork(self.images, pid)
        return split(self.manifest.spaces, parents, kernel_pages, self.manifest.references)

    # CRIU restores; at its post-restore hold the memory is written; then the tree runs.

    def _restore(self) -> int:
        plan = RestorePlan(
            shell_job=bool(self.manifest.meta["plan"]["shell_job"]),
            manage_cgroups=bool(self.manifest.meta["plan"]["manage_cgroups"])
            and self.namespace != PidNamespace.NEW,
            tcp_close=self.options.tcp == TcpPolicy.CLOSE,
            external=tuple(self.replacements.external),
            inherit=self.replacements.inherit,
            has_children=len(self.members) > 1,
            any_cpu="cpu-features" in self.options.forced or cpu_promise(self.manifest.meta) is not None,
        )
        if plan.manage_cgroups:
            plan = replace(plan, work_fd=self._mountable_folder())
        folder = plan.work_fd if plan.work_fd >= 0 else self.images.fd
        if self.pager is not None:
            plan = replace(plan, lazy=True)
            self.pager.listen_in(folder, sum(member.alive for member in self.members))
        elif self._is_handed_over():
            from crcli.pipeline.handover import Handover

            plan = replace(plan, lazy=True)
            self.handover = Handover(folder)
            self.held.callback(self.handover.close)
        options = restore_options(plan, f"/proc/self/fd/{self.images.fd}")
        assert self.residence is not None and self.refill is not None
        if not self.options.root:
            self._note(Change("loan", kerndat.PATH))
            kerndat.lend(self.images)
        try:
            # Where memory runs out we and CRIU go first, not the warden, who clears away then.
            with self.residence.criu as criu, kernel.gone_first_without_memory() as self.oom_score:
                answer = criu.request(
                    rpc.RESTORE, options, self._on_notify, CRIU_LIMIT_S, meanwhile=self.refill.finish_early
                )
        except CriuDied as error:
            if self.pager is not None and (why := self.pager.last_word()):
                raise RestoreFailed(f"memory that the tree needs could not be filled in: {why}") from error
            raise
        if not answer.success:
            raise RestoreFailed("CRIU could not restore the tree")
        self._take_locks_again()
        if self.gpu is not None:
            self.gpu.feeder = self.pager.pid if self.pager is not None else 0
            self.findings += self.gpu.wake(self.host, self.watch)
        if self.locks or self.gpu is not None:
            self.ready_ms = since_process_start_ms()  # it runs only now
        self.interrupts.past_return()
        root = self.members[0].pid
        self.is_settled = True
        self.turn.end()
        if self.gpu is not None:
            self.gpu.settled()
        self.child = self.residence.settle(
            root if self.namespace == PidNamespace.NEW else self.host[root],
            stay=self.stay is not None,
            bound=self.stay is not None and self.stay.bound,
        )
        if self.stay is not None:
            self.replacements.relay.start()  # it runs, and may write more than a pipe holds
        netlock.remove_for(str(self.manifest.meta.get("run_id", "")))
        if isinstance(self.store, CachingStore):
            self.store.cache.go_on()  # nobody waits for anything any more
        if self.pager is not None:
            self.pager.leave()
            if self.stay:
                self.pager.reap()
        return self.members[0].pid

    def _is_handed_over(self) -> bool:
        """Whether memory is filled in before the tree runs, rather than written."""
        assert self.refill is not None
        if not self.refill.is_worth_a_handover() or len(self.members) > 1 or self.options.root:
            return False
        from crcli.memory.userfault import is_available

        return is_available()

    def _take_locks_again(self) -> None:
        """Have the owners of locks that CRIU lost take them, and go on."""
        running = {member.pid for member in self.members if member.alive and not member.stopped}
        for pid, locks in self.locks.items():
            try:
                take_again(self.host[pid], locks)
            except OSError as error:
                raise RestoreFailed(
                    f"process {pid} could not take its file locks again: {error}",
                    hint="another process may hold them: see /proc/locks",
                    state=TreeState.DEAD,
                ) from error
            if pid in running:
                os.kill(self.host[pid], signal.SIGCONT)

    def _mountable_folder(self) -> int:
        """A folder in which CRIU can mount the cgroup hierarchies while it works."""
        path = f"{temporary_folder()}/crcli-cgroups-{os.urandom(8).hex()}"
        self._note(Change("mounts", path))
        os.mkdir(path, 0o700)
        self.held.callback(undo, [asdict(Change("mounts", path))])
        self.logs = Workspace(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        self.held.callback(self.logs.close)
        return self.logs.fd

    def _on_notify(self, script: str, root: int) -> bool:
        if script == "pre-restore":
            kerndat.take_back(self.images)
        elif script == "post-restore":
            if self.terminals is not None:
                self.terminals.end()
            self._find_members(root)
            if self.pager is not None:
                self.missing_bytes = self.pager.go(self.init, self.processes)
            else:
                self._fill_late()
            self._correct_databases()
            self._give_back_settings()
            self._hang_up()
            self._tell()
            self.hooks.call("restore_frozen", target=self.described)
        elif script == "pre-resume":
            for pid in self.locks:
                os.kill(self.host[pid], signal.SIGSTOP)  # not an instruction before it has its locks again
            if not self.locks and self.gpu is None:
                self.interrupts.past_return()  # what comes when it has begun to run is for the tree
        elif script == "post-resume":
            self.ready_ms = since_process_start_ms()
        return True

    def _find_members(self, root: int) -> None:
        """Learn the members' pids here; a tree that is a pid namespace itself is found below its root."""
        if self.members[0].pid == 1:
            self.init = root
        elif self.residence is not None:
            self.init = self.residence.init
        self.host = host_pids(self.init, [member.pid for member in self.members])
        self.processes = [identify(self.host[member.pid]) for member in self.members if member.alive]
        self._describe_target()

    def _describe_target(self) -> None:
        """Say what plug-ins are told of it, where there are any."""
        if not self.hooks.is_empty:
            from crcli.plugins.spec import RestoreTarget

            image = f"{self.manifest.name}@{self.manifest.id}"
            self.described = RestoreTarget(image, self.options.store, self.manifest.meta, dict(self.host))

    def _fill_late(self) -> None:
        assert self.refill is not None
        began = time.monotonic()
        self.refill.finish(self.host, self.huge, self.handover, self.watch.progress.amount)
        self.watch.add("memory", time.monotonic() - began)

    def _correct_databases(self) -> None:
        """Let SQLite know databases again whose files are others here: it would not write to them."""
        if not (saved := self.manifest.meta.get("databases")):
            return
        from crcli.process.databases import correct, moved_databases

        files = {self._host_path(one["path"]): FileId(one["device"], one["inode"]) for one in saved}
        for member in self.members:
            if not member.alive or not (moved := moved_databases(self.host[member.pid], files)):
                continue
            if self.pager is None:
                extents = self.manifest.spaces.get(SpaceKey(SpaceKind.PROCESS, member.pid), [])
                moved = correct(self.host[member.pid], moved, filled_spans(extents))
            if moved:
                self.findings.append(
                    _databases_moved(member.comm, member.pid, moved, is_lazy=self.pager is not None)
                )

    def _give_back_settings(self) -> None:
        """Give back what CRIU does not save: processors, input/output priority, timer slack of threads, and
        what a core dump of a process is to hold. Of who had no score for when memory runs out it takes its
        own, which is not meant for the tree."""
        for member in self.members:
            if member.alive and not member.has_oom_score and self.oom_score:
                give_oom_score(self.host[member.pid], self.oom_score)
        depth = namespace_depth(self.init)
        for process in self.manifest.meta.get("tree", []):
            host_pid = self.host.get(process["pid"])
            saved = process.get("settings", {})
            whole = {"cpus": process["cpus"]} if process.get("cpus") and not saved else {}  # older images
            if host_pid is not None and isinstance(process.get("core_filter"), int):
                give_core_filter(host_pid, process["core_filter"])
            if host_pid is not None and (saved or whole):
                for tid, host_tid in host_threads(host_pid, depth).items():
                    give_back(host_tid, saved.get(str(tid), whole))

    def _hang_up(self) -> None:
        """Let the tree see that terminals which it drives were left: else it would wait for more for ever."""
        for pid, fd in hung_up_terminals(self.images):
            try:
                master = kernel.copy_descriptor(self.host[pid], fd)
                try:
                    kernel.hang_up(master)
                finally:
                    os.close(master)
            except OSError:
                continue

    def _tell(self) -> None:
        """Let processes that use crcli.notify know, so that they find it when they run."""
        if _BOARD in memfd_names(self.images):
            from crcli.process import notify

            running = [self.host[member.pid] for member in self.members if member.alive]
            with notify.Boards(notify.find(running)) as boards:
                boards.restored()

    # CRIU says that it runs: look for ourselves, at once and again a little later.

    def _look(self) -> ProcessId:
        """See the root live on for a while, or end well; the ends of others are their parents' affair.

        Whoever a tree is bound to looks himself, and need not wait to do what is to be done meanwhile.
        """
        root, *others = self.processes
        if self.stay is not None and self.stay.bound:
            return root
        end = time.monotonic() + SECOND_LOOK_S
        while root.alive() and time.monotonic() < end:
            time.sleep(0.05)
        if not root.alive() and (how := self._bad_end(root)):
            raise RestoreFailed(
                f"the tree was restored, but {self.members[0].comm} ({root.pid}) {how} within a second",
                hint="see the program's own log; a lost pipe, terminal or CPU feature can be the cause",
                state=TreeState.DEAD,
            )
        self.findings += [_ended(process) for process in others if not process.alive()]
        return root

    def _signal(self, root: ProcessId) -> None:
        """Send the signal that was asked for, now that a program which dies of it is no failed restore."""
        if not root.send(self.options.signal):
            self.findings.append(_not_signalled(root))

    def _bad_end(self, root: ProcessId) -> str:
        """How the root ended; empty when it ended well. Its end stays to be waited for."""
        assert self.residence is not None
        if self.init or self.stay:  # its parent is the warden, which may outlive it
            return _how_it_ended(self.residence.root_end(_WARDEN_LIMIT_S))
        ended = os.waitid(os.P_PID, self.child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return _how_it_ended(None)
        is_exit = ended.si_code == os.CLD_EXITED
        return _how_it_ended(ended.si_status if is_exit else -ended.si_status)

    def _report(self, root: int) -> RestoreReport:
        return RestoreReport(
            image=f"{self.manifest.name}@{self.manifest.id}",
            id=self.manifest.id,
            pid=root,
            processes=len(self.members),
            host_pid=self.host[root],
            pid_namespace=self.namespace.value,
            ready_ms=round(self.ready_ms, 2),
            total_ms=round(since_process_start_ms(), 2),
            missing_bytes=self.missing_bytes,
            pager=self.pager.pid if self.pager is not None else 0,
            phases=self.watch.phases,
            gpu=self.gpu.as_json() if self.gpu is not None else None,
            findings=(*self.findings, *self.replacements.findings()),
        )

    # Something failed: nothing of it may be left.

    def failure(self, error: BaseException) -> BaseException:
        """Undo everything, and return the error to raise."""
        self.interrupts.past_return()
        if self.store is not None:
            self.store.give_up()  # nobody waits for it any more
        cause = self._explained()
        given_up = self.gpu.give_up() if self.gpu is not None else []
        self._kill_members()
        if self.refill is not None:
            self.refill.abandon()
        if self.pager is not None:
            self.pager.close()
        # What a tree that ran has written is its own: only what nobody can use any more is undone then.
        undo([change for change in self.changes if not self.is_settled or change["kind"] == "mounts"])
        described = self._describe(error, cause)
        if isinstance(described, RestoreFailed) and hasattr(self, "manifest"):
            described.image = f"{self.manifest.name}@{self.manifest.id}"
            described.findings = (*described.findings, *given_up)
        return described

    def _describe(self, error: BaseException, cause: Cause | None) -> BaseException:
        """The error in the words of a restore."""
        if isinstance(error, RestoreFailed) and cause is not None and error.state != TreeState.DEAD:
            hint = error.hint or cause.remedy
            return RestoreFailed(f"{error.message}: {cause.meaning}", hint=hint, cause=cause)
        if isinstance(error, CriuDied):
            return RestoreFailed(
                f"CRIU died: {cause.meaning if cause else error}",
                hint=cause.remedy if cause else DOES_IT_START,
                cause=cause,
            )
        if isinstance(error, CriuTimeout):
            return RestoreFailed(
                f"CRIU did not finish within {CRIU_LIMIT_S:.0f} s",
                hint="another process may hold a file lock that the tree needs: see /proc/locks",
                cause=cause,
            )
        if isinstance(error, Interrupted):
            return RestoreFailed(f"the restore was {error}")
        if isinstance(error, OSError) and not isinstance(error, CrcliError):
            return RestoreFailed(f"the restore failed: {error}")
        return shortage(error) or error

    def _explained(self) -> Cause | None:
        folder = self.logs
        if folder is None or folder.fd < 0 or LOG_NAME not in folder.names():
            return None
        return explain_failure(folder, "restore")

    def _kill_members(self) -> None:
        """CRIU kills what it has begun; this is for what is left when CRIU itself died."""
        if self.residence is not None:
            self.residence.close()
            kill_descendants(self.children_before)


def _how_it_ended(code: int | None) -> str:
    """A process's end in a sentence, from its exit code (negative: a signal); empty for a good one."""
    if code is None:
        return "ended"
    if code < 0:
        return f"was killed by {kernel.signal_name(-code)}"
    return f"ended with exit code {code}" if code else ""


def asked_of(options: RestoreOptions) -> Asked:
    """What the guard must know of how a restore is asked for."""
    return Asked(
        options.pid_namespace.value,
        options.tcp.value,
        options.changed_files.value,
        options.forced,
        options.gpu_map,
    )


def _parent_forgotten(comm: str, number: int) -> Finding:
    name = kernel.signal_name(number)
    return Finding(
        "parent-death-signal",
        Severity.NOTE,
        f"{comm} had asked for {name} when its parent ends (PR_SET_PDEATHSIG), and has no such parent here",
        {"signal": name},
        action="forgets that it asked",
    )


def _ended(process: ProcessId) -> Finding:
    return Finding(
        "process-ended",
        Severity.NOTE,
        f"process {process.pid} ended within a second of the restore",
        {"pid": process.pid},
        action="leaves it to its parent, as before",
    )


def _databases_moved(comm: str, pid: int, moved: Iterable[Moved], *, is_lazy: bool) -> Finding:
    paths = [one.path for one in moved]
    why = "with --lazy its memory is not here yet" if is_lazy else "what it knows of it was not found"
    return Finding(
        "database-moved",
        Severity.CHANGE,
        f"{paths[0]}, an SQLite database that {comm} ({pid}) has open, is another file than at the dump: "
        "unless it is in WAL mode, writes end with 'attempt to write a readonly database' until it is opened "
        "again",
        {"pid": pid, "paths": paths},
        action=f"leaves that to the program: {why}",
        remedy="restore without --lazy" if is_lazy else "let the program open the database again",
    )


def _not_signalled(root: ProcessId) -> Finding:
    return Finding(
        "signal-not-sent",
        Severity.NOTE,
        f"process {root.pid} had ended before it could be sent the signal",
        {"pid": root.pid},
        action="sent it to nobody",
    )


def since_process_start_ms() -> float:
    """Milliseconds since this process was started, the interpreter's own start included.

    The kernel tells in ticks when that was, rounded down: on the average it was half a tick later.
    """
    with open("/proc/self/stat", "rb") as file:
        ticks = int(file.read().rpartition(b")")[2].split()[19])
    started = (ticks + 0.5) / os.sysconf("SC_CLK_TCK")
    return (time.clock_gettime(time.CLOCK_BOOTTIME) - started) * 1000
