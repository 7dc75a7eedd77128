"""How fast this host is: what each step of a dump costs here, learned from the dumps that it made.

A step takes the sum of its rates times what it is given: so much for each process, for each MiB. The rates
are kept in a small file (`$CRCLI_RATES`, by default /var/lib/crcli/rates.json; `off` keeps none). It is a
cache: without it, or with a damaged one, the built-in rates count.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from typing import TYPE_CHECKING, Any

from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_PATH = "/var/lib/crcli/rates.json"
VERSION = 1

Amounts = dict[str, float]
"""What a step is given: a number for each of its rates. `once` is 1."""

BUILT_IN: dict[str, Amounts] = {
    "look": {"once": 30, "processes": 3},
    "prepare file": {"once": 120, "mib": 2},
    "prepare s3": {"once": 450, "mib": 1.5},
    "gpu": {"once": 150, "processes": 50, "mib": 0.5},
    "take": {"once": 20, "processes": 4, "threads": 0.3, "mib": 0.3},
    "take in place": {"once": 20, "processes": 4, "threads": 0.3, "mib": 0.12},
    "files": {"once": 10, "mib": 4},
    "trial": {"once": 35, "processes": 3, "threads": 0.1},
    "ship file": {"once": 35, "processes": 1, "zero": 0.2, "reused": 0.5, "new": 1, "stored": 1},
    "ship s3": {"once": 50, "processes": 1, "zero": 0.2, "reused": 0.5, "new": 1, "stored": 8},
    "reap": {"once": 8, "processes": 1, "mib": 0.02},
    "rest": {"once": 60, "processes": 1},
}
"""Milliseconds for each step at all (`once`), for each process, thread and MiB. Measured on two cores, and
`gpu` with an H100 (driver 580)."""

MOST_ENTRIES = 64
"""Steps that are remembered, the newest: each store has two of its own."""

_LONGEST_STEP = 3.0
"""A single dump is believed to be so many times slower or faster than forecast, and not more."""

_FIRST_WEIGHTS = (1.0, 0.5)
_WEIGHT = 0.3
"""How much the newest dump counts, once there were some."""

_ODD = 1000.0
"""A rate that differs by this factor from the built-in one was not measured, but damaged."""

_FILE_LIMIT = 1 << 20
"""The file is read up to this size (bytes); ours are a tenth of that."""

_LOCK_TRIES, _LOCK_PAUSE_S = 20, 0.005


class Step(Struct, frozen=True):
    """What is known of one step: its rates in milliseconds, how many dumps they come from, and since when."""

    rates: Amounts
    seen: int = 0
    at: float = 0.0

    def takes(self, amounts: Mapping[str, float]) -> float:
        """How long it takes (ms)."""
        return sum(rate * amounts.get(name, 0.0) for name, rate in self.rates.items())

    def after(self, amounts: Mapping[str, float], took_ms: float, now: float) -> Step:
        """The same once a dump has shown how long it takes.

        The rates that make up most of the time get most of the correction: small trees teach what a step
        costs at all, large ones what a MiB costs.
        """
        expected = self.takes(amounts)
        if expected <= 0 or not math.isfinite(took_ms) or took_ms <= 0:
            return self
        wrong = math.log(min(_LONGEST_STEP, max(1 / _LONGEST_STEP, took_ms / expected)))
        shares = {name: rate * amounts.get(name, 0.0) / expected for name, rate in self.rates.items()}
        weight = _FIRST_WEIGHTS[self.seen] if self.seen < len(_FIRST_WEIGHTS) else _WEIGHT
        step = weight * wrong / sum(share * share for share in shares.values())
        moved = {name: rate * math.exp(_within(step * shares[name])) for name, rate in self.rates.items()}
        return Step(moved, self.seen + 1, now)


def _within(change: float) -> float:
    most = math.log(_LONGEST_STEP)
    return min(most, max(-most, change))


class Rates(Struct, frozen=True):
    """All steps by name. A step at a store is known by the store's URL, else by its kind ("s3", "file")."""

    steps: Mapping[str, Step] = field(default_factory=dict)

    def step(self, name: str, store: str = "") -> Step:
        """The rates of a step: this host's, as far as it has any."""
        for key in _keys(name, store):
            if (found := self.steps.get(key)) is not None:
                return found
        return Step(_built_in(name, store))

    def learned(self, facts: Mapping[tuple[str, str], tuple[Amounts, float]], now: float) -> Rates:
        """The rates after a dump: `facts` maps (step, store) to what it was given and what it took (ms)."""
        steps = dict(self.steps)
        for (name, store), (amounts, took_ms) in facts.items():
            for key in _keys(name, store):
                before = steps.get(key) or Step(self.step(name, store).rates)
                steps[key] = before.after(amounts, took_ms, now)
        newest = sorted(steps.items(), key=lambda item: item[1].at, reverse=True)
        return Rates(dict(newest[:MOST_ENTRIES]))


