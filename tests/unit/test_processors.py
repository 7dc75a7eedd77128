"""How many processors crcli may use, whoever limits them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crcli.memory import lookahead
from crcli.pipeline import dump, refill
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
    [(True, 1, 2), (True, 12, 12), (True, 64, 16), (False, 2, 8), (False, 64, 8)],
)
def test_threads_of_a_restore(
    is_near: bool, usable: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory from nearby is fetched by as many as there are processors for, from far away always by eight."""
    monkeypatch.setattr(refill, "usable_processors", lambda: usable)
    working = SimpleNamespace(_is_near=lambda _: is_near)
    assert refill.Refill.threads(working, []) == threads  # type: ignore[arg-type]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Start what looks ahead for a tree of so many MiB, where so many processors are usable."""

    def start(held: ExitStack, usable: int, mib: int, at_once: int = 1, *, stays: bool = False) -> Any:
        monkeypatch.setattr(dump, "usable_processors", lambda: usable)
        dumping = SimpleNamespace(
            target=SimpleNamespace(evidence=SimpleNamespace(may_use_gpus=False, expected_bytes=mib << 20)),
            shared=SimpleNamespace(at_once=at_once),
            options=SimpleNamespace(pre_copy=None),
            overflow=SimpleNamespace(fd=0, limit=mib << 20),
            weights=SimpleNamespace(matcher=None),
            stays=stays,
        )
        return dump._Dump._start_lookahead(dumping, held)  # type: ignore[arg-type]

    return start


@pytest.mark.parametrize(
    ("usable", "mib", "count", "at_once"),
    [(1, 4096, 1, False), (2, 4096, 1, False), (4, 4096, 2, True), (64, 4096, 8, True), (64, 300, 2, True)],
)
def test_processes_look_ahead_where_processors_are_spare(
    started: Callable[..., Any], usable: int, mib: int, count: int, at_once: bool
) -> None:
    """What copies a frozen tree's pages keeps its own, and none is started for little memory."""
    with ExitStack() as held:
        ahead = started(held, usable, mib)
        assert (len(ahead.pids), ahead._has_begun) == (count, at_once)
        assert started(held, usable, 100) is None
        assert started(held, usable, mib, at_once=2) is None


def test_nobody_waits_to_look_at_a_tree_that_stands_still(started: Callable[..., Any]) -> None:
    """There is nobody who copies it, and could be disturbed. It may be larger than what there is room for."""
    with ExitStack() as held:
        ahead = started(held, 2, 4096, stays=True)
        assert (len(ahead.pids), ahead._has_begun) == (1, True)


@pytest.mark.parametrize("lacking", ["mmap.mmap", "os.pipe"])
def test_without_room_for_them_nobody_looks_ahead(
    started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, lacking: str
) -> None:
    """A limit on address space or descriptors is no reason for a dump to fail."""

    def refused(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    module, name = lacking.split(".")
    monkeypatch.setattr(getattr(lookahead, module), name, refused)
    with ExitStack() as held:
        assert started(held, 8, 4096) is None


def test_what_interrupts_the_start_leaves_nobody_behind(
    started: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is left would keep all memory that a dump moves aside."""
    pids, fork = [], lookahead.kernel.quiet_fork

    def forking() -> int:
        if len(pids) == 2:
            raise KeyboardInterrupt
        pids.append(fork())
        return pids[-1]

    monkeypatch.setattr(lookahead.kernel, "quiet_fork", forking)
    before = os.listdir("/proc/self/fd")
    with ExitStack() as held, pytest.raises(KeyboardInterrupt):
        started(held, 8, 4096)
    assert os.listdir("/proc/self/fd") == before
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
