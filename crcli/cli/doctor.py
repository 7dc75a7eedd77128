"""`crcli doctor`: what this host is, and what it lacks; or what the CPUs of several hosts have in common."""

from __future__ import annotations

from typing import Annotated

import typer

from crcli.cli.options import EndpointOption, JsonOption, StoreOption
from crcli.config import choose_store
from crcli.errors import UsageError


def doctor(
    files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE...", help="With --cpu-baseline: reports of hosts.", show_default=False),
    ] = None,
    store: StoreOption = None,
    fix: Annotated[
        bool,
        typer.Option(
            "--fix",
            help="Let go of connections that dumps on this host still hold, and wake CUDA of processes that "
            "killed dumps have left asleep.",
        ),
    ] = False,
    cpu_baseline: Annotated[
        bool,
        typer.Option(
            "--cpu-baseline",
            help="Say what the CPUs of several hosts have in common, each by its report (FILE, what "
            "`crcli doctor --json` printed there), and with which variables programs use no more. "
            "With --json, what `crcli run --cpu-baseline` reads.",
        ),
    ] = False,
    as_json: JsonOption = False,
    endpoint_url: EndpointOption = None,
) -> int:
    """Say what this host is and lacks, with remedies; exit with 40 when processes cannot be dumped here."""
    if cpu_baseline or files:
        if not (cpu_baseline and files):
            raise UsageError(
                "--cpu-baseline and FILE go together", hint="crcli doctor --cpu-baseline a.json b.json"
            )
        return _show_baseline(files, as_json)
    from crcli.guard.doctor import Status, describe, examine, release_locks, wake
    from crcli.ui.doctor import show_checks

    released, woken = (release_locks(), wake()) if fix else ([], [])
    families = examine(choose_store(store, endpoint_url))
    checks = [check for family in families.values() for check in family]
    show_checks(families, describe(checks), released, woken, as_json)
    return 40 if any(check.status == Status.LACKS for check in checks) else 0


def _show_baseline(files: list[str], as_json: bool) -> int:
    from crcli.guard.baseline import common_to, read_hosts
    from crcli.ui.baseline import show_baseline

    hosts = read_hosts(files)
    show_baseline(common_to(hosts), hosts, as_json)
    return 0
