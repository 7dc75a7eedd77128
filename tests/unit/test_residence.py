"""The warden of a tree that is being restored: see crcli.criu.residence."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from crcli.criu import residence
from crcli.criu.residence import _Duty

WAITS = ["sleep", "1000"]


@pytest.fixture
def criu() -> Iterator[subprocess.Popen[bytes]]:
    """What stands for CRIU here: it waits for ever."""
    with subprocess.Popen(WAITS) as process:
        yield process
        process.kill()


def watch(criu: int) -> tuple[socket.socket, socket.socket, threading.Thread]:
    """Have a warden's eye on CRIU; our ends of its channels."""
    ours, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel, criu_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    duty = _Duty(control, criu_end, (), lambda changes: None, "", -1, -1, -1)
    thread = threading.Thread(target=duty.wait_for_word, args=(criu,), daemon=True)
    thread.start()
    return ours, channel, thread


@pytest.mark.parametrize("is_killed", [True, False])
def test_criu_does_not_wait_for_ever_for_a_process_that_was_killed(
    criu: subprocess.Popen[bytes], is_killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not the parent, and may not hear of it; of one that ended as it should nobody needs to hear."""
    monkeypatch.setattr(residence, "_UNHEARD_S", 0.3)
    monkeypatch.setattr(residence, "_LOOK_EVERY_S", 0.1)
    child = subprocess.Popen(WAITS if is_killed else ["true"])
    monkeypatch.setattr(residence, "child_pids", lambda _: [child.pid])  # not what other tests have left
    if is_killed:
        child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    ours, channel, thread = watch(criu.pid)
    with closing(ours), closing(channel):
        channel.settimeout(60 if is_killed else 1)
        if is_killed:
            assert channel.recv(1) == b""
            assert criu.wait(60) == -signal.SIGKILL
        else:
            with pytest.raises(TimeoutError):
                channel.recv(1)
            assert criu.poll() is None
        ours.close()
        thread.join(60)
        assert not thread.is_alive()
    child.wait()
