"""Whether this host can take an image: compared before anything is started."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.errors import GuardRefused
from crcli.findings import Finding, Severity
from crcli.memory.extents import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from crcli.image.manifest import Manifest


_MADE_BY_THE_KERNEL = ("/proc/", "/sys/", "/dev/pts/")


def guard(manifest: Manifest) -> list[Finding]:
    """Return the findings about this host and this image; raise GuardRefused when one is a blocker."""
    findings = examine(manifest)
    blockers = [finding for finding in findings if finding.severity == Severity.BLOCKER]
    if blockers:
        raise GuardRefused(
            f"this host cannot take {manifest.name}@{manifest.id}: {blockers[0].message}",
            hint=blockers[0].remedy,
            findings=findings,
        )
    return findings


def examine(manifest: Manifest) -> list[Finding]:
    """Compare this host with what the image needs; return every finding."""
    return [finding for check in _CHECKS for finding in check(manifest)]


def _machine(manifest: Manifest) -> Iterator[Finding]:
    then, now = manifest.meta.get("host", {}).get("machine"), os.uname().machine
    if then and then != now:
        yield Finding(
            "architecture",
            Severity.BLOCKER,
            f"the image is of a {then} process, this host is {now}",
            {"image": then, "here": now},
            remedy=f"restore on a {then} host",
        )


def _page_size(manifest: Manifest) -> Iterator[Finding]:
    then, now = manifest.meta.get("host", {}).get("page_size"), os.sysconf("SC_PAGE_SIZE")
    if then and then != now:
        yield Finding(
            "page-size",
            Severity.BLOCKER,
            f"the image has pages of {then} bytes, this kernel uses {now}",
            {"image": then, "here": now},
            remedy="restore on a kernel with the same page size",
        )


def _memory(manifest: Manifest) -> Iterator[Finding]:
    from crcli.criu.workspace import spare_memory

    needed = sum(extent.pages for extents in manifest.spaces.values() for extent in extents) * PAGE
    spare = spare_memory()
    if needed > spare:
        yield Finding(
            "memory",
            Severity.BLOCKER,
            f"the tree needs {needed >> 20} MiB of memory and {spare >> 20} MiB are free",
            {"needed": needed, "free": spare},
            remedy="free memory, or restore on a larger host",
        )


def _files(manifest: Manifest) -> Iterator[Finding]:
    carried = {file.name for file in manifest.files}
    for path in (file["path"] for file in manifest.meta.get("opened", [])):
        if path in carried or path.startswith(_MADE_BY_THE_KERNEL):
            continue
        if not os.path.lexists(path):
            yield Finding(
                "file-missing",
                Severity.BLOCKER,
                f"{path}, which the tree has open or mapped, is not here",
                {"path": path},
                remedy="install the same version of what it belongs to, or dump with --include",
            )


_CHECKS: tuple[Callable[[Manifest], Iterator[Finding]], ...] = (_machine, _page_size, _memory, _files)
