"""How many processors crcli may use, whoever limits them."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from crcli.pipeline import restore
from crcli.process import processors
from crcli.process.processors import usable_processors


@pytest.mark.parametrize(
    ("files", "usable"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "1600000 400000"}, 4),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "9900000 100000"}, 64),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, 64),
        ({"cpu.cfs_quota_us": "250000", "cpu.cfs_period_us": "50000"}, 5),
    ],
)
def test_quotas_and_affinity_bound_them(
    files: dict[str, str], usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tightest counts, of both kinds of cgroups, and there is always one."""
    inner = tmp_path / "inner"
    inner.mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(processors, "own_cgroup_folders", lambda _: [str(inner), str(tmp_path)])
    assert usable_processors() == usable


@pytest.mark.parametrize(
    ("is_near", "usable", "threads"),
    [(True, 1, 2), (True, 12, 6), (True, 64, 16), (False, 2, 8), (False, 64, 8)],
)
def test_threads_of_a_restore(
    is_near: bool, usable: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory from nearby is fetched by as many as there are processors for, from far away always by eight."""
    monkeypatch.setattr(restore, "usable_processors", lambda: usable)
    working = SimpleNamespace(_is_near=lambda _: is_near)
    assert restore._Restore._threads(working, []) == threads  # type: ignore[arg-type]
