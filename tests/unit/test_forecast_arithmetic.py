"""The arithmetic of a forecast: from a sample to all of memory, from rates to times."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from crcli.memory.extents import PAGE
from crcli.memory.sample import Counted, Makeup, Tally, distinct_share, make_up
from crcli.pipeline.forecast import Load, image_bytes, predict
from crcli.pipeline.rates import Rates
from crcli.records import astuple

MIB = 1 << 20
FILE = "file:///somewhere"


def load(mebibytes: int = 64, processes: int = 1, **more: object) -> Load:
    """A tree whose memory is all new and does not compress."""
    size = mebibytes * MIB
    memory = Makeup(total=size, new=size, stored=size)
    return Load(processes, 0, memory, image_bytes(processes, 0, memory, 0), **more)  # type: ignore[arg-type]


def sampled(population: list[int], part: float) -> float:
    """The share of distinct values that a sample of such a part makes believe."""
    drawn = random.Random(1).sample(population, round(len(population) * part))
    return distinct_share(Counter(drawn).values(), part)


# --- pages that come twice ---------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 2, 10, 1000])
@pytest.mark.parametrize("part", [1.0, 0.3, 0.05])
def test_twins_are_counted_once(copies: int, part: float) -> None:
    """However often each page comes, a part of them shows how many different ones there are."""
    population = [number // copies for number in range(60_000)]
    assert sampled(population, part) == pytest.approx(1 / copies, rel=0.3)


def test_one_page_that_fills_half_of_memory_says_nothing_of_the_other_half() -> None:
    """Half of the pages are equal, the others are not."""
    population = [0] * 30_000 + list(range(1, 30_001))
    assert sampled(population, 0.05) == pytest.approx(0.5, rel=0.1)


def test_nothing_seen_has_no_twins() -> None:
    """An empty sample does not divide by zero."""
    assert distinct_share([], 0.5) == 1.0


def test_a_page_that_processes_share_counts_once_for_all_of_them() -> None:
    """Ten processes that have a page in common since a fork store it once."""
    kind = Counted()
    for number in range(20):
        kind.add(bytes([number]), 1, 0.1)
    assert kind.sent == 20 and kind.distinct(0.5) == pytest.approx(2)


# --- from a sample to memory -------------------------------------------------------------------------------


def test_shares_of_a_sample_are_shares_of_memory() -> None:
    """A quarter zero, a quarter known, half new, of which half remains when compressed."""
    tally = Tally(zero=25)
    tally.known.alone, tally.new.alone = 25, 50
    tally.known.seen.update({bytes([n]): 1 for n in range(25)})
    tally.new.seen.update({bytes([n]): 1 for n in range(50)})
    made = make_up(tally, 1000, 0.1, (0.5, 1.0))
    expected = Makeup(1000, zero=250, reused=250, new=500, stored=250, referred=250)
    assert made == Makeup(*(value * PAGE for value in astuple(expected)))


def test_what_could_not_be_read_is_taken_for_new() -> None:
    """A forecast errs on the side of more."""
    assert make_up(Tally(), 10, 0.0, (0.1, 0.1)) == Makeup(10 * PAGE, new=10 * PAGE, stored=10 * PAGE)


def test_an_image_of_nothing_new_costs_its_tables_only() -> None:
    """A second dump of 1 GiB is forecast with some hundred KiB, whose processes ran since with more."""
    idle = Makeup(total=1 << 30, reused=1 << 30, referred=1 << 30)
    ran = Makeup(total=1 << 30, reused=1 << 30, referred=1 << 30, new=50 * PAGE)
    assert 100 << 10 < image_bytes(50, 0, idle, 0) < 300 << 10
    assert image_bytes(50, 0, ran, 0) > image_bytes(50, 0, idle, 0) + (100 << 10)


# --- from rates to times -----------------------------------------------------------------------------------


def test_more_to_do_takes_longer() -> None:
    """More memory, more processes, more threads and more files make the freeze and the whole longer."""
    least = predict(load(), Rates(), FILE, room=1 << 40)
    threads = Load(1, 100, load().memory, load().stored_bytes)
    for more in (load(256), load(processes=20), threads, load(file_bytes=64 * MIB)):
        found = predict(more, Rates(), FILE, room=1 << 40)
        assert found.frozen_ms > least.frozen_ms and found.total_ms > least.total_ms


def test_without_a_trial_a_dump_is_shorter() -> None:
    """By what the trial takes; the freeze is not."""
    with_trial, without = (predict(load(trial=on), Rates(), FILE, room=1 << 40) for on in (True, False))
    trial = Rates().step("trial").takes({"once": 1, "processes": 1})
    assert with_trial.frozen_ms == without.frozen_ms
    assert with_trial.total_ms - without.total_ms == pytest.approx(trial, abs=0.2)


def test_a_tree_that_lives_on_is_not_waited_for() -> None:
    """Only a tree that is killed is reaped; it stands frozen as long for its state to leave it."""
    killed, running = (predict(load(reaped=on), Rates(), FILE, room=1 << 40) for on in (True, False))
    assert killed.total_ms > running.total_ms and killed.frozen_ms == running.frozen_ms


def test_memory_that_finds_no_room_waits_for_the_store_while_frozen() -> None:
    """The freeze of a tree that runs on grows by the store's part, the whole stays what it was."""
    running = load(1024, stays=False)
    roomy = predict(running, Rates(), "s3://b", room=1 << 40)
    tight = predict(running, Rates(), "s3://b", room=512 * MIB)
    ship = Rates().step("ship", "s3://b").takes(running.amounts())
    assert tight.frozen_ms - roomy.frozen_ms == pytest.approx(ship / 2, rel=0.01)
    assert tight.total_ms == pytest.approx(roomy.total_ms, abs=0.2)


def test_a_tree_that_stands_still_needs_no_room() -> None:
    """It is read where it is, which takes CRIU less than being copied."""
    still = predict(load(1024), Rates(), "s3://b", room=0)
    assert still == predict(load(1024), Rates(), "s3://b", room=1 << 40)
    assert still.frozen_ms < predict(load(1024, stays=False), Rates(), "s3://b", room=1 << 40).frozen_ms


def test_what_has_passed_already_is_no_forecast() -> None:
    """Right before the freeze the time that was spent counts instead of the rates of getting ready."""
    ready = predict(load(), Rates(), FILE, room=1 << 40, spent_ms=5000)
    later = predict(load(), Rates(), FILE, room=1 << 40, spent_ms=6000)
    assert later.total_ms - ready.total_ms == pytest.approx(1000, abs=0.2)
    assert later.frozen_ms == ready.frozen_ms and ready.total_ms > 5000


def test_a_tree_without_memory_has_a_forecast() -> None:
    """Nothing divides by its size."""
    nothing = predict(Load(1, 0, Makeup(), 10_000), Rates(), FILE, room=0)
    assert nothing.frozen_ms > 0 and nothing.stored_bytes == 10_000
