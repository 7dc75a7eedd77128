"""The names of the findings that forbid a restore, each of which `--force-guard` can override."""

from __future__ import annotations

BLOCKERS = (
    "address-missing",
    "architecture",
    "capabilities",
    "connection-taken",
    "cpu-features",
    "file-changed",
    "file-missing",
    "file-mode",
    "gpu-chip",
    "gpu-device",
    "gpu-driver",
    "gpu-driver-other",
    "gpu-host-memory",
    "gpu-memory",
    "gpu-mig",
    "kernel",
    "library-changed",
    "lock-taken",
    "memory",
    "namespaces",
    "page-size",
    "pid-taken",
    "port-taken",
    "socket-name-taken",
)
