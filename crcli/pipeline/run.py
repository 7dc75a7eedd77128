"""The story of a job: claimed, begun or brought back, kept, and dumped in time when its node goes away.

At any moment either the job runs here under a lease that is ours, or its newest whole image stands in the
store, or both. Nobody else may run it while the lease is ours; when it lapses (the store does not answer) the
job stands still, and when it is lost the job ends. Should we be killed, the job is killed with us: another
node may have it as soon as the lease has run out.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from crcli import kernel
from crcli.criu.binary import see_criu
from crcli.errors import (
    CrcliError,
    GuardRefused,
    HostLacks,
    ImageDamaged,
    ImageTooNew,
    JobMismatch,
    NameClaimed,
    PreflightRefused,
    RestoreFailed,
    StoreError,
    StoreUnreachable,
    TreeState,
    TryAgain,
)
from crcli.guard.baseline import environment_for
from crcli.image.catalog import list_entries
from crcli.image.lease import Lease, LeaseState
from crcli.image.names import check_name
from crcli.image.retention import retire
from crcli.job.identity import Identity, identify_job
from crcli.job.lease_file import LeaseFile
from crcli.job.start import SignalHandling, start_job, watched
from crcli.notice import Notices, Urgency
from crcli.pipeline.interrupts import Interrupted
from crcli.pipeline.own_limits import see_hard_limits
from crcli.pipeline.schedule import History
from crcli.pipeline.stages import (
    OnFailure,
    OnMismatch,
    Outcome,
    PidNamespace,
    RestoreOptions,
    Silent,
    Stdio,
)
from crcli.pipeline.vigil import Event, Keeping, Vigil, VigilEnd, Why
from crcli.process.capabilities import CAP_SYS_ADMIN
from crcli.process.tree import scan_tree
from crcli.records import Struct, asdict, field, replace
from crcli.store import open_store
from crcli.threads import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from crcli.findings import Finding
    from crcli.guard.baseline import Baseline
    from crcli.image.catalog import Entry
    from crcli.job.relay import Relay
    from crcli.notice import Notice
    from crcli.process.identity import ProcessId
    from crcli.store.base import Store

Result = TypeVar("Result")

SAVED = TryAgain.exit_code

_PASSED_ON = tuple(
    signal.Signals[f"SIG{name}"] for name in ("TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "CONT", "TSTP")
)

SECOND_LOOK_S = 1.0
"""A job that dies within so many seconds (of one of `_BAD_ENDS`) has died of being restored here."""

_BAD_ENDS = (signal.SIGILL, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGPIPE, signal.SIGSYS)

_LOOK_EVERY_S = 0.1
"""How often it is seen whether notice came while the store is waited for, and who has ended while the job's
warden is (seconds)."""

_LEAVE_S = 1.5
"""How long what was begun on a store may take to end once it was given up (seconds)."""


class RunOptions(Struct, frozen=True):
    """What a user asks of `crcli run`. `name` names the job, its images and its lease; `store` is a URL.

    `keeping` says which images are taken while it runs, `restore` how one is brought back (their own names,
    pids and outcomes do not count). `config` are files and `variables` names of environment variables that
    make it another job when they change. A job with a `baseline` is told to use no more of the CPU.
    """

    name: str
    store: str
    command: tuple[str, ...]
    keeping: Keeping
    restore: RestoreOptions
    endpoint_url: str | None = None
    fresh: bool = False
    on_mismatch: OnMismatch = OnMismatch.REFUSE
    on_failure: OnFailure = OnFailure.FAIL
    notices: tuple[str, ...] = ()
    grace_s: float | None = None
    config: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()
    baseline: Baseline | None = None
    pid_namespace: PidNamespace = PidNamespace.AUTO
    claim_wait_s: float | None = None


class RunReport(Struct):
    """What `crcli run --report` writes. `begun` is "fresh" or "restored" (from `image`); `end` is "ended"
    (the job, by itself, with `exit_code`), "saved" (as `saved`), or "lost" (the lease)."""

    name: str
    store: str
    lease: int = 0
    begun: str = ""
    image: str = ""
    end: str = ""
    saved: str = ""
    exit_code: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    findings: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The promised JSON object."""
        return asdict(self)


class _Running(Struct, frozen=True):
    """A job that runs: its root, our child the warden, the descriptor that tells of its end, its output, the
    word of how it began, and since when (time.monotonic())."""

    root: ProcessId
    child: int
    ended: int
    relay: Relay
    began: Event
    since: float = field(default_factory=time.monotonic)


