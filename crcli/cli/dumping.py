"""A dump, once it is known what is asked for: call the pipeline, show its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.config import choose_store
from crcli.pipeline.stages import DumpOptions, Outcome

if TYPE_CHECKING:
    from collections.abc import Sequence


def options_of(
    pid: int,
    store: str | None,
    endpoint_url: str | None,
    *,
    leave_running: bool,
    leave_stopped: bool,
    **others: Any,
) -> DumpOptions:
    """What is asked for, with what the environment and the configuration file say about where images are."""
    chosen = choose_store(store, endpoint_url)
    outcome = Outcome.RUNNING if leave_running else Outcome.STOPPED if leave_stopped else Outcome.KILLED
    return DumpOptions(pid=pid, store=chosen.url, endpoint_url=chosen.endpoint_url, outcome=outcome, **others)


def take(pids: Sequence[int], options: DumpOptions, *, as_json: bool) -> int:
    """Have these trees dumped, and what came of it shown; return the exit code."""
    from crcli.pipeline.interrupts import answer_first

    answer_first()
    return _take_one(options, as_json) if len(pids) == 1 else _take_many(pids, options, as_json)


def _take_one(options: DumpOptions, as_json: bool) -> int:
    from crcli.pipeline.dump import dump
    from crcli.ui import reports
    from crcli.ui.progress import showing

    with showing(as_json) as progress:
        report = dump(options, progress)
    reports.show_dump(report, as_json, dry_run=options.dry_run)
    return 0


def _take_many(pids: Sequence[int], options: DumpOptions, as_json: bool) -> int:
    from crcli.pipeline.many import dump_many
    from crcli.ui import dumps
    from crcli.ui.progress import showing

    with showing(as_json) as progress:
        report = dump_many(pids, options, progress)
    dumps.show(report, as_json, dry_run=options.dry_run)
    return report.exit_code
