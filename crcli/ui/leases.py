"""Who holds which name, for people and for programs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from crcli.ui.reports import show_json
from crcli.ui.table import show_table
from crcli.ui.text import duration, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.image.claims import Claim


def show_claims(claims: Sequence[Claim], store_url: str, as_json: bool) -> None:
    """Show who holds what."""
    if as_json:
        show_json({"store": store_url, "leases": [claim.as_json() for claim in claims]})
    elif not claims:
        print(printable(f"no name is claimed in {store_url}"))
    else:
        columns = ("NAME", "NUMBER", "HOLDER", "SINCE", "LAST HEARD OF")
        show_table(columns, [_row(claim) for claim in claims], right=("NUMBER",))


def show_broken(claim: Claim, store_url: str, as_json: bool) -> None:
    """Show whose lease was broken."""
    if as_json:
        show_json({"store": store_url, "broken": claim.as_json()})
    else:
        print(printable(f"{claim.name} is free: it was claimed by {claim.holder}"))


def _row(claim: Claim) -> list[str]:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(claim.since)) if claim.since else "?"
    silent_ms = max(0.0, time.time() - claim.renewed) * 1000
    return [claim.name, str(claim.number), claim.holder, since, f"{duration(silent_ms)} ago"]