def run(options: RunOptions, tell: Callable[[Event], None]) -> RunReport:
    """Run a job to its end, or until it is saved because this node goes away; return what was done.

    Raises NameClaimed (another has the job), JobMismatch (the image is of another job), TryAgain and what a
    restore raises (nothing was started; also HostLacks where CRIU cannot work), StoreError.
    """
    check_name(options.name)
    handling = SignalHandling.now()
    identity = identify_job(
        options.command,
        os.environ,
        config=options.config,
        variables=options.variables,
        weights=options.keeping.dump.weights,
    )
    report = RunReport(options.name, options.store)

    def found(finding: Finding) -> None:
        report.findings.append(finding.as_json())
        tell(Event("finding", finding.message, {"finding": finding.as_json()}))

    notices = Notices(options.notices, options.grace_s, found=found)
    see_criu()  # a job that could never be saved is not begun
    see_hard_limits()
    kernel.become_subreaper()
    with ExitStack() as held:
        store = open_store(options.store, endpoint_url=options.endpoint_url)
        held.callback(store.close)
        held.enter_context(notices)
        waiting = Event("waiting", f"waiting to see whether anybody else has {options.name}")
        claim = partial(Lease.claim, store, options.name, "crcli run", wait_s=options.claim_wait_s)
        with _told_when_slow(tell, waiting):
            lease = _claimed(notices, store, claim)
        report.lease = lease.number
        work = _Run(options, identity, handling, store, lease, notices, report, tell)
        try:
            lease.keep(work.on_lease)
            work.to_the_end()
        finally:
            notices.deafen()
            lease.release()
            work.answer()  # who hears it may start the job elsewhere at once
    return report


