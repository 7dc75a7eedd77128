"""The demo's steps as they happen, and where time and bytes went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.ui.reports import phases, show_json
from crcli.ui.text import duration, printable, size

if TYPE_CHECKING:
    from crcli.demo.story import DemoReport, Step


class DemoScreen:
    """Shows a demo; under --json only its end."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json

    def step(self, step: Step) -> None:
        """Show a step that was done."""
        if not self._as_json:
            print(printable(f"{step.name:<16} {duration(step.ms):>8}   {step.seen}"), flush=True)

    def end(self, report: DemoReport) -> None:
        """Show where time and bytes went."""
        if self._as_json:
            show_json(report.as_json())
            return
        dump = report.dump
        new = dump["memory_bytes"] - dump["zero_bytes"] - dump["reused_bytes"] - dump["weights_bytes"]
        rows = [
            ("memory of the tree", dump["memory_bytes"], ""),
            ("  zeros", dump["zero_bytes"], "never stored"),
            ("  known", dump["reused_bytes"], "stored already: by another process, or an earlier dump"),
            ("  new", new, "compressed where that pays"),
            ("stored in all", dump["stored_bytes"], "memory, CRIU's images, the log, the manifest"),
        ]
        print()
        for name, count, note in rows:
            print(f"{name:<20} {size(count):>9}   {note}".rstrip())
        print()
        print(f"dump     {phases(dump['phases'])}")
        print(f"restore  {phases(report.restore['phases'])}")
        print()
        print("it works: the agent was dumped, killed, restored, and went on with its memory intact")
