"""What a store says of who holds a name: the objects below `leases/`, read. `lease.py` writes them.

The object with the greatest number is the one that counts. It is never removed, only superseded.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import TYPE_CHECKING, Any

from crcli.errors import NotFound, StoreError
from crcli.image.names import LEASES, lease_key
from crcli.image.owner import Sight, sight_of
from crcli.records import Struct, replace
from crcli.store.leaving import asking

if TYPE_CHECKING:
    from collections.abc import Container

    from crcli.store.base import Store

TTL_S = 30.0
"""How long a lease is good for after its last renewal began (seconds), where its holder says nothing else."""

_FOR_EVER_S = 1e11
"""No time and no date is later (seconds): it is none that a holder has written."""

_READERS = 8


class Claim(Struct, frozen=True):
    """One lease as the store has it. `renewed` is when it was last written, by the store's clock (seconds
    since the epoch; 0.0 where nobody asked)."""

    name: str
    number: int
    text: bytes
    renewed: float = 0.0

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What it says of itself; empty where that cannot be read."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def nonce(self) -> str:
        """What only its holder writes."""
        return str(self.facts.get("nonce", ""))

    @property
    def is_released(self) -> bool:
        """Whether its holder has let go of it."""
        return self.facts.get("released") is True

    @property
    def ttl_s(self) -> float:
        """For how long (seconds) nobody may take it over after its text has changed."""
        return self._seconds("ttl_s") or TTL_S

    @property
    def since(self) -> float:
        """When it was claimed, by its holder's clock (seconds since the epoch)."""
        return self._seconds("since")

    @property
    def holder(self) -> str:
        """Who has it, for people."""
        facts = self.facts
        return f"{facts.get('holder', 'somebody')} on {facts.get('host', '?')} (pid {facts.get('pid', '?')})"

    def sight(self) -> Sight:
        """What can be seen from here of its holder, and of the processes that it answers for."""
        seen = sight_of(self.facts)
        if seen != Sight.ENDED:
            return seen
        covered = self.facts.get("covers")
        covered = [one for one in covered if isinstance(one, dict)] if isinstance(covered, list) else []
        sights = {sight_of({**self.facts, **one}) for one in covered}
        return next((one for one in (Sight.ALIVE, Sight.UNSEEN) if one in sights), Sight.ENDED)

    def _seconds(self, name: str) -> float:
        given = self.facts.get(name)
        is_sane = isinstance(given, int | float) and 0 < given < _FOR_EVER_S
        return float(given or 0) if is_sane else 0.0

    def as_json(self) -> dict[str, Any]:
        """The claim as commands print it."""
        return {
            "name": self.name,
            "number": self.number,
            "holder": str(self.facts.get("holder", "")),
            "host": str(self.facts.get("host", "")),
            "pid": self.facts.get("pid"),
            "since": self.since,
            "renewed": self.renewed,
            "ttl_s": self.ttl_s,
            "seen": self.sight().value,
        }


def read_claim(store: Store, name: str, number: int) -> Claim | None:
    """The lease of that number, if there is one."""
    try:
        return Claim(name, number, store.get(lease_key(name, number)))
    except NotFound:
        return None


def newest_claim(store: Store, name: str, known: int = 0) -> Claim | None:
    """The lease that counts; None where the name was never claimed.

    A listing may lag behind: from the greatest number that it shows (or that is `known`) we go on by reading,
    which finds all later ones, for of two neighbours the older is removed first, and an hour after the newer
    was written at the earliest.
    """
    number = max(known, *_numbers(store, name), 0)
    newest = read_claim(store, name, number) if number else None
    while (later := read_claim(store, name, number + 1)) is not None:
        newest, number = later, number + 1
    if newest is None and number:
        raise StoreError(
            f"{store.url} shows leases on {name} that it does not give", hint="try again in a moment"
        )
    return newest


def claimed_by(store: Store, name: str) -> Claim | None:
    """Who holds a name, as far as can be told at a glance: it was not released, nor has its holder ended on
    this host. A holder that died elsewhere is still named; `renewed` says when it was last heard of."""
    newest = newest_claim(store, name)
    return _standing(store, newest) if newest is not None else None


def is_held_by(store: Store, name: str, nonce: str) -> bool:
    """Whether a name is that holder's, as it knows itself: nobody has followed, and it has not let go."""
    newest = newest_claim(store, name)
    return newest is not None and newest.nonce == nonce and not newest.is_released


def all_claims(store: Store, names: Container[str] | None = None) -> list[Claim]:
    """Who holds which name (of `names`; None: of all), in the order of names; see `claimed_by`.

    Every name that was ever claimed has a lease for good: each costs a request or two.
    """
    newest: dict[str, int] = {}
    for info in store.list(LEASES):
        name, _, number = info.key.removeprefix(LEASES).partition("/")
        if _is_number(number) and (names is None or name in names):
            newest[name] = max(newest.get(name, 0), int(number))

    def standing(name: str) -> Claim | None:
        claim = newest_claim(store, name, newest[name])
        return _standing(store, claim) if claim is not None else None

    with asking(_READERS, "leases", store) as readers:
        return [claim for claim in readers.map(standing, sorted(newest)) if claim is not None]


def numbers_before(store: Store, name: str, number: int, older_than_s: float) -> list[int]:
    """The numbers of leases that were written so long before that one, by the store's clock; ascending."""
    written = {
        int(last): info.modified
        for info in store.list(lease_key(name, 0)[:-12])
        if _is_number(last := info.key.rpartition("/")[2])
    }
    ours = written.get(number, 0.0)
    return sorted(one for one, when in written.items() if one < number and ours - when > older_than_s)


def _standing(store: Store, claim: Claim) -> Claim | None:
    if claim.is_released or claim.sight() == Sight.ENDED:
        return None
    return replace(claim, renewed=store.stat(lease_key(claim.name, claim.number)).modified)


def _numbers(store: Store, name: str) -> list[int]:
    try:
        keys = [info.key.rpartition("/")[2] for info in store.list(lease_key(name, 0)[:-12])]
    except NotFound:
        return []  # a directory store that is not there yet
    return [int(key) for key in keys if _is_number(key)]


def _is_number(text: str) -> bool:
    return len(text) == 12 and text.isascii() and text.isdecimal()
