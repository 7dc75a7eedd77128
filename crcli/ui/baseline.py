"""What the CPUs of a fleet have in common, for people and for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.guard.baseline import NOT_REACHED, environment_for, level_of
from crcli.ui.reports import show_json
from crcli.ui.table import show_table
from crcli.ui.text import count, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.guard.baseline import Baseline, Host


def show_baseline(baseline: Baseline, hosts: Sequence[Host], as_json: bool) -> None:
    """Show what all have, what each has more, the variables that keep programs to it, and what they miss."""
    environment, level = environment_for(baseline), level_of(baseline)
    if as_json:
        show_json(
            {
                "machine": baseline.machine,
                "cpu_flags": sorted(baseline.flags),
                "level": level,
                "hosts": [
                    {"hostname": host.name, "cpu_model": host.cpu_model, "beyond": host.beyond(baseline)}
                    for host in hosts
                ],
                "environment": environment,
                "not_reached": list(NOT_REACHED),
            }
        )
        return
    rows = [(host.name, host.cpu_model, " ".join(host.beyond(baseline)) or "nothing") for host in hosts]
    show_table(("HOST", "CPU", "HAS BEYOND THE OTHERS"), rows)
    print()
    print(printable(f"{count(len(hosts), 'host')} have in common: {level or baseline.machine}"))
    for name, value in environment.items():
        print(printable(f"{name}={value}"))
    print()
    print("These variables do not reach:")
    for line in NOT_REACHED:
        print(f"  {line}")
