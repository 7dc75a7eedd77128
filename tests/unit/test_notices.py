"""Notices: which sources watch, what they say, and that none of them ends a job."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from crcli import kernel
from crcli.errors import UsageError
from crcli.notice import Notice, Notices, Source, SourceKind, Surroundings, Urgency
from crcli.notice.base import Tell, grace_of, note, nothing, seconds
from crcli.notice.choose import choose, known_kinds
from crcli.notice.file import FileAppears
from crcli.notice.hook import HttpHook
from crcli.notice.signals import NAMES, OnSignal
from crcli.notice.slurm import _local
from crcli.plugins import load_hooks, names
from crcli.plugins.loader import Hooks
from tests.support.notices import ENOUGH_S, Reported, free_port, handlers, next_of, watching

ROOT = Path(__file__).parents[2]


class Says:
    """A source that tells some notices and ends, or raises."""

    def __init__(self, *notices: Notice, name: str = "says", error: BaseException | None = None) -> None:
        self.name = name
        self._notices, self._error = notices, error

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        for notice in self._notices:
            tell(notice)
        if self._error is not None:
            raise self._error


def names_of(specs: list[str], environ: dict[str, str] | None = None, dmi: str = "/nonexistent") -> list[str]:
    """Which sources some specs make."""
    here = Surroundings(None, environ or {}, dmi=dmi)
    return [source.name for source in choose(specs, here, Hooks([]))]


# --- handing out -------------------------------------------------------------------------------------------


def test_notices_come_in_their_order() -> None:
    """`get` returns one after another, then waits no longer than it may."""
    given = [Notice("says", str(number), Urgency.RISK) for number in range(3)]
    with watching(Says(*given)) as notices:
        assert [next_of(notices) for _ in given] == given
        assert notices.get(0) is None


def test_the_fd_is_readable_while_there_is_a_notice() -> None:
    """A loop can wait for notices and other things together."""
    release = threading.Event()

    class Later(Says):
        def watch(self, tell: Tell, stopped: threading.Event) -> None:
            release.wait(ENOUGH_S)
            super().watch(tell, stopped)

    with watching(Later(Notice("says", "a"), Notice("says", "b"))) as notices:
        poll = select.poll()
        poll.register(notices.fd, select.POLLIN)
        assert poll.poll(0) == []
        release.set()
        for _ in range(2):
            assert poll.poll(ENOUGH_S * 1000) == [(notices.fd, select.POLLIN)]
            next_of(notices)
        assert poll.poll(0) == []


def test_a_broken_source_is_a_finding_and_the_others_go_on() -> None:
    """What a source raises ends that source only; the finding names it, and is told as it comes."""
    reported = Reported()
    notices = Notices(["none"], found=reported)
    notices.sources = [
        Says(name="broken", error=ValueError("what?")),
        Says(name="exits", error=SystemExit(3)),
        Says(Notice("says", "go")),
    ]
    with notices:
        assert next_of(notices).reason == "go"
        reported.wait()
        for thread in notices._threads:
            thread.join(ENOUGH_S)
    assert {finding.evidence["source"] for finding in notices.findings} == {"broken", "exits"}
    assert {finding.name for finding in notices.findings} == {"notice-failed"}
    assert notices.findings == list(reported)


def test_who_listens_for_findings_may_fail() -> None:
    """A terminal that has gone ends no source: it is heard after a finding that nobody could be told of."""

    def fail(finding: object) -> None:
        raise BrokenPipeError

    class Reports(Says):
        def watch(self, tell: Tell, stopped: threading.Event) -> None:
            notices._report(note("notice-silent", "says", "hears nothing", "tries on"))
            super().watch(tell, stopped)

    notices = Notices(["none"], found=fail)
    notices.sources = [Reports(Notice("says", "go"))]
    with notices:
        assert next_of(notices).reason == "go"
    assert len(notices.findings) == 1


def test_threads_leave_signals_to_the_main_thread() -> None:
    """One that is delivered to another thread would not end the main thread's wait."""
    with Notices(["sigusr1"], environ={}) as notices:
        for thread in notices._threads:
            for _ in range(1000):
                status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
                blocked = int(re.findall(r"SigBlk:\s*(\w+)", status)[0], 16)
                if blocked >> (signal.SIGUSR1 - 1) & 1 and blocked >> (signal.SIGTERM - 1) & 1:
                    break
                time.sleep(0.01)
            else:
                raise AssertionError(f"{thread.name} takes signals")


