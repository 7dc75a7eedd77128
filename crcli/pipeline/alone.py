"""One dump of a tree at a time: another one is waited for."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.errors import PreflightRefused
from crcli.pipeline.interrupts import Interrupted, interruptible
from crcli.process.tree import find_target, tracer_label
from crcli.process.tree_lock import TreeLock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.pipeline.shared import Shared
    from crcli.pipeline.stages import DumpOptions, Stopwatch

_OTHER_DUMP_S = 120.0
"""How long another dump of the tree is waited for, where no deadline says it (seconds)."""


@contextmanager
def alone(options: DumpOptions, watch: Stopwatch, shared: Shared) -> Iterator[TreeLock]:
    """Within the block, until the lock is released, no other crcli of this host dumps the tree, or one around
    or inside it. One that does is waited for. Raises PreflightRefused."""
    root = find_target(options.pid)
    with TreeLock(root) as lock:
        if not lock.take():
            with watch.phase("wait"):
                _wait_for_other(lock, watch.left_s(options.deadline_s), shared, options.pid)
            if not root.alive():
                raise PreflightRefused(
                    f"process {options.pid} ended while another dump of it was waited for",
                    hint="`crcli ls` shows the image that the other dump took",
                )
        yield lock


def _wait_for_other(lock: TreeLock, left_s: float | None, shared: Shared, pid: int) -> None:
    """The lock is ours. Raises PreflightRefused when it is not in time, Interrupted on a signal."""
    holder = lock.holder()
    try:
        with interruptible(left_s):
            shared.see_caller()
            if lock.wait(_OTHER_DUMP_S if left_s is None else left_s):
                return
    except Interrupted as error:
        if error.number != signal.SIGALRM:
            raise
    holder = lock.holder() or holder
    raise PreflightRefused(
        f"another dump of process {pid}, or of a tree around or inside it, is under way"
        + (f" and was waited for: {tracer_label(holder)}" if holder else ""),
        hint="try again when it has ended"
        + (f", or end it (`kill {holder}`): its tree then runs on" if holder else ""),
    )
