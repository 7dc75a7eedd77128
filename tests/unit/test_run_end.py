"""How a job is seen dead, whatever is lacking then."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time

import pytest

from crcli.job.relay import Relay
from crcli.pipeline import run
from crcli.process.identity import identify
from crcli.process.tree import read_process


def test_a_job_is_reaped_without_a_descriptor_to_be_had() -> None:
    """Its warden is waited for, and what told of its end is closed, when no more files may be open."""
    reader, writer = os.pipe()
    warden = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL)
    job = run._Running(identify(warden.pid), warden.pid, reader, Relay(), run.Event("fresh", "begun"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        run._end_it(job)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        os.close(writer)
        warden.kill()
        warden.wait()
    with pytest.raises(ChildProcessError):
        os.waitpid(job.child, os.WNOHANG)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)


def test_a_tree_is_woken_though_one_of_it_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else would wake those that come after it."""
    sleepers = [subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL) for _ in range(2)]
    members = [read_process(one.pid) for one in sleepers]
    monkeypatch.setattr(run, "scan_tree", lambda root: members)
    try:
        gone, last = sleepers
        gone.kill()
        gone.wait()
        last.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, last.pid, os.WSTOPPED)
        run._wake(identify(os.getpid()))
        assert os.waitid(os.P_PID, last.pid, os.WCONTINUED | os.WNOHANG) is not None
    finally:
        for one in sleepers:
            one.kill()
            one.wait()


def test_last_words_are_waited_for_together() -> None:
    """Who has left its output open to others, as a daemon has, is waited for once, not for each of them."""
    asked: list[float] = []

    class Busy(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            asked.append(timeout or 0.0)
            time.sleep(timeout or 0.0)

    Relay(_readers=[Busy(), Busy()]).finish(0.05)
    assert asked[0] > 0 and asked[1] == 0
