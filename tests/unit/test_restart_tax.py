"""The benchmark of the restart tax: its lots, its arithmetic, its agent, and jobs that begin anew."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.commands import BenchError
from tests.bench.restart_tax import (
    SAVED,
    Agent,
    Attempt,
    Bench,
    Job,
    Row,
    as_plot,
    as_table,
    expected_without,
    lots,
    summarise,
)

AGENT = Agent(steps=4, wait_s=0.02, mebibytes=1)
ROWS = [
    Row(0.1, 54.0, 1, 2, 1.06, 1.05, 1.01, 0.9, 30),
    Row(0.5, 54.6, 9, 8, 1.5, 1.62, 1.04, 0.8, 30),
]


def test_both_ways_draw_the_same_lots() -> None:
    """What a job without crcli suffers, the same job with it suffers as well; other jobs suffer otherwise."""
    first, again, other = ([*islice(lots(0.5, seed), 50)] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5])
def test_the_lots_have_the_rate_and_fall_anywhere(rate: float) -> None:
    """So many starts in a hundred are evicted, on the average in the middle of what is left."""
    drawn = list(islice(lots(rate, "many"), 20000))
    where = [one for one in drawn if one is not None]
    assert len(where) / len(drawn) == pytest.approx(rate, abs=0.02)
    assert sum(where) / len(where) == pytest.approx(0.5, abs=0.02)


def test_what_is_expected_is_what_the_lots_give() -> None:
    """A job that begins anew after each eviction, simulated."""
    costs = []
    for seed in range(4000):
        cost = 0.0
        for where in lots(0.5, seed):
            cost += 1.0 if where is None else where
            if where is None:
                break
        costs.append(cost)
    assert sum(costs) / len(costs) == pytest.approx(expected_without(0.5), rel=0.05) == 1.5


def test_a_job_that_is_evicted_begins_anew_and_comes_to_the_same_result(tmp_path: Path) -> None:
    """Two evictions, three attempts, one result; the cost is the time of all three."""
    bench = Bench(AGENT, tmp_path, "file:///none")
    bench.learn()
    bench.undisturbed_s = 0.1  # so that the evictions come before its end
    job = bench.run("job", iter([0.5, 0.9, None]), with_crcli=False)
    assert [attempt.evicted for attempt in job.attempts] == [True, True, False]
    assert job.evictions == 2 and job.result == bench.result
    assert job.wall_s == sum(attempt.wall_s for attempt in job.attempts)
    assert (tmp_path / "job" / "progress").read_text().count("\n") == AGENT.steps


def test_a_job_that_is_quicker_than_its_eviction_is_done(tmp_path: Path) -> None:
    """It was not evicted then."""
    bench = Bench(AGENT, tmp_path, "file:///none", undisturbed_s=1000.0)
    job = bench.run("job", iter([0.9]), with_crcli=False)
    assert (job.evictions, len(job.attempts)) == (0, 1)


def test_a_wrong_result_ends_the_benchmark(tmp_path: Path) -> None:
    """No figure is worth anything then."""
    bench = Bench(AGENT, tmp_path, "file:///none", undisturbed_s=1000.0, result="another")
    with pytest.raises(BenchError, match="another result"):
        bench.run("job", iter([None]), with_crcli=False)


def test_a_job_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    """With what it said."""
    bench = Bench(Agent(-1, -1.0, -1), tmp_path, "file:///none", undisturbed_s=1000.0)
    (tmp_path / "job").mkdir()
    with pytest.raises(FileExistsError):
        bench.run("job", iter([None]), with_crcli=False)
    bench = Bench(Agent(1, -1.0, 1), tmp_path, "file:///none", undisturbed_s=1000.0)
    with pytest.raises(BenchError, match="sleep length must be non-negative"):
        bench.run("other", iter([None]), with_crcli=False)


def test_how_much_is_left_is_read_from_the_progress(tmp_path: Path) -> None:
    """An eviction falls into what is still to be done."""
    assert AGENT.left(tmp_path) == 1
    (tmp_path / "progress").write_text("1 a\n2 b\n3 c\n")
    assert AGENT.left(tmp_path) == 0.25


def test_costs_are_in_units_of_the_jobs_that_ran_beside() -> None:
    """Means of machine time, over that of undisturbed jobs; what was saved is what ended with 75."""
    found = {
        "undisturbed": [Job([Attempt(10.0, False, 0)], "x"), Job([Attempt(30.0, False, 0)], "x")],
        "without": [Job([Attempt(5.0, True, -15), Attempt(20.0, False, 0)], "x")],
        "with": [
            Job([Attempt(5.0, True, SAVED, 0.7), Attempt(16.0, False, 0)], "x"),
            Job([Attempt(21.0, False, 0)], "y"),
        ],
    }
    row = summarise(0.5, found, "x")
    assert (row.undisturbed_s, row.without, row.with_crcli) == (20, 1.25, 1.05)
    assert (row.evictions_without, row.evictions_with, row.after_notice_s) == (1, 1, 0.7)
    assert row.same_results == 4


def test_the_table_and_the_plot_say_what_was_measured() -> None:
    """Every figure stands in the table; the plot is SVG with a curve for each way."""
    table = as_table(ROWS, 10)
    assert "| 50% | 1.62 (1.50) | 1.040 | 9, 8 | 0.80 s |" in table
    assert "60 of 60 results" in table and "(54 s)" in table
    svg = ElementTree.fromstring(as_plot(ROWS))
    curves = svg.findall("{http://www.w3.org/2000/svg}polyline")
    assert len(curves) == 3
    heights = [[float(point.split(",")[1]) for point in curve.attrib["points"].split()] for curve in curves]
    assert heights[0][1] < heights[0][0], "more evictions cost more, and more is higher up"
    assert heights[1][1] > heights[0][1], "with crcli it costs less"
