"""Watches over a running tree: images of it by and by, and a dump in time when the node goes away.

One loop waits for whatever comes first: a notice, the tree's end, the next periodic image, an answer of the
dumper. It never dumps itself (see dumper.py), so it always listens: a second notice with an earlier deadline
moves the end of the dump under way.

**On notice to leave** the tree is dumped as `crcli dump --deadline` does it, and killed only when its image
is durable. The dump has until the deadline less a reserve. What fails is tried again while there is time.
When the dump cannot be in time, that is said at once, and the tree runs on to its end: what is left then is
the newest whole image. An image that is being taken when the notice comes is given up if the tree was not let
go yet; otherwise it may use half of the time, for it spares the last dump what it has sent.

**On notice of a risk** an image is taken at once, and the tree runs on.

**Between images** a tree is looked at now and then, as `crcli check` does it: that it cannot be saved as it
stands is better known before there is notice.
"""

from __future__ import annotations

import os
import select
import time
import weakref
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from crcli.errors import CrcliError, DumpFailed, HostLacks, PreflightRefused, StoreError, TooLate, TreeState
from crcli.findings import Finding, Severity
from crcli.image.names import ImageRef, new_image_id
from crcli.notice.base import Urgency
from crcli.pipeline.dumper import Dumper
from crcli.pipeline.schedule import LEAVE, Activity, Cost, History, Schedule, activity_of
from crcli.pipeline.stages import PRE_COPY_AUTO, RESERVE_S, Outcome
from crcli.pipeline.weights import absent_ones
from crcli.process.identity import read_stat
from crcli.records import Struct, asdict, field, replace

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crcli.notice.base import Notice
    from crcli.notice.notices import Notices
    from crcli.pipeline.stages import DumpOptions
    from crcli.process.identity import ProcessId

_RESERVE_SHARE = 0.2
"""Of a short time no more than this is kept back."""

_SHORTEST_TRY_S = 0.3
"""With less time than this (seconds) no dump is begun."""

_PATIENCE_S = 120.0
"""For how long a dump is tried again where no deadline was said (seconds)."""

_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0
"""Between two tries: at first, and at most (seconds)."""

_LONGEST_STOP_S, _STOP_SHARE = 5.0, 0.15
"""How long a dump that was stopped may take to end (seconds), and which share of a short time."""

_LONGEST_WAIT_S = 3600.0
"""For how long nothing is looked at (seconds); poll(2) takes 24 days at most."""

_LOOKS_S = (10.0, 60.0, 900.0)
"""After how long without an image it is looked at what keeps a tree from being dumped (seconds): at first,
when it has begun its work, once more, and from then on."""

_NEVER = float("inf")

_LOOK_AGAIN_S = 0.05
"""How often a tree is looked at whose dump should have ended (seconds)."""


class Keeping(Struct, frozen=True):
    """What is to be kept of a tree. `dump` says how (its `outcome` is what a notice to leave leaves).

    An image is taken every `every_s` seconds, or with `auto` as often as costs least at `failure_rate_per_h`
    (None: as the job's history has it, which stands in `dump.job`); with neither, only on notice. `keep`
    images of the job stay (0: all).
    """

    dump: DumpOptions
    every_s: float | None = None
    auto: bool = False
    keep: int = 0
    reserve_s: float = RESERVE_S
    failure_rate_per_h: float | None = None


class Event(Struct, frozen=True):
    """Something that happened, in a sentence, and as JSON values. `name` is stable."""

    name: str
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def as_json(self) -> dict[str, Any]:
        """The event as a line of JSON."""
        return {"event": self.name, "message": self.message, **self.data}


class Why(StrEnum):
    """Why a vigil ended."""

    ENDED = "ended"
    """The tree ended by itself."""

    SAVED = "saved"
    """There was notice, and the image is durable."""

    LEFT_BEHIND = "left-behind"
    """There was notice, and no image in time. The tree runs."""

    STOPPED = "stopped"
    """`interrupt` was called. The tree runs."""


