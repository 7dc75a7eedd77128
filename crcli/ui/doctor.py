"""What the doctor found, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.guard.doctor import Status
from crcli.ui.reports import show_json
from crcli.ui.table import show_table
from crcli.ui.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.guard.doctor import Check


def show_checks(checks: Sequence[Check], released: Sequence[str], as_json: bool) -> None:
    """Show every check, then what can be done about those that found something."""
    lacking = [check for check in checks if check.status == Status.LACKS]
    if as_json:
        found = [check.as_json() for check in checks]
        show_json({"ok": not lacking, "checks": found, "released": list(released)})
        return
    show_table(("CHECK", "", "FOUND"), [(check.name, check.status.value, check.message) for check in checks])
    remedies = [check for check in checks if check.remedy]
    if remedies:
        print()
    for check in remedies:
        print(printable(f"{check.name}: {check.remedy}"))
    for name in released:
        print(printable(f"let go of the connections behind {name}"))
    print()
    print("processes cannot be dumped here yet" if lacking else "processes can be dumped and restored here")
