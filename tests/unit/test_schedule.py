"""When images are due, whether they are worth taking, and which may go."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcli.cli.keeping import parse_time
from crcli.errors import ImagePinned, NotFound, UsageError
from crcli.image.catalog import Entry
from crcli.image.names import ImageRef, manifest_key
from crcli.image.pins import pin, pinned_ids, unpin
from crcli.image.remove import remove
from crcli.image.retention import superfluous
from crcli.pipeline.schedule import (
    FIRST_S,
    LONGEST_S,
    SHORTEST_S,
    Cost,
    History,
    Schedule,
    activity_of,
    optimal_interval,
)
from crcli.process.identity import identify
from crcli.records import asdict
from crcli.store.open import open_store
from tests.support.programs import spawn_python, then_wait


def waste(work_s: float, cost_s: float, mtbf_s: float) -> float:
    """The time that a second of work takes: Daly's complete model, without the time of restarts."""
    return mtbf_s * (math.exp((work_s + cost_s) / mtbf_s) - 1) / work_s


@given(st.floats(0.01, 100), st.floats(600, 1e6))
def test_no_other_interval_is_much_better(cost_s: float, mtbf_s: float) -> None:
    """Half of it and twice of it cost more, and nothing near it costs 1 % less."""
    best = optimal_interval(cost_s, mtbf_s)
    assert waste(best, cost_s, mtbf_s) < min(waste(best / 2, cost_s, mtbf_s), waste(best * 2, cost_s, mtbf_s))
    near = min(waste(best * factor / 20, cost_s, mtbf_s) for factor in range(10, 40))
    assert waste(best, cost_s, mtbf_s) <= near * 1.01


def test_young_and_daly() -> None:
    """The published order of magnitude: the square root of twice cost times mean time, a little less."""
    assert optimal_interval(5, 86400) == pytest.approx(math.sqrt(2 * 5 * 86400), rel=0.01)
    assert optimal_interval(1000, 400) == 400  # an image that costs more than there is time
    assert optimal_interval(0, 86400) == 0


def test_auto_follows_what_images_cost() -> None:
    """The first comes soon; the dearer they are, and the rarer failures, the fewer there are."""
    schedule = Schedule(100.0, auto=True, rate_per_h=1.0)
    assert schedule.due == 100.0 + FIRST_S
    schedule.taken(130.0, Cost(frozen_ms=500, total_ms=3000))
    cheap = schedule.interval_s
    assert schedule.due == pytest.approx(130.0 + cheap) and 60 < cheap < 120
    schedule.taken(300.0, Cost(frozen_ms=5000, total_ms=30000))
    assert schedule.interval_s > 2 * cheap
    rare = Schedule(0.0, auto=True, rate_per_h=0.01)
    rare.taken(0.0, Cost(500, 3000))
    assert rare.interval_s > 5 * cheap


def test_auto_keeps_its_bounds() -> None:
    """Never so often that images follow on each other, never as rarely as never."""
    often = Schedule(0.0, auto=True, rate_per_h=1e6)
    often.taken(0.0, Cost(1, 2))
    assert often.interval_s == SHORTEST_S
    often.taken(0.0, Cost(1, 60_000))
    assert often.interval_s == 120.0
    for rate in (0.0, 1e-9):
        never = Schedule(0.0, auto=True, rate_per_h=rate)
        never.taken(0.0, Cost(500, 3000))
        assert never.interval_s == LONGEST_S


def test_a_risk_brings_images_closer() -> None:
    """A node that is said to be at risk has the next image sooner, counted from the last."""
    schedule = Schedule(0.0, auto=True, rate_per_h=0.001)
    schedule.taken(10.0, Cost(500, 3000))
    before = schedule.due
    schedule.at_risk()
    assert 10.0 < schedule.due < before


def test_a_fixed_interval_counts_from_beginnings() -> None:
    """`--every 10m` is ten minutes from begin to begin, also after one that was not worth taking."""
    schedule = Schedule(0.0, every_s=600.0)
    assert schedule.due == 600.0
    schedule.taken(601.0, Cost(500, 3000))
    assert schedule.due == 1201.0
    schedule.skipped(1201.5)
    assert schedule.due == 1801.5
    assert Schedule(0.0).due is None


def test_after_failures_it_tries_again_less_and_less_soon() -> None:
    """But never later than the next image would have been due."""
    schedule = Schedule(0.0, every_s=100.0)
    pauses = []
    for _ in range(6):
        schedule.failed(1000.0)
        pauses.append(schedule.due - 1000.0)
    assert pauses == sorted(pauses) and pauses[0] == 15.0 and pauses[-1] == 100.0
    for _ in range(1100):  # a store that is away for a day
        schedule.failed(1000.0)
    assert schedule.due == 1100.0
    schedule.taken(1000.0, Cost(1, 1))
    schedule.failed(1000.0)
    assert schedule.due == 1015.0


