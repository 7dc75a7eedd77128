"""Work in progress on a store, as other commands on it see it.

A dump relies on chunks that it saw in the store when it began. Its session object tells `gc` so: while a
session is alive, nothing is removed that it may have seen. `gc` announces itself in the same way.

An announcement is renewed while the work takes. It is over when its object is gone, when it was not renewed
for STALE_AFTER_S, or when it names a process of this host that has ended. How long ago it was renewed the
store's clock says; where both are on one host, a clock of the kernel's that nobody sets.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Self

from crcli.errors import NotFound, StoreError
from crcli.image.names import SESSIONS, is_announcement
from crcli.image.owner import Sight, clock, describe_owner, sight_of
from crcli.store.leaving import is_of_a_signal

if TYPE_CHECKING:
    from types import TracebackType

    from crcli.store.base import Store

HEARTBEAT_S = 60.0
STALE_AFTER_S = 900.0
"""An announcement that was not renewed for this long belongs to work that is dead."""

LAPSED_AFTER_S = STALE_AFTER_S * 2 / 3
"""Who was not able to renew for this long must take it that others have stopped waiting."""


class Announcement:
    """An object that says, from entry to exit, that somebody is at work."""

    def __init__(self, store: Store, key: str) -> None:
        self.key = key
        self._store = store
        self._owner = describe_owner()
        self._over = threading.Event()
        self._beat = threading.Thread(target=self._keep_renewing, name="session", daemon=True)
        self._lapsed = False
        self._renewed_at = 0.0

    @property
    def lapsed(self) -> bool:
        """Whether this was ever without renewal for so long that others may have taken us for dead."""
        return self._lapsed or clock() - self._renewed_at > LAPSED_AFTER_S

    def renew(self) -> None:
        """Write the object again."""
        began = clock()
        self._lapsed = self.lapsed
        if not self._lapsed:
            self._write()
            self._renewed_at = began

    def store_time(self) -> float:
        """What the store's clock says now (seconds since the epoch)."""
        self.renew()
        return self._store.stat(self.key).modified

    def __enter__(self) -> Self:
        self._renewed_at = clock()
        self._write()
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if is_of_a_signal(error):
            self._store.give_up()  # it goes stale by itself
        self.end()

    def end(self) -> None:
        """Nobody is at work any more; safe to call again."""
        if self._over.is_set():
            return
        self._over.set()
        self._beat.join()
        if self.lapsed:
            return  # the object may be somebody else's by now
        try:
            self._store.delete(self.key)
        except StoreError:
            pass  # it goes stale by itself

    def _write(self) -> None:
        self._store.put(self.key, json.dumps({**self._owner, "uptime": clock()}).encode())

    def _keep_renewing(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            try:
                self.renew()
            except StoreError:
                continue


class Session(Announcement):
    """Announces a dump, or whatever else is about to refer to objects that are in the store already.

    `name` must be nobody else's: an image's id, or made of one.
    """

    def __init__(self, store: Store, name: str) -> None:
        super().__init__(store, f"{SESSIONS}{name}")

    def rename(self, name: str) -> None:
        """Announce the same under another name: that of the image, by which `gc` knows that it is there."""
        before, self.key = self.key, f"{SESSIONS}{name}"
        self._write()
        try:
            self._store.delete(before)
        except StoreError:
            pass  # it goes stale by itself


def announced(store: Store, prefix: str, store_time: float) -> tuple[list[str], list[str]]:
    """Keys of the announcements below `prefix`: those behind which somebody is at work, and the dead ones."""
    alive: list[str] = []
    dead: list[str] = []
    for info in store.list(prefix):
        if not is_announcement(info.key):
            continue
        try:
            is_dead = _is_over(store.get(info.key), store_time - info.modified)
        except NotFound:
            continue  # over since it was listed
        (dead if is_dead else alive).append(info.key)
    return alive, dead


def _is_over(text: bytes, silent_s: float) -> bool:
    """Whether nobody is behind an announcement any more, by what it says and for how long it has stood there
    (seconds, by the store's clock: somebody may have set that meanwhile)."""
    try:
        owner = json.loads(text)
        sight = sight_of(owner)
        if sight is Sight.ALIVE:
            silent_s = clock() - float(owner["uptime"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return silent_s > STALE_AFTER_S
    return sight is Sight.ENDED or silent_s > STALE_AFTER_S