def test_everybody_who_gave_notice_is_told_that_the_job_is_saved() -> None:
    """One notice is acted on, others said the same; each is told once, and one that fails is a finding."""
    saved: list[str] = []

    def fail() -> None:
        raise OSError("gone")

    given = [
        Notice("a", "", on_saved=lambda: saved.append("a")),
        Notice("b", "", on_saved=fail),
        Notice("c", "", Urgency.RISK, on_saved=lambda: saved.append("risk")),
        Notice("d", "", on_saved=lambda: saved.append("d")),
    ]
    with watching(Says(*given)) as notices:
        told = [next_of(notices) for _ in given]
        told[0].on_saved()
        told[3].on_saved()
    assert saved == ["a", "d"]
    assert [(finding.name, finding.evidence["source"]) for finding in notices.findings] == [
        ("notice-unanswered", "b")
    ]


def test_what_is_told_after_leaving_goes_nowhere() -> None:
    """A source that is late neither fails nor writes into a descriptor that is somebody else's by then."""
    tells: list[Tell] = []

    class Keeps(Says):
        def watch(self, tell: Tell, stopped: threading.Event) -> None:
            tells.append(tell)

    with watching(Keeps()) as notices:
        fd = notices.fd
        notices._threads[0].join(ENOUGH_S)
    other = os.eventfd(0, os.EFD_NONBLOCK)
    os.dup2(other, fd)
    try:
        tells[0](Notice("late", ""))
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    finally:
        os.close(fd)
        if other != fd:
            os.close(other)


def test_leaving_ends_every_thread(tmp_path: Path) -> None:
    """Sources that wait for something that never comes end with the block."""
    here = Surroundings(None, {})
    with watching(FileAppears("file", str(tmp_path / "no"), here), OnSignal("sigusr2", [], here)) as notices:
        threads = list(notices._threads)
        assert all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(ENOUGH_S)
        assert not thread.is_alive()


# --- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_signal_is_a_notice(name: str) -> None:
    """The signal does not end the process; its notice says when the grace time is over."""
    number = NAMES[name]
    before = handlers([number])
    with Notices([name], 30, environ={}) as notices:
        assert notices.signals == {number}
        sent = time.monotonic()
        os.kill(os.getpid(), number)
        notice = next_of(notices)
        assert (notice.source, notice.reason, notice.urgency) == (name, number.name, Urgency.LEAVE)
        assert notice.deadline is not None
        assert sent + 30 <= notice.deadline <= time.monotonic() + 30
    assert handlers([number]) == before


def test_without_a_grace_time_a_signal_has_no_deadline() -> None:
    """Nobody knows when SIGKILL comes."""
    with Notices(["sigusr1"], environ={}) as notices:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert next_of(notices).deadline is None


def test_the_grace_time_may_come_from_the_environment() -> None:
    """An entrypoint cannot change its command line, but its variables."""
    with Notices(["sigusr1"], environ={"CRCLI_GRACE": "12.5"}) as notices:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert next_of(notices).deadline is not None


def test_every_signal_of_a_storm_is_taken() -> None:
    """A handler that interrupts another, or the queue itself, loses nothing and locks nothing."""
    code = """
        import os, signal, threading
        from crcli.notice import Notices

        with Notices(["sigusr1", "sigusr2"], environ={}) as notices:
            pid, done = os.getpid(), threading.Event()

            def storm(number):
                while not done.is_set():
                    os.kill(pid, number)

            storms = [threading.Thread(target=storm, args=(n,)) for n in (signal.SIGUSR1, signal.SIGUSR2)]
            for one in storms: one.start()
            heard = [notices.get(30).reason for _ in range(200)]
            done.set()
            for one in storms: one.join()
        assert set(heard) == {"SIGUSR1", "SIGUSR2"}, set(heard)
        print("heard")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "heard\n", done.stderr


def test_a_waiting_main_thread_is_woken() -> None:
    """A signal ends the wait of `get` although it is a thread that tells of it."""
    with Notices(["sigusr1"], environ={}) as notices:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        assert next_of(notices).reason == "SIGUSR1"
        timer.join()


def test_a_signal_that_another_thread_gets_is_heard() -> None:
    """The kernel may give a signal to a thread that is being started: the main thread, which waits for it by
    `get` or by `fd`, is woken all the same. The signals of a forked child do not wake it."""
    over = threading.Event()
    other = threading.Thread(target=over.wait)
    other.start()
    try:
        with Notices(["sigusr1"], environ={}) as notices:
            threading.Timer(0.1, signal.pthread_kill, (other.ident, signal.SIGUSR1)).start()
            assert next_of(notices).reason == "SIGUSR1"
            threading.Timer(0.1, signal.pthread_kill, (other.ident, signal.SIGUSR1)).start()
            assert select.select([notices.fd], [], [], ENOUGH_S)[0]
            assert next_of(notices).reason == "SIGUSR1"
            if not (child := kernel.quiet_fork()):
                signal.raise_signal(signal.SIGUSR1)
                os._exit(0)
            os.waitpid(child, 0)
            assert not select.select([notices.fd], [], [], 0)[0]
    finally:
        over.set()
        other.join()


def test_who_is_woken_by_signals_is_so_again_afterwards() -> None:
    """The descriptor that Python writes signals into is what it was, unless somebody has set another."""
    reads, writes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for before in (-1, writes):
            signal.set_wakeup_fd(before)
            with Notices(["none"], environ={}):
                pass
            assert signal.set_wakeup_fd(-1) == before
        with Notices(["none"], environ={}):
            signal.set_wakeup_fd(writes)
        assert signal.set_wakeup_fd(-1) == writes
    finally:
        signal.set_wakeup_fd(-1)
        os.close(reads)
        os.close(writes)


def test_a_blocked_signal_is_unblocked_and_blocked_again() -> None:
    """A launcher may have left a signal blocked; it is heard all the same, and blocked afterwards."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with Notices(["sigusr1"], environ={}) as notices:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert next_of(notices).reason == "SIGUSR1"
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])


