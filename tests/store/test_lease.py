"""Leases: a name has one holder at a time, whatever becomes of holders, claimers, clocks and stores."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crcli import kernel
from crcli.errors import NameClaimed, NotFound, StoreError
from crcli.image import lease as leases
from crcli.image.claims import all_claims, claimed_by, newest_claim, read_claim
from crcli.image.gc import collect_garbage
from crcli.image.lease import Lease, LeaseState, break_lease
from crcli.image.names import LEASES, lease_key
from crcli.image.owner import Sight, describe_owner
from crcli.process.identity import ProcessId, identify
from crcli.store import open_store, retrying
from crcli.store.base import is_key
from tests.support.faulty_proxy import FaultyProxy, answer, hold_until, lose_answer
from tests.support.stores import Actor, WatchedStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from crcli.store import Store
    from tests.store.conftest import Place
    from tests.support.s3servers import S3Server

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m", "tests.support.claimers"]
ELSEWHERE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""In a pid namespace of its own nobody sees whether the holder lives, as on another host."""

OTHER_CLOCKS = ["unshare", "--time", "--boottime", "100000", "--fork", "--kill-child"]
"""In a time namespace, as in a tree that was restored, each process has another start time."""

SOON_S = 60.0
SETTLE_S = 1.0
QUICK, SLOW = 2.0, 6.0
"""How long leases are good for in tests that wait for their end (seconds): in folders, in all others."""

LONG = 600.0
"""How long they are good for where nobody waits for that: no disk is so slow that they lapse."""

two_stores = pytest.mark.parametrize("place", ["file", "moto"], indirect=True)
some_stores = pytest.mark.parametrize("place", ["file", "moto", "swift"], indirect=True)

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a holder elsewhere needs a pid namespace"
)


@pytest.fixture(autouse=True)
def settle_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creations in this process's tests are quick."""
    monkeypatch.setattr(leases, "SETTLE_S", SETTLE_S)
    monkeypatch.setattr(leases, "SHORTEST_S", 0.0)


class Holder:
    """A process elsewhere that holds a name."""

    def __init__(
        self,
        place: Place,
        name: str,
        ttl_s: float = 0,
        *,
        skew_s: float = 0,
        here: bool = False,
        below: list[str] = ELSEWHERE,
    ) -> None:
        ttl_s = ttl_s or (QUICK if place.leg == "file" else SLOW)
        command = [*PYTHON, "hold", place.url, name, str(ttl_s), str(SETTLE_S), str(skew_s)]
        self.process = subprocess.Popen(
            command if here else [*below, *command],
            cwd=ROOT,
            env=os.environ | place.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
        )

    def says(self) -> dict[str, Any]:
        """The next thing it says; it is waited for."""
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def claims(self) -> int:
        """The number that it gets; not the first, should the store have been slow."""
        return int(self.says()["number"])

    def stop(self) -> None:
        """Stop all of it; what it has said until then is forgotten."""
        self.send(signal.SIGSTOP)
        while select.select([self.process.stdout], [], [], 0.2)[0]:
            self.says()

    def send(self, number: int) -> None:
        """Send a signal to all of it."""
        os.killpg(self.process.pid, number)

    def release(self) -> dict[str, Any]:
        """Have it let go."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"release\n")
        while "released" not in (said := self.says()):
            pass
        return said

    def end(self) -> None:
        """Kill it."""
        try:
            self.send(signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.fixture
def holder(place: Place) -> Iterator[Callable[..., Holder]]:
    """Start holders of names in the store of this test."""
    started: list[Holder] = []

    def start(**how: Any) -> Holder:
        started.append(Holder(place, "job", **how))
        return started[-1]

    yield start
    for one in started:
        one.end()


def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that are claimed from now on by this process seem to be of another host."""
    real = leases.describe_owner
    monkeypatch.setattr(leases, "describe_owner", lambda: real() | {"boot": "another"})


