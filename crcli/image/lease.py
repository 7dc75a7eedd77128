"""A name held by one holder at a time, whichever hosts they are on: leases in a store.

Each lease on a name is an object with a number (`leases/NAME/000000000007`). The greatest number counts.

**Claim.** Whoever creates the object with the next number has the name; of several at once one creates it.
That may be tried when the newest lease was released, when its holder is seen to have ended on this very host,
or when the claimer has itself seen it unchanged for its `ttl_s`, by the claimer's own clock: from the end of
the first look until the beginning of the last.

**Renewal.** The holder writes its object again, with another count. A renewal counts from when it *began*,
and only if it was complete, its look for a greater number included, before the lease had lapsed. The lease
lapses a margin before `ttl_s` is over. So nobody creates the next number before the holder knows that it has
lapsed: the write from which the claimer's wait began had itself begun earlier. No wall clock is read.

**A lapsed lease is never renewed.** A claimer may be past its last look and about to create the next number.
The holder has to create it too (its job stands still meanwhile): one of the two gets it. A holder that stood
still itself (SIGSTOP, a suspended host) finds by its clock, which goes on meanwhile, that it has lapsed.

**Stores that may give one number to two.** Where creating is not known to be atomic (S3 other than AWS), who
created waits SETTLE_S and looks whether its words are still there, and who needed longer than SETTLE_S for
the creation takes it as failed, for another may have looked meanwhile. (Fischer's algorithm; it needs a store
that shows what was written before a read began.) A renewal that finds another's words in its object has lost.

**Copies of a running virtual machine** have the holder twice, with the same nonce, pid and boot, and
nothing that it could read tells it so. What each writes differs, though, in its time: a holder that finds
words in its object which it has not written itself has lost, whosever nonce they bear. So at most one of
them holds the lease once each has begun its next renewal. A claimer on a copy may see the holder ended
there while another copy of it lives: that one finds the greater number with its next renewal, as after
`lease break`.

**What it cannot do.** A host whose clocks stood still too (a paused virtual machine) learns of it with its
next renewal, of which there are RENEWALS in `ttl_s`. The number only grows: a job that hands it to its own
storage, which refuses smaller ones, is protected there as well.

Objects are removed an hour after they were superseded, in order, so that the number never goes back and no
request still on its way can find its number free.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import time
import weakref
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from crcli.errors import NameClaimed, NotFound, ObjectExists, StoreError, UsageError
from crcli.image.claims import TTL_S, Claim, newest_claim, numbers_before, read_claim
from crcli.image.claims import claimed_by as claimed_by  # where others look for it
from crcli.image.names import check_name, lease_key
from crcli.image.owner import Sight, clock, describe_owner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crcli.process.identity import ProcessId
    from crcli.store.base import Store

RENEWALS = 5
"""How often a lease is renewed while it is good for."""

MARGIN = 1 / 6
"""The part of `ttl_s` by which a holder takes its lease for lapsed before anybody else may."""

SETTLE_S = 2.0
"""How long a creation may take (seconds) where a store may let two create one object."""

SHORTEST_S = 5 * SETTLE_S
"""The shortest `ttl_s` in such a store."""

RELEASE_S = 10.0
"""How long giving a name back may take (seconds): who does that has ended otherwise, and is waited for."""

_KEPT_S = 3600.0
_WORDS_KEPT = 4096
"""So many of the last words that it wrote a holder knows again: more than may be on their way."""

_IN_FLIGHT = 4
"""Renewals under way at once: one connection that hangs does not let the lease lapse."""


class LeaseState(StrEnum):
    """What a holder may do."""

    HELD = "held"
    """The job may run."""

    LAPSED = "lapsed"
    """The store does not answer, or we stood still: others may take over, so the job must not run."""

    LOST = "lost"
    """Another has the name, or was given it: the job must end, and publish nothing more."""


class Lease:
    """A name that is ours, until it lapses or is lost. `number` grows when it lapsed and was claimed again.

    `good_until` is when it lapses, in seconds of CLOCK_BOOTTIME. Whoever must not rely on this process being
    scheduled reads it, a double, and then the number, 8 bytes, from the descriptor `deadline`.
    """

    def __init__(self, store: Store, name: str, holder: str, ttl_s: float) -> None:
        """Of a name that is not ours yet; see `claim`."""
        self.name = check_name(name)
        self.number = 0
        self.deadline = os.memfd_create("crcli-lease")
        weakref.finalize(self, os.close, self.deadline).atexit = False  # threads may still write to it then
        self.good_until = 0.0
        self._store = store
        self._ttl_s = ttl_s
        self._words = {
            **describe_owner(),
            "holder": holder,
            "host": os.uname().nodename,
            "since": time.time(),
            "ttl_s": ttl_s,
        }
        self._written: dict[int, None] = {}  # hashes of what we wrote
        self._covered: list[dict[str, int]] = []
        self._beats = 0
        self._changed = threading.Condition()
        self._claiming = threading.Lock()
        self._in_flight = 0
        self._is_lost = False
        self._is_over = False

    @classmethod
    def claim(
        cls, store: Store, name: str, holder: str, *, ttl_s: float = TTL_S, wait_s: float | None = None
    ) -> Lease:
        """Return the lease on `name`; `holder` says who we are, for people ("crcli run").

        A name that is held is watched until it is seen whether its holder lives, `ttl_s` of *its* at most:
        one that is dead is followed, one that lives raises NameClaimed. With `wait_s` the name may take so
        long (seconds) to come free; 0 looks once. Raises StoreError when the store cannot be used.
        """
        lease = cls(store, name, holder, ttl_s)
        if ttl_s < SHORTEST_S and not store.creates_atomically:
            raise UsageError(f"a lease in {store.url} must be good for {SHORTEST_S:g} s at least")
        watch = _Watch(lease.nonce)
        give_up = None if wait_s is None else clock() + wait_s
        while True:
            began = clock()
            newest = newest_claim(store, name, watch.number)
            if newest is None or watch.finds_it_free(newest, began):
                if lease._create((newest.number if newest else 0) + 1):
                    return lease
                continue
            if watch.holder_lives if give_up is None else clock() >= give_up:
                raise _refusal(newest)
            time.sleep(_pause(newest, give_up))

    @property
    def good_until(self) -> float:
        """When it lapses."""
        return self._good_until

    @good_until.setter
    def good_until(self, value: float) -> None:
        self._good_until = value
        os.pwrite(self.deadline, struct.pack("dq", value, self.number), 0)

    @property
    def nonce(self) -> str:
        """What stands in our objects and in no others."""
        return str(self._words["nonce"])

    @property
    def state(self) -> LeaseState:
        """What may be done now."""
        if self._is_lost:
            return LeaseState.LOST
        return LeaseState.HELD if clock() < self.good_until else LeaseState.LAPSED

    def covers(self, processes: Iterable[ProcessId]) -> None:
        """Answer for these processes of this host too: as long as one of them lives, nobody here takes the
        name over because we have ended. Stands in the store with the next renewal."""
        self._covered = [{"pid": one.pid, "start_time": one.start_time} for one in processes]

    def keep(self, on: Callable[[LeaseState], None]) -> None:
        """Renew from now on, in threads of our own, until `release`.

        `on` is called, in one thread, with the state each time that it or the number has changed, at once and
        also when this process was suspended; it must not raise. After LOST nothing more is done.
        """
        for work, name in ((lambda: self._tell(on), "lease"), (self._renew_for_ever, "lease-renewer")):
            threading.Thread(target=work, name=name, daemon=True).start()

    def release(self) -> None:
        """Stop renewing, and let the next claimer have the name at once. The job must not run any more.

        A store that does not answer is waited for RELEASE_S: then the lease runs out by itself.
        """
        end = clock() + min(RELEASE_S, self._ttl_s)
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._wait_for_attempts(clock() + (end - clock()) / 3)
        if not self._is_lost:
            letting_go = threading.Thread(target=self._let_go, name="lease-release", daemon=True)
            letting_go.start()
            letting_go.join(max(0.0, end - clock()))
            self._wait_for_attempts(end)  # whose words came after our last: each says it once more

    def _wait_for_attempts(self, end: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight == 0, max(0.0, end - clock()))

    # The number is ours, or another's.

    def _create(self, number: int) -> bool:
        """Create the lease of that number; say whether it is ours and good. Raises StoreError when it is not
        known, and then it is nobody's: who finds our words there finds them unchanged."""
        began = clock()
        text = self._text()
        try:
            self._store.put(lease_key(self.name, number), text, if_absent=True)
        except ObjectExists:
            return False
        except StoreError:
            if not self._stands(number, text):
                raise
        if not self._store.creates_atomically and not self._settles(number, text, began):
            return False
        later = read_claim(self._store, self.name, number + 1)
        with self._changed:
            good_until = self._lapse_after(began)
            if later is not None or clock() >= good_until:
                return False
            self.number, self.good_until = number, good_until
            self._changed.notify_all()
        return True

    def _settles(self, number: int, text: bytes, began: float) -> bool:
        if clock() - began > SETTLE_S:
            return False
        time.sleep(SETTLE_S)
        return self._stands(number, text)

    def _stands(self, number: int, text: bytes) -> bool:
        found = read_claim(self._store, self.name, number)
        return found is not None and found.text == text

    def _lapse_after(self, began: float) -> float:
        return began + self._ttl_s * (1 - MARGIN)

    def _text(self, **more: Any) -> bytes:
        self._beats += 1
        words = {**self._words, "covers": self._covered, "renewed": time.time(), "beat": self._beats, **more}
        text = json.dumps(words).encode()
        with self._changed:
            self._written[hash(text)] = None
            if len(self._written) > _WORDS_KEPT:
                del self._written[next(iter(self._written))]
        return text

    # It is renewed, or claimed again.

    def _renew_for_ever(self) -> None:
        self._start(self._forget_old)
        while True:
            self._start(self._attempt)
            with self._changed:
                step = self._ttl_s / RENEWALS if self.state == LeaseState.HELD else self._ttl_s / RENEWALS / 4
                if self._changed.wait_for(lambda: self._is_over or self._is_lost, step):
                    return

    def _start(self, work: Callable[[], None]) -> None:
        with self._changed:
            if self._is_over or self._in_flight >= _IN_FLIGHT:
                return
            self._in_flight += 1
        threading.Thread(target=self._do, args=(work,), name="lease-renewal", daemon=True).start()

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except StoreError:
            pass  # the next attempt is not far; without any that works the lease lapses
        finally:
            with self._changed:
                self._in_flight -= 1
                self._changed.notify_all()

    def _attempt(self) -> None:
        try:
            self._renew_or_claim()
        finally:
            if self._is_over and not self._is_lost:
                self._let_go()

    def _renew_or_claim(self) -> None:
        state = self.state
        if state == LeaseState.HELD:
            self._renew()
        elif state == LeaseState.LAPSED and self._claiming.acquire(blocking=False):
            try:
                self._claim_again()
            finally:
                self._claiming.release()

    def _renew(self) -> None:
        began, number = clock(), self.number
        if self._is_ours(number):
            self._store.put(lease_key(self.name, number), self._text())
            if not self._is_superseded(number):
                self._extend(number, began)
                return
        self._lose()

    def _extend(self, number: int, began: float) -> None:
        with self._changed:
            if number == self.number and not self._is_over and clock() < self.good_until:
                self.good_until = max(self.good_until, self._lapse_after(began))
                self._changed.notify_all()

    def _claim_again(self) -> None:
        number = self.number
        if not self._is_ours(number) or self._is_superseded(number):
            self._lose()
            return
        number = self._last_of_ours()
        if read_claim(self._store, self.name, number + 1) is None:
            self._create(number + 1)

    def _last_of_ours(self) -> int:
        """The number, or a later one: created by us in an attempt that we took for failed."""
        number = self.number
        while (later := read_claim(self._store, self.name, number + 1)) is not None and self._wrote(later):
            number += 1
        return number

    def _is_ours(self, number: int) -> bool:
        found = read_claim(self._store, self.name, number)
        return found is not None and self._wrote(found)

    def _is_superseded(self, number: int) -> bool:
        later = read_claim(self._store, self.name, number + 1)
        return later is not None and not self._wrote(later)

    def _wrote(self, claim: Claim) -> bool:
        with self._changed:
            return hash(claim.text) in self._written

    def _lose(self) -> None:
        with self._changed:
            self._is_lost = True
            self._changed.notify_all()

    def _forget_old(self) -> None:
        for number in numbers_before(self._store, self.name, self.number, _KEPT_S):
            self._store.delete(lease_key(self.name, number))

    def _let_go(self) -> None:
        try:
            number = self._last_of_ours()
            if self._is_ours(number):
                self._store.put(lease_key(self.name, number), self._text(released=True))
        except StoreError:
            pass  # it lapses by itself

    # Whoever runs the job is told.

    def _tell(self, on: Callable[[LeaseState], None]) -> None:
        told = (LeaseState.HELD, self.number)
        while told[0] != LeaseState.LOST:
            with self._changed:
                if self._is_over:
                    return
                now = (self.state, self.number)
                if now == told:
                    self._changed.wait(self._until_lapse())
                    continue
            told = now
            on(now[0])

    def _until_lapse(self) -> float:
        """For how long nothing changes by itself; a second at most, as waiting takes no note of a suspended
        host."""
        left = self.good_until - clock()
        return min(left, 1.0) if left > 0 else 1.0


