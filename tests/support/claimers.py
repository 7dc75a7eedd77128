"""Processes that claim names, for tests of leases: `python -m tests.support.claimers WHAT URL …`.

- `hold URL NAME TTL SETTLE SKEW`: claim, say the number, keep; say every state; `release` on stdin lets go.
- `race URL PROCESSES AT_ONCE ROUNDS TTL SETTLE`: so many processes claim the same names at the same instants;
  says how many of them got each name.
- `live URL NAME JOURNAL TTL SETTLE`: claim and let go, for ever; writes down for when the name was ours.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import compress
from typing import Any

from crcli.errors import NameClaimed
from crcli.image import lease as leases
from crcli.image.lease import Lease, LeaseState
from crcli.image.owner import clock
from crcli.store import open_store


def say(**words: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(words), flush=True)


def settle_within(settle_s: float) -> None:
    """Expect creations to take no longer, as all others of a test do."""
    leases.SETTLE_S, leases.SHORTEST_S = settle_s, 0.0


def hold(url: str, name: str, ttl_s: str, settle_s: str, skew_s: str) -> None:
    """Claim a name and keep it until told otherwise, with a wall clock that is wrong by `skew_s`."""
    settle_within(float(settle_s))
    real = time.time
    leases.time.time = lambda: real() + float(skew_s)  # type: ignore[method-assign]
    try:
        lease = Lease.claim(open_store(url, patience_s=5), name, "a test", ttl_s=float(ttl_s))
    except NameClaimed as error:
        say(refused=error.claim)
        return
    say(number=lease.number)
    lease.keep(lambda state: say(state=state.value, number=lease.number))
    for line in sys.stdin:
        if line.strip() == "release":
            lease.release()
            say(released=lease.number)
            return


def race(url: str, processes: str, at_once: str, rounds: str, ttl_s: str, settle_s: str) -> None:
    """Have processes claim names together; say for each name who won, in order."""
    settle_within(float(settle_s))
    context = multiprocessing.get_context("fork")
    start = context.Barrier(int(processes))
    results = context.Queue()

    def run(number: int) -> None:
        store = open_store(url, patience_s=20)
        store.warm(for_writing=True)

        def claim(name: str) -> bool:
            try:
                Lease.claim(store, name, f"racer {number}", ttl_s=float(ttl_s), wait_s=0)
            except NameClaimed:
                return False
            return True

        won: list[str] = []
        with ThreadPoolExecutor(int(at_once)) as threads:
            for turn in range(int(rounds)):
                names = [f"race-{turn}-{one}" for one in range(int(at_once))]
                start.wait(240)
                won += compress(names, threads.map(claim, names))
        start.wait(240)  # whose winners had ended by then would be followed
        results.put(won)

    racers = [context.Process(target=run, args=(number,)) for number in range(int(processes))]
    for racer in racers:
        racer.start()
    won = [name for _ in racers for name in results.get(timeout=280)]
    for racer in racers:
        racer.join()
    names = [f"race-{turn}-{one}" for turn in range(int(rounds)) for one in range(int(at_once))]
    say(winners=[won.count(name) for name in names])


class Journalled(Lease):
    """A lease that writes down until when it is good, before it relies on it."""

    journal = -1

    def __init__(self, *arguments: Any) -> None:
        self._given_up: set[int] = set()
        super().__init__(*arguments)

    @property
    def good_until(self) -> float:
        """As it was set."""
        return super().good_until

    @good_until.setter
    def good_until(self, value: float) -> None:
        Lease.good_until.__set__(self, value)  # type: ignore[attr-defined]
        if value:
            self._note(good_until=value)

    def _let_go(self) -> None:
        if self.number not in self._given_up:  # said once more, it is over since it was said first
            self._given_up.add(self.number)
            self._note(released=True)
        super()._let_go()

    def _note(self, **what: Any) -> None:
        line = json.dumps({"number": self.number, "at": clock(), **what})
        os.write(self.journal, line.encode() + b"\n")


def live(url: str, name: str, journal: str, ttl_s: str, settle_s: str) -> None:
    """Claim and let go at random, until killed."""
    settle_within(float(settle_s))
    Journalled.journal = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    store = open_store(url, patience_s=5)
    while True:
        try:
            lease = Journalled.claim(store, name, "a test", ttl_s=float(ttl_s), wait_s=random.random())
        except NameClaimed:
            continue
        states: list[LeaseState] = []
        lease.keep(states.append)
        time.sleep(random.choice((0, 0.05, float(ttl_s) * 2 * random.random())))
        lease.release()


if __name__ == "__main__":
    {"hold": hold, "race": race, "live": live}[sys.argv[1]](*sys.argv[2:])