class VigilEnd(Struct, frozen=True):
    """How a vigil ended.

    `image` is the newest whole image that is known of (NAME@ID, or empty), `images` how many were taken.
    `report` is that of the dump that saved the tree; None where the dumper did not live to give it. `error`
    is why a tree was left behind. `timing` says in seconds after the notice: `deadline`, `forecast` (when the
    image would be durable), `fact` (when it was, or was given up), and how long the `reserve` was; what was
    not known is None.
    """

    why: Why
    image: str = ""
    images: int = 0
    reason: str = ""
    notice: Notice | None = None
    report: dict[str, Any] | None = None
    error: CrcliError | None = None
    timing: Mapping[str, float | None] = field(default_factory=dict)


class Purpose(StrEnum):
    """What an image is for."""

    PERIODIC = "periodic"
    RISK = "risk"
    LEAVE = LEAVE

    LOOK = "look"
    """For nothing: what an image would find."""


class _UnderWay(Struct):
    """A dump that was begun and not answered. `since` sorts before the id of its image; `seen` is what the
    tree had done when it was let go, or when this began."""

    purpose: Purpose
    began: float
    since: str
    seen: Activity
    phase: str = ""
    stopped_at: float | None = None

    @property
    def tree_is_free(self) -> bool:
        """Whether the tree has been let go, and what is left is to be sent."""
        return self.phase == "store"


class _Leaving(Struct):
    """The notice to leave that counts, and how it is met. Times are of time.monotonic()."""

    notice: Notice
    at: float
    limit: float
    reserve_s: float = 0.0
    forecast: float | None = None
    tries: int = 0
    pause_s: float = _PAUSE_S
    next_try: float = 0.0
    error: CrcliError | None = None

    @property
    def half(self) -> float:
        """When half of the time is over."""
        return (self.at + self.limit) / 2


