"""What the two stories did, for people and for programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from crcli.ui.text import duration, printable, size

if TYPE_CHECKING:
    from crcli.pipeline.stages import DumpReport, RestoreReport


def show_dump(report: DumpReport, as_json: bool, *, dry_run: bool = False) -> None:
    """Show what a dump did (or, for a dry run, found)."""
    if as_json:
        print(json.dumps(report.as_json()))
        return
    if dry_run:
        print(printable(f"{report.processes} processes can be dumped as {report.name}"))
        return
    stored = f"{size(report.memory_bytes)} of memory, {size(report.stored_bytes)} stored"
    times = f"frozen {duration(report.frozen_ms)}, {duration(report.total_ms)} in all"
    print(printable(f"{report.image}: {stored}; {times}; the tree is {report.outcome}"))


def show_restore(report: RestoreReport, as_json: bool) -> None:
    """Show what a restore did."""
    if as_json:
        print(json.dumps(report.as_json()))
        return
    print(printable(f"{report.image}: running as pid {report.host_pid} after {duration(report.ready_ms)}"))
