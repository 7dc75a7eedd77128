"""CRIU's log, read for us: the line that is the cause, what it means, and what helps.

A log holds lines of several processes. CRIU's own have no pid; a process that is being restored
(or code that runs inside one) puts its own before what it says:

    (00.046071)   5392: Error (criu/files-reg.c:2353): Can't open file tmp/f on restore: No such file …
    (00.040588) pie: 8324: Error (criu/pie/restorer.c:1907): Can't read pages data (-9)
    (00.046095) Error (criu/cr-restore.c:2331): Restoring FAILED.

The process that failed first is the one that matters: the others are killed because of it, and say so. Of its
errors the first is the nearest to the cause; those after it say what could not be done without. Some errors
stand in the log of every run that works; they are left out.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from crcli.cause import Cause
from crcli.criu.binary import DOES_IT_START

if TYPE_CHECKING:
    from collections.abc import Iterable

_LINE = re.compile(
    r"^(?:\(\d+\.\d+\))?\s*(?:pie: )?\s*(?:(?P<pid>\d+):\s*)?"
    r"(?P<level>Error|Warn)\s*\([^)]*:\d+\): (?P<text>.*)$"
)
_WARNINGS_THAT_COUNT = re.compile(r"Unable to interrupt task")
"""A process that cannot be stopped is a warning at first, for it may be a zombie; then CRIU just gives up."""

_HARMLESS = re.compile(
    r"rlimit: Can't setup RLIMIT_NOFILE for self"
    r"|Can't keep kdat cache"
    r"|-?\d+ reported by netlink"
    r"|net: Unable to create a veth pair"
    r"|net: Unexpected error: -?\d+\("
    r"|RPC client reported script error"
)
"""Errors that stand in the logs of runs that worked, and one that only passes on what we said ourselves."""

_THE_END = re.compile(
    r"Error \([^)]*\): (?:(?:Restoring|Dumping) FAILED|Killing processes because of failure)"
)
"""From here on CRIU clears away: what is killed then is not a cause."""

_CONSEQUENCES = re.compile(
    r"\w[\w ]* \(pid: \d+\) failed with"
    r"|Unable to open fd=\d+ id="
    r"|`- Can't open vma"
    r"|\d+ exited, status="
    r"|Unable to detach from"
    r"|Restorer fail|BUG at criu/pie/restorer"
    r"|Aborting restore due to|(?:Pre|Post)-resume script"
    r"|Can't unfreeze"
)
"""What CRIU says on its way there, after the cause."""

_KILLED = re.compile(r"\d+ killed by signal 9: ")
"""A cause only when nothing was said before: after an error CRIU kills what it has begun."""

_VERSION = re.compile(r"^\([\d.]+\) Version: (\S+)", re.MULTILINE)


class _Line(NamedTuple):
    pid: int
    text: str
    is_error: bool


def version_in(log: bytes) -> str:
    """The version of the CRIU that wrote a log, such as `4.2.1`; empty when it does not say."""
    found = _VERSION.search(log[:4096].decode(errors="replace"))
    return found[1] if found else ""


def explain(log: str | None) -> Cause:
    """Return why CRIU gave up, as far as its log says (None: it wrote none).

    A cause that is not known has no name, and its meaning is the line itself.
    """
    if log is None:
        return Cause(name="", said="", meaning="CRIU wrote no log", remedy=DOES_IT_START, retry=None)
    lines = [line for line in _parse(log) if not _HARMLESS.match(line.text)]
    errors = [line for line in lines if line.is_error]
    causes = [line for line in errors if not _CONSEQUENCES.match(line.text)]
    causes = causes[:1] + [line for line in causes[1:] if not _KILLED.search(line.text)]
    warnings = [line for line in lines if _WARNINGS_THAT_COUNT.match(line.text)]
    said = _of_the_first_to_fail(causes or warnings or errors)
    return _known(said) or _unknown(said, log)


def _parse(log: str) -> Iterable[_Line]:
    end = _THE_END.search(log)
    for text in log[: end.start() if end else None].splitlines():
        if found := _LINE.match(text):
            yield _Line(int(found["pid"] or 0), found["text"].strip(), found["level"] == "Error")


def _of_the_first_to_fail(lines: list[_Line]) -> list[str]:
    """The lines, those of the process that spoke first before those of all others."""
    first = [line.text for line in lines if line.pid == lines[0].pid]
    return first + [line.text for line in lines if line.pid != lines[0].pid]


def _known(said: list[str]) -> Cause | None:
    """The known cause that is named first."""
    from crcli.criu.causes import KNOWN

    text = "\n".join(said)
    found = [(known, match) for known in KNOWN if (match := known.pattern.search(text))]
    if not found:
        return None
    known, match = min(found, key=lambda pair: text.count("\n", 0, pair[1].start()))
    values = {name: value or "" for name, value in match.groupdict().items()}
    if path := values.get("path"):
        values["path"] = path if path.startswith("/") else f"/{path}"
    return Cause(
        name=known.name,
        said=said[text.count("\n", 0, match.start())],
        meaning=known.meaning.format_map(values),
        remedy=known.remedy.format_map(values),
        retry=known.retry,
    )


def _unknown(said: list[str], log: str) -> Cause:
    if said:
        return Cause(name="", said=said[0], meaning=said[0], remedy="", retry=None)
    last = next((line.strip() for line in reversed(log.splitlines()) if _tells(line)), "")
    meaning = f"CRIU's log ends without an error, with: {last}" if last else "CRIU's log tells of no error"
    return Cause(name="", said=last, meaning=meaning, remedy=DOES_IT_START, retry=None)


def _tells(line: str) -> bool:
    """Whether a line may say how far CRIU had come: none does where only errors are logged."""
    found = _LINE.match(line)
    return bool(line.strip()) and not (found and _HARMLESS.match(found["text"]))
