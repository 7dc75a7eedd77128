"""A dump in progress, as other commands on the same store see it.

A dump relies on chunks that it saw in the store when it began. Its session object tells `gc` so: while a
session is alive, nothing is removed that it may have seen.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from crcli.errors import StoreError
from crcli.image.names import SESSIONS

if TYPE_CHECKING:
    from types import TracebackType

    from crcli.store.base import Store

HEARTBEAT_S = 60.0
STALE_AFTER_S = 900.0
"""A session that was not renewed for this long belongs to a dump that is dead."""


class Session:
    """Announces a dump from entry to exit, and renews the announcement while it takes."""

    def __init__(self, store: Store, image_id: str) -> None:
        self._store = store
        self._key = f"{SESSIONS}{image_id}"
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._renew, name="session", daemon=True)

    def __enter__(self) -> Session:
        self._store.put(self._key, b"dump\n")
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._beat.join()
        try:
            self._store.delete(self._key)
        except StoreError:
            pass  # it goes stale by itself

    def _renew(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            try:
                self._store.put(self._key, b"dump\n")
            except StoreError:
                continue
