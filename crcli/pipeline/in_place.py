"""Whose memory is read in the frozen tree itself, and whether the tree stood still while that was done."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import TYPE_CHECKING

from crcli.criu.compel import writes_over_memory
from crcli.errors import PreflightRefused
from crcli.memory.extents import SpaceKind
from crcli.memory.reading import may_read_all
from crcli.pipeline.aftermath import CriuKilled
from crcli.process.tree import scan_tree

if TYPE_CHECKING:
    from crcli.memory.extents import SpaceKey
    from crcli.process.identity import ProcessId
    from crcli.process.tree import Process

_STOPPED_S = 2.0
"""How long CRIU may stand stopped by its debugger at the end of a dump (seconds): it looks at a signal."""


class FrozenTree:
    """The tree below `root`, in the hands of `criu`, which is None until it is known."""

    def __init__(self, root: Process) -> None:
        self._root = root
        self._inside: dict[int, int] | None = None
        """The tree's processes, by the pids that they have in a pid namespace of their own."""
        self.criu: ProcessId | None = None

    def owner_of(self, space: SpaceKey) -> int:
        """The process that CRIU names so; 0 where that is not known, as for other spaces, where nobody could
        say whether CRIU has held the tree until all was read, where CRIU writes to what would be read, and on
        hosts that let nobody read all of it."""
        if self.criu is None or space.kind != SpaceKind.PROCESS or not may_read_all():
            return 0
        pid = self._pid_of(space.number)
        try:
            return 0 if not pid or writes_over_memory(pid) else pid
        except OSError:  # it was killed
            return 0

    def _pid_of(self, number: int) -> int:
        depth = len(self._root.nspid)
        if depth <= 1:  # of our own pid namespace
            return number
        if self._inside is None:
            self._inside = {}
            with suppress(PreflightRefused):  # its root was killed: whoever reads it will be told
                tree = scan_tree(self._root.identity)
                self._inside = {one.nspid[depth - 1]: one.pid for one in tree if len(one.nspid) >= depth}
        return self._inside.get(number, 0)

    def see_that_it_stood_still(self) -> None:
        """Raise CriuKilled when CRIU may have let go of the tree, of which pages were read until now."""
        if self.criu is None:
            return
        end = time.monotonic() + _STOPPED_S
        while not self.criu.is_at_work():
            if not self.criu.alive() or time.monotonic() > end:
                raise CriuKilled("CRIU was killed")
            time.sleep(0.001)
