"""The preflight of a dump: what /proc says of the tree, and what this host's CRIU cannot do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.criu.binary import knows_bpf
from crcli.process.preflight import preflight
from crcli.process.wording import blocker, places, who

if TYPE_CHECKING:
    from crcli.findings import Finding
    from crcli.process.evidence import Evidence


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
