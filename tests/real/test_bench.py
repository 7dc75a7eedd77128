"""The benchmark itself: it runs through all ways, and what it compares would show a wrong byte."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crcli import kernel
from tests.bench.commands import BenchError, Subject
from tests.bench.kinds import KINDS
from tests.bench.memory import TreeMemory, fresh, own_ranges
from tests.bench.ways import WAYS
from tests.support.crcli import ROOT, wait_until

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")


@pytest.mark.skipif(shutil.which("zstd") is None, reason="zstd is not installed")
def test_the_quick_benchmark_takes_every_way(tmp_path: Path) -> None:
    """Sixteen MiB go every way once, no round fails, and the figures are written down with their ratios.

    Only runc may be left out, where it is missing or does not work; then it says why.
    """
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "tests.bench", "--quick", "--folder", tmp_path, "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (result,) = json.loads(out.read_text())["results"]
    left_out = {"runc"} if "runc is left out: " in done.stderr else set()
    assert {way for way, rounds in result["rounds"].items() if len(rounds) == 1} == set(WAYS) - left_out
    assert result["failures"] == []
    for way in ("criu", "script", "crcli file", "crcli s3"):
        assert 16 <= result["medians"][way]["stored_mib"] < 32
        assert 0 < result["medians"][way]["cold_first_s"] <= result["medians"][way]["cold_whole_s"]
    assert result["medians"]["crcli file"]["second_mib"] < 2
    assert result["ratios"]["durable / boto3's upload"].keys() == {"script", "crcli s3"}
    assert not list(tmp_path.glob("crcli-bench-*")), "something was left behind"


@pytest.mark.parametrize("kind", KINDS)
def test_a_subject_notices_every_change(kind: str, tmp_path: Path) -> None:
    """Its hash stays while it is only asked, is another after a change, and all of its memory is copied."""
    kernel.become_subreaper()
    with Subject(16, tmp_path / "subject", kind=kind) as subject:
        subject.ask()
        before = subject.hash
        subject.change()
        assert subject.hash != before
        subject.ask()
        living = TreeMemory(subject.pids())
        assert living.size >= 15 << 20
        living.copy(fresh(living.size))


def test_one_wrong_byte_is_noticed(tmp_path: Path) -> None:
    """A byte that somebody else writes into the memory of a subject fails the round."""
    kernel.become_subreaper()
    with Subject(16, tmp_path / "subject") as subject:
        start, size = max(own_ranges(subject.pid), key=lambda one: one[1])
        with open(f"/proc/{subject.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(start + size // 2)
            was = memory.read(1)[0]
            memory.seek(start + size // 2)
            memory.write(bytes([was ^ 1]))
        with pytest.raises(BenchError, match="not what it was"):
            subject.ask()


def test_one_wrong_process_is_noticed(tmp_path: Path) -> None:
    """What differs in the last of fifty processes fails the round."""
    kernel.become_subreaper()
    with Subject(64, tmp_path / "subject", kind="processes") as subject:
        subject.ask()
        last = subject.pids()[-1]
        assert last != subject.pid
        (report,) = tmp_path.rglob(f"*.{len(subject.pids()) - 2}")
        before = report.stat()
        os.kill(last, signal.SIGUSR1)
        wait_until(lambda: report.stat() != before, "it does not change its memory")
        with pytest.raises(BenchError, match="not what it was"):
            subject.ask()