def test_a_rate_that_was_observed() -> None:
    """A short time changes little of the usual one failure a day; a long one counts for what it says."""
    assert History().rate_per_h == pytest.approx(1 / 24)
    assert History(0, 1000 * 3600.0).rate_per_h < 1 / 500
    assert History(100, 100 * 3600.0).rate_per_h == pytest.approx(0.8, rel=0.1)


def test_what_happened_to_a_job_stands_in_its_images() -> None:
    """Brought back from a periodic image it was lost; from one of a notice or by hand it was not."""
    ran = asdict(History(2, 50.0).and_ran(10.0))
    assert History.noted(ran) == History(2, 60.0)
    assert History.after({**ran, "purpose": "periodic"}) == History(3, 60.0)
    assert History.after({**ran, "purpose": "leave"}) == History(2, 60.0)
    assert History.after({"identity": "x"}) == History.after(None) == History.noted({}) == History()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2 d", 172800), ("9" * 400, 1e9)],
)
def test_times(text: str, seconds: float) -> None:
    """Times are read as people write them."""
    assert parse_time(text, "--every") == seconds


@pytest.mark.parametrize("text", ["", "0", "-5s", "10 min", "soon", "1e3", "5w"])
def test_what_is_no_time_is_refused(text: str) -> None:
    """With the option's name."""
    with pytest.raises(UsageError, match="--every"):
        parse_time(text, "--every")


# --- what a tree has done ----------------------------------------------------------------------------------


def changes(code: str, within_s: float = 0.5) -> bool:
    """Whether a program that does this, over and over, once it was ready, comes to be worth another image."""
    with spawn_python(then_wait("").replace("time.sleep(60)", code)) as program:
        root = identify(program.pid)
        time.sleep(0.2)
        before = activity_of(root)
        end = time.monotonic() + within_s
        while not (found := activity_of(root).matters_since(before)) and time.monotonic() < end:
            time.sleep(0.1)
        return found


def test_who_sleeps_has_done_nothing() -> None:
    """Also one that wakes up now and then."""
    assert not changes("time.sleep(60)")
    assert not changes("time.sleep(0.1)")


@pytest.mark.parametrize(
    "code",
    [
        "sum(range(10_000_000))",
        "time.sleep(0.1); open('/dev/null', 'w').write('x')",
        "time.sleep(0.4); import os; os.fork() or time.sleep(60)",
    ],
)
def test_work_writes_and_children_matter(code: str) -> None:
    """Processor time, bytes written (however few), a process that was not there."""
    assert changes(code, 60.0)


def test_a_tree_that_is_gone_has_done_nothing() -> None:
    """To look at it is no failure."""
    with spawn_python(then_wait()) as program:
        root = identify(program.pid)
    assert activity_of(root).members == frozenset()


# --- which images may go -----------------------------------------------------------------------------------


def entry(number: int, **job: object) -> Entry:
    """An image, the newer the greater its number."""
    return Entry(ImageRef("job", f"2026010{number}T000000000-000000"), 0.0, {"job": job} if job else {})


def test_only_older_images_of_the_same_job_may_go() -> None:
    """Those of other jobs, of dumps by hand, damaged and pinned ones stay, and do not count."""
    ours = [entry(number, identity="a") for number in (1, 3, 5, 7)]
    others = [entry(2, identity="b"), entry(4), entry(6, watched="a"), entry(8, other=1)]
    images = sorted([*ours, *others], key=lambda one: one.ref.id)
    job = {"identity": "a", "lease": 9}
    assert superfluous(images, job, 2, set()) == ours[:2]
    assert superfluous(images, job, 2, {ours[0].ref.id}) == ours[1:2]
    assert superfluous(images, job, 4, set()) == []
    assert superfluous(images, {"watched": "a"}, 0, set()) == [others[2]]
    assert superfluous(images, {}, 0, set()) == []


def test_pinned_images_stay(tmp_path: Path) -> None:
    """A pinned image cannot be removed until it is unpinned; what is not there cannot be pinned."""
    store = open_store(f"file://{tmp_path}/store")
    ref = entry(1).ref
    with pytest.raises(NotFound):
        pin(store, ref)
    assert pinned_ids(store, "job") == set()
    store.put(manifest_key(ref.name, ref.id), b"manifest")
    assert pin(store, ImageRef("job")) == pin(store, ref) == ref
    assert pinned_ids(store, "job") == {ref.id}
    with pytest.raises(ImagePinned):
        remove(store, ImageRef("job"))
    unpin(store, ref)
    unpin(store, ref)
    assert remove(store, ref) == ref
    assert os.listdir(tmp_path / "store")
