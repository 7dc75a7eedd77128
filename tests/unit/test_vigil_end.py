"""What a vigil takes for the end of its tree, when a dump has failed."""

from __future__ import annotations

import os
import subprocess
import time
from functools import partial
from unittest.mock import Mock

import pytest

from crcli.errors import DumpFailed, TreeState
from crcli.notice.base import Notice
from crcli.notice.notices import Notices
from crcli.pipeline.schedule import activity_of
from crcli.pipeline.stages import DumpOptions
from crcli.pipeline.vigil import Event, Keeping, Purpose, Vigil, VigilEnd, Why, _Leaving, _UnderWay
from crcli.process.identity import ProcessId, identify
from crcli.ui.vigils import teller


def failed_dump(root: ProcessId) -> tuple[VigilEnd | None, list[str]]:
    """How the vigil over a tree ends of which one process was lost in a dump, and what it has told."""
    told: list[str] = []
    keeping = Keeping(DumpOptions(pid=root.pid, store="none"))
    vigil = Vigil(keeping, root, Mock(spec=Notices), lambda event: told.append(event.name))
    under_way = _UnderWay(Purpose.PERIODIC, 0.0, "", activity_of(identify(os.getpid())))
    return vigil._dump_failed(under_way, DumpFailed("one is lost", state=TreeState.DEAD)), told


def test_a_tree_whose_root_lives_has_not_ended() -> None:
    """A worker was lost, or ended while its image was on its way: the tree is watched on."""
    assert failed_dump(identify(os.getpid())) == (None, ["image-failed"])


def test_a_tree_whose_root_is_gone_has_ended() -> None:
    """There is nothing left to watch."""
    with subprocess.Popen(["sleep", "60"]) as root:
        its = identify(root.pid)
        root.kill()
    end, told = failed_dump(its)
    assert end is not None
    assert (end.why, told) == (Why.ENDED, [])


def test_a_dump_is_tried_again_for_as_long_as_there_is_time() -> None:
    """A job of Slurm's may hear two hours before its end that it will have to go, and its store be away."""
    told: list[str] = []
    root = identify(os.getpid())
    keeping = Keeping(DumpOptions(pid=root.pid, store="none"))
    vigil = Vigil(keeping, root, Mock(spec=Notices), lambda event: told.append(event.name))
    notice = Notice("slurm", "time limit", deadline=time.monotonic() + 7200)
    leaving = _Leaving(notice, time.monotonic(), time.monotonic() + 7200, tries=1440)
    assert vigil._cannot_save(leaving, DumpFailed("no answer", state=TreeState.RUNNING)) is None
    assert told == ["retry"]


def test_each_event_is_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources of notices tell from threads of their own: a line and its end are one."""
    written: list[str] = []
    stderr = Mock(write=written.append, isatty=lambda: False)
    monkeypatch.setattr("sys.stderr", stderr)
    for as_json in (True, False):
        teller(as_json)(Event("notice", "word came"))
    assert [text.count("\n") for text in written] == [1, 1] and written[1] == "crcli: word came\n"


def test_what_fails_time_and_again_is_said_now_and_then() -> None:
    """In the same words: the first, second and fourth time; another reason at once; after an image anew."""
    told: list[str] = []
    root = identify(os.getpid())
    keeping = Keeping(DumpOptions(pid=root.pid, store="none"))
    vigil = Vigil(keeping, root, Mock(spec=Notices), lambda event: told.append(event.message))
    under_way = _UnderWay(Purpose.PERIODIC, 0.0, "", activity_of(root))
    fails = partial(vigil._image_failed, under_way)
    for _ in range(5):
        fails(DumpFailed("no answer"))
    fails(DumpFailed("no room"))
    vigil._image_taken(under_way, {"frozen_ms": 1.0, "total_ms": 1.0, "stored_bytes": 1})
    fails(DumpFailed("no room"))
    assert [text.removeprefix("no image could be taken: ") for text in told if "could" in text] == [
        "no answer", "no answer (2 times by now)", "no answer (4 times by now)", "no room", "no room",
    ]  # fmt: skip
