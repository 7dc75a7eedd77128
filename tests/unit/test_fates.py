"""Who died of what it ran into, and who ended by itself: told apart although somebody has reaped both."""

from __future__ import annotations

import subprocess
import time

import pytest

from crcli.process.crash import Fates
from crcli.process.identity import identify


@pytest.fixture
def tells() -> bool:
    """Whether this kernel tells how a process ended that its parent has reaped (Linux 6.15)."""
    with subprocess.Popen(["sleep", "60"]) as child:
        fates = Fates([identify(child.pid)])
        child.kill()
    return not fates.crashed()


@pytest.mark.parametrize("is_reaped", [False, True])
@pytest.mark.parametrize(
    ("ends", "has_crashed"),
    [("exit 0", False), ("exit 7", False), ("kill -KILL $$", False), ("kill -TRAP $$", True)],
)
def test_who_crashed(ends: str, has_crashed: bool, is_reaped: bool, tells: bool) -> None:
    """By its exit status, also of a shell's child, which the shell reaps at once."""
    child = subprocess.Popen(["sh", "-c", f"read x; {ends}"], stdin=subprocess.PIPE)
    one = identify(child.pid)
    fates = Fates([one])
    assert child.stdin
    child.stdin.close()
    while one.alive():
        time.sleep(0.002)
    if is_reaped:
        child.wait()
    assert fates.crashed() == ([one] if has_crashed or (is_reaped and not tells) else [])
    child.wait()


def test_who_is_gone_without_a_word_counts() -> None:
    """Nobody can say that it was not lost; who lives was not."""
    with subprocess.Popen(["true"]) as gone:
        one = identify(gone.pid)
    with subprocess.Popen(["sleep", "60"]) as other:
        assert Fates([one, identify(other.pid)]).crashed() == [one]
        other.kill()
