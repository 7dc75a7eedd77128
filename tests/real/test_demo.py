"""`crcli demo`, and the journal plug-in, on the real thing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from crcli.image.manifest import list_images
from crcli.store.file import FileStore
from tests.support.crcli import COMMAND_LIMIT_SECONDS, Crcli, counter, wait_until
from tests.support.programs import spawn_python

ROOT = Path(__file__).parents[2]


def agents(folder: Path) -> set[int]:
    """The agents of demos whose temporary folders are in this one."""
    found = set()
    for process in psutil.process_iter(["cmdline", "environ"]):
        words, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if any(word.endswith("demo/agent.py") for word in words) and environment.get("TMPDIR") == str(folder):
            found.add(process.pid)
    return found


def assert_nothing_stays(folder: Path) -> None:
    """Assert that the agents of demos with this temporary folder end, and that nothing is in it."""
    wait_until(lambda: not agents(folder), f"an agent stays: {agents(folder)}")
    assert list(folder.iterdir()) == []


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary folders of its own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_the_demo_works_and_leaves_nothing(crcli: Crcli, temporary: Path) -> None:
    """The agent is dumped, gone, restored and goes on; afterwards there is no agent and no folder left."""
    report = crcli.run("demo", "--json").json
    assert report["ok"]
    assert [step["name"] for step in report["steps"]] == [
        "agent started",
        "crcli dump",
        "seen to be gone",
        "crcli restore",
        "seen to go on",
    ]
    assert report["dump"]["outcome"] == "killed"
    assert report["dump"]["memory_bytes"] > 60 << 20 > report["dump"]["stored_bytes"]
    assert_nothing_stays(temporary)


def test_the_demo_uses_the_store_that_it_is_given(crcli: Crcli, temporary: Path) -> None:
    """With --store the image goes there, and is removed again; the table is for people."""
    said = crcli.run("demo", "--store", crcli.store).out
    assert "went on with its memory intact" in said
    store = FileStore(str(crcli.folder / "store"))
    assert list(store.list("packs/"))
    assert list_images(store) == []


@pytest.mark.parametrize("step", ["agent started", "crcli dump", "crcli restore"])
def test_a_demo_that_is_ended_cleans_up(step: str, crcli: Crcli, temporary: Path) -> None:
    """SIGTERM at any step ends it with 143, and neither the agent nor its restored copy lives on."""
    with crcli.start("demo") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(step):
                break
        assert step != "agent started" or agents(temporary)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=COMMAND_LIMIT_SECONDS)
    assert process.returncode != 0
    assert_nothing_stays(temporary)


def test_a_failing_demo_says_why(crcli: Crcli, temporary: Path) -> None:
    """Where the store cannot be used, the demo ends as the dump does, and the agent does not stay."""
    (crcli.folder / "file").write_text("in the way")
    error = crcli.run("demo", "--json", "--store", f"{crcli.folder}/file", code=30).json["error"]
    assert error["code"] == "demo-failed"
    assert_nothing_stays(temporary)


def test_the_journal_of_a_real_night(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """With crcli-journal installed, a dump, its restore and a failed restore have their lines."""
    site = crcli.folder / "site"
    source = crcli.folder / "source"
    subprocess.run(["cp", "-r", str(ROOT / "plugins" / "crcli-journal"), str(source)], check=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    journal = crcli.folder / "journal.jsonl"
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("CRCLI_JOURNAL", str(journal))
    with spawn_python(counter()) as program:
        dumped = crcli.dump(program.pid, "--name", "night")
        crcli.restore("night")
        crcli.run("restore", "night", "--pid-namespace", "host", "--store", crcli.store, code=20)
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line["event"] for line in lines] == [
        "dump-begins",
        "dump-finished",
        "restore-begins",
        "restore-finished",
        "restore-begins",
        "restore-failed",
    ]
    assert {line["image"] for line in lines} == {dumped["image"]}
    assert lines[1]["outcome"] == "killed"
    assert lines[5]["exit_code"] == 20
    assert os.path.getsize(journal) < 8192