class Vigil:
    """See the module."""

    def __init__(
        self,
        keeping: Keeping,
        root: ProcessId,
        notices: Notices,
        tell: Callable[[Event], None],
        *,
        image: str = "",
    ) -> None:
        """`root` is the tree's; `image` is the newest whole one that is known of, as NAME@ID."""
        self._keeping = keeping
        self._root = root
        self._notices = notices
        self._tell = tell
        self._image = image
        self._taken = 0
        self._seen: Activity | None = None
        """What the tree had done when its newest image was taken."""
        self._uses_gpus = False
        self._leaving: _Leaving | None = None
        self._under_way: _UnderWay | None = None
        self._is_at_risk = False
        self._has_ended = False
        self._is_interrupted = False
        self._told: set[str] = set()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        weakref.finalize(self, os.close, self._wake)
        self._began = time.monotonic()
        self._looks = 0
        self._look_at = self._began + _LOOKS_S[0]
        """When the tree is to be looked at, if no image was begun by then."""
        self._obstacle = ""
        """What keeps it from being dumped, as it was said last, if a look finds it."""
        self._instead, self._again = "", 0
        """What was said last instead of an image, and how often it has happened since the last one."""
        self._history = History.noted(keeping.dump.job)
        rate = keeping.failure_rate_per_h
        self._schedule = Schedule(
            self._began,
            every_s=keeping.every_s,
            auto=keeping.auto,
            rate_per_h=self._history.rate_per_h if rate is None else rate,
        )

    def interrupt(self) -> None:
        """From any thread: have `keep` stop what is under way, and return STOPPED."""
        self._is_interrupted = True
        os.eventfd_write(self._wake, 1)

    def keep(self, ended: int) -> VigilEnd:
        """Watch until the tree has ended (`ended` is readable then), is saved, or cannot be.

        On return no dump is under way, unless its deadline has passed. The notice's `on_saved` is the
        caller's to call.
        """
        options = self._keeping.dump
        for finding in absent_ones(options.weights):
            self._say("finding", f"{finding.message}: crcli {finding.action}", finding=finding.as_json())
        with Dumper(options.store, options.endpoint_url) as self._dumper:
            while True:
                self._wait(ended)
                if (end := self._look_around()) is not None:
                    return end

    # What the loop waits for, and what it finds.

    def _wait(self, ended: int) -> None:
        """Return when there is something to do."""
        poll = select.poll()
        for fd in (self._notices.fd, self._dumper.fileno(), self._wake):
            poll.register(fd, select.POLLIN)
        if not self._has_ended:
            poll.register(ended, select.POLLIN)
        due = self._next_time()
        timeout = None if due is None else min(max(0.0, due - time.monotonic()), _LONGEST_WAIT_S) * 1000 + 1
        ready = {fd for fd, _ in poll.poll(timeout)}
        self._has_ended = self._has_ended or ended in ready
        if self._wake in ready:
            os.eventfd_read(self._wake)

    def _next_time(self) -> float | None:
        """When there is something to do even if nothing is heard."""
        if self._under_way is not None and self._under_way.stopped_at is not None:
            return max(self._under_way.stopped_at + self._patience_s(), time.monotonic() + _LOOK_AGAIN_S)
        if self._has_ended:
            return None if self._under_way is not None else time.monotonic()
        if (leaving := self._leaving) is None:
            return min(self._schedule.due or _NEVER, self._look_at) if self._under_way is None else None
        if self._under_way is None:
            return leaving.next_try
        until = leaving.limit if self._under_way.purpose is Purpose.LEAVE else leaving.half
        return max(until, time.monotonic() + _LOOK_AGAIN_S)

    def _look_around(self) -> VigilEnd | None:
        """Take in all that is new, and begin what is to be done; return the end, if this is it."""
        while (notice := self._notices.get(0)) is not None:
            self._take(notice)
        if (end := self._hear()) is not None:
            return end
        if self._under_way is None:
            return self._begin_what_is_due()
        self._hurry(self._under_way)
        return self._give_up_if_late(self._under_way)

    def _begin_what_is_due(self) -> VigilEnd | None:
        """Nothing is under way."""
        now = time.monotonic()
        if self._has_ended:
            return VigilEnd(Why.ENDED, self._image, self._taken)
        if self._is_interrupted:
            return VigilEnd(Why.STOPPED, self._image, self._taken)
        if (leaving := self._leaving) is not None:
            if now < leaving.next_try:
                return None
            if leaving.limit - now < _SHORTEST_TRY_S:
                return self._left_behind(leaving)
            self._begin_to_leave(leaving)
        elif self._is_at_risk or (self._schedule.due is not None and now >= self._schedule.due):
            self._begin_image(now)
        elif now >= self._look_at:
            self._begin_look()
        return None

    # Notices.

    def _take(self, notice: Notice) -> None:
        now = time.monotonic()
        left = None if notice.deadline is None else round(notice.deadline - now, 3)
        in_time = "" if left is None else f", {left:.1f} s are left"
        self._say(
            "notice",
            f"notice of {notice.source}: {notice.reason} ({notice.urgency.value}){in_time}",
            source=notice.source, reason=notice.reason, urgency=notice.urgency.value, left_s=left,
        )  # fmt: skip
        if notice.urgency is not Urgency.LEAVE:
            self._is_at_risk = True
            self._schedule.at_risk()
        elif self._leaving is None:
            self._leaving = _Leaving(notice, now, 0.0)
            self._set_limit(self._leaving, notice)
        elif notice.deadline is not None and notice.deadline < (
            self._leaving.notice.deadline or float("inf")
        ):
            self._leaving.notice = notice
            self._set_limit(self._leaving, notice)
            if self._under_way is not None and self._under_way.purpose is Purpose.LEAVE:
                self._dumper.set_deadline(self._leaving.limit - now)

    def _set_limit(self, leaving: _Leaving, notice: Notice) -> None:
        """Set when the dump must have ended: the deadline less the reserve."""
        now = time.monotonic()
        if notice.deadline is None:
            leaving.limit = now + _PATIENCE_S
        else:
            left = notice.deadline - now
            leaving.reserve_s = max(0.0, min(self._keeping.reserve_s, left * _RESERVE_SHARE))
            leaving.limit = notice.deadline - leaving.reserve_s

    # Images while the tree runs.

    def _begin_image(self, now: float) -> None:
        """Take a periodic image, or one for a risk, unless it would be what the newest one is."""
        purpose = Purpose.RISK if self._is_at_risk else Purpose.PERIODIC
        self._is_at_risk = False
        activity = activity_of(self._root)
        is_known = self._seen is not None and not activity.matters_since(self._seen)
        if is_known and not self._uses_gpus:  # a GPU may work while its processes only wait
            self._schedule.skipped(now)
            self._say_now_and_then("skipped", "no image was taken: nothing has changed since the last one")
            return
        self._begin(purpose, activity, replace(self._keeping.dump, outcome=Outcome.RUNNING))

    def _begin_look(self) -> None:
        """Have what would keep the tree from being dumped be found. Absent weights would not."""
        self._begin(
            Purpose.LOOK, activity_of(self._root), replace(self._keeping.dump, weights=()), dry_run=True
        )

    def _begin(
        self, purpose: Purpose, activity: Activity, options: DumpOptions, *, dry_run: bool = False
    ) -> None:
        self._looks += 1
        self._look_at = time.monotonic() + _LOOKS_S[min(self._looks, len(_LOOKS_S) - 1)]
        self._under_way = _UnderWay(purpose, time.monotonic(), new_image_id(), activity)
        self._dumper.begin(
            replace(
                options,
                pid=self._root.pid,
                start_time=self._root.start_time,
                dry_run=dry_run,
                job=self._note(purpose),
            )
        )

    def _note(self, purpose: Purpose) -> Mapping[str, Any] | None:
        """What the image says of the job."""
        if self._keeping.dump.job is None:
            return None
        history = self._history.and_ran(time.monotonic() - self._began)
        return {**self._keeping.dump.job, "purpose": purpose.value, **asdict(history)}

    def _image_taken(self, under_way: _UnderWay, report: dict[str, Any]) -> None:
        self._seen, self._instead = under_way.seen, ""
        cost = Cost(report["frozen_ms"], report["total_ms"])
        self._schedule.taken(under_way.began, cost)
        self._say(
            "image",
            f"{self._image} taken, the tree stood still for {cost.frozen_ms:.0f} ms",
            purpose=under_way.purpose.value, image=self._image, frozen_ms=cost.frozen_ms,
            total_ms=cost.total_ms, stored_bytes=report["stored_bytes"], next_s=self._schedule.interval_s,
        )  # fmt: skip
        if self._keeping.keep and self._keeping.dump.job:
            self._dumper.retire(self._keeping.dump.name, self._keeping.dump.job, self._keeping.keep)

    def _image_failed(self, under_way: _UnderWay, error: CrcliError) -> None:
        if under_way.stopped_at is not None:
            return
        if under_way.purpose is Purpose.LOOK:
            self._saw(error)
            return
        self._obstacle = error.message if _is_seen_by_looking(error) else ""
        self._schedule.failed(time.monotonic())
        self._say_now_and_then("image-failed", f"no image could be taken: {error.message}", **_of(error))

    def _saw(self, error: CrcliError) -> None:
        """A look has failed: say what is in the way, unless that was said, or the tree has just ended."""
        if _is_seen_by_looking(error) and error.message != self._obstacle and self._root.alive():
            self._obstacle = error.message
            what = "; ".join(filter(None, [error.message, error.hint]))
            self._say("cannot-save", f"as it is now it could not be saved: {what}", **_of(error))

    # Leaving.

    def _begin_to_leave(self, leaving: _Leaving) -> None:
        leaving.tries += 1
        now = time.monotonic()
        options = self._keeping.dump
        left = leaving.limit - now if leaving.notice.deadline is not None else None
        in_time = "" if left is None else f", which must take no longer than {left:.1f} s"
        self._say(
            "saving",
            f"the tree is being dumped{in_time}",
            left_s=left and round(left, 3), reserve_s=round(leaving.reserve_s, 3), attempt=leaving.tries,
        )  # fmt: skip
        pre_copy = options.pre_copy or PRE_COPY_AUTO
        self._begin(
            Purpose.LEAVE,
            activity_of(self._root),
            replace(options, deadline_s=left, pre_copy=pre_copy),
        )

    def _hurry(self, under_way: _UnderWay) -> None:
        """Have a dump that stands in the way of something else end: see the module."""
        if under_way.stopped_at is not None:
            if time.monotonic() > under_way.stopped_at + self._patience_s():
                self._dumper.kill()  # which loses nothing: it waits for a store that does not answer, maybe
            return
        is_image = under_way.purpose is not Purpose.LEAVE
        is_in_vain = self._is_interrupted or (is_image and self._has_ended)
        leaving = self._leaving if is_image else None
        if is_in_vain or (
            leaving is not None and (not under_way.tree_is_free or time.monotonic() > leaving.half)
        ):
            self._stop(under_way)

    def _stop(self, under_way: _UnderWay) -> None:
        under_way.stopped_at = time.monotonic()
        self._dumper.stop()

    def _patience_s(self) -> float:
        """How long a dump that was stopped may take to end (seconds)."""
        if (leaving := self._leaving) is None:
            return _LONGEST_STOP_S
        return min(_LONGEST_STOP_S, (leaving.limit - leaving.at) * _STOP_SHARE)

    def _saved(self, image: str, report: dict[str, Any] | None) -> VigilEnd:
        leaving = self._leaving
        assert leaving is not None
        timing = self._timing(leaving)
        self._say("saved", f"{image} is durable {_timely(timing)}", image=image, timing=timing)
        return VigilEnd(
            Why.SAVED, image, self._taken, leaving.notice.reason, leaving.notice, report, timing=timing
        )

    def _cannot_save(self, leaving: _Leaving, error: CrcliError) -> VigilEnd | None:
        """A dump has failed: try again while there is time and hope."""
        leaving.error = error
        if error.state in (TreeState.STOPPED, TreeState.DEAD) or not _may_pass(error):
            return self._left_behind(leaving)
        leaving.next_try = time.monotonic() + leaving.pause_s
        leaving.pause_s = min(2 * leaving.pause_s, _LONGEST_PAUSE_S)
        if leaving.limit - leaving.next_try < _SHORTEST_TRY_S:
            return self._left_behind(leaving)
        self._say("retry", f"the dump failed and is tried again: {error.message}", **_of(error))
        return None

    def _left_behind(self, leaving: _Leaving, error: CrcliError | None = None) -> VigilEnd:
        error = error or leaving.error or DumpFailed(
            "there was no time for a dump between the notice and its deadline", state=TreeState.RUNNING
        )  # fmt: skip
        timing = self._timing(leaving)
        whole = f"the newest whole image is {self._image}" if self._image else "there is no image of it"
        reason = f"{error.message}; {whole}"
        self._say("left-behind", f"the tree could not be saved: {reason}", image=self._image, timing=timing)
        return VigilEnd(
            Why.LEFT_BEHIND, self._image, self._taken, reason, leaving.notice, error=error, timing=timing
        )

    def _give_up_if_late(self, under_way: _UnderWay) -> VigilEnd | None:
        """The dump has not ended when it had to.

        If the tree runs, it was undone, and what is left is to end requests to the store: nobody waits for
        that. If the tree stands still, the dump writes its last object.
        """
        leaving = self._leaving
        if leaving is None or leaving.notice.deadline is None or under_way.purpose is not Purpose.LEAVE:
            return None
        now = time.monotonic()
        is_over = now > leaving.limit + leaving.reserve_s / 4 and self._is_undone()
        if not is_over and now < leaving.notice.deadline - leaving.reserve_s / 4:
            return None
        self._dumper.leave()
        if is_over:
            error = DumpFailed("the dump was stopped at its deadline", state=TreeState.RUNNING)
        elif self._is_off_its_gpus():
            error = DumpFailed(
                "the tree was still off its GPUs when the time was over",
                hint="crcli goes on to wake it for ten minutes; afterwards `crcli doctor --fix` does",
                state=TreeState.STOPPED,
            )
        else:
            error = DumpFailed(
                "the store had not confirmed the image when the time was over",
                hint=f"`crcli ls {self._keeping.dump.name}` says whether it came to be",
                state=TreeState.STOPPED,
            )
        return self._left_behind(leaving, error)

    def _is_undone(self) -> bool:
        """Whether the tree was to be held until its image is durable, and nobody holds it."""
        if self._keeping.dump.outcome is Outcome.RUNNING:
            return False
        try:
            stat = read_stat(self._root.pid)
        except ProcessLookupError:
            return False
        if stat.start_time != self._root.start_time or stat.is_zombie or stat.state in "tT":
            return False
        return not self._is_off_its_gpus()

    def _is_off_its_gpus(self) -> bool:
        """Whether somebody still has to wake a process of the tree on its GPUs, which may look awake."""
        from crcli.gpu.care import is_cared_for
        from crcli.process.identity import identify
        from crcli.process.tree import child_pids

        pids = [self._root.pid]
        for pid in pids:
            pids += child_pids(pid)
            try:
                if is_cared_for(identify(pid)):
                    return True
            except ProcessLookupError:
                continue
        return False

    def _timing(self, leaving: _Leaving) -> dict[str, float | None]:
        deadline = leaving.notice.deadline
        return {
            "deadline": None if deadline is None else round(deadline - leaving.at, 3),
            "reserve": None if deadline is None else round(leaving.reserve_s, 3),
            "forecast": None if leaving.forecast is None else round(leaving.forecast - leaving.at, 3),
            "fact": round(time.monotonic() - leaving.at, 3),
        }

    # What the dumper says.

    def _hear(self) -> VigilEnd | None:
        """Take in what the dumper has said; return the end, if this is it."""
        under_way = self._under_way
        try:
            report = self._dumper.hear(self)
        except CrcliError as error:
            assert under_way is not None
            self._under_way = None
            return self._dump_failed(under_way, error)
        for image in self._dumper.retired:
            self._say("retired", f"{image} was removed: newer ones are there", image=image)
        self._dumper.retired.clear()
        if report is None:
            return None
        assert under_way is not None
        self._under_way = None
        was_in_the_way, self._obstacle = self._obstacle, ""
        if under_way.purpose is Purpose.LOOK:
            if was_in_the_way:
                self._say("can-save", "as it is now it could be saved")
            return None
        self._image = str(report["image"])
        self._uses_gpus = report["gpu"] is not None
        self._taken += 1
        if under_way.purpose is Purpose.LEAVE:
            return self._saved(self._image, report)
        self._image_taken(under_way, report)
        return None

    def _dump_failed(self, under_way: _UnderWay, error: CrcliError) -> VigilEnd | None:
        if self._has_ended or (error.state is TreeState.DEAD and not self._root.alive()):
            return self._ended_in_a_dump(under_way, error)
        if under_way.purpose is not Purpose.LEAVE:
            self._image_failed(under_way, error)
            return None
        if self._is_interrupted:
            return None
        assert self._leaving is not None
        return self._cannot_save(self._leaving, error)

    def _ended_in_a_dump(self, under_way: _UnderWay, error: CrcliError) -> VigilEnd:
        """The tree is not there any more. If this dump's image is, the tree was killed on purpose, and only
        the dumper did not live to say so; otherwise it has ended, of itself or of what `error` says."""
        if under_way.purpose is Purpose.LEAVE and (image := self._image_since(under_way.since)):
            self._image = image
            return self._saved(image, None)
        return VigilEnd(Why.ENDED, self._image, self._taken, error.message, error=error)

    def _image_since(self, image_id: str) -> str:
        """The newest image of the name, if it is newer than this id; empty where there is none."""
        from crcli.image.manifest import resolve
        from crcli.store.open import open_store

        options = self._keeping.dump
        store = open_store(options.store, endpoint_url=options.endpoint_url)
        try:
            newest = resolve(store, ImageRef(options.name))
        except StoreError:
            return ""
        finally:
            store.close()
        return str(newest) if newest.id > image_id else ""

    # It is told of the dump's progress.

    def phase(self, name: str) -> None:
        """See Progress."""
        if self._under_way is not None:
            self._under_way.phase = name
            if self._under_way.tree_is_free:
                self._under_way.seen = activity_of(self._root)  # a dump makes the tree busy, too

    def amount(self, done: int, total: int) -> None:
        """See Progress."""

    def finding(self, finding: Finding) -> None:
        """See Progress."""
        if self._under_way is not None and self._under_way.purpose is Purpose.LOOK:
            return  # an image says so, or what keeps there from being one
        if finding.name == "deadline-forecast" and self._leaving is not None:
            needs_s = float(finding.evidence["needs_s"])
            self._leaving.forecast = time.monotonic() + needs_s
            is_late = needs_s > finding.evidence["left_s"]
            self._say("forecast", finding.message, **finding.evidence, fits=not is_late)
        elif _leads_to_us(finding):
            return  # the job's output, which we pass on before and after
        elif finding.severity is not Severity.NOTE and finding.message not in self._told:
            self._told.add(finding.message)  # each image finds the same
            self._say("finding", finding.message, finding=finding.as_json())

    def _say(self, name: str, message: str, **data: Any) -> None:
        self._tell(Event(name, message, data))

    def _say_now_and_then(self, name: str, message: str, **data: Any) -> None:
        """Say what happened instead of an image. What happens time and again in the same words is said the
        first, second, fourth, eighth time and so on, with how often it was: a log has other lines too."""
        self._again = self._again + 1 if message == self._instead else 1
        self._instead = message
        if self._again.bit_count() == 1:
            often = f" ({self._again} times by now)" if self._again > 1 else ""
            self._say(name, message + often, **data, times=self._again)