def wait_for(what: Callable[[], bool]) -> None:
    """Wait until it is so."""
    limit = time.monotonic() + SOON_S
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def numbers(store: Store) -> list[int]:
    """The numbers of all leases."""
    return [int(info.key.rpartition("/")[2]) for info in store.list(LEASES)]


# --- one wins ---------------------------------------------------------------------------------------------


def test_of_many_claimers_one_wins(place: Place) -> None:
    """Processes that claim a name at the same instant: one gets it, every time."""
    at_once, rounds = {"file": (8, 40), "swift": (2, 1)}.get(place.leg, (4, 1))
    done = subprocess.run(
        [*PYTHON, "race", place.url, "4", str(at_once), str(rounds), "120", "4"],
        cwd=ROOT,
        env=os.environ | place.env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["winners"] == [1] * (at_once * rounds)


@needs_namespaces
def test_no_two_hold_a_name_whatever_befalls_them(tmp_path: Path) -> None:
    """Holders come, go, are stopped for longer than their lease, and are killed: never are two leases good at
    one instant, and the number never goes back."""
    journal = tmp_path / "journal"
    command = [*ELSEWHERE, *PYTHON, "live", f"file://{tmp_path}/store", "job", str(journal), "0.6", "1"]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
        )

    lives = [start() for _ in range(3)]
    try:
        for turn in range(12):
            victim = turn % 3
            time.sleep(0.4)
            os.killpg(lives[victim].pid, signal.SIGSTOP)
            time.sleep(0.9)
            if turn % 4 == 3:
                os.killpg(lives[victim].pid, signal.SIGKILL)
                lives[victim].wait()
                lives[victim] = start()
            else:
                os.killpg(lives[victim].pid, signal.SIGCONT)
    finally:
        for one in lives:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()
    assert_exclusive([json.loads(line) for line in journal.read_text().splitlines()])


def assert_exclusive(lines: list[dict[str, Any]]) -> None:
    """No lease was good when the next one came to be."""
    began: dict[int, float] = {}
    good_until: dict[int, float] = {}
    given_up = {line["number"]: line["at"] for line in lines if line.get("released")}
    for line in lines:
        if not line.get("released"):
            number = line["number"]
            began.setdefault(number, line["at"])
            good_until[number] = min(line["good_until"], given_up.get(number, line["good_until"]))
    order = sorted(began)
    assert len(order) > 3
    for number, following in pairwise(order):
        assert good_until[number] < began[following], (number, following)


# --- claiming ---------------------------------------------------------------------------------------------


def test_claim_release_claim(store: Store) -> None:
    """A name that was released can be had at once, with the next number; its objects are keys."""
    had = []
    for _ in range(2):
        lease = Lease.claim(store, "job", "a test", ttl_s=6)
        had.append(lease.number)
        assert is_key(lease_key("job", lease.number))
        lease.release()
        assert claimed_by(store, "job") is None
    assert had[0] < had[1] == max(numbers(store))


@some_stores
def test_a_living_holder_is_not_followed(store: Store, holder: Callable[..., Holder]) -> None:
    """A claim is refused (exit 23) once the holder is seen to live, and says who that is."""
    other = holder(ttl_s=LONG, here=True)
    number = other.claims()
    with pytest.raises(NameClaimed, match="job is claimed by a test on") as caught:
        Lease.claim(store, "job", "another")
    assert caught.value.exit_code == 23
    assert (caught.value.claim["number"], caught.value.claim["seen"]) == (number, "alive")
    assert other.release() == {"released": number}
    assert Lease.claim(store, "job", "another").number > number


@two_stores
@needs_namespaces
def test_a_holder_elsewhere_shows_that_it_lives(store: Store, holder: Callable[..., Holder]) -> None:
    """Who cannot see the holder waits for its next renewal, and is refused then; clocks do not matter."""
    other = holder(ttl_s=8, skew_s=-3600)
    other.claims()
    with pytest.raises(NameClaimed):
        Lease.claim(store, "job", "another")
    with pytest.raises(NameClaimed):
        Lease.claim(store, "job", "another", wait_s=0)