def test_of_two_that_want_a_signal_the_first_is_told() -> None:
    """One SIGTERM is one notice, by the source that knows more about it."""
    with Notices(["systemd", "sigterm"], environ={}) as notices:
        os.kill(os.getpid(), signal.SIGTERM)
        assert next_of(notices).reason == "systemd stops the service (SIGTERM)"
        assert notices.get(0.05) is None


def test_a_handler_that_somebody_put_there_meanwhile_stays() -> None:
    """What is given back is ours only."""

    def theirs(*_: object) -> None:
        pass

    before = signal.getsignal(signal.SIGUSR1)
    try:
        with Notices(["sigusr1"], environ={}):
            signal.signal(signal.SIGUSR1, theirs)
        assert signal.getsignal(signal.SIGUSR1) is theirs
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_story_within_has_the_signals_for_itself() -> None:
    """A restore that crcli does meanwhile is interrupted by SIGTERM; after it, the notices have it again."""
    from crcli.pipeline.interrupts import Interrupted, interruptible

    with Notices(["sigterm"], environ={}) as notices:
        with pytest.raises(Interrupted), interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(ENOUGH_S)
        assert notices.get(0.05) is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert next_of(notices).reason == "SIGTERM"


def test_who_is_done_is_not_killed_before_saying_so() -> None:
    """Between the end of a job and that of crcli a notice changes nothing: the exit code is the job's."""
    code = """
        import os, signal, sys
        from crcli.notice import Notices
        with Notices(["sigterm", "sigusr1"], environ={}) as notices:
            notices.deafen()
            os.kill(os.getpid(), signal.SIGUSR1)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        sys.exit(7)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT).returncode == 7


def test_outside_of_the_main_thread_signals_are_a_finding() -> None:
    """They cannot be taken there; other sources watch."""
    found: list[Any] = []

    def elsewhere() -> None:
        notices = Notices(["sigusr1"], environ={})
        notices.sources.append(Says(Notice("says", "go")))
        with notices:
            found.append(notices.get(ENOUGH_S))
        found.extend(notices.findings)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found[0].reason == "go"
    assert [finding.name for finding in found[1:]] == ["notice-failed"]


# --- a file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "left_s", "reason"),
    [
        ("", 60, ""),
        ("12\n", 12, ""),
        ("0.5 ", 0.5, ""),
        ("nan", 60, ": nan"),
        ("-3", 60, ": -3"),
        ("1e999", 60, ": 1e999"),
        ("rack 7 is drained\nmore", 60, ": rack 7 is drained"),
        ("x" * 9000, 60, ": " + "x" * 200),
    ],
)
def test_a_file_that_appears_is_a_notice(tmp_path: Path, text: str, left_s: float, reason: str) -> None:
    """It may say how many seconds are left; anything else that it says is the reason."""
    path = tmp_path / "leave"
    with watching(FileAppears("file", str(path), Surroundings(60.0, {}))) as notices:
        assert notices.get(0.05) is None
        before = time.monotonic()
        path.write_text(text)
        notice = next_of(notices)
        assert notice.reason == f"{path} is there{reason}"
        assert notice.deadline is not None
        assert before + left_s <= notice.deadline <= time.monotonic() + left_s
        assert notices.get(0.5) is None


def test_a_file_that_cannot_be_read_is_there_all_the_same(tmp_path: Path) -> None:
    """A folder, or a FIFO that nobody writes to, is a notice and holds nobody."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    here = Surroundings(None, {})
    sources = [FileAppears(name, str(tmp_path / name), here) for name in ("fifo", "folder")]
    with watching(*sources) as notices:
        assert {next_of(notices).source for _ in sources} == {"fifo", "folder"}


