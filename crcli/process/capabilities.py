"""The names of capabilities (linux/capability.h), and which this kernel knows."""

from __future__ import annotations

from crcli.process.identity import read_proc

CAP_SETGID, CAP_SETUID, CAP_SETPCAP, CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_RESOURCE = 6, 7, 8, 21, 23, 24

_NAMES = [
    "chown",
    "dac_override",
    "dac_read_search",
    "fowner",
    "fsetid",
    "kill",
    "setgid",
    "setuid",
    "setpcap",
    "linux_immutable",
    "net_bind_service",
    "net_broadcast",
    "net_admin",
    "net_raw",
    "ipc_lock",
    "ipc_owner",
    "sys_module",
    "sys_rawio",
    "sys_chroot",
    "sys_ptrace",
    "sys_pacct",
    "sys_admin",
    "sys_boot",
    "sys_nice",
    "sys_resource",
    "sys_time",
    "sys_tty_config",
    "mknod",
    "lease",
    "audit_write",
    "audit_control",
    "setfcap",
    "mac_override",
    "mac_admin",
    "syslog",
    "wake_alarm",
    "block_suspend",
    "audit_read",
    "perfmon",
    "bpf",
    "checkpoint_restore",
]


def capability_names(bits: int) -> list[str]:
    """Return the names of these capabilities: `CAP_NET_RAW`; those too new to be known here by number."""
    return [
        f"CAP_{_NAMES[bit].upper()}" if bit < len(_NAMES) else f"CAP_{bit}"
        for bit in range(bits.bit_length())
        if bits >> bit & 1
    ]


def all_capabilities() -> int:
    """Return every capability that this kernel knows, as bits."""
    return (2 << int(read_proc("/proc/sys/kernel/cap_last_cap"))) - 1
