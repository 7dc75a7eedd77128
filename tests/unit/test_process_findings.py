"""Findings are uniform: scripts match on their names, people read their words."""

from __future__ import annotations

import json
import os
import re

import pytest

from crcli.findings import Severity, change, note
from crcli.process import preflight as preflight_module
from crcli.process.capabilities import capability_names
from crcli.process.gather import gather
from crcli.process.identity import identify
from crcli.process.notes import is_confined
from crcli.process.preflight import CHECKS, preflight
from crcli.process.settings import parse_cpus
from crcli.process.tree import scan_tree
from crcli.process.wording import Check, and_more, blocker, count


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


@pytest.mark.parametrize(
    ("label", "confined"),
    [
        ("", False),
        ("unconfined", False),
        ("unconfined_u:unconfined_r:unconfined_t:s0-s0:c0.c1023", False),
        ("docker-default (enforce)", True),
        ("system_u:system_r:container_t:s0:c1,c2", True),
    ],
)
def test_only_a_label_that_confines_is_told(label: str, confined: bool) -> None:
    """AppArmor and SELinux label everything; only what restricts a program is worth a word."""
    assert is_confined(label) == confined


def test_capabilities_are_called_by_their_names() -> None:
    """Those that came after this list are called by number."""
    assert capability_names(1 | 1 << 24 | 1 << 40 | 1 << 63) == [
        "CAP_CHOWN",
        "CAP_SYS_RESOURCE",
        "CAP_CHECKPOINT_RESTORE",
        "CAP_63",
    ]


def test_processors_are_read_from_their_list() -> None:
    """The kernel writes spans and single ones."""
    assert parse_cpus("0-2,5") == {0, 1, 2, 5}
