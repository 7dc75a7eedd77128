"""The file in which a job finds its lease's number, and the sentry beside it."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crcli.image.lease import Lease
from crcli.job import lease_file, sentry
from crcli.job.lease_file import LeaseFile
from crcli.job.start import watched
from crcli.process.identity import identify, read_stat
from crcli.store.file import FileStore

COUNTS = "import time\nfor n in range(10**9): print(n, flush=True); time.sleep(0.01)"


@pytest.fixture
def lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lease:
    """A lease whose file is in a folder of the test's."""
    monkeypatch.setattr(lease_file, "FOLDER", f"{tmp_path}/jobs")
    return Lease.claim(FileStore(f"{tmp_path}/store"), "job", "a test")


def wait_for(what: Callable[[], bool]) -> None:
    """Wait until it is so."""
    limit = time.monotonic() + 60
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_a_job_finds_its_number_and_nobody_else_s(lease: Lease) -> None:
    """Two jobs of one name on one host have files of their own, gone after the block."""
    with LeaseFile(lease) as one, LeaseFile(lease) as other:
        assert one.path != other.path
        assert not os.path.exists(one.path)  # a job that is brought back has its own
        one.write()
        assert Path(one.path).read_text() == "1\n"
        lease.number = 7
        one.write()
        assert Path(one.path).read_text() == "7\n"
        other.write()
    assert not os.path.exists(one.path) and not os.path.exists(other.path)


def test_a_job_that_is_brought_back_finds_it_where_it_looks(lease: Lease) -> None:
    """The image says where; one that says nothing, or leads elsewhere, gives the file its plain name."""
    with LeaseFile(lease) as file:
        first = file.path
        file.write()
        file.follow({"lease_file": "job-0badcafe.lease"})
        assert not os.path.exists(first)
        assert file.path == f"{lease_file.FOLDER}/job-0badcafe.lease" and os.path.exists(file.path)
        for strange in (
            {},
            {"lease_file": "../../etc/passwd"},
            {"lease_file": "a\n.lease"},
            {"lease_file": 3},
        ):
            file.follow(strange)
            assert file.path == f"{lease_file.FOLDER}/job.lease"


def test_the_file_of_another_stays(lease: Lease) -> None:
    """Who has lost the job to another on this host leaves that one's number alone."""
    with LeaseFile(lease) as file:
        file.write()
        Path(file.path).write_text("2\n")
    assert Path(file.path).read_text() == "2\n"


def commands(pid: int) -> bytes:
    """The command line of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_sentry_stops_a_tree_whose_lease_has_lapsed_and_lets_it_go_on() -> None:
    """All of the tree that runs is stopped while the time is over; what others had stopped stays stopped."""
    deadline = os.memfd_create("deadline")

    def good_for(seconds: float) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        os.pwrite(deadline, struct.pack("dq", now + seconds, 1), 0)

    def states() -> list[str]:
        return [read_stat(pid).state for pid in (root.pid, *children)]

    start = f"subprocess.Popen([sys.executable, '-c', {COUNTS!r}])"
    script = f"import subprocess, sys\n{start}\n{start}\n{COUNTS}"
    root = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL)
    children: list[int] = []
    try:
        path = Path(f"/proc/{root.pid}/task/{root.pid}/children")
        wait_for(lambda: len(path.read_text().split()) == 2)
        children = [int(pid) for pid in path.read_text().split()]
        # Stopped before it has become its program, a child would hold its parent too (vfork).
        wait_for(lambda: all(commands(pid) != commands(root.pid) for pid in children))
        os.kill(children[1], signal.SIGSTOP)
        good_for(3600)
        with watched(deadline, identify(root.pid), ""):
            good_for(-1)
            wait_for(lambda: states() == ["T", "T", "T"])
            good_for(3600)
            wait_for(lambda: "T" not in states()[:2])
            assert states()[2] == "T"
    finally:
        for pid in (*children, root.pid):
            os.kill(pid, signal.SIGKILL)
        root.wait()
        os.close(deadline)


@pytest.mark.parametrize("number", [7, 8])
def test_a_sentry_whose_supervisor_was_killed_removes_the_number(tmp_path: Path, number: int) -> None:
    """That of the supervisor's lease; not that of who has taken the job over on this host by then."""
    file, deadline = tmp_path / "job.lease", os.memfd_create("deadline")
    file.write_text(f"{number}\n")
    os.pwrite(deadline, struct.pack("dq", time.clock_gettime(time.CLOCK_BOOTTIME) + 3600, 7), 0)
    supervisor, root = (subprocess.Popen(["sleep", "1000"]) for _ in range(2))
    ours = os.pidfd_open(supervisor.pid)
    words = [str(file), *map(str, (deadline, ours, root.pid, identify(root.pid).start_time))]
    beside = subprocess.Popen(
        [sys.executable, "-I", "-S", "-E", sentry.__file__, *words], pass_fds=(deadline, ours)
    )
    try:
        supervisor.kill()
        assert beside.wait(60) == 0
    finally:
        for process in (supervisor, root, beside):
            process.kill()
            process.wait()
        os.close(deadline)
        os.close(ours)
    assert file.exists() == (number == 8)