@needs_namespaces
@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_a_holder_in_a_restored_tree_is_not_taken_for_dead(
    store: Store, holder: Callable[..., Holder]
) -> None:
    """Its own /proc tells it another start time than ours does: it lives, and whoever claims its name waits
    for its next renewal. So is it with who collects garbage."""
    other = holder(ttl_s=8, below=OTHER_CLOCKS)
    other.claims()
    with pytest.raises(NameClaimed):
        Lease.claim(store, "job", "another")
    claim = newest_claim(store, "job")
    assert claim is not None and claim.sight() == Sight.UNSEEN


@needs_namespaces
@pytest.mark.parametrize(
    ("place", "skew_s"), [("file", 3600), ("file", -3600), ("moto", 3600)], indirect=["place"]
)
def test_a_holder_that_was_killed_is_followed(
    store: Store, holder: Callable[..., Holder], skew_s: float
) -> None:
    """A holder elsewhere that ended without a word is followed when its time is over, though its clock is an
    hour off."""
    other = holder(skew_s=skew_s)
    number = other.claims()
    other.end()
    assert Lease.claim(store, "job", "another").number > number


@some_stores
def test_a_holder_that_ended_here_is_followed_at_once(store: Store, holder: Callable[..., Holder]) -> None:
    """Nobody waits for a process of this host that is seen to have ended, however long its lease."""
    other = holder(ttl_s=LONG, here=True)
    number = other.claims()
    other.end()
    assert claimed_by(store, "job") is None
    assert Lease.claim(store, "job", "another", wait_s=SOON_S).number > number


def test_a_job_that_outlives_its_holder_keeps_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as a process lives that the holder answered for, its name is not taken over on this host."""
    store = open_store(f"file://{tmp_path}/store")
    job = subprocess.Popen(["sleep", "600"])
    try:
        real = leases.describe_owner
        monkeypatch.setattr(leases, "describe_owner", lambda: real() | {"start_time": 1})  # another, and gone
        first = Lease.claim(store, "job", "a test", ttl_s=0.5)
        first.covers([identify(job.pid)])
        first._renew()
        time.sleep(1)
        with pytest.raises(NameClaimed):
            Lease.claim(store, "job", "another")
    finally:
        job.kill()
        job.wait()
    assert Lease.claim(store, "job", "another").number == 2


@some_stores
def test_waiting_for_a_name(store: Store, holder: Callable[..., Holder]) -> None:
    """With a time to wait, a claimer gets the name when its living holder lets go."""
    other = holder(ttl_s=LONG, here=True)
    number = other.claims()
    threading.Timer(0.5, lambda: other.release()).start()
    assert Lease.claim(store, "job", "another", wait_s=SOON_S).number > number


def test_words_that_nobody_can_read_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that a newer crcli wrote in other words is held for as long as one that says nothing."""
    store = open_store(f"file://{tmp_path}/store")
    monkeypatch.setattr("crcli.image.claims.TTL_S", 0.5)
    unread = (b"", b"[]", b'{"ttl_s": -1, "since": "x", "covers": 3}', b"\xff", b"[" * 100_000)
    for number, text in enumerate((*unread, b'{"since": 1e300, "ttl_s": 1e300}'), 1):
        store.put(lease_key("job", number), text)
        with pytest.raises(NameClaimed):
            Lease.claim(store, "job", "a test", wait_s=0)
        assert len(all_claims(store)) == 1
    assert Lease.claim(store, "job", "a test").number == 7


# --- keeping ----------------------------------------------------------------------------------------------


@two_stores
@needs_namespaces
def test_a_suspended_holder_learns_of_it_first(store: Store, holder: Callable[..., Holder]) -> None:
    """A holder that was stopped for longer than its lease finds it lapsed or lost when it wakes, not held."""
    other = holder()
    number = other.claims()
    other.stop()
    ours = Lease.claim(store, "job", "another", ttl_s=60)
    assert ours.number > number
    other.send(signal.SIGCONT)
    states = [other.says()["state"]]
    while states[-1] != "lost":
        states.append(other.says()["state"])
    assert states in (["lapsed", "lost"], ["lost"])
    assert ours._is_ours(ours.number)