class _Run:
    """A job under our care."""

    def __init__(
        self,
        options: RunOptions,
        identity: Identity,
        handling: SignalHandling,
        store: Store,
        lease: Lease,
        notices: Notices,
        report: RunReport,
        tell: Callable[[Event], None],
    ) -> None:
        self.options = options
        self.identity = identity
        self.handling = handling
        self.store = store
        self.lease = lease
        self.lease_file = LeaseFile(lease)
        self.notices = notices
        self.report = report
        self.tell = tell
        self.job: _Running | None = None
        self.vigil: Vigil | None = None
        self.notice: Notice | None = None
        """Because of which the job was dumped."""
        self.stopping = threading.Lock()
        self.stopped: list[ProcessId] = []
        self.is_lost = False
        self.early: list[int] = []
        """Signals for the job that came when it was there, and what passes them on was not."""
        self.lived_s = 0.0
        self.history = History()

    def to_the_end(self) -> None:
        """Begin, keep, end; start afresh if that is wished for a job that its restore was the end of."""
        with self.lease_file:
            self._live(self._begin())
            if (error := self._died_of_restore()) is not None:
                self._heed(error)
                self._live(self._start())
        if self.report.end == "ended" and self.report.exit_code == 0:
            with suppress(StoreError, TryAgain):  # the next run would only do the last part again
                self._unless_leaving(
                    lambda: retire(self.store, self.options.name, self.identity.as_json(), keep=0)
                )

    def _live(self, job: _Running) -> None:
        self.job = job
        try:
            self.lease.covers([job.root])
            if self.lease.state is LeaseState.LAPSED:
                self._stop()
            with (
                watched(self.lease.deadline, job.root, self.lease_file.path),
                self._signals_passed_on(job),
                job.relay.raw_terminal(),
            ):
                self._on_event(job.began)  # who reads it may send a signal, which is the job's from here on
                job.relay.start()
                self._keep(job)
                job.relay.finish()
        finally:
            self.job = None
            _end_it(job)

    # An image of the same job is brought back; without one the job starts.

    def _begin(self) -> _Running:
        self._heed_early_notice()
        failure: CrcliError | None = None
        for entry in [] if self.options.fresh else self._images():
            try:
                return self._bring_back(entry)
            except ImageTooNew as error:
                failure = error  # it may be whole: what was done since the image before is not to be lost
                break
            except ImageDamaged as error:
                failure = error
                self._say("damaged", f"{entry.ref} is damaged: {error.message}", image=str(entry.ref))
            except (GuardRefused, RestoreFailed, HostLacks) as error:
                failure = error
                break
        if failure is not None:
            self._heed(failure)
        return self._start()

    def _heed_early_notice(self) -> None:
        """A node that goes away already begins nothing."""
        self.notice = self.notices.waiting(Urgency.LEAVE)
        if self.notice is not None:
            raise _not_begun(self.notice)

    def _images(self) -> list[Entry]:
        """The job's images, the newest first; none when it is to start afresh."""
        entries = self._unless_leaving(lambda: list_entries(self.store, self.options.name))[::-1]
        readable = [entry for entry in entries if not entry.damage]
        different = self._differences(readable[0]) if readable else []
        if different and self.options.on_mismatch is OnMismatch.FRESH:
            other = readable[0].ref
            self._say("mismatch", f"{other} is of another job: {'; '.join(different)}", image=str(other))
            return []
        if different:
            raise JobMismatch(
                f"{readable[0].ref} is of another job: {'; '.join(different)}",
                hint="choose another --name, start afresh with --fresh (--on-mismatch fresh does so each "
                "time), or bring it back with `crcli restore`",
            )
        return [entry for entry in entries if entry.damage or not self._differences(entry)]

    def _unless_leaving(self, work: Callable[[], Result]) -> Result:
        try:
            return _unless_leaving(self.notices, self.store, work)
        except TryAgain:
            self.notice = self.notices.waiting(Urgency.LEAVE)
            raise

    def _differences(self, entry: Entry) -> list[str]:
        facts = entry.meta.get("job")
        if not isinstance(facts, dict):
            return ["it was not taken by `crcli run`"]
        return self.identity.differs_from(facts)

    def _heed(self, error: CrcliError) -> None:
        """An image that cannot be restored here: raise, or return when the job is to start all the same."""
        if self.is_lost:
            raise self._lost()
        is_interrupted = isinstance(error.__cause__, Interrupted)
        if self.options.on_failure is OnFailure.COLD and not is_interrupted:
            self._say("not-restored", f"the image cannot be restored here: {error.message}")
            return
        if self.options.on_failure is OnFailure.RETRY or is_interrupted:
            raise TryAgain(
                f"the job was not started here: {error.message}",
                hint="its image stands: start the same command again, here or elsewhere",
            ) from error
        raise error

    def _bring_back(self, entry: Entry) -> _Running:
        from crcli.pipeline.restore import Stay, bring_back

        handlers = {number: signal.getsignal(number) for number in _PASSED_ON}

        def later(number: int, frame: FrameType | None) -> None:
            handler = handlers.get(signal.Signals(number))
            if handler in (signal.SIG_DFL, signal.default_int_handler):
                self.early.append(number)
            elif callable(handler):
                handler(number, frame)

        options = replace(
            self.options.restore,
            image=str(entry.ref),
            store=self.options.store,
            endpoint_url=self.options.endpoint_url,
            stdio=Stdio.INHERIT,
            pid_namespace=self._namespace(),
        )
        self.lease_file.follow(entry.meta.get("job", {}))
        restored = bring_back(options, Silent(), Stay(later, bound=True))
        if restored.stopped:
            _wake(restored.root)
        self.report.begun, self.report.image = "restored", restored.report.image
        self.history = History.after(entry.meta.get("job"))
        age_s = max(0.0, time.time() - entry.created)
        facts = {"image": str(entry.ref), "age_s": round(age_s, 3), "ready_ms": restored.report.ready_ms}
        began = Event("restored", f"restored {entry.ref}, which was taken {age_s:.0f} s ago", facts)
        return _Running(restored.root, restored.child, restored.ended, restored.relay, began)

    def _namespace(self) -> PidNamespace:
        """A namespace of its own, so that its pids are free on every node, unless asked otherwise."""
        asked = self.options.pid_namespace
        return PidNamespace.NEW if asked is PidNamespace.AUTO and _may_unshare() else asked

    def _start(self) -> _Running:
        own_namespace = self._namespace() is PidNamespace.NEW
        told = {"CRCLI_JOB": self.options.name, "CRCLI_LEASE_FILE": self.lease_file.path}
        environment = {**os.environ, **told, "GODEBUG": _without_mptcp(os.environ.get("GODEBUG", ""))}
        if self.options.baseline is not None:
            environment |= environment_for(self.options.baseline, environment)
        start = partial(start_job, self.options.command, environment, self.handling)
        self.lease_file.write()
        try:
            job = start(own_namespace)
        except HostLacks:
            if self.options.pid_namespace is not PidNamespace.AUTO:
                raise
            job = start(own_namespace=False)
        self.report.begun = "fresh"
        began = Event("started", f"started {self.options.name}", {})
        return _Running(job.root, job.child, job.ended, job.relay, began)

    # It runs: images are taken, and notices heeded, until it ends.

    def _keep(self, job: _Running) -> None:
        dump = replace(
            self.options.keeping.dump,
            name=self.options.name,
            store=self.options.store,
            endpoint_url=self.options.endpoint_url,
            outcome=Outcome.KILLED,
            job=self._facts(),
        )
        keeping = replace(self.options.keeping, dump=dump)
        end = VigilEnd(Why.LEFT_BEHIND, image=self.report.image)
        while end.why is Why.LEFT_BEHIND:  # it runs on, and may be spared
            self.notice = end.notice
            self.vigil = Vigil(keeping, job.root, self.notices, self._on_event, image=end.image)
            end = self.vigil.keep(job.ended) if not self.is_lost else VigilEnd(Why.STOPPED)
            self.vigil = None
            if self.is_lost:
                raise self._lost()
        if end.why is Why.SAVED:
            self.notice = end.notice
            self._is_saved_as(end.image)
        else:
            self._ended(job, end.image)

    def _is_saved_as(self, image: str) -> None:
        self.report.end, self.report.saved, self.report.exit_code = "saved", image, SAVED

    def _facts(self) -> dict[str, Any]:
        """What its images say of the job."""
        facts = {
            **self.identity.as_json(),
            "lease": self.report.lease,
            "holder": self.lease.nonce,
            "lease_file": self.lease_file.name,
            **asdict(self.history),
        }
        if self.options.baseline is not None:
            facts["cpu_baseline"] = self.options.baseline.kept_here()
        return facts

    def _on_event(self, event: Event) -> None:
        self.report.events.append(event.as_json())
        self.tell(event)

    def _say(self, name: str, message: str, **data: Any) -> None:
        self._on_event(Event(name, message, data))

    def answer(self) -> None:
        """Tell whoever gave notice that there is nothing here any more that it would be the end of."""
        if self.notice is not None and (self.report.end == "saved" or not self.report.begun):
            self.notice.on_saved()

    def _ended(self, job: _Running, newest: str) -> None:
        """The job's end is its own, unless a dump killed it that we had given up waiting for."""
        select.select([job.ended], [], [])
        word = os.read(job.ended, 64)
        code = int(word) if word else -signal.SIGKILL
        self.report.end = "ended"
        self.report.exit_code = code if code >= 0 else 128 - code
        self.lived_s = time.monotonic() - job.since
        if code == -signal.SIGKILL and (image := self._newer_than(newest)):
            self._is_saved_as(image)

    def _newer_than(self, image: str) -> str:
        """The newest image, if it was taken under our lease and is not that one; empty where it is not."""
        try:
            newest = next(iter(list_entries(self.store, self.options.name)[::-1]), None)
        except StoreError:
            return ""
        is_ours = newest is not None and (newest.meta.get("job") or {}).get("lease") == self.report.lease
        return str(newest.ref) if newest is not None and is_ours and str(newest.ref) != image else ""

    def _died_of_restore(self) -> RestoreFailed | None:
        """The error of a job that died of its first instructions here; its image stands."""
        number = self.report.exit_code - 128
        if self.report.begun != "restored" or self.lived_s > SECOND_LOOK_S or number not in _BAD_ENDS:
            return None
        return RestoreFailed(
            f"{self.report.image} was restored, but died of {kernel.signal_name(number)} within a second",
            hint="see the job's own log; a lost pipe or CPU feature can be the cause",
            state=TreeState.DEAD,
        )

    def _signals_passed_on(self, job: _Running) -> ExitStack:
        """Until the end of the block, signals that are no notice go to the job.

        One that was ignored when we started (by nohup, or a shell's &) stays so.
        """

        def pass_on(number: int, _frame: FrameType | None) -> None:
            must_stand_still = number == signal.SIGCONT and self.lease.state is not LeaseState.HELD
            if not must_stand_still:  # we may have been stopped until the lease lapsed
                job.root.send(number)

        before = ExitStack()
        for number in _PASSED_ON:
            if number not in self.notices.signals and signal.getsignal(number) is not signal.SIG_IGN:
                before.callback(signal.signal, number, signal.signal(number, pass_on))
        resized = signal.signal(signal.SIGWINCH, lambda *_: job.relay.resize())
        before.callback(signal.signal, signal.SIGWINCH, resized)
        while self.early:
            pass_on(self.early.pop(0), None)
        return before

    # The lease, in a thread of its own.

    def on_lease(self, state: LeaseState) -> None:
        """The job stands still while the lease has lapsed, and ends when it is lost."""
        if state is LeaseState.HELD:
            self.lease_file.write()
            self._let_go_on()
        elif state is LeaseState.LAPSED:
            self._say("lapsed", "the store does not answer: the job stands still until it does")
            self._stop()
        else:
            self.is_lost = True
            self._stop()
            if self.vigil is not None:
                self.vigil.interrupt()

    def _stop(self) -> None:
        with self.stopping, suppress(ProcessLookupError, PreflightRefused):  # it has just ended
            self._stop_all(self.job)

    def _stop_all(self, job: _Running | None) -> None:
        while job is not None and job.root.alive():
            new = [
                process.identity for process in scan_tree(job.root) if process.identity not in self.stopped
            ]
            if not new:
                return
            for one in new:
                one.send(signal.SIGSTOP)
            self.stopped += new

    def _let_go_on(self) -> None:
        with self.stopping:
            stopped, self.stopped = self.stopped, []
        for one in reversed(stopped):
            one.send(signal.SIGCONT)

    def _lost(self) -> NameClaimed:
        self.report.end = "lost"
        return NameClaimed(
            f"the job {self.options.name} was taken over by another `crcli run`, and ended here",
            hint="`crcli ls` says who has it; nothing that it did here since its last image counts",
        )


