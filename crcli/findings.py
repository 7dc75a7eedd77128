"""A finding: one fact that a preflight or a guard has established, with its remedy."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from crcli.records import Struct, field


class Severity(StrEnum):
    """How much a finding weighs: it stops the work, it alters what the tree sees, or it is worth knowing."""

    BLOCKER = "blocker"
    CHANGE = "change"
    NOTE = "note"


def gravest_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings in the order in which a reader should see them."""
    return sorted(findings, key=lambda finding: tuple(Severity).index(finding.severity))


class Finding(Struct, frozen=True):
    """One fact, with its evidence.

    `name` is stable (scripts match on it), `action` is what crcli does about it by itself, `remedy` what the
    user can do. `evidence` holds JSON values: pids, fds, paths, addresses.
    """

    name: str
    severity: Severity
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)
    action: str = ""
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the finding as the JSON object that DESIGN.md promises."""
        return {
            "name": self.name,
            "severity": self.severity.value,
            "message": self.message,
            "evidence": self.evidence,
            "action": self.action,
            "remedy": self.remedy,
        }


def change(name: str, message: str, evidence: dict[str, Any], action: str = "", remedy: str = "") -> Finding:
    """Return a finding about something that will not be as it was after a restore."""
    return Finding(name, Severity.CHANGE, message, evidence, action, remedy)


def note(name: str, message: str, evidence: dict[str, Any], action: str = "", remedy: str = "") -> Finding:
    """Return a finding about something worth knowing that is in the way of nothing."""
    return Finding(name, Severity.NOTE, message, evidence, action, remedy)