def test_a_file_that_is_written_after_it_was_made_is_read(tmp_path: Path) -> None:
    """`echo 12 > FILE` makes an empty file first."""
    path = tmp_path / "leave"
    source = FileAppears("file", str(path), Surroundings(None, {}))
    lines = iter(["", "12"])
    source._first_line = lambda: next(lines)  # type: ignore[method-assign]
    assert source._read(threading.Event()) == "12"


def test_a_file_that_appears_again_is_a_notice_again(tmp_path: Path) -> None:
    """Drained, taken back, drained again: three states of a node, two notices."""
    path = tmp_path / "leave"
    path.write_text("first")
    with watching(FileAppears("file", str(path), Surroundings(None, {}))) as notices:
        assert next_of(notices).reason.endswith("first")
        path.unlink()
        assert notices.get(0.6) is None
        path.write_text("second")
        assert next_of(notices).reason.endswith("second")


def test_who_made_the_file_finds_another_when_the_job_is_saved(tmp_path: Path) -> None:
    """PATH.saved appears once the image is durable, and not before."""
    path = tmp_path / "leave"
    path.touch()
    with watching(FileAppears("file", str(path), Surroundings(None, {}))) as notices:
        notice = next_of(notices)
        assert not (tmp_path / "leave.saved").exists()
        notice.on_saved()
        assert (tmp_path / "leave.saved").exists()
    assert path.exists()


# --- Kubernetes and its hook -------------------------------------------------------------------------------


def test_kubernetes_hears_sigterm_and_the_hook(tmp_path: Path) -> None:
    """Both of what a pod that is stopped is told; the file is where the variable says."""
    environ = {"CRCLI_NOTICE_FILE": str(tmp_path / "leave"), "CRCLI_GRACE": "30"}
    with Notices(["kubernetes"], environ=environ) as notices:
        (tmp_path / "leave").write_text("25")
        assert next_of(notices).reason == "the pod is stopped (preStop)"
        os.kill(os.getpid(), signal.SIGTERM)
        assert next_of(notices).reason == "the pod is stopped (SIGTERM)"
        assert notices.get(0.05) is None


# --- HTTP --------------------------------------------------------------------------------------------------


class Client:
    """Speaks to a hook."""

    def __init__(self, port: int) -> None:
        self._port = port

    def __call__(
        self, method: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=ENOUGH_S)
        connection.request(method, "/", body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, json.loads(content) if content.startswith(b"{") else content


def wait_until_open(port: int) -> None:
    """Return once somebody listens."""
    for _ in range(int(ENOUGH_S / 0.02)):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError("nobody listens")


@pytest.fixture
def hooked() -> Iterator[tuple[Notices, Client]]:
    """A hook that listens, with a grace time of a minute, and a client of it."""
    port = free_port()
    with Notices([f"http:127.0.0.1:{port}"], 60, environ={}) as notices:
        wait_until_open(port)
        yield notices, Client(port)


@pytest.mark.parametrize(
    ("body", "reason", "left_s", "urgency"),
    [
        (None, "told by HTTP", 60, Urgency.LEAVE),
        (b"", "told by HTTP", 60, Urgency.LEAVE),
        (b"{}", "told by HTTP", 60, Urgency.LEAVE),
        (b'{"reason": "drain", "seconds": 7}', "drain", 7, Urgency.LEAVE),
        (b'{"seconds": "7.5", "urgency": "risk"}', "told by HTTP", 7.5, Urgency.RISK),
    ],
)
def test_a_post_is_a_notice(
    hooked: tuple[Notices, Client], body: bytes | None, reason: str, left_s: float, urgency: Urgency
) -> None:
    """It is answered at once; what its body says is optional."""
    notices, client = hooked
    before = time.monotonic()
    status, _ = client("POST", body)
    assert status == 202
    notice = next_of(notices)
    assert (notice.reason, notice.urgency) == (reason, urgency)
    assert notice.deadline is not None
    assert before + left_s <= notice.deadline <= time.monotonic() + left_s


def test_a_get_tells_the_state(hooked: tuple[Notices, Client]) -> None:
    """Who posted can ask whether the job is saved; asking is no notice."""
    notices, client = hooked
    assert client("GET") == (200, {"state": "watching"})
    assert notices.get(0) is None
    assert client("POST") == (202, {"state": "told"})
    assert client("GET") == (200, {"state": "told"})
    next_of(notices).on_saved()
    assert client("GET") == (200, {"state": "saved"})


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"now!", {}, 400),
        (b"[]", {}, 400),
        (b"\xff", {}, 400),
        (b"[" * 60000, {}, 400),
        (b'{"seconds": -1}', {}, 400),
        (b'{"seconds": true}', {}, 400),
        (b'{"seconds": NaN}', {}, 400),
        (b'{"urgency": "panic"}', {}, 400),
        (b"", {"Content-Length": "9999999"}, 413),
        (b"", {"Content-Length": "-1"}, 413),
        (b"", {"Content-Length": "two"}, 413),
        (b"", {"Origin": "https://example.com"}, 403),
    ],
)
def test_what_makes_no_sense_is_no_notice(
    hooked: tuple[Notices, Client], body: bytes, headers: dict[str, str], status: int
) -> None:
    """It is refused and leaves everything as it was; a browser's page may not end a job either."""
    notices, client = hooked
    assert client("POST", body, headers)[0] == status
    assert client("GET") == (200, {"state": "watching"})
    assert notices.get(0) is None