@two_stores
@needs_namespaces
def test_a_suspended_holder_whom_nobody_followed_goes_on(place: Place, holder: Callable[..., Holder]) -> None:
    """When nobody has taken the name meanwhile, it is claimed again, with a new number."""
    other = holder()
    number = other.claims()
    other.stop()
    time.sleep(QUICK if place.leg == "file" else SLOW)
    other.send(signal.SIGCONT)
    assert other.says()["state"] == "lapsed"
    again = other.says()
    assert again["state"] == "held" and again["number"] > number


def test_a_store_that_does_not_answer_lets_the_lease_lapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job stands still while renewals fail, and goes on with a greater number once they work again."""
    is_down = threading.Event()

    def around(_: str) -> Any:
        if is_down.is_set():
            raise StoreError("down")
        return nullcontext()

    lease = Lease.claim(
        WatchedStore(open_store(f"file://{tmp_path}/store"), around), "job", "a test", ttl_s=1
    )
    states: list[tuple[LeaseState, int]] = []
    lease.keep(lambda state: states.append((state, lease.number)))
    is_down.set()
    wait_for(lambda: (LeaseState.LAPSED, 1) in states)
    is_down.clear()
    wait_for(lambda: states[-1][0] == LeaseState.HELD)
    assert states[-1][1] > 1
    lease.release()


def test_a_renewal_that_takes_too_long_does_not_count(tmp_path: Path) -> None:
    """A renewal is as old as its beginning, and one that ends after the lease has lapsed is none."""
    inner = open_store(f"file://{tmp_path}/store")
    delay = [0.0]

    def around(what: str) -> Any:
        time.sleep(delay[0] if what.startswith("put") else 0)
        return nullcontext()

    lease = Lease.claim(WatchedStore(inner, around), "job", "a test", ttl_s=1.2)
    delay[0] = 0.2
    before = lease.good_until
    lease._renew()
    assert lease.good_until < before + 1.2
    delay[0] = 1.5
    before = lease.good_until
    lease._renew()
    assert (lease.good_until, lease.state) == (before, LeaseState.LAPSED)


@pytest.mark.parametrize("how", ["renewal", "claim"])
def test_of_two_copies_of_a_holder_one_has_lost(tmp_path: Path, how: str) -> None:
    """A virtual machine was copied while it ran: both holders have one nonce, and what one writes is not
    the other's."""
    store = open_store(f"file://{tmp_path}/store")
    lease = Lease.claim(store, "job", "a test", ttl_s=30)
    copied = Lease(store, "job", "a test", 30)
    copied._words, copied._written = lease._words, dict(lease._written)
    copied._beats, copied.number, copied.good_until = lease._beats, lease.number, lease.good_until
    if how == "claim":
        lease.good_until = copied.good_until = 0.0
    for _ in range(2):
        lease._renew_or_claim()
        copied._renew_or_claim()
    assert lease.nonce == copied.nonce
    assert (lease.state, copied.state) == (LeaseState.HELD, LeaseState.LOST)


@pytest.mark.parametrize("has_lapsed", [False, True], ids=["renewal", "claim"])
def test_what_was_under_way_does_not_take_a_release_back(tmp_path: Path, has_lapsed: bool) -> None:
    """The name is free once it was let go, though a slow store writes an earlier renewal after that, or a
    claim that is too late to count."""
    inner = open_store(f"file://{tmp_path}/store")
    is_held_up, goes_on = threading.Event(), threading.Event()

    @contextmanager
    def around(what: str) -> Iterator[None]:
        is_first = what.startswith("put") and threading.current_thread().name == "lease-renewal"
        if is_first and not is_held_up.is_set():
            is_held_up.set()
            assert goes_on.wait(SOON_S)
        yield

    lease = Lease.claim(WatchedStore(inner, around), "job", "a test", ttl_s=1)
    if has_lapsed:
        lease.good_until = 0.0
    lease.keep(lambda state: None)
    assert is_held_up.wait(SOON_S)
    releasing = threading.Thread(target=lease.release)
    releasing.start()
    wait_for(lambda: (found := newest_claim(inner, "job")) is not None and found.is_released)
    if has_lapsed:
        time.sleep(1)
    goes_on.set()
    releasing.join(SOON_S)
    wait_for(lambda: lease._in_flight == 0)
    found = newest_claim(inner, "job")
    assert found is not None and found.is_released
    assert found.number == (2 if has_lapsed else 1)