class _Watch:
    """What a claimer has seen of the newest lease."""

    def __init__(self, nonce: str) -> None:
        self.number = 0
        self.holder_lives = False
        self._nonce = nonce
        self._seen = b""
        self._since = 0.0

    def finds_it_free(self, newest: Claim, began: float) -> bool:
        """Whether its number is over for good, after a look that began at that time."""
        if newest.is_released:
            return True
        sight = Sight.UNSEEN if newest.nonce == self._nonce else newest.sight()
        if sight != Sight.UNSEEN:
            self.holder_lives = sight == Sight.ALIVE
            return sight == Sight.ENDED
        if (newest.number, newest.text) != (self.number, self._seen):
            self.holder_lives = self.number != 0 and newest.nonce != self._nonce
            self.number, self._seen, self._since = newest.number, newest.text, clock()
            return False
        return began - self._since >= newest.ttl_s


def _pause(newest: Claim, give_up: float | None) -> float:
    pause = min(newest.ttl_s / RENEWALS / 2, 1.0)
    return pause if give_up is None else max(0.0, min(pause, give_up - clock()))


def _refusal(claim: Claim) -> NameClaimed:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(claim.since))
    return NameClaimed(
        f"{claim.name} is claimed by {claim.holder} since {since}, and was not given up",
        hint=f"it comes free when that ends, or {claim.ttl_s:g} s after its last renewal; "
        f"if the holder is surely dead, `crcli lease break {claim.name}`",
        claim=claim.as_json(),
    )


def break_lease(store: Store, name: str, by: str) -> Claim:
    """Give the name free, whatever its holder thinks: a greater number, released at once, supersedes it.

    A holder that lives after all sees that with its next renewal, and ends its job; until then two may run.
    Returns the claim that was broken. Raises NotFound when nobody has the name, NameClaimed when its holder
    is seen to live on this host.
    """
    while True:
        claim = newest_claim(store, name)
        if claim is None or claim.is_released:
            raise NotFound(
                f"nobody has claimed {name} in {store.url}",
                hint="`crcli lease ls` shows who holds which name",
            )
        if claim.sight() == Sight.ALIVE:
            refusal = _refusal(claim)
            refusal.hint = "its holder, or its job, runs on this host: end that"
            raise refusal
        words = {**describe_owner(), "holder": by, "host": os.uname().nodename, "since": time.time()}
        text = json.dumps({**words, "ttl_s": TTL_S, "released": True}).encode()
        try:
            store.put(lease_key(name, claim.number + 1), text, if_absent=True)
        except ObjectExists:
            continue  # it was claimed meanwhile
        return claim
