"""What the benchmark makes of its figures: medians, ratios, verdicts, and rounds that failed."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest

from tests.bench import __main__ as bench
from tests.bench import memory, readme, table, targets
from tests.bench.commands import BenchError
from tests.bench.table import Ratio

MIDDLE = {
    "limits": {"copy_ms": 200.0, "copy_fresh_ms": 400.0, "upload_s": 10.0, "memory_mib": 1024.0},
    "criu": {"frozen_ms": 500.0, "dump_s": 2.0},
    "crcli s3": {"frozen_ms": 250.0, "dump_s": 12.0, "second_s": 3.0, "warm_first_s": 0.8},
}


def test_medians_are_taken_over_the_rounds_that_have_the_figure() -> None:
    """A figure that one round lacks is the median of the others', and a way without rounds has none."""
    rounds = {"criu": [{"dump_s": 3.0}, {"dump_s": 1.0, "frozen_ms": 7.0}, {"dump_s": 9.0}], "runc": []}
    assert table.medians(rounds) == {"criu": {"dump_s": 3.0, "frozen_ms": 7.0}}


@pytest.mark.parametrize(
    ("ratio", "values"),
    [
        (Ratio("", "frozen_ms", "limits", "copy_ms"), {"criu": 2.5, "crcli s3": 1.25}),
        (Ratio("", "dump_s", "limits", "upload_s", ("script", "crcli s3")), {"crcli s3": 1.2}),
        (Ratio("", "second_s", "", "dump_s"), {"crcli s3": 0.25}),
        (Ratio("", "warm_first_s", "limits", "copy_fresh_ms", unit=0.001), {"crcli s3": 2.0}),
        (Ratio("", "frozen_ms", "script", "frozen_ms"), {}),
    ],
    ids=["limit", "some-ways", "own-figure", "other-unit", "not-taken"],
)
def test_a_ratio_is_told_for_each_way_that_has_both_figures(ratio: Ratio, values: dict[str, float]) -> None:
    """A figure over a limit, over another way's or over its own, in one unit, for the ways that are meant."""
    assert ratio.values(MIDDLE) == pytest.approx(values)


def test_every_ratio_has_a_name_of_its_own_that_says_what_over_what() -> None:
    """The indented rows of the table carry in JSON what they belong to."""
    every = {
        way: dict.fromkeys([*table.ROWS, *table.LIMITS], 1.0)
        for way in ("limits", "criu", "runc", "script", "crcli file", "crcli s3")
    }
    names = [found["ratio"] for found in table.ratios(every)]
    assert len(set(names)) == len(names) == len(table.RATIOS)
    assert {"frozen, killed / raw criu", "second dump, stored / memory", "lazy restore, whole / eager"} <= {
        *names
    }
    assert all(" / " in name and not name.startswith(" ") for name in names)


def test_every_figure_of_a_ratio_is_one_of_the_table() -> None:
    """No ratio waits for a figure that no way takes."""
    known = {*table.ROWS, *table.LIMITS}
    assert {name for ratio in table.RATIOS for name in (ratio.figure, ratio.by)} <= known


def test_a_target_is_judged_for_its_kind_and_size_only_where_all_figures_were_taken() -> None:
    """Met, missed, and not judged at all."""
    found = {one["target"]: one for one in targets.judged("random", 1024, MIDDLE)}
    assert found["crcli s3: frozen, killed / one copy"]["met"]
    assert found["crcli s3: frozen, killed / raw criu"] == {
        "target": "crcli s3: frozen, killed / raw criu",
        "value": 0.5,
        "most": 0.6,
        "met": True,
    }
    assert found["crcli s3: durable / boto3's upload"]["met"]
    assert not found["crcli s3: second dump / first"]["met"]
    assert "crcli s3: durable / the script" not in found
    assert not list(targets.judged("half-zero", 64, MIDDLE))


def test_the_table_shows_every_way_and_leaves_out_rows_that_nobody_has() -> None:
    """A figure that a way lacks is a dash; the limits stand below."""
    lines = table.as_text("title", MIDDLE).splitlines()
    frozen = next(line for line in lines if line.startswith("frozen, killed (ms"))
    second = next(line for line in lines if line.startswith("second dump, 1 %"))
    assert frozen.split()[-2:] == ["500", "250"]
    assert second.split()[-2:] == ["-", "3"]
    assert not any(line.startswith("frozen, left running (ms") for line in lines)
    assert any(line.startswith("one copy") and line.endswith("200") for line in lines)


def test_a_round_that_fails_is_kept_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rounds are taken all the same, and the failure stands in the text and in the JSON."""

    def take(way: str, *_: object) -> dict[str, float]:
        calls.append(way)
        if way == "criu" and calls.count("criu") == 2:
            raise BenchError("the memory of 7 is not what it was")
        return {"dump_s": 1.0}

    calls: list[str] = []
    monkeypatch.setattr(bench, "_take", take)
    monkeypatch.setattr(bench, "start_moto", nullcontext)
    taken = bench.Taken("random", 16)
    bench._measure(taken, 3, ["criu", "script"], None)
    assert calls == ["criu", "script", "script", "criu", "criu", "script"], "the order turns"
    assert [len(rounds) for rounds in taken.rounds.values()] == [2, 3]
    assert taken.json["failures"] == ["criu, round 2: the memory of 7 is not what it was"]
    assert "FAILED  random 16 MiB: criu, round 2: the memory of 7 is not what it was" in taken.text


def test_the_table_of_readme_has_the_figures_and_a_dash_where_there_is_none() -> None:
    """It is made of the medians of random bytes, with the limits below."""
    limits = dict.fromkeys(table.LIMITS, 1.0)
    middle = {**MIDDLE, "limits": limits}
    made = list(readme.lines([{"kind": "random", "mebibytes": 1024, "medians": middle}]))
    assert "| 1024 MiB: frozen, to be killed (ms) | 500 | – | – | – | 250 |" in made
    assert not any("64 MiB:" in line for line in made), "a size that was not taken has no rows"
    assert made[-1].startswith("Limits of 1024 MiB: 1 ms for one copy")
    assert readme.ROWS.keys() <= table.ROWS.keys()
    assert readme.LIMITS.keys() <= table.LIMITS.keys()


def test_only_pages_that_are_here_and_in_no_file_are_copied() -> None:
    """Runs of pages are found in the kernel's words about a mapping."""
    here, of_file = 1 << 63, 1 << 61
    entries = np.array([here, here, 0, here | of_file, here], dtype=np.uint64)
    assert list(memory.runs(0x10000, entries)) == [(0x10000, 2 * 4096), (0x14000, 4096)]
