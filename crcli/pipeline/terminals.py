"""What CRIU leaves open about the terminals of a frozen tree, settled in its images."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.criu.reopened import TerminalLost, name_reopened
from crcli.criu.unread import pids_inside
from crcli.errors import DumpFailed, TreeState
from crcli.process.asking import terminal_device, unread_in
from crcli.process.identity import identify

if TYPE_CHECKING:
    from crcli.criu.workspace import Workspace
    from crcli.pipeline.plan import OutsideLink
    from crcli.process.identity import ProcessId


def settle_terminals(images: Workspace, root: ProcessId, links: tuple[OutsideLink, ...]) -> None:
    """Have /dev/tty be the terminal that it is, where the tree drives that itself.

    The tree must be frozen. Raises DumpFailed where it could not come back as it is, or is not whole.
    """
    here = _Frozen(root)
    try:
        unsaved = name_reopened(
            images,
            lambda pid, fd: terminal_device(here.find(pid), fd),
            lambda path: os.stat(f"/proc/{root.pid}/root{path}"),
            may_stay=any(link.kind == "terminal" for link in links),
        )
        is_unread = any(unread_in(here.find(pid), fd) for pid, fd in unsaved)
    except (TerminalLost, OSError) as error:
        raise _refusal(str(error)) from error
    if is_unread:
        raise _refusal(
            "CRIU has not saved what nobody has read yet from a terminal",
            "wait until the program is idle, then run it again",
        )


class _Frozen:
    """A tree that stands still: nobody of it can end but by being killed."""

    def __init__(self, root: ProcessId) -> None:
        self._host = pids_inside(root.pid)

    def find(self, pid: int) -> int:
        """The pid here of a process of the tree. Raises DumpFailed where it is no more."""
        here = self._host.get(pid)
        if here is None or not identify(here).alive():
            raise DumpFailed(
                f"process {pid}, or one above it, was killed while the tree stood still",
                hint="see who did that (`dmesg`, if it was for want of memory), then run it again",
                state=TreeState.RUNNING,
            )
        return here


def _refusal(why: str, hint: str = "") -> DumpFailed:
    return DumpFailed(
        f"a terminal of the tree could not come back as it is: {why}",
        hint=hint or "close programs that have /dev/tty open, then run it again",
        state=TreeState.RUNNING,
    )
