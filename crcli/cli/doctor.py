"""`crcli doctor`: what this host is, and what it lacks."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import EndpointOption, JsonOption, StoreOption
from crcli.config import choose_store


def doctor(
    store: StoreOption = None,
    fix: Annotated[
        bool, typer.Option("--fix", help="Let go of connections that dumps on this host still hold.")
    ] = False,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> int:
    """Say what this host is and lacks, with remedies; exit with 40 when processes cannot be dumped here."""
    from crcli.guard.doctor import Status, describe, examine, release_locks
    from crcli.ui.doctor import show_checks

    released = release_locks() if fix else []
    families = examine(choose_store(store, endpoint_url))
    checks = [check for family in families.values() for check in family]
    show_checks(families, describe(checks), released, as_json)
    return 40 if any(check.status == Status.LACKS for check in checks) else 0
