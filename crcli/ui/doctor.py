"""What the doctor found, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.guard.doctor import Status
from crcli.ui.reports import show_json
from crcli.ui.table import show_table
from crcli.ui.text import count, printable, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from crcli.guard.doctor import Check
    from crcli.guard.doctor.gpus import Woken

_MARKS = {Status.OK: "ok", Status.NOTE: "note", Status.LACKS: "LACKS"}


def show_checks(
    families: Mapping[str, Sequence[Check]],
    host: Mapping[str, Any],
    released: Sequence[str],
    woken: Sequence[Woken],
    as_json: bool,
) -> None:
    """Show what this host is, every check by family, then the remedies of those that found something."""
    checks = [check for family in families.values() for check in family]
    lacking = [check for check in checks if check.status == Status.LACKS]
    if as_json:
        found = [{**check.as_json(), "family": name} for name, family in families.items() for check in family]
        show_json(
            {
                "ok": not lacking,
                "host": host,
                "checks": found,
                "released": list(released),
                "woken": [one.as_json() for one in woken],
            }
        )
        return
    print(printable(_host(host)))
    rows = []
    for family, members in families.items():
        rows += [
            (family if number == 0 else "", _MARKS[check.status], check.name, check.message)
            for number, check in enumerate(members)
        ]
    show_table(("", "", "CHECK", "FOUND"), rows)
    _show_remedies([check for check in checks if check.remedy])
    for name in released:
        print(printable(f"let go of the connections behind {name}"))
    for one in woken:
        print(printable(one.sentence))
    print()
    print("processes cannot be dumped here yet" if lacking else "processes can be dumped and restored here")


def _host(host: Mapping[str, Any]) -> str:
    processors = f"{count(host['cpus'], 'processor')} ({host['cpu_model']})"
    return f"{host['hostname']}: {processors}, {size(host['memory_bytes'])} of memory, crcli {host['crcli']}"


def _show_remedies(checks: Sequence[Check]) -> None:
    """What can be done, the gravest first."""
    if checks:
        print()
    for check in sorted(checks, key=lambda check: check.status != Status.LACKS):
        print(printable(f"{check.name}: {check.remedy}"))