def test_other_methods_are_refused(hooked: tuple[Notices, Client]) -> None:
    """Only POST gives notice."""
    notices, client = hooked
    assert client("PUT")[0] == client("DELETE")[0] == 501
    assert notices.get(0) is None


def test_other_hosts_are_refused_unless_named() -> None:
    """Loopback is served, and networks that the spec names."""
    (hook,) = choose(["http:0.0.0.0:80,allow=10.1.0.0/16"], Surroundings(), Hooks([]))
    assert isinstance(hook, HttpHook)
    for peer in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "10.1.2.3", "::ffff:10.1.2.3"):
        assert hook.admits(peer), peer
    for peer in ("10.2.0.1", "192.0.2.1", "fe80::1%eth0", "::ffff:192.0.2.1", "2001:db8::1"):
        assert not hook.admits(peer), peer
    (plain,) = choose(["http:0.0.0.0:80"], Surroundings(), Hooks([]))
    assert isinstance(plain, HttpHook) and not plain.admits("10.1.2.3")


def test_a_port_that_is_taken_is_a_finding() -> None:
    """The job is not held up by it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        reported = Reported()
        spec_of = f"http:127.0.0.1:{other.getsockname()[1]}"
        with Notices([spec_of], environ={}, found=reported) as notices:
            assert reported.wait().name == "notice-failed"
            assert notices.get(0) is None


def test_a_client_that_says_nothing_holds_nobody(hooked: tuple[Notices, Client]) -> None:
    """Others are served meanwhile."""
    notices, client = hooked
    port = client._port
    with socket.create_connection(("127.0.0.1", port)):
        assert client("POST")[0] == 202
        next_of(notices)


# --- Slurm -------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Put a `scontrol` into place that says so of the job; returns the environment of a job."""

    def put(says: str = "", requeue: str = "exit 0", **more: str) -> dict[str, str]:
        command = tmp_path / "bin" / "scontrol"
        command.parent.mkdir(exist_ok=True)
        command.write_text(
            f'#!/bin/sh\n[ "$1" != requeue ] || {{ echo "$@" >>{tmp_path}/requeued; {requeue}; }}\n{says}\n'
        )
        command.chmod(0o755)
        return {"SLURM_JOB_ID": "17", "PATH": f"{command.parent}:{os.environ['PATH']}", "TZ": "UTC", **more}

    return put


