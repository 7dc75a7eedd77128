"""`crcli doctor`: what this host lacks."""

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
    """Say what this host lacks, each with its remedy; exit with 40 when processes cannot be dumped here."""
    from crcli.guard.doctor import Status, examine, release_locks
    from crcli.ui.doctor import show_checks

    released = release_locks() if fix else []
    checks = examine(choose_store(store, endpoint_url))
    show_checks(checks, released, as_json)
    return 40 if any(check.status == Status.LACKS for check in checks) else 0