def _wake(root: ProcessId) -> None:
    """Have a tree go on that was dumped while it stood still because its lease had lapsed.

    Then its root, which is the init of ours, is stopped too, and nobody else would do that.
    """
    with suppress(ProcessLookupError, PreflightRefused):
        for process in scan_tree(root):
            process.identity.send(signal.SIGCONT)


def _end_it(job: _Running) -> None:
    """See the job dead, all of it, and its warden.

    Its namespace is not over while somebody in it is a zombie. Of a dump whose process was killed, CRIU may
    be one, and has come to us.
    """
    try:
        with suppress(ProcessLookupError):
            os.kill(job.child, signal.SIGTERM)
            _reap_until_it_ends(job.child)
        with suppress(ChildProcessError):
            os.waitpid(job.child, 0)
    finally:
        os.close(job.ended)


def _reap_until_it_ends(child: int) -> None:
    """Reap whoever ends before this child does. Its end is noticed at once, or a little later where no
    descriptor is to be had."""
    with ExitStack() as held:
        end = select.poll()
        with suppress(OSError):
            pidfd = os.pidfd_open(child)
            held.callback(os.close, pidfd)
            end.register(pidfd, select.POLLIN)
        while not end.poll(_LOOK_EVERY_S * 1000) and _has_not_ended(child):
            _reap_all()


