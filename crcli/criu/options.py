"""From what crcli has decided to the options that CRIU understands. Nothing else names a CRIU option."""

from __future__ import annotations

import os
from typing import Any

from crcli.criu.rpc import rpc
from crcli.records import Struct, field

LOG_NAME = "criu.log"
PARENT_LINK = "parent"
"""The name, in a folder of images, under which CRIU leaves and looks for those of a pre-dump."""

_LOG_LEVEL = 4 if os.environ.get("CRCLI_DEBUG") else 3
"""Errors, warnings and what CRIU does. At 4 it writes a line for every page that a child may share with its
parent: of 50 processes 190 000, which took a quarter of the time of their restore, a fifth of their dump's.
"""

_TERSE_LEVEL = 4 if os.environ.get("CRCLI_DEBUG") else 2
"""Errors and warnings. A restore writes such a line at 3 still, 76 000 for 50 processes: a third of the time
from CRIU's first fork to the end of its work."""

_CPU_CAP = (1 << 0) | (1 << 2)  # CPU_CAP_FPU | CPU_CAP_INS: refuse a CPU that lacks what programs may use
_GHOST_FLOOR = 1 << 20


class DumpPlan(Struct, frozen=True):
    """How CRIU is to take one tree, decided from what /proc says about it.

    `external` names objects that lead out of the tree and are handed in again on restore; `ghost_bytes`
    is the size of the largest deleted file; `freeze_limit_s` bounds how long CRIU may try to stop the tree.
    """

    pid: int
    shell_job: bool = False
    manage_cgroups: bool = False
    network_lock: str = "nftables"
    external: tuple[str, ...] = ()
    ghost_bytes: int = 0
    unprivileged: bool = False
    orphan_terminals: bool = False
    freeze_limit_s: int = 10
    enter: int = 0
    """A process whose pid and mount namespaces CRIU works in (0: ours); `pid` is then as seen there."""
    watched: tuple[str, ...] = ()
    """Paths of files that the tree watches, and that CRIU could not find by itself."""
    leave_running: bool = False
    leave_stopped: bool = False


class RestorePlan(Struct, frozen=True):
    """How CRIU is to bring a tree back: the same decisions, and the descriptors for external objects."""

    shell_job: bool = False
    manage_cgroups: bool = False
    tcp_close: bool = False
    external: tuple[str, ...] = ()
    inherit: dict[str, int] = field(default_factory=dict)
    leave_stopped: bool = False
    sibling: bool = True
    lazy: bool = False
    """Whether memory comes through userfaultfd: see crcli.criu.lazy_socket."""
    has_children: bool = False
    """Whether it is a tree of several processes, of which CRIU compares pages with those of their parents."""
    any_cpu: bool = False
    """Whether CRIU is not to compare the CPU with that of the dump."""
    work_fd: int = -1
    """A folder of ours for CRIU to work in, where the images' folder does not do: CRIU mounts there."""


def dump_options(plan: DumpPlan, images_fd: int, page_fd: int, parent: str) -> Any:
    """Return the request's options for a dump into the folder `images_fd`, pages into the socket `page_fd`.

    Both are descriptors that CRIU has inherited from us under the same numbers. `parent` is the folder of the
    pre-dump before it, seen from there: pages that were not written to since are not sent. CRIU leaves it
    under the name PARENT_LINK.
    """
    options = _memory_options(plan, images_fd, page_fd, parent)
    options.track_mem = bool(parent)
    options.leave_running = plan.leave_running
    options.leave_stopped = plan.leave_stopped
    options.notify_scripts = True
    options.ghost_limit = min(max(plan.ghost_bytes, _GHOST_FLOOR), 0xFFFF_FFFF)
    options.network_lock = {"nftables": rpc.NFTABLES, "iptables": rpc.IPTABLES}.get(
        plan.network_lock, rpc.SKIP
    )
    options.tcp_established = True
    options.orphan_pts_master = plan.orphan_terminals
    options.irmap_scan_paths.extend(plan.watched)
    return options


def pre_dump_options(plan: DumpPlan, images_fd: int, page_fd: int, parent: str) -> Any:
    """Return the same for a pre-dump: memory alone, of a tree that is stopped only for a moment."""
    options = _memory_options(plan, images_fd, page_fd, parent)
    options.track_mem = True
    return options


def _memory_options(plan: DumpPlan, images_fd: int, page_fd: int, parent: str) -> Any:
    options = _common(plan.shell_job, plan.manage_cgroups, plan.external, f"/proc/self/fd/{images_fd}")
    options.pid = plan.pid
    options.ps.fd = page_fd
    options.unprivileged = plan.unprivileged
    options.timeout = plan.freeze_limit_s
    if parent:
        options.parent_img = parent
    return options


def restore_options(plan: RestorePlan, images: str) -> Any:
    """Return the request's options for a restore from the folder `images`, a path as CRIU sees it."""
    options = _common(plan.shell_job, plan.manage_cgroups, plan.external, images)
    options.notify_scripts = True
    if plan.any_cpu:
        options.cpu_cap = 0
    if plan.has_children:
        options.log_level = _TERSE_LEVEL
    options.rst_sibling = plan.sibling
    options.leave_stopped = plan.leave_stopped
    options.lazy_pages = plan.lazy
    options.tcp_established = not plan.tcp_close
    options.tcp_close = plan.tcp_close
    for key, fd in plan.inherit.items():
        options.inherit_fd.add(key=key, fd=fd)
    if plan.work_fd >= 0:
        options.work_dir_fd = plan.work_fd
    return options


def _common(shell_job: bool, manage_cgroups: bool, external: tuple[str, ...], images: str) -> Any:
    options = rpc.criu_opts()
    options.images_dir_fd = -1
    options.images_dir = images
    options.log_level = _LOG_LEVEL
    options.log_file = LOG_NAME
    options.file_locks = True
    options.link_remap = True
    options.ext_unix_sk = True
    options.evasive_devices = True
    options.tcp_skip_in_flight = True
    options.shell_job = shell_job
    options.manage_cgroups_mode = rpc.SOFT if manage_cgroups else rpc.IGNORE
    options.cpu_cap = _CPU_CAP
    options.external.extend(external)
    return options
