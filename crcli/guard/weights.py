"""Files of weights that an image refers to: they must be here, or in the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.findings import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.guard.here import Here
    from crcli.guard.needs import Needs
    from crcli.guard.wording import Check


def missing(needs: Needs, here: Here) -> Iterator[Finding]:
    """A file that nobody has: there is nothing that could be put in its place, so this cannot be forced."""
    for file in needs.missing_weights:
        yield Finding(
            "weights-missing",
            Severity.BLOCKER,
            f"{file.path}, which holds weights of the tree, is neither here nor in the store",
            {"path": file.path, "bytes": file.size, "blake3": file.digest},
            action="starts nothing",
            remedy="say with --weights-map OLD=NEW where it is, or put it into the store with `crcli weights "
            "push` where it still exists",
        )


WEIGHTS: tuple[Check, ...] = (missing,)
