"""Who holds the name of an image, asked of the store while other work goes on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from crcli.errors import StoreError
from crcli.guard.claimed import claimed
from crcli.image.claims import claimed_by

if TYPE_CHECKING:
    from crcli.findings import Finding
    from crcli.image.claims import Claim
    from crcli.store.base import Store

LONGEST_S = 5.0
"""For how long (seconds) a restore waits for the answer: it is only a warning."""


class WhoHolds:
    """The question, put to the store in a thread of its own."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._claim: Claim | None = None
        self._thread = threading.Thread(target=self._ask, name="claimed", daemon=True)
        self._thread.start()

    def findings(self) -> list[Finding]:
        """What is to be said of it; nothing where the store does not answer."""
        self._thread.join(LONGEST_S)
        return list(claimed(self._claim))

    def _ask(self) -> None:
        try:
            self._claim = claimed_by(self._store, self._name)
        except StoreError:
            pass
