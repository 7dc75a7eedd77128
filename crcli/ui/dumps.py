"""What a dump of several trees did: a line for each, and a summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.ui.errors import as_object, what_of_the_tree
from crcli.ui.reports import OUTCOMES, show_json
from crcli.ui.text import count, duration, printable, size

if TYPE_CHECKING:
    from crcli.pipeline.stages import DumpReport, DumpsReport, TreeResult


def show(report: DumpsReport, as_json: bool, *, dry_run: bool = False) -> None:
    """Show what became of each tree, in the order in which they were named, and of all together."""
    if as_json:
        show_json({"dumps": [_object(one) for one in report.dumps], **report.sums()})
        return
    for one in report.dumps:
        print(printable(_line(one, dry_run)))
    print(_summary(report, dry_run))


def _object(one: TreeResult) -> dict[str, Any]:
    if one.error is not None:
        return {"pid": one.pid, "error": as_object(one.error)}
    assert one.report is not None
    return one.report.as_json()


def _line(one: TreeResult, dry_run: bool) -> str:
    if one.error is not None:
        hint = f" Hint: {one.error.hint}" if one.error.hint else ""
        return f"{one.pid}: not dumped: {one.error.message}. {what_of_the_tree(one.error)}{hint}"
    assert one.report is not None
    return _foreseen(one.report) if dry_run else _done(one.report)


def _done(report: DumpReport) -> str:
    line = (
        f"{report.image}: {count(report.processes, 'process')} dumped {OUTCOMES[report.outcome]}, "
        f"frozen {duration(report.frozen_ms)}, {size(report.stored_bytes)} stored"
    )
    return "; ".join([line, *(one.remedy for one in report.findings if one.name == "left-stopped")])


def _foreseen(report: DumpReport) -> str:
    line = f"{report.pid}: {count(report.processes, 'process')} can be dumped, as {report.name}"
    if (forecast := report.forecast) is not None:
        line += f"; forecast: frozen {duration(forecast.frozen_ms)}, {size(forecast.stored_bytes)} stored"
    return line


def _summary(report: DumpsReport, dry_run: bool) -> str:
    sums = report.sums()
    counted = f"{len(report.done)} of {count(len(report.dumps), 'tree')}"
    if dry_run:
        return f"{counted} can be dumped; nothing was touched"
    return (
        f"{counted} dumped in {duration(report.total_ms)}: {size(sums['stored_bytes'])} stored, frozen "
        f"{duration(sums['frozen_ms_median'])} at the median, {duration(sums['frozen_ms_most'])} at most"
    )