@pytest.mark.parametrize("what", ["put", "get"])
def test_a_name_that_cannot_be_given_back_is_left_to_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Who ends waits for a store that hangs so long and no longer, however long the lease is good for; what
    comes of the request after that harms nobody."""
    monkeypatch.setattr(leases, "RELEASE_S", 0.3)
    inner = open_store(f"file://{tmp_path}/store")
    hangs, goes_on = threading.Event(), threading.Event()

    @contextmanager
    def around(call: str) -> Iterator[None]:
        if hangs.is_set() and call.startswith(what):
            assert goes_on.wait(SOON_S)
        yield

    lease = Lease.claim(WatchedStore(inner, around), "job", "a test", ttl_s=LONG)
    lease.keep(lambda state: None)
    hangs.set()
    lease.release()
    found = newest_claim(inner, "job")
    assert found is not None and not found.is_released
    assert not goes_on.is_set()
    goes_on.set()
    wait_for(lambda: (found := newest_claim(inner, "job")) is not None and found.is_released)


def test_a_lapsed_holder_and_a_claimer_cannot_both_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claimer that has done with looking, and a holder that wakes at that instant: one of them goes on,
    wherever the claimer had got to."""
    as_elsewhere(monkeypatch)
    now = [0.0]
    monkeypatch.setattr(leases, "clock", lambda: now[0])
    went_on = set()
    for steps in range(8):
        store = open_store(f"file://{tmp_path}/store-{steps}")
        holder = Lease.claim(store, "job", "a test", ttl_s=0.3)

        def claim(around: Any, store: Store = store) -> Lease:
            return Lease.claim(WatchedStore(store, around), "job", "another", ttl_s=60)

        claimer = Actor(claim)
        claimer.start()
        claimer.advance(3)
        now[0] += 0.4
        claimer.advance(steps)
        holder._claim_again()
        assert claimer.finish()
        if holder._is_lost:
            assert claimer.result.number == 2
        else:
            assert holder.number == 2 and isinstance(claimer.error, NameClaimed)
        went_on.add(holder._is_lost)
    assert went_on == {True, False}


@some_stores
def test_words_of_another_in_ones_own_object(store: Store) -> None:
    """Where a store let two create one object, whoever finds the other's words in it has lost."""
    lease = Lease.claim(store, "job", "a test", ttl_s=60)
    store.put(lease_key("job", 1), b'{"nonce": "another"}')
    states: list[LeaseState] = []
    lease.keep(states.append)
    wait_for(lambda: states == [LeaseState.LOST])
    lease.release()
    assert store.get(lease_key("job", 1)) == b'{"nonce": "another"}'


