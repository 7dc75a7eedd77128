"""`crcli watch`: a vigil over a tree that somebody else has started."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from crcli.criu.binary import see_criu
from crcli.errors import NameClaimed, PreflightRefused
from crcli.image.lease import Lease, LeaseState
from crcli.image.names import check_name, suggested_name
from crcli.notice import Notices
from crcli.pipeline.vigil import Event, Keeping, Vigil, VigilEnd, Why
from crcli.process.identity import read_stat
from crcli.process.tree import find_target
from crcli.records import replace
from crcli.store import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.findings import Finding
    from crcli.process.identity import ProcessId


def watch_tree(
    keeping: Keeping,
    notices: Sequence[str],
    grace_s: float | None,
    tell: Callable[[Event], None],
    answer: Callable[[VigilEnd], int],
) -> int:
    """Watch the tree of `keeping.dump.pid` until it ends, is saved on notice, or cannot be.

    Returns what `answer` made of the end, which it is told at once: to give the name back takes a while where
    the store is slow, and there may be no time for that.

    The images' name is claimed meanwhile. The tree is not stopped when the store cannot be reached and the
    claim lapses, for it is somebody else's; it may then run here and elsewhere. Raises UsageError,
    PreflightRefused (no such tree), HostLacks (CRIU cannot work), NameClaimed and StoreError, with the tree
    as it was. Call it from the main thread.
    """

    def found(finding: Finding) -> None:
        tell(Event("finding", finding.message, {"finding": finding.as_json()}))

    with ExitStack() as held:
        root, ended, comm = _find(keeping.dump.pid)
        held.callback(os.close, ended)
        name = check_name(keeping.dump.name or suggested_name(comm))
        heard = Notices(notices, grace_s, found=found)
        see_criu()
        store = open_store(keeping.dump.store, endpoint_url=keeping.dump.endpoint_url)
        held.callback(store.close)
        lease = Lease.claim(store, name, "crcli watch")
        held.callback(lease.release)
        held.enter_context(heard)
        dump = replace(
            keeping.dump, name=name, job={**_job(root), "lease": lease.number, "holder": lease.nonce}
        )
        vigil = Vigil(replace(keeping, dump=dump), root, heard, tell)

        def on_lease(state: LeaseState) -> None:
            tell(Event("lease", f"the name {name} is {_WORDS[state]}", {"lease": state.value}))
            if state is LeaseState.LOST:
                vigil.interrupt()

        lease.keep(on_lease)
        tell(Event("watching", f"watching process {root.pid} as {name}", {"pid": root.pid, "name": name}))
        end = vigil.keep(ended)
        heard.deafen()
        if end.why is Why.STOPPED:
            raise NameClaimed(
                f"the name {name} was taken over by another; the tree runs on, unwatched",
                hint="`crcli lease ls` says who has it",
            )
        code = answer(end)
        if end.why is Why.SAVED and end.notice is not None:
            end.notice.on_saved()
        return code


_WORDS = {
    LeaseState.HELD: "ours",
    LeaseState.LAPSED: "not ours for now: the store does not answer, so another may take it",
    LeaseState.LOST: "another's",
}


def _find(pid: int) -> tuple[ProcessId, int, str]:
    """The process, a descriptor that is readable when it has ended, and its command's name."""
    root = find_target(pid)
    try:
        ended, stat = os.pidfd_open(pid), read_stat(pid)
    except ProcessLookupError as error:
        raise PreflightRefused(f"process {pid} has ended") from error
    if not root.alive():
        os.close(ended)
        raise PreflightRefused(f"process {pid} has ended")
    return root, ended, stat.comm


def _job(root: ProcessId) -> dict[str, Any]:
    """What the images say of the job."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return {"watched": f"{boot}/{root.pid}/{root.start_time}"}
