"""What CRIU leaves open about the terminals of a frozen tree, settled in its images."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.criu.reopened import TerminalLost, name_reopened
from crcli.criu.unread import pids_inside
from crcli.errors import DumpFailed, TreeState
from crcli.process.asking import terminal_device, unread_in

if TYPE_CHECKING:
    from crcli.criu.workspace import Workspace
    from crcli.pipeline.plan import OutsideLink
    from crcli.process.identity import ProcessId


def settle_terminals(images: Workspace, root: ProcessId, links: tuple[OutsideLink, ...]) -> None:
    """Have /dev/tty be the terminal that it is, where the tree drives that itself.

    The tree must be frozen. Raises DumpFailed where it could not come back as it is.
    """
    host = pids_inside(root.pid)
    try:
        unsaved = name_reopened(
            images,
            lambda pid, fd: terminal_device(host[pid], fd),
            lambda path: os.stat(f"/proc/{root.pid}/root{path}"),
            may_stay=any(link.kind == "terminal" for link in links),
        )
    except (TerminalLost, OSError) as error:
        raise _refusal(str(error)) from error
    if any(unread_in(host[pid], fd) for pid, fd in unsaved):
        raise _refusal(
            "CRIU has not saved what nobody has read yet from a terminal",
            "wait until the program is idle, then run it again",
        )


def _refusal(why: str, hint: str = "") -> DumpFailed:
    return DumpFailed(
        f"a terminal of the tree could not come back as it is: {why}",
        hint=hint or "close programs that have /dev/tty open, then run it again",
        state=TreeState.RUNNING,
    )
