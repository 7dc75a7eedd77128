"""The types that sources of notices and those who heed them meet by."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from crcli.errors import UsageError
from crcli.findings import Finding, Severity
from crcli.records import Struct, field

if TYPE_CHECKING:
    import signal
    import threading

GRACE_VARIABLE = "CRCLI_GRACE"
"""Seconds between a notice that does not say when and the end; `--grace` comes before it."""

_DMI = "/sys/class/dmi/id"


class Urgency(StrEnum):
    """What a notice asks for."""

    LEAVE = "leave"
    """This node goes away: dump, and let the tree go."""

    RISK = "risk"
    """More likely than before that it will: take an image, and go on."""


def nothing() -> None:
    """Nobody waits for the image."""


class Notice(Struct, frozen=True):
    """Word that this node goes away, or may.

    `deadline` is when, on the clock of `time.monotonic()`; None where that was not said. `on_saved` is to be
    called once the image is durable and the tree gone, and after everything else that is to be done here
    (a lease to be released): who is told may take the node away at once. It may take seconds, and never
    raises when it comes from `Notices.get`.
    """

    source: str
    reason: str
    urgency: Urgency = Urgency.LEAVE
    deadline: float | None = None
    on_saved: Callable[[], None] = nothing


Tell = Callable[[Notice], None]


class Source(Protocol):
    """Something that may give notice."""

    name: str

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        """Tell every notice, until `stopped` is set; runs in a thread of its own.

        It looks at `stopped` a few times a second. What it raises ends this source only.
        """


@runtime_checkable
class SignalSource(Protocol):
    """A source that is told of signals."""

    name: str
    signals: Sequence[signal.Signals]

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        """As of any source."""

    def caught(self, number: int, at: float) -> None:
        """Called in the signal's handler, at that `time.monotonic()`: take no lock here, and no time."""


class Surroundings(Struct, frozen=True):
    """What a source may know of where it runs."""

    grace_s: float | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    report: Callable[[Finding], None] = lambda finding: None
    dmi: str = _DMI

    def machine(self, name: str) -> str:
        """What the firmware says of this machine under a name of /sys/class/dmi/id; empty where nothing."""
        try:
            with open(os.path.join(self.dmi, name), encoding="utf-8", errors="replace") as file:
                return file.read(256).strip()
        except OSError:
            return ""

    def deadline(self, at: float | None = None) -> float | None:
        """When a notice that came `at` (now) runs out if it does not say so itself."""
        if self.grace_s is None:
            return None
        return (time.monotonic() if at is None else at) + self.grace_s

    def silent(self, source: str, what: str, remedy: str = "") -> None:
        """Report that what a source asks has not answered as it should for some time."""
        remedy = remedy or "name the notices that apply here (--notice), if this one does not"
        self.report(note("notice-silent", source, f"hears nothing: {what}", "tries on", remedy))


def note(name: str, source: str, message: str, action: str, remedy: str = "") -> Finding:
    """A finding about a source; none of them ends a job."""
    return Finding(
        name, Severity.NOTE, f"the notice source {source} {message}", {"source": source}, action, remedy
    )


Make = Callable[[str, str, Surroundings], Sequence[Source]]


class SourceKind(Struct, frozen=True):
    """A kind of source, as a plug-in registers it.

    `names` are what `--notice` calls it, the first of them in general; `sees` says in a line what it sees,
    `form` how it is written where it takes an argument. `make(name, argument, surroundings)` makes its
    sources (mostly one) and raises UsageError for an argument that makes no sense; `applies` says whether
    `auto` takes it here, from the environment and the firmware only.
    """

    names: tuple[str, ...]
    sees: str
    make: Make
    applies: Callable[[Surroundings], bool] = lambda surroundings: False
    form: str = ""

    @property
    def package(self) -> str:
        """The Python package that brings it."""
        return self.make.__module__.partition(".")[0]

    @property
    def shown(self) -> str:
        """How `--notice` is told of it."""
        return self.form or self.names[0]

    def as_json(self) -> dict[str, str]:
        """The kind as `crcli plugins --json` prints it."""
        return {"name": self.names[0], "form": self.shown, "sees": self.sees, "package": self.package}


def grace_of(given_s: float | None, environ: Mapping[str, str]) -> float | None:
    """Return the grace time in seconds: the one given, else $CRCLI_GRACE's, else None.

    Raises UsageError for what is no number of seconds.
    """
    said = (environ.get(GRACE_VARIABLE) or None) if given_s is None else given_s
    if said is None:
        return None
    found = seconds(said)
    if found is None:
        where = GRACE_VARIABLE if given_s is None else "--grace"
        raise UsageError(f"{where} is a number of seconds, not {said!r}")
    return found


def seconds(text: object) -> float | None:
    """Return the number of seconds that a text or a number stands for; None for anything else."""
    if isinstance(text, bool) or not isinstance(text, int | float | str):
        return None
    try:
        found = float(text)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) and found >= 0 else None
