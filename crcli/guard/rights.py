"""Whom the tree belongs to and what surrounds it: users, capabilities, namespaces, cgroups, plug-ins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.findings import change, note
from crcli.guard.wording import blocker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from crcli.findings import Finding
    from crcli.guard.here import Here
    from crcli.guard.needs import Needs
    from crcli.guard.wording import Check


def users(needs: Needs, here: Here) -> Iterator[Finding]:
    """Users and groups that this host has no name for: nothing breaks, but `id` and `ls` show numbers."""
    import grp
    import pwd

    if "user" in needs.own_namespaces:
        return
    strangers = {
        "users": sorted(user for user in needs.rights.users if user and not _known(pwd.getpwuid, user)),
        "groups": sorted(group for group in needs.rights.groups if group and not _known(grp.getgrgid, group)),
    }
    for kind, numbers in strangers.items():
        if numbers:
            listed = ", ".join(map(str, numbers))
            yield note(
                f"{kind}-unknown",
                f"the tree runs as {'user' if kind == 'users' else 'group'} {listed}, which has no name here",
                {kind: numbers},
                "restores it with the same numbers",
                "see that the number is nobody else's here",
            )


def _known(find: Callable[[int], object], number: int) -> bool:
    try:
        find(number)
    except (KeyError, OverflowError):
        return False
    return True


def capabilities(needs: Needs, here: Here) -> Iterator[Finding]:
    """The kernel gives nobody a capability that is not in the bounding set: CRIU's restore ends there."""
    if "user" in needs.own_namespaces:
        return
    lacking = needs.rights.capabilities & ~here.capabilities
    if lacking:
        named = [_capability(bit) for bit in range(64) if lacking >> bit & 1]
        yield blocker(
            "capabilities",
            f"the tree holds {', '.join(named)}, which this place does not let crcli give",
            {"lacking": named},
            "restore where root has them (a container: start it with --cap-add)",
        )


def _capability(bit: int) -> str:
    names = _NAMES.split()
    return f"CAP_{names[bit]}" if bit < len(names) else f"capability {bit}"


def namespaces(needs: Needs, here: Here) -> Iterator[Finding]:
    """Kinds of namespaces that the tree brings along and this kernel was built without."""
    lacking = sorted(kind for kind in needs.own_namespaces if not os.path.exists(f"/proc/self/ns/{kind}"))
    if lacking:
        yield blocker(
            "namespaces",
            f"the tree brings namespaces along that this kernel does not have: {', '.join(lacking)}",
            {"lacking": lacking},
            "restore on a kernel that has them",
        )


def cgroups(needs: Needs, here: Here) -> Iterator[Finding]:
    """The cgroups that the tree ran in, with their limits."""
    then: list[str] = needs.meta.get("cgroups", [])
    if not then or then == here.cgroups:
        return
    evidence = {"image": then, "here": here.cgroups}
    if needs.meta.get("plan", {}).get("manage_cgroups"):
        hierarchies = {line.split(":")[1] for line in here.cgroups}
        if lacking := sorted({line.split(":")[1] for line in then} - hierarchies):
            yield change(
                "cgroups-missing",
                f"this host does not have the cgroup hierarchies {', '.join(lacking)}",
                evidence | {"lacking": lacking},
                "restores without them",
                "mount them before, if the tree needs their limits",
            )
        return
    yield note(
        "cgroups-other",
        "the tree ran in other cgroups than crcli does here",
        evidence,
        "restores it into crcli's own, whose limits count",
        "start the restore in the cgroup that the tree shall have (systemd-run --scope)",
    )


def plugins(needs: Needs, here: Here) -> Iterator[Finding]:
    """Plug-ins that took part in the dump: what they had put aside nobody else will put back."""
    for used in needs.meta.get("plugins", []):
        if used["name"] not in here.plugins:
            yield change(
                "plugin-missing",
                f"the plug-in {used['name']} ({used['package']} {used['version']}), which took part in the "
                "dump, is not here",
                dict(used),
                "restores without it",
                f"install {used['package']} {used['version']} beside crcli",
            )


_NAMES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
    SYS_PTRACE SYS_PACCT
    SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL
    SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
"""The capabilities by their numbers, from 0."""

RIGHTS: tuple[Check, ...] = (users, capabilities, namespaces, cgroups, plugins)
