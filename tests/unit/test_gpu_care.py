"""Notes of the processes that a hand has put to sleep, and what is left of them when it is killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crcli.gpu import care
from crcli.gpu.care import Care, neglected
from crcli.notice.notices import Notices
from crcli.pipeline.stages import DumpOptions
from crcli.pipeline.vigil import Keeping, Vigil
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


def test_what_another_hand_works_on_is_not_taken(notes: Path) -> None:
    """The second is told so, and takes nothing away when it lets go."""
    ours = identify(os.getpid())
    first, second = Care(), Care()
    assert first.take(ours)
    assert not second.take(ours)
    second.let_go(ours)
    assert care.is_cared_for(ours)
    first.let_go(ours)
    assert second.take(ours)
    second.let_go(ours)
    assert list(notes.iterdir()) == []


def test_who_only_looks_is_in_nobodys_way(notes: Path) -> None:
    """A note that is locked for a moment, or cleared away meanwhile, is taken all the same."""
    ours = identify(os.getpid())
    notes.mkdir()
    path = notes / f"{ours.pid}-{ours.start_time}"
    path.write_bytes(b"another boot")
    with path.open() as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        threading.Timer(0.1, lambda: (path.unlink(), looked_at.close())).start()
        hand = Care()
        assert hand.take(ours)
    assert (care.is_cared_for(ours), neglected()) == (True, [])
    hand.let_go(ours)


def test_a_note_is_locked_and_whole_from_the_start(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks while it is being made, as the doctor does, finds nothing that it could clear away."""
    ours, link = identify(os.getpid()), os.link

    def look_link_look(*paths: str) -> None:
        assert neglected() == []
        link(*paths)
        assert (neglected(), care.is_cared_for(ours)) == ([], True)

    monkeypatch.setattr(os, "link", look_link_look)
    hand = Care()
    assert hand.take(ours)
    assert [path.name for path in notes.iterdir()] == [f"{ours.pid}-{ours.start_time}"]
    hand.let_go(ours)


def test_a_crcli_whose_hand_was_killed_has_another(notes: Path) -> None:
    """As long as it lives nobody else is to touch the process, but its own next hand may."""
    ours = identify(os.getpid())
    with subprocess.Popen(["sleep", "60"]) as crcli:
        its = identify(crcli.pid)
        killed = Care(its)
        assert killed.take(ours)
        os.close(killed._kept.pop(ours))  # as the kernel does for a process that it kills
        assert (neglected(), care.is_cared_for(ours)) == ([], True)
        assert not Care(ours).take(ours)
        following = Care(its)
        assert following.take(ours)
        os.close(following._kept.pop(ours))
        crcli.kill()
        crcli.wait()
    assert (neglected(), care.is_cared_for(ours)) == ([ours], False)
    care.forget(ours)


def test_a_kept_note_is_not_forgotten(notes: Path) -> None:
    """It belongs to the hand that keeps it."""
    ours = identify(os.getpid())
    hand = Care()
    hand.take(ours)
    care.forget(ours)
    assert care.is_cared_for(ours)
    hand.let_go(ours)


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


def test_a_tree_in_care_is_not_told_as_running(notes: Path) -> None:
    """It looks awake when a dump is stopped at its deadline, while it waits for its GPUs."""
    script = ["sh", "-c", "sleep 1000 & echo $!; wait"]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as root:
        assert root.stdout is not None
        child = identify(int(root.stdout.readline()))
        vigil = Vigil(Keeping(DumpOptions(root.pid, "")), identify(root.pid), Notices(), print)
        hand = Care()
        try:
            assert vigil._is_undone()
            hand.take(child)
            assert not vigil._is_undone()
            hand.let_go(child)
            assert vigil._is_undone()
        finally:
            os.kill(child.pid, signal.SIGKILL)


def test_one_tree_is_put_to_sleep_at_a_time() -> None:
    """Who comes second begins when the first has ended its part, and so finds the memory that is left."""
    order = []

    def second() -> None:
        with care.alone():
            order.append("second")

    with care.alone():
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_who_hangs_holds_up_nobody_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the next one goes ahead."""
    monkeypatch.setattr(care, "_ALONE_S", 0.05)
    with care.alone(), care.alone():
        pass