def in_slurm(epoch: float) -> str:
    """A time as Slurm writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(epoch))


def slurm_notice(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, grace_s: float | None) -> Notice:
    """What the source says of a SIGUSR1, with the environment of a job."""
    monkeypatch.setenv("PATH", environ["PATH"])
    with Notices(["slurm"], grace_s, environ=environ) as notices:
        os.kill(os.getpid(), signal.SIGUSR1)
        return next_of(notices)


@pytest.mark.parametrize(
    ("ends_in", "started_with", "grace_s", "expected"),
    [
        (20, 3600, None, 20),  # preempted: Slurm has moved the end
        (20, None, 5, 5),
        (3600, None, 30, 30),  # a Slurm that has not moved it
        (None, 40, None, 40),
        (None, None, 15, 15),
        (None, None, None, None),
    ],
)
def test_slurm_says_when_the_job_ends(
    scontrol: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    ends_in: float | None,
    started_with: float | None,
    grace_s: float | None,
    expected: float | None,
) -> None:
    """The earliest of what Slurm says now, what it said at the start, and the grace time."""
    before_wall, before = time.time(), time.monotonic()
    says = "exit 1" if ends_in is None else f"echo JobId=17 EndTime={in_slurm(before_wall + ends_in)} X=1"
    more = {} if started_with is None else {"SLURM_JOB_END_TIME": str(int(before_wall + started_with))}
    deadline = slurm_notice(scontrol(says, **more), monkeypatch, grace_s).deadline
    if expected is None:
        assert deadline is None
    else:
        assert deadline is not None
        assert before + expected - 1.1 <= deadline <= time.monotonic() + expected


@pytest.mark.parametrize(
    "says", ["echo garbage", "echo EndTime=Unknown", "sleep 60", "exit 127", "echo a=b=c ="]
)
def test_slurm_that_does_not_answer_well_delays_no_notice(
    scontrol: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    """What cannot be asked is left out; the notice comes."""
    assert slurm_notice(scontrol(says), monkeypatch, None).deadline is None


def test_slurm_puts_the_job_back_into_its_queue_when_it_is_saved(
    scontrol: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An exit code of 0 within the grace time would complete the job."""
    notice = slurm_notice(scontrol("echo JobState=RUNNING"), monkeypatch, None)
    assert not (tmp_path / "requeued").exists()
    notice.on_saved()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "TIMEOUT"])
def test_slurm_does_not_bring_back_what_was_cancelled(
    scontrol: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str
) -> None:
    """Between the notice and the image the user may have cancelled the job."""
    slurm_notice(scontrol(f"echo JobState={state}"), monkeypatch, None).on_saved()
    assert not (tmp_path / "requeued").exists()


