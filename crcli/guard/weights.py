"""Files of weights that an image refers to: they must be here, or in the store."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.findings import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.guard.here import Here
    from crcli.guard.needs import Needs
    from crcli.guard.wording import Check
    from crcli.image.manifest import Weights


def missing(needs: Needs, here: Here) -> Iterator[Finding]:
    """A file that nobody has: there is nothing that could be put in its place, so this cannot be forced."""
    for file in needs.missing_weights:
        yield Finding(
            "weights-missing",
            Severity.BLOCKER,
            f"{file.path}, which holds weights of the tree, {_where_it_is_not(file)}",
            {"path": file.path, "bytes": file.size, "blake3": file.digest},
            action="starts nothing",
            remedy="say with --weights-map OLD=NEW where it is, or put it into the store with `crcli weights "
            "push` where it still exists",
        )


def _where_it_is_not(file: Weights) -> str:
    """What became of it: whoever sees a file of that name here wants to know why it is not taken."""
    try:
        size = os.path.getsize(file.path)
    except OSError:
        size = file.size
    if size == file.size:
        return "is neither here nor in the store"
    return f"is another here ({size} bytes, not {file.size}), and not in the store"


WEIGHTS: tuple[Check, ...] = (missing,)