def test_two_that_created_one_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store that lets two create one object, one claim stands after both have settled, whoever was
    interrupted where."""
    monkeypatch.setattr(leases, "SETTLE_S", 0.2)

    class Careless(WatchedStore):
        """Looks, and writes a moment later, as stores do that never heard of conditional writes."""

        creates_atomically = False

        def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
            """Look before; look after."""
            if if_absent:
                try:
                    self.get(key)
                except NotFound:
                    pass
                else:
                    raise leases.ObjectExists("there")
            with self._around(f"put {key}"):
                self._inner.put(key, data)

    for first_steps in range(2, 6):
        for second_steps in range(2, 6):
            inner = open_store(f"file://{tmp_path}/store-{first_steps}-{second_steps}")

            def claim(around: Any, inner: Store = inner) -> Lease:
                return Lease.claim(Careless(inner, around), "job", "a test", ttl_s=60, wait_s=0)

            actors = [Actor(claim), Actor(claim)]
            for actor, steps in zip(actors, (first_steps, second_steps), strict=True):
                actor.start()
                actor.advance(steps)
            for actor in actors:
                assert actor.finish()
            won = [actor for actor in actors if actor.result is not None]
            assert len(won) <= 1, (first_steps, second_steps)
            assert all(isinstance(actor.error, NameClaimed) for actor in actors if actor not in won)


def test_one_connection_that_hangs_costs_nothing(
    s3: Callable[[str], S3Server], prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A renewal that gets no answer is overtaken by the next."""
    server = s3("moto")
    released = threading.Event()
    with FaultyProxy(server) as proxy:
        store = open_store(server.url(prefix), endpoint_url=proxy.endpoint_url)
        lease = Lease.claim(store, "job", "a test", ttl_s=6)
        proxy.inject(hold_until(released), method="PUT")
        before, states = lease.good_until, list[LeaseState]()
        lease.keep(states.append)
        wait_for(lambda: lease.good_until > before + 2)
        assert states == []
        released.set()
        lease.release()
        store.close()


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leg", ["moto", "swift"])
def test_a_claim_whose_answer_was_lost_is_ours(
    s3: Callable[[str], S3Server], prefix: str, monkeypatch: pytest.MonkeyPatch, leg: str
) -> None:
    """When the answer to a creation is lost, the object with our words in it makes the name ours."""
    monkeypatch.setattr(retrying, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(leases, "SETTLE_S", 3.0)
    server = s3(leg)
    with FaultyProxy(server) as proxy:
        store = open_store(server.url(prefix), endpoint_url=proxy.endpoint_url, patience_s=20)
        proxy.inject(lose_answer, method="PUT")
        assert Lease.claim(store, "first", "a test", ttl_s=60).number == 1
        assert proxy.count("PUT") == 1, "the quick client's, which is then looked at"
        store.warm()
        proxy.inject(lose_answer, method="PUT")
        lease = Lease.claim(store, "job", "a test", ttl_s=60)
        assert (lease.number, proxy.count("PUT")) == (1, 3)
        proxy.inject(lose_answer, method="PUT")
        lease._renew()
        assert lease.state == LeaseState.HELD
        impatient = open_store(server.url(prefix), endpoint_url=proxy.endpoint_url, patience_s=0)
        impatient.warm()
        proxy.inject(lose_answer, method="PUT")
        assert Lease.claim(impatient, "other", "a test", ttl_s=60).number == 1
        proxy.inject(answer(503, "SlowDown"), method="PUT")
        with pytest.raises(StoreError):
            Lease.claim(impatient, "third", "a test", ttl_s=60)
        assert newest_claim(store, "third") is None
        store.close()
        impatient.close()


def test_a_listing_that_lags_behind(tmp_path: Path) -> None:
    """What a listing does not show yet is found all the same."""
    store = open_store(f"file://{tmp_path}/store")
    for _ in range(3):
        Lease.claim(store, "job", "a test", ttl_s=60).release()

    class Lagging(WatchedStore):
        """Lists only the first lease."""

        def list(self, prefix: str = "") -> Iterator[Any]:
            """The first of all that there are."""
            return iter(list(self._inner.list(prefix))[:1])

    lagging = Lagging(store, lambda _: nullcontext())
    assert Lease.claim(lagging, "job", "a test", ttl_s=60).number == 4


# --- housekeeping -----------------------------------------------------------------------------------------


def test_old_leases_go_and_the_number_stays(tmp_path: Path) -> None:
    """Leases superseded for an hour are removed by the next holder; a later claim counts on, also when all
    that is left is one that was released."""
    store = open_store(f"file://{tmp_path}/store")
    for _ in range(4):
        Lease.claim(store, "job", "a test", ttl_s=60).release()
    for number in (1, 2, 3):
        hours_ago = time.time() - 3600 * (6 - number)
        os.utime(tmp_path / "store" / lease_key("job", number), (hours_ago, hours_ago))
    lease = Lease.claim(store, "job", "a test", ttl_s=60)
    lease.keep(lambda _: None)
    wait_for(lambda: numbers(store) == [4, 5])
    lease.release()
    assert Lease.claim(store, "job", "a test", ttl_s=60).number == 6


def test_a_holder_whose_object_was_removed_has_lost(tmp_path: Path) -> None:
    """Who slept so long, clocks and all, that its lease and the next were removed, does not bring it back."""
    store = open_store(f"file://{tmp_path}/store")
    lease = Lease.claim(store, "job", "a test", ttl_s=60)
    store.delete(lease_key("job", 1))
    store.put(lease_key("job", 3), b"{}")
    lease._renew()
    assert lease.state == LeaseState.LOST
    assert numbers(store) == [3]


@two_stores
def test_gc_leaves_leases_alone(store: Store) -> None:
    """A collection removes no lease, held or released."""
    Lease.claim(store, "one", "a test", ttl_s=60).release()
    Lease.claim(store, "two", "a test", ttl_s=60)
    collect_garbage(store, grace_s=0)
    assert numbers(store) == [1, 1]


@two_stores
def test_breaking_a_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken lease is lost to its holder, and free for the next; not one whose holder is seen to live."""
    with pytest.raises(NotFound, match="nobody has claimed"):
        break_lease(store, "job", "a test")
    Lease.claim(store, "job", "a test", ttl_s=60)
    with pytest.raises(NameClaimed):
        break_lease(store, "job", "a test")
    as_elsewhere(monkeypatch)
    lease = Lease.claim(store, "other", "a test", ttl_s=60)
    assert break_lease(store, "other", "a test").number == 1
    assert claimed_by(store, "other") is None
    states: list[LeaseState] = []
    lease.keep(states.append)
    wait_for(lambda: states == [LeaseState.LOST])
    assert Lease.claim(store, "other", "a test", ttl_s=60, wait_s=0).number == 3


@two_stores
def test_who_has_what(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """All claims that stand are listed by name, with the time of the last renewal by the store's clock."""
    Lease.claim(store, "released", "a test", ttl_s=60).release()
    Lease.claim(store, "held", "a test", ttl_s=60)
    store.put(f"{LEASES}held/not-a-number", b"")
    (claim,) = all_claims(store)
    assert (claim.name, claim.number) == ("held", 1)
    assert abs(claim.renewed - time.time()) < 60
    described = claim.as_json()
    assert (described["holder"], described["host"]) == ("a test", os.uname().nodename)
    assert (described["pid"], described["seen"]) == (os.getpid(), "alive")
    assert read_claim(store, "held", 2) is None
    assert ProcessId(os.getpid(), claim.facts["start_time"]).alive()


# --- whom one can see --------------------------------------------------------------------------------------

LOOK = """
import json, os, subprocess, sys
from crcli.image.owner import sight_of
subprocess.run(["mount", "-t", "proc", "-o", f"hidepid={sys.argv[1]}", "proc", "/proc"], check=True)
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
for owner in json.loads(sys.stdin.read()):
    print(sight_of(owner).value)
"""


@needs_namespaces
@pytest.mark.parametrize("hidepid", ["0", "1", "2"])
def test_a_process_that_is_hidden_is_not_taken_for_dead(hidepid: str) -> None:
    """/proc may show a user nobody else's processes (hidepid, ProtectProc=): who cannot see whether the
    holder of a name, or a dump in progress, has ended waits as if it were elsewhere."""
    ours = describe_owner()
    owners = [ours, ours | {"pid": ended()}, ours | {"start_time": 1}]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", LOOK, hidepid],
        input=json.dumps(owners),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=True,
    )
    is_seen = hidepid == "0"
    assert done.stdout.split() == [
        "alive" if is_seen else "unseen",
        "ended",
        "ended" if is_seen else "unseen",
    ]


def ended() -> int:
    """The pid of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid
