"""Notes of the processes that a hand has put to sleep, and what is left of them when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crcli.gpu import care
from crcli.gpu.care import Care, neglected
from crcli.process.identity import ProcessId, identify

_HAND = """
import sys
from crcli.gpu.care import Care
from crcli.process.identity import identify
care = Care()
care.take(identify(int(sys.argv[1])))
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of our own for the notes."""
    monkeypatch.setenv("CRCLI_STATE_DIR", str(tmp_path))
    return tmp_path / "gpu"


def test_a_process_in_care_is_not_neglected(notes: Path) -> None:
    """While a hand works on it nobody else should; afterwards there is no note left."""
    ours = identify(os.getpid())
    hand = Care()
    hand.take(ours)
    hand.take(ours)
    assert neglected() == []
    hand.let_go(ours)
    hand.let_go(ours)
    assert (neglected(), list(notes.iterdir())) == ([], [])


def test_a_hand_that_was_killed_leaves_its_note(notes: Path) -> None:
    """The process that it had put to sleep is found, and can be forgotten once it is awake."""
    command = [sys.executable, "-c", _HAND, str(os.getpid())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as hand:
        assert hand.stdout is not None and hand.stdout.readline() == b"taken\n"
        assert neglected() == []
        hand.send_signal(signal.SIGKILL)
        hand.wait()
    ours = identify(os.getpid())
    assert neglected() == [ours]
    care.forget(ours)
    assert (neglected(), list(notes.iterdir())) == ([], [])


def test_notes_of_the_dead_are_cleared_away(notes: Path) -> None:
    """A process that has ended is not meant, nor one that has its pid since, or since a reboot."""
    ours = identify(os.getpid())
    notes.mkdir()
    (notes / f"{ours.pid}-{ours.start_time + 1}").write_bytes(care._boot())
    (notes / f"{ours.pid}-{ours.start_time}").write_bytes(b"another boot")
    (notes / "readme").touch()
    assert neglected() == []
    assert [path.name for path in notes.iterdir()] == ["readme"]


def test_without_a_place_nothing_is_noted(notes: Path) -> None:
    """A folder that cannot be made is no reason not to work."""
    notes.write_text("in the way")
    hand = Care()
    hand.take(identify(os.getpid()))
    hand.let_go(ProcessId(1, 1))
    assert neglected() == []
