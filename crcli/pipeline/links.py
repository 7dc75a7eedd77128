"""Names that CRIU gives to files without one, such as the semaphores of multiprocessing, for a restore here.

They are the same in every dump (`link_remap.N` beside the file), so they are made by one dump at a time, and
images have names of their own.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from crcli.criu.images import rename_link_remaps
from crcli.errors import DumpFailed, TreeState
from crcli.process.host_turn import HostTurn

if TYPE_CHECKING:
    from crcli.criu.workspace import Workspace

_FOLDER = "/dev/shm"
"""Where such files are, as a rule: glibc's semaphores, which multiprocessing uses."""


class Links:
    """Those of one dump, of the tree with this root (a pid)."""

    def __init__(self, root: int) -> None:
        self._root = f"/proc/{root}/root"
        self._turn: HostTurn | None = None
        self._kept: list[str] = []

    def take_turn(self) -> None:
        """Wait until it is ours to have CRIU give names."""
        self._turn = HostTurn("links", _FOLDER)

    def end_turn(self) -> None:
        """Let others have theirs."""
        if self._turn is not None:
            self._turn.end()

    def keep(self, images: Workspace, image: str) -> None:
        """Have the names that CRIU has made be those of the image with this id; CRIU's are free again.

        Raises DumpFailed where another has removed one.
        """
        for old, new in rename_link_remaps(images, image).items():
            try:
                os.link(self._root + old, self._root + new)
                self._kept.append(self._root + new)
                os.unlink(self._root + old)
            except FileNotFoundError:
                raise DumpFailed(
                    f"{old}, which CRIU had just made, was removed, maybe by another dump that failed",
                    hint="run it again",
                    state=TreeState.RUNNING,
                ) from None
        self.end_turn()

    def remove(self) -> None:
        """The tree lives on, and knows nothing of these names."""
        for path in self._kept:
            with suppress(FileNotFoundError):
                os.unlink(path)
        self._kept.clear()
