"""The trial: the skeleton restored, stopped, in throwaway namespaces, before anything is killed.

A tree that runs on need not wait for it, unless what it has open goes away by then.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from crcli.criu.connections import forget_devices, forget_network_lock
from crcli.criu.images import join_threads_to_leaders, link_remaps, read_tree
from crcli.criu.options import LOG_NAME, RestorePlan, restore_options
from crcli.criu.rpc import CriuDied, CriuTimeout, rpc
from crcli.criu.sandbox import STAND_IN_FD, Order
from crcli.criu.skeleton import (
    forget_sizes,
    keep_orphans,
    laid_out_memory,
    make_room_for_deleted,
    named_files,
    outside_sockets,
    regular_files,
    touched_folders,
)
from crcli.criu.terminals import (
    forget_control_of_devices,
    forget_foreign_sessions,
    move_terminals,
)
from crcli.errors import DumpFailed, TreeState
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey
from crcli.memory.writing import write_all
from crcli.pipeline.logs import explain_failure

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crcli.criu.options import DumpPlan
    from crcli.criu.sandbox import Sandbox
    from crcli.criu.workspace import Workspace
    from crcli.pipeline.plan import OutsideLink
    from crcli.process.evidence import Evidence

TRIAL_LIMIT_S = 20.0
"""How long a trial may take (seconds) before the dump is refused."""

_LEFT_OUT = frozenset((LOG_NAME, "filelocks.img"))
"""The originals still hold their locks: restoring them beside would wait for ever."""


def is_harmless(evidence: Evidence) -> bool:
    """Whether a trial leaves the tree as it is: opening a file again breaks a lease on it."""
    return not any(held.lock.kind == "LEASE" for held in evidence.locks)


def may_try_later(evidence: Evidence, images: Workspace) -> bool:
    """Whether a trial beside the running tree will find what it would find now, as far as can be told:
    files that were open already when we looked at the tree are likely to stay for as long again."""
    if link_remaps(images):
        return False
    if any(flags & os.O_ACCMODE and mode & 0o111 for _, flags, mode, _ in regular_files(images)):
        return False  # a program that the tree makes, and could not start while the trial has it open
    seen = {file.path for file in evidence.files} | {mapping.path for mapping in evidence.mappings}
    return all(stat.S_ISDIR(one["mode"] or 0) or one["path"] in seen for one in named_files(images))


def try_skeleton(
    sandbox: Sandbox,
    trial: Workspace,
    images: Workspace,
    kept: Mapping[SpaceKey, list[tuple[int, bytes]]],
    plan: DumpPlan,
    links: tuple[OutsideLink, ...],
) -> None:
    """Restore the skeleton in the sandbox, without a single instruction of the tree being run.

    `trial` is an empty folder that the sandbox has open, for the images as they are tried. Raises DumpFailed
    when the skeleton cannot be restored: the dump must then be given up, and the tree let go.
    """
    for name in images.names():
        if name not in _LEFT_OUT:
            trial.link_from(images, name)
    _lay_out_kept(trial, kept)
    forget_network_lock(trial)  # it lies around the original
    forget_devices(trial)
    forget_control_of_devices(trial)
    keep_orphans(trial)
    move_terminals(trial, lambda ours: range(max(ours) + len(ours) + 1))  # the sandbox has none but these
    make_room_for_deleted(trial)
    forget_sizes(trial)  # others may write to the same files meanwhile
    outside = [link for link in links if link.external]
    members = read_tree(trial)
    forget_foreign_sessions(trial, {member.pid for member in members})
    if plan.manage_cgroups:
        join_threads_to_leaders(trial)
    pids = [pid for member in members for pid in (member.pid, *member.threads)]
    order = Order(
        overlays=tuple(touched_folders(trial)),
        keep=tuple(outside_sockets(trial)),
        taken_pids=tuple(pids),
        stand_ins=tuple(_stand_in(link) for link in outside),
    )
    restore = RestorePlan(
        shell_job=plan.shell_job,
        manage_cgroups=False,
        tcp_close=True,
        external=tuple(link.key for link in outside),
        inherit={link.inherit_key: STAND_IN_FD + number for number, link in enumerate(outside)},
        leave_stopped=True,
        sibling=True,
        has_children=len(members) > 1,
    )
    try:
        criu = sandbox.start_criu(order)
        folder = f"/proc/self/fd/{trial.fd}"
        answer = criu.request(rpc.RESTORE, restore_options(restore, folder), lambda *_: True, TRIAL_LIMIT_S)
    except CriuTimeout as error:
        raise _refusal("the trial restore took too long", trial) from error
    except (CriuDied, OSError) as error:
        raise DumpFailed(
            f"the trial restore was cut short ({error}), which says nothing about the tree",
            hint="run it again",
            state=TreeState.RUNNING,
        ) from error
    if not answer.success:
        raise _refusal("the trial restore failed", trial, answer.message)


def _stand_in(link: OutsideLink) -> str:
    return "terminal" if link.kind == "terminal" else "socket"


def _lay_out_kept(trial: Workspace, kept: Mapping[SpaceKey, list[tuple[int, bytes]]]) -> None:
    extents = {
        space: [Extent(start, len(data) // PAGE, Source.CHUNK) for start, data in sorted(runs)]
        for space, runs in kept.items()
    }
    with laid_out_memory(trial, extents) as places:
        for space, (fd, offsets) in places.items():
            for start, data in kept[space]:
                write_all(fd, memoryview(data), offsets[start])


def _refusal(what: str, trial: Workspace, said: str = "") -> DumpFailed:
    cause = explain_failure(trial, "trial", said)
    return DumpFailed(
        f"{what}, so this tree could not come back here: {cause.meaning}",
        hint=cause.remedy or "--no-trial dumps it all the same, at your own risk",
        state=TreeState.RUNNING,
        cause=cause,
    )
