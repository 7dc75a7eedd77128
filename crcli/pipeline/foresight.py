"""The forecast of a dump that is under way: made before the freeze, compared with the deadline, learned from.

Whatever should be wrong with it, the dump goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli import kernel
from crcli.errors import TooLate
from crcli.findings import Finding, Severity
from crcli.memory.sample import Makeup
from crcli.pipeline.forecast import DUMP_LOOK_MOST_S, DUMP_LOOK_S, Load, learn_from, measure, predict
from crcli.pipeline.rates import load_rates
from crcli.pipeline.stages import Outcome
from crcli.pipeline.watch import tree_state
from crcli.records import replace
from crcli.threads import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.image.index import KnownChunks
    from crcli.memory.overflow import Overflow
    from crcli.memory.weights.match import Matcher
    from crcli.pipeline.stages import DumpOptions, DumpReport
    from crcli.process.evidence import Evidence
    from crcli.process.tree import Tree

_CRIU_START_S = 0.025
"""How long CRIU takes before it asks whether it may freeze the tree (seconds): memory is got until then."""

_HOPELESS = 3.0
"""A forecast from measured rates that exceeds the time that is left by this factor is believed."""


class Foresight:
    """What lies ahead of the dump that `report` is of, as far as it was looked at.

    `gpu_bytes` is what the tree's memory on GPUs takes; `matcher` knows what is in files of weights.
    """

    def __init__(
        self,
        options: DumpOptions,
        report: DumpReport,
        overflow: Overflow,
        matcher: Matcher | None,
        gpu_bytes: int,
    ) -> None:
        self._options = options
        self._report = report
        self._overflow = overflow
        self._matcher = matcher
        self._gpu_bytes = gpu_bytes
        self._room = max(0, overflow.limit - gpu_bytes // 2)
        self._load: Load | None = None
        self._looking: Worker | None = None

    def look(self, evidence: Evidence, known: KnownChunks) -> None:
        """Look at the tree's memory, of which the store has what is `known`."""
        if not self._options.forecast:
            return
        most_s = min(DUMP_LOOK_MOST_S, max(DUMP_LOOK_S, self._overflow.left_s() - _CRIU_START_S))
        try:
            self._load = measure(
                evidence, self._options, known, DUMP_LOOK_S, most_s, self._matcher, self._gpu_bytes
            )
        except Exception:
            return

    def predict(self, spent_ms: float) -> None:
        """Make the forecast from what was seen; `spent_ms` is what preparing took."""
        self._predict(self._load, spent_ms)

    def _predict(self, load: Load | None, spent_ms: float) -> None:
        if load is not None:
            try:
                self._report.forecast = predict(load, load_rates(), self._options.store, self._room, spent_ms)
            except Exception:
                return

    def beside(self, work: Callable[[], None]) -> None:
        """Have a thread do this: a tree that stays can be looked at while CRIU works. `end` waits for it."""
        looking = Worker(work, name="forecast")
        try:
            with kernel.signals_held():
                looking.start()
                self._looking = looking
        except RuntimeError:  # there are as many threads as there may be
            work()

    def end(self) -> None:
        """Return when nobody looks at the tree's memory any more."""
        if self._looking is not None:
            self._looking.join()
            self._looking = None

    def see_deadline(self, evidence: Evidence, now_ms: float, left_s: float) -> Finding | None:
        """A finding that compares the forecast with the time that is left, `now_ms` after the dump began.

        Raises TooLate when it is out of reach: that is better said than tried, the tree would stand still for
        nothing.
        """
        if self._report.forecast is None:
            return None
        needs_s = max(0.0, self._report.forecast.total_ms - now_ms) / 1000
        message = f"the image takes {needs_s:.1f} s more by the forecast, and {left_s:.1f} s are left"
        was_measured = load_rates().step("ship", self._options.store).seen > 0
        was_measured = was_measured and not self._gpu_bytes  # nobody could look at what is on its GPUs
        if was_measured and needs_s > _HOPELESS * left_s:
            raise TooLate(
                f"the image cannot be durable before its deadline: {message}",
                hint="take images while there is time; the next one then stores only what has changed",
                state=tree_state(evidence.tree),
            )
        seen = {"needs_s": round(needs_s, 3), "left_s": round(left_s, 3)}
        return Finding("deadline-forecast", Severity.NOTE, message, seen)

    def after_rounds(self, left_of: Callable[[Load], Load], spent_ms: float) -> None:
        """Rounds have sent memory ahead: as much as before is stored, and less is left for the freeze."""
        if self._load is not None and self._report.forecast is not None:
            stored = self._report.forecast.stored_bytes
            self._predict(left_of(self._load), spent_ms)
            self._report.forecast = replace(self._report.forecast, stored_bytes=stored)

    def learn(self, tree: Tree, file_bytes: int, *, weights: bool) -> None:
        """Keep how long the dump of this tree took, with so many bytes of files, for the forecasts of others.

        `weights`: some were looked for.
        """
        if not self._options.forecast:
            return
        try:
            load = self._what_it_was(tree, file_bytes)
            fits = load.stays or load.memory.total <= self._room
            is_plain = self._options.deadline_s is None and not weights and not self._report.rounds
            learn_from(self._report, load, is_plain and fits)
        except Exception:
            return

    def _what_it_was(self, tree: Tree, file_bytes: int) -> Load:
        """What the dump turned out to do."""
        report = self._report
        new = report.memory_bytes - report.zero_bytes - report.reused_bytes - report.weights_bytes
        return Load(
            processes=len(tree),
            threads=max(0, sum(process.threads for process in tree) - len(tree)),
            memory=Makeup(
                report.memory_bytes,
                report.zero_bytes,
                report.reused_bytes,
                new,
                weights=report.weights_bytes,
            ),
            stored_bytes=report.stored_bytes,
            file_bytes=file_bytes,
            gpu_bytes=self._gpu_bytes,
            stays=self._options.outcome != Outcome.RUNNING,
        )
