"""Findings are uniform: scripts match on their names, people read their words."""

from __future__ import annotations

import json
import os
import re

import pytest

from crcli.findings import Severity
from crcli.process import preflight as preflight_module
from crcli.process.gather import gather
from crcli.process.identity import identify
from crcli.process.preflight import CHECKS, preflight
from crcli.process.tree import scan_tree
from crcli.process.wording import Check, and_more, blocker, change, count, note


def test_every_family_is_registered_once_and_explained() -> None:
    """No check stands twice in the tuple, and each says in a sentence what it is about."""
    assert len(set(CHECKS)) == len(CHECKS)
    assert all((check.__doc__ or "").strip().endswith(".") for check in CHECKS)


def test_findings_are_plain_json_and_the_gravest_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever order the checks have, a reader sees blockers, then changes, then notes."""
    made = [note("n", "m", {}), blocker("b", "m", {}, "r"), change("c", "m", {})]
    checks: tuple[Check, ...] = (lambda evidence: iter(made),)
    monkeypatch.setattr(preflight_module, "CHECKS", checks)
    evidence = gather(scan_tree(identify(os.getpid())))
    found = preflight(evidence)
    assert [one.severity for one in found] == [Severity.BLOCKER, Severity.CHANGE, Severity.NOTE]


def test_this_very_process_can_be_described() -> None:
    """Evidence of the running test, with whatever it has open, becomes findings that JSON can hold."""
    found = preflight(gather(scan_tree(identify(os.getpid()))))
    for finding in found:
        json.dumps(finding.as_json())
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", finding.name)


@pytest.mark.parametrize(("number", "words"), [(1, ""), (2, " (and 1 more)"), (9, " (and 8 more)")])
def test_more_than_one_is_counted(number: int, words: str) -> None:
    """A sentence names the first, and how many more."""
    assert and_more([None] * number) == words


def test_nouns_follow_their_number() -> None:
    """One file, two files."""
    assert (count([1], "file"), count([1, 2], "file")) == ("1 file", "2 files")
