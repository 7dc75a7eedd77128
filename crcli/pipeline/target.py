"""What is dumped, and how: decided by looking, before anything is touched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.criu.binary import see_criu
from crcli.errors import PreflightRefused
from crcli.findings import Finding, Severity
from crcli.image.names import check_name, new_image_id, suggested_name
from crcli.pipeline.own_limits import see_file_size
from crcli.pipeline.plan import make_plan, outside_links
from crcli.pipeline.preflight import look_at
from crcli.pipeline.weights import chosen_files
from crcli.process.tree import refuse_bad_target
from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.criu.options import DumpPlan
    from crcli.pipeline.plan import OutsideLink
    from crcli.pipeline.stages import DumpOptions
    from crcli.process.evidence import Evidence


class Target(Struct, frozen=True):
    """A tree that was looked at and can be dumped, and how. Nothing was touched."""

    evidence: Evidence
    findings: tuple[Finding, ...]
    links: tuple[OutsideLink, ...]
    plan: DumpPlan
    weights: tuple[str, ...]
    name: str
    image_id: str

    @property
    def must_answer_limits(self) -> bool:
        """Whether CRIU needs help to read a member's limits, and can have it: see crcli.criu.limits."""
        denied = self.evidence.prlimit_denied
        return bool(denied) and not any(process.seccomp for process in self.evidence.tree)


def look(options: DumpOptions, *, careful: bool = False) -> Target:
    """Look at the tree and decide how to take it; raise PreflightRefused when it cannot be taken.

    `careful`: it is not to be relied on that the tree stays as it is until it is frozen.
    """
    if options.name:
        check_name(options.name)
    root = refuse_bad_target(options.pid)
    if options.start_time not in (None, root.start_time):
        raise PreflightRefused(f"process {options.pid} ended before its turn came; another has its pid now")
    see_criu()  # what is lacking here is said before anything is begun
    evidence, findings = look_at(root)
    refuse_blockers(options.pid, findings)
    see_file_size(evidence.expected_bytes)
    links = outside_links(evidence)
    plan = make_plan(evidence, links, options.outcome, careful=careful)
    name = options.name or suggested_name(evidence.root.comm)
    weights = _weights(options, evidence) if options.weights else ()
    return Target(evidence, findings, links, plan, weights, name, new_image_id())


def refuse_blockers(pid: int, findings: Sequence[Finding]) -> None:
    """Raise PreflightRefused where one of the findings forbids a dump."""
    blockers = [finding for finding in findings if finding.severity == Severity.BLOCKER]
    if blockers:
        raise PreflightRefused(
            f"process {pid} cannot be dumped: {blockers[0].message}",
            hint=blockers[0].remedy,
            findings=findings,
        )


def _weights(options: DumpOptions, evidence: Evidence) -> tuple[str, ...]:
    """The files of weights to compare with. A job that is to be saved is, whatever became of them."""
    return tuple(chosen_files(options.weights, evidence, may_be_absent=options.job is not None))


def gpus_ahead(evidence: Evidence, options: DumpOptions) -> tuple[list[Finding], int]:
    """What is found of the GPU side of a tree, and its bytes on GPUs, for a dump that is not made."""
    if not evidence.may_use_gpus:
        return [], 0
    from crcli.pipeline.gpu import look_at_gpus

    return look_at_gpus(evidence, options)
