"""Several trees: which lists of pids make sense, what is summed up, and the one exit code."""

from __future__ import annotations

import os

import pytest

from crcli.errors import EXIT_CODES, WORST_FIRST, DumpFailed, StoreError, TreeState, UsageError, worst
from crcli.findings import Finding, Severity
from crcli.pipeline.many import refuse_overlap
from crcli.pipeline.stages import DumpReport, DumpsReport, TreeResult
from crcli.ui.dumps import show


def done(pid: int, frozen_ms: float, stored: int) -> TreeResult:
    """A tree that was dumped."""
    report = DumpReport(f"a@{pid}", "a", str(pid), "file:///store", pid, 2, stored_bytes=stored)
    report.frozen_ms = frozen_ms
    return TreeResult(pid, report=report)


def test_the_worst_code_is_the_code_of_all() -> None:
    """0 only where all are done; a tree that is lost outdoes whatever befell others."""
    assert worst([0, 0]) == 0
    assert worst([0, 10, 0]) == 10
    assert worst([11, 30, 10, 0]) == 30
    assert worst([40, 12, 30]) == 12


def test_every_code_of_a_dump_has_its_place() -> None:
    """All codes but those that only a restore ends with are in the order, each once."""
    assert sorted(WORST_FIRST) == sorted(set(EXIT_CODES) - {0, 20, 21, 22, 23, 24, 75})


def test_sums_are_of_what_was_done() -> None:
    """Failures count among the trees, and nowhere else."""
    failed = TreeResult(3, error=DumpFailed("no", state=TreeState.RUNNING))
    report = DumpsReport((done(1, 30.0, 100), failed, done(2, 50.0, 200)), 1000.0)
    sums = report.sums()
    assert (sums["trees"], sums["done"], sums["processes"], sums["stored_bytes"]) == (3, 2, 4, 300)
    assert sums["frozen_ms_most"] == 50.0
    assert report.exit_code == 11
    assert DumpsReport((failed, TreeResult(4, error=StoreError("gone"))), 1.0).exit_code == 30


def test_trees_left_stopped_come_with_the_way_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Each says how it goes on, as a tree that is dumped alone does."""
    one = done(7, 1.0, 1)
    assert one.report is not None
    one.report.outcome = "stopped"
    one.report.findings = [
        Finding("left-stopped", Severity.NOTE, "left stopped", remedy="`kill -CONT 7 8` continues them")
    ]
    show(DumpsReport((one,), 1.0), as_json=False)
    assert "left stopped" in (said := capsys.readouterr().out) and "`kill -CONT 7 8`" in said


def test_nothing_done_is_summed_up_too() -> None:
    """A call in which every tree failed has sums of zero."""
    assert DumpsReport((TreeResult(3, error=StoreError("gone")),), 1.0).sums()["frozen_ms_median"] == 0.0


def test_a_process_and_its_ancestor_exclude_each_other() -> None:
    """In either order; and so does a pid with itself. A pid that is gone is no reason to refuse the list."""
    ours, parent = os.getpid(), os.getppid()
    for pids in ([ours, parent], [parent, ours]):
        with pytest.raises(UsageError, match=f"process {ours} belongs to the tree of {parent}"):
            refuse_overlap(pids)
    with pytest.raises(UsageError, match="twice"):
        refuse_overlap([7, ours, 7])
    refuse_overlap([ours, 2**22 - 1])