def _has_not_ended(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    except ChildProcessError:
        return False


def _reap_all() -> None:
    """Reap whichever children have ended."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def _claimed(notices: Notices, store: Store, claim: Callable[[], Lease]) -> Lease:
    try:
        return _unless_leaving(notices, store, claim)
    except TryAgain:
        if (notice := notices.waiting(Urgency.LEAVE)) is not None:
            notice.on_saved()
        raise


def _unless_leaving(notices: Notices, store: Store, work: Callable[[], Result]) -> Result:
    """Return what this work on the store comes to.

    Raises TryAgain when notice comes that this node goes away, and the store, given up then, does not let the
    work end soon.
    """
    results: list[Result] = []
    failures: list[BaseException] = []

    def do() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again where it is waited for
            failures.append(error)

    worker = Worker(do, name="asking")
    worker.start()
    notice = None
    while worker.is_alive() and notice is None:
        worker.join(_LOOK_EVERY_S)
        notice = notices.waiting(Urgency.LEAVE)
    if notice is not None:
        store.give_up()
        worker.join(_LEAVE_S)
        if worker.is_alive() or any(isinstance(error, StoreUnreachable) for error in failures):
            raise _not_begun(notice)
    for error in failures:
        raise error
    return results.pop()


def _not_begun(notice: Notice) -> TryAgain:
    return TryAgain(
        f"the job was not started here: notice of {notice.source}: {notice.reason}",
        hint="nothing was begun: start the same command again, elsewhere",
    )


@contextmanager
def _told_when_slow(tell: Callable[[Event], None], what: Event) -> Iterator[None]:
    """Tell what is being waited for if the block takes more than a second."""
    timer = threading.Timer(1.0, tell, [what])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _without_mptcp(settings: str) -> str:
    """Go's settings, with which servers listen as they did before Go 1.24: CRIU cannot save MPTCP's sockets.

    Who has settled it in the environment already keeps what stands there.
    """
    if "multipathtcp=" in settings:
        return settings
    return ",".join(filter(None, (settings, "multipathtcp=0")))


def _may_unshare() -> bool:
    """Whether this host lets us make a pid namespace: without one a job runs all the same."""
    from crcli.guard.here import Here

    return bool(Here().capabilities >> CAP_SYS_ADMIN & 1)
