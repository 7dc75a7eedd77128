"""Jobs under `crcli run` whose machine is taken away, by each kind of notice."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.crcli import Crcli, wait_until
from tests.support.evictions import EVICTIONS, Eviction
from tests.support.jobs import job, result_of_steps, steps

STEPS, PAUSE_S = 100, 0.1


@pytest.fixture(params=EVICTIONS)
def eviction(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Eviction]:
    """A machine that can be taken away; its variables are set."""
    one = EVICTIONS[request.param](tmp_path)
    with one.there():
        for name, value in one.environ.items():
            monkeypatch.setenv(name, value)
        yield one


def test_a_job_survives_its_machine(crcli: Crcli, tmp_path: Path, eviction: Eviction) -> None:
    """Saved on notice, whoever gave it is told, and on another machine it ends as if nothing had happened."""
    arguments = ("--notice", eviction.spec, *steps(STEPS, PAUSE_S))
    with job(crcli, tmp_path / "1", *arguments) as first:
        first.lines(3)
        eviction.take_away(first.process.pid)
        first.end(75)
    assert first.report["end"] == "saved"
    eviction.check_answer()
    eviction.another()
    with job(crcli, tmp_path / "2", *arguments) as second:
        second.end(0)
    assert second.report["begun"] == "restored"
    assert first.out.count("\n") < STEPS
    assert first.out + second.out == result_of_steps(STEPS)


@pytest.mark.parametrize("eviction", ["aws"], indirect=True)
def test_a_risk_is_an_image_and_the_job_goes_on(crcli: Crcli, tmp_path: Path, eviction: Eviction) -> None:
    """After a rebalance recommendation the job is imaged, and ends by itself."""
    service: Any = eviction
    service.service.recommend("2026-11-26T02:00:00Z")
    with job(crcli, tmp_path / "1", "--notice", "aws", *steps(STEPS, PAUSE_S)) as one:
        one.end(0)
    assert one.out == result_of_steps(STEPS)
    assert one.report["end"] == "ended"
    images = [event["purpose"] for event in one.report["events"] if event["event"] == "image"]
    assert images == ["risk"]


def test_a_source_that_hears_nothing_is_said_while_the_job_runs(crcli: Crcli, tmp_path: Path) -> None:
    """A hook whose port somebody else has: who relies on it reads that at once, not only in the report."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        hook = f"http:127.0.0.1:{taken.getsockname()[1]}"
        with job(crcli, tmp_path / "1", "--notice", hook, "--", "sleep", "1000") as one:
            wait_until(
                lambda: one.has_begun and "crcli: the notice source http failed: " in one.err, "not said"
            )
            assert one.process.poll() is None
            one.tell()
            one.end(128 + signal.SIGTERM)
    assert [finding["name"] for finding in one.report["findings"]] == ["notice-failed"]
