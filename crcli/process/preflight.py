"""What the evidence means: the findings that a dump and `crcli check` report before anything is frozen.

Each family of findings is one small function in `blockers`, `changes` or `notes`, named in the tuple at that
module's end; to add one, write it and name it there.
"""

from __future__ import annotations

from crcli.findings import Finding, gravest_first
from crcli.process.blockers import BLOCKERS
from crcli.process.changes import CHANGES
from crcli.process.evidence import Evidence
from crcli.process.notes import NOTES
from crcli.process.wording import Check

CHECKS: tuple[Check, ...] = (*BLOCKERS, *CHANGES, *NOTES)


def preflight(evidence: Evidence) -> list[Finding]:
    """Return every finding about the tree, the gravest first."""
    return gravest_first(finding for check in CHECKS for finding in check(evidence))
