"""What would happen: a tree before its dump, an image before its restore, looked at and not touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.criu.binary import see_criu
from crcli.findings import Severity, gravest_first
from crcli.guard.claimed import claimed
from crcli.guard.here import Here
from crcli.guard.host import examine
from crcli.guard.needs import Asked, StoredImages, needs_of
from crcli.image.claims import claimed_by
from crcli.image.manifest import load
from crcli.image.names import parse_image, suggested_name
from crcli.image.packs import ChunkReader
from crcli.image.weights import MemoryReader
from crcli.pipeline.forecast import look_ahead
from crcli.pipeline.preflight import look_at
from crcli.pipeline.stages import DumpOptions
from crcli.process.tree import find_target, refuse_bad_target
from crcli.process.tree_lock import TreeLock
from crcli.records import Struct, replace
from crcli.store.open import open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.findings import Finding
    from crcli.gpu.preflight import Survey
    from crcli.pipeline.stages import Forecast
    from crcli.process.evidence import Evidence


_OTHER_DUMP_S = 20.0
"""How long a dump of the tree that is under way is waited for (seconds); who takes longer is found there."""


class CheckReport(Struct, frozen=True):
    """What `crcli check --json` says. `target` is a pid, or an image as NAME@ID."""

    target: str
    findings: Sequence[Finding] = ()
    forecast: Forecast | None = None
    """Of a process that can be dumped, and whose store answers."""

    @property
    def is_refused(self) -> bool:
        """Whether a dump, or a restore here, would be refused as things stand."""
        return any(finding.severity == Severity.BLOCKER for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The promised JSON object."""
        return {
            "target": self.target,
            "findings": [finding.as_json() for finding in self.findings],
            "forecast": self.forecast and self.forecast.as_json(),
        }


def check_process(pid: int, store: str, endpoint_url: str | None = None) -> CheckReport:
    """Say what stands in the way of a dump of this process's tree to this store, what will be different after
    it, and what it will take.

    Raises PreflightRefused for a pid that can never be dumped, HostLacks where CRIU cannot work.
    """
    with TreeLock(find_target(pid)) as lock:
        lock.wait(_OTHER_DUMP_S)
        root = refuse_bad_target(pid)
        see_criu()
        evidence, found = look_at(root)
    gpus = _gpu_side(evidence)
    report = CheckReport(str(pid), gravest_first([*found, *gpus.findings]))
    if report.is_refused:
        return report
    options = DumpOptions(pid=pid, store=store, endpoint_url=endpoint_url)
    name = suggested_name(evidence.root.comm)
    forecast, findings = look_ahead(evidence, options, name, gpus.used_bytes)
    return CheckReport(report.target, [*report.findings, *findings], forecast)


def _gpu_side(evidence: Evidence) -> Survey:
    """What CUDA says of the tree, where it may use it at all."""
    from crcli.gpu.preflight import Survey, survey

    if not evidence.may_use_gpus:
        return Survey()
    from crcli.gpu.hand import Hand, Purpose

    with Hand(Purpose.DUMP) as hand:
        return survey(evidence, hand)


def check_image(
    image: str, store: str, endpoint_url: str | None = None, weights_folders: Sequence[str] = ()
) -> CheckReport:
    """Say what stands in the way of a restore of this image here, and what will be different after it.

    Of the image only what tells of its needs is fetched, no memory. Files of weights are looked for in
    `weights_folders` too. Raises NotFound, ImageDamaged, StoreError, HostLacks where CRIU cannot work.
    """
    url, ref = parse_image(image)
    found = open_store(url or store, endpoint_url=endpoint_url)
    try:
        manifest = load(found, ref)
        reader = ChunkReader(found, manifest.packs, manifest.chunks)
        images = StoredImages(manifest, reader)
        held = list(claimed(claimed_by(found, manifest.name)))
        missing = MemoryReader(found, manifest, reader, folders=weights_folders).missing()
    finally:
        found.close()
    see_criu()
    needs = replace(needs_of(manifest, images, Asked()), missing_weights=tuple(missing))
    findings = [*examine(needs, Here()), *held]
    return CheckReport(f"{manifest.name}@{manifest.id}", findings)