def _keys(name: str, store: str) -> tuple[str, ...]:
    return (f"{name} {store}", f"{name} {store.partition(':')[0]}") if store else (name,)


def _built_in(name: str, store: str) -> Amounts:
    return BUILT_IN[name] if not store else BUILT_IN.get(_keys(name, store)[1]) or BUILT_IN[f"{name} s3"]


def load_rates() -> Rates:
    """What this host has learned; nothing where there is no file, or one that cannot be read."""
    path = _path()
    if not path:
        return Rates()
    try:
        with open(path, "rb") as file:
            return _parse(json.loads(file.read(_FILE_LIMIT)))
    except (OSError, ValueError, RecursionError):
        return Rates()


def learn(facts: Mapping[tuple[str, str], tuple[Amounts, float]]) -> bool:
    """Take in what a dump has shown; False when that could not be kept, which is no failure.

    Whoever learns at the same time waits, so that nobody's facts are lost, and a reader always finds a whole
    file.
    """
    path = _path()
    if not path:
        return False
    folder = os.path.dirname(path) or "."
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if not _locked(lock) or (os.path.exists(path) and not os.path.isfile(path)):
                return False  # /dev/null, say, is not to be replaced
            text = json.dumps(_as_json(load_rates().learned(facts, time.time())), indent=1)
            with open(path + ".new", "w", opener=_open_new) as file:
                file.write(text)
            os.replace(path + ".new", path)
            return True
        finally:
            os.close(lock)
    except OSError:
        return False


def _open_new(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _path() -> str:
    path = os.environ.get("CRCLI_RATES", DEFAULT_PATH)
    return "" if path == "off" else path


def _locked(fd: int) -> bool:
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
    return False


def _as_json(rates: Rates) -> dict[str, Any]:
    steps = {
        key: {"rates": {name: round(rate, 6) for name, rate in step.rates.items()}, "seen": step.seen,
              "at": round(step.at, 3)}
        for key, step in rates.steps.items()
    }  # fmt: skip
    return {"version": VERSION, "steps": steps}


def _parse(data: Any) -> Rates:
    if (
        not isinstance(data, dict)
        or data.get("version") != VERSION
        or not isinstance(data.get("steps"), dict)
    ):
        return Rates()
    return Rates(dict(_sound(data["steps"])))


def _sound(steps: Mapping[str, Any]) -> Iterator[tuple[str, Step]]:
    """The steps that make sense: all of a step's rates, near enough to the built-in ones."""
    for key, found in steps.items():
        name, _, store = key.partition(" ")
        try:
            expected = _built_in(name, store)
            rates = {name: float(found["rates"][name]) for name in expected}
            step = Step(rates, int(found["seen"]), float(found["at"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            continue
        is_sound = all(expected[name] / _ODD < rate < expected[name] * _ODD for name, rate in rates.items())
        if is_sound and step.seen > 0 and math.isfinite(step.at):
            yield key, step