_OTHER_SIDES = {"pipe-outside": "other_end", "fifo-outside": "other_end", "terminal-outside": "driver"}
"""Where a finding's evidence has who is at the other side."""


def _leads_to_us(finding: Finding) -> bool:
    """Whether it is about a pipe or terminal of the tree's whose other side this process alone has."""
    others = finding.evidence.get(_OTHER_SIDES.get(finding.name, ""), ())
    return bool(others) and all(one["pid"] == os.getpid() for one in others)


def _may_pass(error: CrcliError) -> bool:
    """Whether a dump that ended like this may work a moment later, with the tree as it is."""
    if isinstance(error, PreflightRefused):
        return True  # some findings last for a moment only, and there is nothing better to do
    return isinstance(error, DumpFailed | StoreError) and not isinstance(error, TooLate)


def _is_seen_by_looking(error: CrcliError) -> bool:
    """Whether a look at the tree finds what is in the way of a dump, and finds when it is not there any more.

    Nothing was found of a tree that has ended, or that somebody else is dumping.
    """
    return isinstance(error, HostLacks) or (isinstance(error, PreflightRefused) and bool(error.findings))


def _of(error: CrcliError) -> dict[str, Any]:
    return {"code": error.code, "hint": error.hint, "state": error.state.value}


def _timely(timing: Mapping[str, float | None]) -> str:
    """The words for deadline, forecast and fact."""
    words = [f"{timing['fact']:.1f} s after the notice"]
    if timing["forecast"] is not None:
        words.append(f"forecast {timing['forecast']:.1f} s")
    if timing["deadline"] is not None:
        words.append(f"deadline {timing['deadline']:.1f} s")
    return f"{words[0]} ({', '.join(words[1:])})" if words[1:] else words[0]