def test_slurm_that_refuses_to_requeue_is_a_finding(
    scontrol: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image stands; what Slurm said is passed on."""
    environ = scontrol(
        "echo JobState=RUNNING", requeue="echo Requested operation is presently disabled; exit 1"
    )
    monkeypatch.setenv("PATH", environ["PATH"])
    with Notices(["slurm"], environ=environ) as notices:
        os.kill(os.getpid(), signal.SIGUSR1)
        next_of(notices).on_saved()
    assert [finding.name for finding in notices.findings] == ["notice-unanswered"]
    assert "presently disabled" in notices.findings[0].message


def test_slurm_times_are_local() -> None:
    """Slurm writes times without a zone."""
    assert _local(in_slurm(1795658400)) == 1795658400
    assert _local("Unknown") is None and _local("") is None and _local("N/A") is None


def test_slurm_leaves_sigterm_alone() -> None:
    """`scancel` sends it: such a job is saved, maybe, but never put back into the queue."""
    for name, number in (
        ("slurm", signal.SIGUSR1),
        ("slurm:USR2", signal.SIGUSR2),
        ("slurm:SIGHUP", signal.SIGHUP),
    ):
        (source,) = choose([name], Surroundings(None, {}), Hooks([]))
        assert isinstance(source, OnSignal) and source.signals == (number,)
    sigterm, *_ = (
        source
        for source in choose(
            ["auto"], Surroundings(None, {"SLURM_JOB_ID": "17"}, dmi="/nonexistent"), Hooks([])
        )
        if isinstance(source, OnSignal) and signal.SIGTERM in source.signals
    )
    with watching(sigterm) as notices:
        os.kill(os.getpid(), signal.SIGTERM)
        next_of(notices)
        assert notices._unsaved[0].on_saved is nothing


# --- which sources -----------------------------------------------------------------------------------------

MACHINES = {
    "aws": {"sys_vendor": "Amazon EC2"},
    "aws xen": {"sys_vendor": "Xen", "bios_version": "4.11.amazon"},
    "gcp": {"sys_vendor": "Google", "product_name": "Google Compute Engine"},
    "azure": {
        "sys_vendor": "Microsoft Corporation",
        "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77",
    },
    "hyper-v": {"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": "1234"},
    "chromebook": {"sys_vendor": "Google", "product_name": "Snappy"},
    "none": {},
}


@pytest.mark.parametrize(
    ("machine", "environ", "expected"),
    [
        ("none", {}, ["sigterm"]),
        ("aws", {}, ["aws", "sigterm"]),
        ("aws xen", {}, ["aws", "sigterm"]),
        ("gcp", {}, ["gcp", "gcp", "sigterm"]),
        ("azure", {}, ["azure", "sigterm"]),
        ("hyper-v", {}, ["sigterm"]),
        ("chromebook", {}, ["sigterm"]),
        ("aws", {"AWS_EC2_METADATA_DISABLED": "true"}, ["sigterm"]),
        ("none", {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1"}, ["aws", "sigterm"]),
        ("none", {"GCE_METADATA_HOST": "127.0.0.1:1"}, ["gcp", "gcp", "sigterm"]),
        ("none", {"CRCLI_AZURE_METADATA_ENDPOINT": "http://127.0.0.1:1"}, ["azure", "sigterm"]),
        ("none", {"SLURM_JOB_ID": "17"}, ["slurm", "sigterm"]),
        ("aws", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ["kubernetes", "kubernetes", "aws", "sigterm"]),
        ("none", {"SYSTEMD_EXEC_PID": str(os.getpid())}, ["systemd", "sigterm"]),
        ("none", {"SYSTEMD_EXEC_PID": "1"}, ["sigterm"]),
    ],
)
def test_auto_finds_out_what_applies(
    tmp_path: Path, machine: str, environ: dict[str, str], expected: list[str]
) -> None:
    """Told from the firmware and the environment; nothing is asked for it."""
    for name, value in MACHINES[machine].items():
        (tmp_path / name).write_text(value + "\n")
    assert names_of([], environ, str(tmp_path)) == expected
    assert names_of(["auto"], environ, str(tmp_path)) == expected


def test_auto_and_named_ones_go_together() -> None:
    """What is named is not taken twice, and the rest of `auto` stays."""
    assert names_of(["auto", "sigusr1", "file:/x"]) == ["sigterm", "sigusr1", "file"]
    environ = {"SLURM_JOB_ID": "17"}
    assert names_of(["slurm:USR2", "auto", "slurm:USR2"], environ) == ["slurm", "sigterm"]
    assert names_of(["sigterm", "auto"]) == ["sigterm"]
    assert names_of(["none"]) == []


@pytest.mark.parametrize(
    "specs",
    [
        ["sigkill"],
        ["sigterm:x"],
        ["aws:x"],
        [""],
        ["file"],
        ["file:leave"],
        ["file:/"],
        ["http"],
        ["http:"],
        ["http:80x"],
        ["http:127.0.0.1:0"],
        ["http:127.0.0.1:99999"],
        ["http:example.com:80"],
        ["http:127.0.0.1:80,allow=all"],
        ["slurm:KILL"],
        ["none", "auto"],
        ["pagerduty"],
    ],
)
def test_a_spec_that_makes_no_sense_is_wrong_usage(specs: list[str]) -> None:
    """Before anything has begun, and with the names that there are."""
    with pytest.raises(UsageError) as found:
        Notices(specs, environ={})
    assert "int()" not in found.value.message


def test_an_override_that_makes_no_sense() -> None:
    """It is wrong usage where the cloud was asked for, and a finding where `auto` came upon it."""
    environ = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "https://[::"}
    with pytest.raises(UsageError, match="AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        Notices(["aws"], environ=environ)
    notices = Notices([], environ=environ)
    assert "aws" not in [source.name for source in notices.sources]
    assert [finding.name for finding in notices.findings] == ["notice-failed"]


def test_a_number_of_seconds() -> None:
    """A grace time is one, and nothing else."""
    assert [seconds(one) for one in ("0", " 3.5 ", 7, "x", "inf", -1, True, None)] == [
        *(0, 3.5, 7),
        *[None] * 5,
    ]
    assert grace_of(None, {}) is None and grace_of(None, {"CRCLI_GRACE": ""}) is None
    assert grace_of(5, {"CRCLI_GRACE": "30"}) == 5 and grace_of(None, {"CRCLI_GRACE": "30"}) == 30
    with pytest.raises(UsageError, match="CRCLI_GRACE"):
        grace_of(None, {"CRCLI_GRACE": "30s"})
    with pytest.raises(UsageError, match="--grace"):
        grace_of(-1, {})


# --- the door ----------------------------------------------------------------------------------------------

PAGER = """
from crcli.notice import Notice, SourceKind
from crcli.plugins import hookimpl

class Pager:
    name = "pager"
    def watch(self, tell, stopped):
        tell(Notice("pager", "somebody was paged"))

def make(name, argument, surroundings):
    return [Pager()]

@hookimpl
def crcli_notice_sources(register):
    register(SourceKind(("{name}",), "a page", make, lambda here: {applies}))
"""


def install(folder: Path, code: str) -> None:
    """Install a plug-in, as pip leaves it."""
    module = f"pager_of_{folder.name.replace('-', '_')}"
    (folder / f"{module}.py").write_text(code)
    info = folder / "pager-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pager\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{names.GROUP}]\npager = {module}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages that this process, and crcli as a process, import from."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("CRCLI_NO_PLUGINS", raising=False)
    return tmp_path


def test_a_plug_in_brings_a_source(site: Path) -> None:
    """It is named like ours, and `auto` takes it where it says that it applies."""
    install(site, PAGER.format(name="pager", applies=True))
    with Notices(["pager"], environ={}) as notices:
        assert next_of(notices).reason == "somebody was paged"
    assert "pager" in [source.name for source in Notices([], environ={}).sources]
    assert [kind.names[0] for kind in known_kinds()].count("pager") == 1


def test_a_plug_in_takes_nobody_s_name(site: Path) -> None:
    """Two sources of one name would be one that is never heard: the second is refused, ours works."""
    install(site, PAGER.format(name="sigterm", applies=True))
    hooks = load_hooks()
    kinds = known_kinds(hooks)
    assert [finding.name for finding in hooks.findings] == ["plugin-failed"]
    assert "sigterm" in hooks.findings[0].message
    assert {kind.package for kind in kinds} == {"crcli"}


def test_a_plug_in_that_fails_where_it_is_asked_whether_it_applies(site: Path) -> None:
    """`auto` goes on without it; who names it learns why not."""
    install(site, PAGER.format(name="pager", applies="1 / 0"))
    notices = Notices([], environ={})
    assert "division" in notices.findings[0].message
    assert "sigterm" in [source.name for source in notices.sources]


def test_crcli_plugins_lists_sources(site: Path) -> None:
    """Ours and those of plug-ins, with who brings them."""
    install(site, PAGER.format(name="pager", applies=False))
    command = [sys.executable, "-m", "crcli", "plugins"]
    found = json.loads(
        subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    )
    ours = {one["name"] for one in found["notices"] if one["package"] == "crcli"}
    assert ours == {
        *("kubernetes", "slurm", "systemd", "aws", "gcp", "azure", "file", "http", "sigterm"),
    }
    assert [one["sees"] for one in found["notices"] if one["package"] != "crcli"] == ["a page"]
    table = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert "file:/PATH" in table and "a page" in table


def test_what_is_not_used_is_not_imported() -> None:
    """A job on a plain machine pays for no HTTP."""
    code = """
        import sys
        from crcli.notice import Notices
        with Notices(["sigterm", "file:/x"], environ={}) as notices:
            notices.get(0)
        heavy = {"http", "email", "urllib.request", "ssl", "pluggy", "subprocess", "boto3", "numpy", "typer"}
        assert not heavy.intersection(sys.modules), heavy.intersection(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)


def test_the_types_meet() -> None:
    """Every built-in source is what `Source` says."""
    environ = {"SLURM_JOB_ID": "1"}
    here = Surroundings(None, environ, dmi="/nonexistent")
    specs = ["kubernetes", "slurm", "systemd", "aws", "gcp", "azure", "file:/x", "http:127.0.0.1:80", *NAMES]
    sources: list[Source] = choose(specs, here, Hooks([]))
    assert all(isinstance(source.name, str) and callable(source.watch) for source in sources)
    assert isinstance(known_kinds(Hooks([]))[0], SourceKind)


def test_readme_has_every_source_and_its_time() -> None:
    """Each name that `--notice` takes stands in the table; what is said of times is what the code does."""
    from crcli.notice import gcp, kubernetes
    from crcli.notice.base import GRACE_VARIABLE
    from crcli.notice.places import AWS_ENDPOINT, AZURE_ENDPOINT, GCE_HOST

    readme = (ROOT / "README.md").read_text()
    section = readme.partition("**Notice that the node goes away.**")[2].partition("**Keep house.**")[0]
    rows = [line.split(" | ") for line in section.splitlines() if re.match(r"\| `[a-z]", line)]
    named = {name.partition(":")[0] for row in rows for name in row[0].strip("| ").replace("`", "").split()}
    assert named == {name for kind in known_kinds(Hooks([])) for name in kind.names}
    for word in (GRACE_VARIABLE, kubernetes.FILE_VARIABLE, kubernetes.DEFAULT_FILE, GCE_HOST):
        assert word in section
    assert AWS_ENDPOINT in section and AZURE_ENDPOINT in section
    (of_gcp,) = (row[2] for row in rows if row[0] == "| `gcp`")
    preempted, stopped = gcp.PREEMPTED["TRUE"], gcp.MAINTENANCE["TERMINATE_ON_HOST_MAINTENANCE"]
    assert of_gcp.strip(" |") == f"{preempted[2]:.0f} s; {stopped[2]:.0f} s"
