"""What a vigil says while it lasts (on stderr), and how it ended."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from crcli.errors import CrcliError, DumpFailed
from crcli.findings import Finding, Severity
from crcli.pipeline.vigil import Event, VigilEnd, Why
from crcli.ui import errors
from crcli.ui.reports import show_json
from crcli.ui.text import json_text, printable

if TYPE_CHECKING:
    from collections.abc import Callable

SAVED_CODE = 75


def teller(as_json: bool) -> Callable[[Event], None]:
    """What tells of events: lines of JSON, or sentences."""
    end = "\r\n" if sys.stderr.isatty() else "\n"  # a terminal may be raw: it is the job's

    def tell(event: Event) -> None:
        text = json_text(event.as_json()) if as_json else printable(f"crcli: {event.message}")
        try:
            sys.stderr.write(text + end)  # at once: sources of notices have threads of their own
            sys.stderr.flush()
        except OSError:
            pass  # a log that went away must not end what is being done

    return tell


def show_end(pid: int, as_json: bool, end: VigilEnd) -> int:
    """Show how a vigil ended, and return the exit code."""
    if end.why is Why.LEFT_BEHIND:
        return errors.show(_explained(end), as_json)
    if as_json:
        show_json(as_object(pid, end))
    elif end.why is Why.SAVED:
        print(printable(f"{end.image}: saved"))
    else:
        newest = f"; its newest image is {end.image}" if end.image else ""
        print(printable(f"the tree of {pid} has {end.why.value}{newest}"))
    return SAVED_CODE if end.why is Why.SAVED else 0


def as_object(pid: int, end: VigilEnd) -> dict[str, Any]:
    """How a vigil ended, as programs read it."""
    return {
        "pid": pid,
        "outcome": end.why.value,
        "image": end.image,
        "images": end.images,
        "notice": end.notice and {"source": end.notice.source, "reason": end.notice.reason},
        "timing": dict(end.timing) or None,
        "dump": end.report,
    }


def _explained(end: VigilEnd) -> CrcliError:
    """The error that a tree was left behind with, and what was known of the time."""
    error = end.error or DumpFailed(end.reason)
    evidence = {"image": end.image, **end.timing}
    message = f"the tree could not be saved before this node goes away: {end.reason}"
    error.findings = (
        *error.findings,
        Finding("left-behind", Severity.NOTE, message, evidence, "lets the tree run on"),
    )
    error.message = message
    error.args = (message,)
    return error
