"""The preflight of a dump: what /proc says of the tree, and what this host's CRIU cannot do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from crcli.criu.binary import knows_bpf
from crcli.findings import Severity
from crcli.process.gather import gather
from crcli.process.preflight import preflight
from crcli.process.tree import scan_tree
from crcli.process.wording import blocker, places, who

if TYPE_CHECKING:
    from crcli.findings import Finding
    from crcli.process.evidence import Evidence
    from crcli.process.identity import ProcessId

_LOOKS, _PAUSE_S = 5, 0.03
_MOMENTARY = frozenset(
    ("udp-corked", "netlink-unread", "unix-unaccepted", "thread-apart", "memory-in-common")
)
"""Blockers that are mostly over a moment later."""


def look_at(root: ProcessId) -> tuple[Evidence, tuple[Finding, ...]]:
    """Return what can be seen of the tree, and every finding about it, the gravest first.

    What stands in the way is looked at again where it may be over in a moment, and where processes came or
    went meanwhile: a child that began after its parent's siblings were listed looks like a stranger.
    """
    for left in reversed(range(_LOOKS)):
        evidence = gather(scan_tree(root))
        findings = preflight_here(evidence)
        blockers = {finding.name for finding in findings if finding.severity == Severity.BLOCKER}
        if not blockers or not left:
            break
        if blockers - _MOMENTARY and scan_tree(root).identities == evidence.tree.identities:
            break
        time.sleep(_PAUSE_S)
    return evidence, findings


def preflight_here(evidence: Evidence) -> tuple[Finding, ...]:
    """Return every finding about the tree, the gravest first."""
    return (*_bpf_maps(evidence), *preflight(evidence))


def _bpf_maps(evidence: Evidence) -> list[Finding]:
    """A BPF map: CRIU saves some kinds, if it was built to."""
    held = evidence.anon("bpf-map")
    if not held or knows_bpf():
        return []
    return [
        blocker(
            "bpf-map",
            f"{who(evidence, held)} is a BPF map, and this CRIU was built without BPF",
            places(evidence, held),
            "let the program close it before the dump, or use a CRIU that was built with libbpf",
        )
    ]
