"""How the guard words its findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from crcli.findings import Finding, Severity

if TYPE_CHECKING:
    from crcli.guard.here import Here
    from crcli.guard.needs import Needs

    Check = Callable[[Needs, Here], Iterator[Finding]]
    """One family of findings about an image (what it needs) and this host."""


def blocker(name: str, message: str, evidence: dict[str, Any], remedy: str) -> Finding:
    """Return a finding with which a restore must not begin. Its name must stand in `names.BLOCKERS`."""
    return Finding(name, Severity.BLOCKER, message, evidence, "starts nothing", remedy)
