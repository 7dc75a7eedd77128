"""Whether an image's name is held by a `crcli run` that is at work: two copies may run then."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from crcli.findings import change
from crcli.image.owner import Sight
from crcli.process.identity import read_stat

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.findings import Finding
    from crcli.image.claims import Claim

CLOCKS_APART_S = 3600.0
"""By how much (seconds) the clocks of this host and of the store may differ."""


def claimed(claim: Claim | None) -> Iterator[Finding]:
    """Say that the name is held, unless by whoever has started us, or by nobody that was lately heard of."""
    if claim is None or _is_above_us(claim):
        return
    silent_s = time.time() - claim.renewed
    if claim.sight() != Sight.ALIVE and silent_s > claim.ttl_s + CLOCKS_APART_S:
        return
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(claim.since))
    heard = f"last heard of {max(0.0, silent_s):.0f} s ago"
    yield change(
        "name-claimed",
        f"{claim.name} is claimed by {claim.holder} since {since}, {heard}; two copies may run",
        {"claim": claim.as_json()},
        "starts a copy that no lease protects",
        "end the other, or start this one with `crcli run`",
    )


def _is_above_us(claim: Claim) -> bool:
    """Whether its holder is this process, or one that this one descends from."""
    if claim.sight() != Sight.ALIVE:
        return False
    pid = os.getpid()
    try:
        while pid and pid != claim.facts["pid"]:
            pid = read_stat(pid).ppid
    except ProcessLookupError:
        return False
    return pid != 0
