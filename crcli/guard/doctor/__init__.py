"""What this host is, and what it lacks for the main job: each check with its evidence and its remedy.

Each check tries the thing itself where that leaves no trace, and asks the kernel or CRIU where it would. The
families stand in modules of their own; to add a check, write a function there that yields it, and name it in
that module's CHECKS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.guard.doctor import criu, gpus, kernel, leftovers, machine, places, rights
from crcli.guard.doctor.check import Check, Status
from crcli.guard.doctor.gpus import wake
from crcli.guard.doctor.host import describe
from crcli.guard.doctor.leftovers import release_locks

if TYPE_CHECKING:
    from crcli.config import StoreChoice

FAMILIES = {
    "kernel": kernel.CHECKS,
    "rights": rights.CHECKS,
    "criu": criu.CHECKS,
    "machine": machine.CHECKS,
    "gpus": gpus.CHECKS,
    "leftovers": leftovers.CHECKS,
}


def examine(store: StoreChoice) -> dict[str, list[Check]]:
    """Look at everything that the main job needs, by family; `store` is the one that commands would use."""
    found = {family: [one for look in checks for one in look()] for family, checks in FAMILIES.items()}
    return found | {"places": list(places.examine(store))}


__all__ = ["Check", "Status", "describe", "examine", "release_locks", "wake"]
