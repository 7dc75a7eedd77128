"""One thing that the doctor looked at."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from crcli.records import Struct, asdict, field


class Status(StrEnum):
    """What a check found: all is well, something to know, or the main job cannot run."""

    OK = "ok"
    NOTE = "note"
    LACKS = "lacks"


class Check(Struct, frozen=True):
    """One thing that was looked at. `name` is stable, `evidence` holds JSON values."""

    name: str
    status: Status
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """The check as `crcli doctor --json` prints it."""
        return {**asdict(self), "status": self.status.value}


def passed(name: str, message: str, **evidence: Any) -> Check:
    """Return a check that found all well."""
    return Check(name, Status.OK, message, evidence)


def note(name: str, message: str, remedy: str = "", **evidence: Any) -> Check:
    """Return a check that found something to know."""
    return Check(name, Status.NOTE, message, evidence, remedy)


def lacks(name: str, message: str, remedy: str, **evidence: Any) -> Check:
    """Return a check without which the main job cannot run."""
    return Check(name, Status.LACKS, message, evidence, remedy)


def read(path: str) -> str:
    """Return the text of a small file of the kernel's without its last newline; empty where there is none."""
    try:
        with open(path, errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""
