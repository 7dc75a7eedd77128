"""The rates of this host: what they learn from dumps, and what becomes of their file."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from crcli.pipeline import rates
from crcli.pipeline.rates import BUILT_IN, Rates, Step, learn, load_rates

ROOT = Path(__file__).parents[2]
ONE_TAKE = {("take", ""): ({"once": 1.0, "processes": 1.0, "mib": 100.0}, 200.0)}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of rates that does not exist yet, and is the one that counts."""
    found = tmp_path / "cache" / "rates.json"
    monkeypatch.setenv("CRCLI_RATES", str(found))
    return found


def test_one_dump_is_enough_to_forecast_the_same_again() -> None:
    """After a first dump the same step is forecast as it went, whatever the built-in rates said."""
    step = Step({"once": 20.0, "mib": 0.3})
    amounts = {"once": 1.0, "mib": 100.0}
    assert step.after(amounts, 100.0, now=1.0).takes(amounts) == pytest.approx(100, rel=0.15)


def test_what_a_step_costs_is_told_from_what_a_mebibyte_costs() -> None:
    """Small and large dumps together teach both rates: a size never seen is forecast well."""
    lot = random.Random(1)
    step = Step({"once": 20.0, "mib": 0.3})
    for number in range(60):
        size = lot.choice((4.0, 64.0, 1024.0))
        step = step.after(
            {"once": 1.0, "mib": size}, (80 + 0.1 * size) * lot.uniform(0.8, 1.25), float(number)
        )
    for size in (1.0, 256.0, 4096.0):
        assert step.takes({"once": 1.0, "mib": size}) == pytest.approx(80 + 0.1 * size, rel=0.4)


def test_one_odd_dump_does_not_spoil_the_rates() -> None:
    """A dump that took a hundred times as long moves the forecast by less than half."""
    step, amounts = Step({"once": 100.0}), {"once": 1.0}
    for number in range(10):
        step = step.after(amounts, 100.0, float(number))
    odd = step.after(amounts, 10_000.0, 11.0)
    assert 100 < odd.takes(amounts) < 150
    for number in range(10):
        odd = odd.after(amounts, 100.0, 12.0 + number)
    assert odd.takes(amounts) == pytest.approx(100, rel=0.05)


@pytest.mark.parametrize("took", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_that_is_none_teaches_nothing(took: float) -> None:
    """Zero, negative and endless times leave the rates as they are."""
    step = Step({"once": 100.0})
    assert step.after({"once": 1.0}, took, 1.0) == step


def test_a_store_has_rates_of_its_own_and_a_new_one_those_of_its_kind() -> None:
    """What one S3 store teaches counts for it, for S3 stores never seen, and for no folder."""
    amounts = {"once": 1.0, "stored": 100.0}
    before = Rates()
    after = before.learned({("ship", "s3://slow/x"): (amounts, 8000.0)}, now=1.0)
    for store in ("s3://slow/x", "s3://never/seen"):
        assert after.step("ship", store).takes(amounts) > 2 * before.step("ship", store).takes(amounts)
    assert after.step("ship", "file:///x") == before.step("ship", "file:///x")
    fast = after.learned({("ship", "s3://fast/x"): (amounts, 300.0)}, now=2.0)
    assert fast.step("ship", "s3://slow/x") == after.step("ship", "s3://slow/x")


def test_every_step_has_built_in_rates() -> None:
    """Also for a kind of store that is not known here."""
    for name in ("take", "files", "trial", "look", "rest", "reap"):
        assert Rates().step(name).rates == BUILT_IN[name]
    for name in ("prepare", "ship"):
        assert all(Rates().step(name, store).rates for store in ("file:///x", "s3://x", "other://x"))


def test_the_file_stays_small() -> None:
    """Of many stores the newest are remembered."""
    known = Rates()
    for number in range(200):
        known = known.learned({("ship", f"s3://b/{number}"): ({"once": 1.0}, 100.0)}, now=float(number))
    assert len(known.steps) == rates.MOST_ENTRIES
    assert "ship s3://b/199" in known.steps and "ship s3://b/0" not in known.steps


def test_what_was_learned_is_there_for_the_next(path: Path) -> None:
    """The file comes into being with the first dump, and its rates are read back as they were written."""
    assert load_rates() == Rates()
    assert learn(ONE_TAKE)
    assert load_rates().step("take").seen == 1
    assert load_rates().step("take").rates != BUILT_IN["take"]
    assert [one.name for one in path.parent.iterdir()] == ["rates.json"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'{"version": 2, "steps": {}}',
        b'{"version": 1, "steps": []}',
        b"[" * 100_000,
        b'{"version": 1, "steps": {"take": null, "unknown": {}, "ship": {"rates": {}}, "": 3}}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(path: Path, text: bytes) -> None:
    """Whatever stands in it, the built-in rates count, and the next dump writes a whole file."""
    path.parent.mkdir()
    path.write_bytes(text)
    assert load_rates() == Rates()
    assert learn(ONE_TAKE)
    assert load_rates().step("take").seen == 1


@pytest.mark.parametrize("rate", ["x", None, 0, -1, 1e9, float("nan"), float("inf"), [], {}])
def test_a_rate_that_makes_no_sense_is_not_used(path: Path, rate: object) -> None:
    """One senseless number costs the step that it stands in, and no other."""
    learn(ONE_TAKE | {("look", ""): ({"once": 1.0, "processes": 1.0}, 50.0)})
    data = json.loads(path.read_text())
    data["steps"]["take"]["rates"]["mib"] = rate
    path.write_text(json.dumps(data))
    assert load_rates().step("take").rates == BUILT_IN["take"]
    assert load_rates().step("look").seen == 1


def test_nowhere_to_write_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path below a file, a folder or a device in its place, none at all: nothing is learned or replaced."""
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with os.fdopen(os.open(tmp_path / "fifo", os.O_RDWR)) as _:
        monkeypatch.setenv("CRCLI_RATES", f"{tmp_path}/fifo")
        assert not learn(ONE_TAKE)
    for path in (f"{tmp_path}/file/rates.json", f"{tmp_path}/folder", "off", ""):
        monkeypatch.setenv("CRCLI_RATES", path)
        assert not learn(ONE_TAKE)
        assert load_rates() == Rates()


def test_who_learns_at_the_same_time_loses_nothing(path: Path) -> None:
    """Eight processes learn ten times each, a reader finds a whole file each time, and all 80 are counted."""
    code = (
        f"from crcli.pipeline.rates import learn\nfor _ in range(10):\n  while not learn({ONE_TAKE!r}): pass"
    )
    command = [sys.executable, "-c", code]
    writers = [subprocess.Popen(command, cwd=ROOT) for _ in range(8)]
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            json.loads(path.read_text())
    assert [writer.wait() for writer in writers] == [0] * 8
    assert load_rates().step("take").seen == 80
