"""What the store has, read by a thread beside what else a dump prepares.

Only a dump that has announced itself (see crcli.image.session) may rely on what a store has: `gc` removes
what nobody may have seen. The reading need not wait for that: it begins at once, and what was read counts if
the store, once it was told of the dump, has all that it relies on: the indexes, the manifests that vouched
for them, and the packs, which are looked for only then.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from crcli.errors import CrcliError

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.image.index import KnownChunks
    from crcli.store.base import Store


class Knowing(threading.Thread):
    """Reads what a store has by `read`, which is told whether to look for packs itself (see load_known);
    `finish` it once the dump is announced."""

    def __init__(self, store: Store, read: Callable[[bool], KnownChunks]) -> None:
        super().__init__(name="knowing", daemon=True)
        self._store = store
        self._read = read
        self._known: KnownChunks | None = None

    def run(self) -> None:
        """What the thread does."""
        try:
            self._known = self._read(False)
        except (CrcliError, MemoryError, RuntimeError):
            pass  # perhaps the announcement was just making a directory: it is read once more after that

    def finish(self) -> KnownChunks:
        """Return what the store has, now that it is told of the dump. Raises StoreError."""
        self.join()
        if self._known is None or self._is_outdated(self._known):
            self._known = self._read(True)
        return self._known

    def _is_outdated(self, known: KnownChunks) -> bool:
        return bool(self._store.missing(known.relied_on))
