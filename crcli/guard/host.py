"""Whether this host can take an image: compared before anything is started or written.

Each family of findings is one small function in `machine`, `gpus`, `files`, `weights`, `places` or `rights`,
named in the tuple at that module's end; to add one, write it and name it there (and its blockers in `names`).
It is given what the image needs (`needs`) and what this host has (`here`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.errors import GuardRefused
from crcli.findings import Finding, Severity, gravest_first
from crcli.guard.files import FILES
from crcli.guard.machine import MACHINE
from crcli.guard.places import PLACES
from crcli.guard.rights import RIGHTS
from crcli.guard.weights import WEIGHTS
from crcli.records import replace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.guard.here import Here
    from crcli.guard.needs import Needs
    from crcli.guard.wording import Check


def _gpu_side(needs: Needs, here: Here) -> Iterator[Finding]:
    """GPUs: a module that only images with GPU memory load."""
    if needs.meta.get("gpu"):
        from crcli.guard.gpus import GPUS

        for check in GPUS:
            yield from check(needs, here)


CHECKS: tuple[Check, ...] = (*MACHINE, _gpu_side, *FILES, *WEIGHTS, *PLACES, *RIGHTS)


def guard_machine(needs: Needs, here: Here) -> None:
    """Raise GuardRefused, with all findings, when the machine itself forbids it: nobody can put that right.

    Files, ports and pids are not looked at otherwise: a plug-in may still see to them.
    """
    found = [_force(finding, needs) for check in MACHINE for finding in check(needs, here)]
    if any(finding.severity == Severity.BLOCKER for finding in found):
        guard(needs, here)


def guard(needs: Needs, here: Here) -> list[Finding]:
    """Return the findings about this host and this image; raise GuardRefused when one is a blocker."""
    findings = examine(needs, here)
    blockers = [finding for finding in findings if finding.severity == Severity.BLOCKER]
    if blockers:
        more = f" (and {len(blockers) - 1} more)" if len(blockers) > 1 else ""
        raise GuardRefused(
            f"this host cannot take {needs.manifest.name}@{needs.manifest.id}: {blockers[0].message}{more}",
            hint=blockers[0].remedy,
            findings=findings,
        )
    return findings


def examine(needs: Needs, here: Here) -> list[Finding]:
    """Compare this host with what the image needs; return every finding, the gravest first.

    A blocker whose name was forced is a change. Nothing is touched.
    """
    found = [_force(finding, needs) for check in CHECKS for finding in check(needs, here)]
    here.contents.save()
    return gravest_first(found)


def _force(finding: Finding, needs: Needs) -> Finding:
    if finding.severity != Severity.BLOCKER or finding.name not in needs.asked.forced:
        return finding
    action = f"goes on all the same, as --force-guard {finding.name} was given"
    return replace(finding, severity=Severity.CHANGE, action=action)


def forced_paths(findings: list[Finding]) -> list[str]:
    """The files that are to be opened although they are not what they were."""
    names = ("file-changed", "file-mode", "library-changed")
    return [
        str(finding.evidence["path"])
        for finding in findings
        if finding.name in names and "--force-guard" in finding.action
    ]
