"""What crcli may do here: capabilities, those that processes can ever have, and resource limits."""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

from crcli.guard.doctor.check import Check, lacks, note, passed, read

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_NEEDED = {
    "CAP_SYS_ADMIN": (21, "namespaces, mounts and the pids of restored processes"),
    "CAP_SYS_PTRACE": (19, "looking into other processes"),
    "CAP_NET_ADMIN": (12, "connections, and the lock on them while a tree stands frozen"),
    "CAP_DAC_OVERRIDE": (1, "files of other users"),
    "CAP_SETUID": (7, "the users of restored processes"),
    "CAP_SETGID": (6, "the groups of restored processes"),
    "CAP_KILL": (5, "stopping processes of other users"),
}
_USEFUL = {
    "CAP_SYS_RESOURCE": (24, "trees of other users, and limits above the hard limit, cannot be restored"),
    "CAP_SYS_TIME": (25, "the clocks of restored trees cannot go on from where they were"),
    "CAP_SYS_CHROOT": (18, "processes cannot be given their root folder"),
    "CAP_SETPCAP": (8, "processes with fewer capabilities than crcli cannot be restored"),
}
_NAMES = (  # noqa: SIM905  # a list of forty literals would be forty lines
    "chown dac_override dac_read_search fowner fsetid kill setgid setuid setpcap linux_immutable "
    "net_bind_service net_broadcast net_admin net_raw ipc_lock ipc_owner sys_module sys_rawio sys_chroot "
    "sys_ptrace sys_pacct sys_admin sys_boot sys_nice sys_resource sys_time sys_tty_config mknod lease "
    "audit_write audit_control setfcap mac_override mac_admin syslog wake_alarm block_suspend audit_read "
    "perfmon bpf checkpoint_restore"
).split()
"""The capabilities by number (linux/capability.h)."""

_FEW_FILES = 1024
_LIMITS = {
    "open_files": resource.RLIMIT_NOFILE,
    "processes": resource.RLIMIT_NPROC,
    "address_space": resource.RLIMIT_AS,
    "data": resource.RLIMIT_DATA,
    "file_size": resource.RLIMIT_FSIZE,
    "locked_memory": resource.RLIMIT_MEMLOCK,
    "stack": resource.RLIMIT_STACK,
}


def _capabilities() -> Iterator[Check]:
    held = effective()
    lacking = {name: why for name, (bit, why) in _NEEDED.items() if not held >> bit & 1}
    evidence = {
        "uid": os.geteuid(),
        "effective": f"{held:x}",
        "lacking": list(lacking),
        "cap_checkpoint_restore": bool(held >> 40 & 1),  # CAP_SYS_ADMIN stands in for it
    }
    if lacking:
        says = "; ".join(f"no {name}: {why}" for name, why in lacking.items())
        yield lacks("capabilities", says, _remedy(), **evidence)
    else:
        yield passed("capabilities", "all that is needed", **evidence)
    for name, (bit, why) in _USEFUL.items():
        if not held >> bit & 1:
            yield note(name.lower(), f"no {name}: {why}", _remedy())


def effective() -> int:
    """The capabilities that are in force for us, as bits."""
    return _mask("CapEff")


def _mask(field: str) -> int:
    lines = read("/proc/self/status").splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith(f"{field}:"))


def _remedy() -> str:
    return "start this container with it (--cap-add)" if os.geteuid() == 0 else "run crcli as root"


def _bounding_set() -> Iterator[Check]:
    bounding = _mask("CapBnd")
    absent = [name for bit, name in enumerate(_NAMES) if not bounding >> bit & 1]
    evidence = {"bounding": f"{bounding:x}", "absent": absent}
    if absent:
        yield note(
            "bounding-set",
            f"no process here can have {', '.join(absent)}: one that had it elsewhere cannot be restored",
            "start the container with what the processes had where they were dumped (--cap-add)",
            **evidence,
        )
    else:
        yield passed("bounding-set", "processes can have every capability", **evidence)


def _limits() -> Iterator[Check]:
    evidence = {
        name: [_number(value) for value in resource.getrlimit(kind)] for name, kind in _LIMITS.items()
    }
    low = [name for name in ("address_space", "data", "file_size") if evidence[name][0] is not None]
    files = evidence["open_files"][1]
    if files is not None and files < _FEW_FILES:
        low.append("open_files")
    if low:
        yield note(
            "limits",
            f"limits hold for crcli and so for CRIU: {', '.join(name.replace('_', ' ') for name in low)}",
            "raise them where crcli is started (ulimit -v, -d, -f, -n)",
            **evidence,
        )
    else:
        yield passed("limits", f"none in the way; {files or 'any number of'} open files", **evidence)


def _number(value: int) -> int | None:
    return None if value == resource.RLIM_INFINITY else value


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (_capabilities, _bounding_set, _limits)
