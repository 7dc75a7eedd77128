"""What the store has, read by a thread beside what else a dump prepares.

Only a dump that has announced itself (see crcli.image.session) may rely on what a store has: `gc` removes
what nobody may have seen. The reading need not wait for that: it begins at once, and what was read counts if
the store, once it was told of the dump, has all that it relies on: the indexes, the manifests that vouched
for them, and the packs, which are looked for only then. As far as the newest images say what that will be, it
is looked for while the indexes are read.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from crcli.errors import CrcliError
from crcli.threads import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crcli.image.index import Expect, KnownChunks
    from crcli.store.base import Store


class Knowing(Worker):
    """Reads what a store has by `read`, which is given what to tell early on what will be relied on; without
    that it looks for packs itself (see load_known). It is told when the dump is `announced`, and `finish`
    follows."""

    def __init__(self, store: Store, read: Callable[[Expect | None], KnownChunks]) -> None:
        super().__init__(self._work, name="knowing")
        self._store = store
        self._read = read
        self._known: KnownChunks | None = None
        self._turn = threading.Lock()
        self._is_announced = False
        self._expected: set[str] = set()
        self._look: _Look | None = None

    def _work(self) -> None:
        try:
            self._known = self._read(self._expect)
        except (CrcliError, MemoryError, RuntimeError):
            pass  # perhaps the announcement was just making a directory: it is read once more after that

    def announced(self) -> None:
        """From now on what is seen in the store stays there."""
        with self._turn:
            self._is_announced = True
            self._begin_look()

    def finish(self) -> KnownChunks:
        """Return what the store has, now that it is told of the dump. Raises StoreError."""
        self.join()
        if self._known is None or self._is_outdated(self._known):
            self._known = self._read(None)
        return self._known

    def end(self) -> None:
        """Nothing more is asked on return."""
        self.join()
        if self._look is not None:
            self._look.join()

    def _is_outdated(self, known: KnownChunks) -> bool:
        seen = self._look.seen() if self._look is not None else set[str]()
        return bool(self._store.missing(set(known.relied_on) - seen))

    def _expect(self, keys: Iterable[str]) -> None:
        with self._turn:
            self._expected.update(keys)
            self._begin_look()

    def _begin_look(self) -> None:
        """Look for what is expected, once both it and the announcement are there."""
        if self._is_announced and self._expected and self._look is None:
            self._look = _Look(self._store, frozenset(self._expected))
            try:
                self._look.start()
            except RuntimeError:  # there are as many threads as there may be
                self._look = None


class _Look(Worker):
    """Looks for objects in a store that was told of the dump."""

    def __init__(self, store: Store, keys: frozenset[str]) -> None:
        super().__init__(self._work, name="look")
        self._store = store
        self._keys = keys
        self._seen = frozenset[str]()
        self._error: CrcliError | None = None

    def _work(self) -> None:
        try:
            self._seen = self._keys - self._store.missing(self._keys)
        except CrcliError as error:
            self._error = error
        except (MemoryError, RuntimeError):
            pass  # all of it is looked for once more

    def seen(self) -> frozenset[str]:
        """Those of the objects that are there. Raises StoreError."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._seen
