"""A job that is given notice of every kind, at random times, again and again, ends as if there had been none.
And what a vigil does that `crcli watch` does not show."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import socket
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from crcli.notice.base import Notice, Urgency
from crcli.notice.notices import Notices
from crcli.pipeline.stages import DumpOptions, Outcome
from crcli.pipeline.vigil import Event, Keeping, Vigil, VigilEnd, Why
from crcli.process.identity import identify
from crcli.records import replace
from tests.support.crcli import Crcli, assert_goes_on, counter, crcli_in, reap, tree_of, wait_until
from tests.support.programs import SLOWNESS, Program, spawn_python
from tests.support.raw_criu import started_with

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

ROUNDS = int(os.environ.get("CRCLI_NOTICE_ROUNDS", "12"))
"""How many notices the job is given; more of them take two seconds each."""

LIMIT_S = 60.0 * SLOWNESS

JOB = textwrap.dedent("""
    import hashlib, os, sys, time
    state, memory = hashlib.sha256(b"seed"), bytearray(os.urandom(1 << 20))
    print("ready")
    step = 0
    while not os.path.exists({stop!r}) or step % 50:
        state.update(b"%d" % step)
        reader, writer = os.pipe()
        if step % 10 == 0 and not (child := os.fork()):
            os.write(writer, hashlib.sha256(b"%d" % step).digest())
            os._exit(0)
        if step % 10 == 0:
            state.update(os.read(reader, 32))
            os.waitpid(child, 0)
        os.close(reader), os.close(writer)
        memory += b"%d" % step
        step += 1
        time.sleep(0.005)
    print(f"result={{step}} {{state.hexdigest()}} {{hashlib.sha256(memory[1 << 20:]).hexdigest()}}")
    """)
"""A job of steps, with children, a state and memory that grows; its result says how many steps there were."""


def expected(steps: int) -> str:
    """The result of a job of so many steps that nobody disturbed."""
    import hashlib

    state, memory = hashlib.sha256(b"seed"), b"".join(b"%d" % step for step in range(steps))
    for step in range(steps):
        state.update(b"%d" % step)
        if step % 10 == 0:
            state.update(hashlib.sha256(b"%d" % step).digest())
    return f"{steps} {state.hexdigest()} {hashlib.sha256(memory).hexdigest()}"


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Notifier:
    """Gives notice in one of several ways, chosen by lot."""

    def __init__(self, lot: random.Random, folder: Path) -> None:
        self.lot = lot
        self.file = folder / "leave"
        self.port = free_port()

    @property
    def sources(self) -> list[str]:
        """All of them, at once."""
        named = ["sigterm", "sigusr1", f"file:{self.file}", f"http:127.0.0.1:{self.port}"]
        return [word for name in named for word in ("--notice", name)]

    def give(self, watcher: int) -> str:
        """Give notice, mostly of enough time; return how."""
        ways: dict[str, Callable[[], None]] = {
            "sigterm": lambda: os.kill(watcher, signal.SIGTERM),
            "sigusr1": lambda: os.kill(watcher, signal.SIGUSR1),
            "file": self._write,
            "http": self._post,
            "two": lambda: self._both(watcher),
        }
        way = self.lot.choice(sorted(ways))
        ways[way]()
        return way

    def _both(self, watcher: int) -> None:
        self._post()
        os.kill(watcher, signal.SIGTERM)

    def _seconds(self) -> float:
        return self.lot.choice((1.0, 3.0, 20.0, 60.0))

    def _write(self) -> None:
        made = self.file.with_suffix(".new")
        made.write_text(f"{self._seconds()}\n")
        made.rename(self.file)

    def _post(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("POST", "/", json.dumps({"seconds": self._seconds()}))
            connection.getresponse().read()
        finally:
            connection.close()


def test_no_notice_at_any_time_changes_the_result(tmp_path: Path) -> None:
    """A job is watched, given notice at a random moment, restored, and so on; left behind where the time was
    too short, it runs on. In the end its result is what it would have been."""
    seed = int(os.environ.get("CRCLI_NOTICE_SEED", str(random.randrange(10**6))))
    lot = random.Random(seed)
    stop = tmp_path / "stop"
    codes: list[int] = []
    with crcli_in(tmp_path) as crcli, spawn_python(JOB.format(stop=str(stop))) as program:
        pid = program.pid
        for number in range(ROUNDS):
            tree = tree_of(pid)
            code, way = _one_round(crcli, pid, lot)
            codes.append(code)
            said = f"round {number} of seed {seed}: {way} ended with {code}"
            assert code in (75, 11), said
            if code == 75:
                reap(tree)
                pid = crcli.restore("job")["host_pid"]
            assert psutil.Process(pid).status() != psutil.STATUS_ZOMBIE, said
        stop.touch()
        wait_until(lambda: "result=" in program.output, f"no result, seed {seed}:\n{program.output}", LIMIT_S)
        result = program.value_of("result")
        assert result == expected(int(result.split()[0])), f"seed {seed}"
        assert 75 in codes


def _one_round(crcli: Crcli, pid: int, lot: random.Random) -> tuple[int, str]:
    """Watch a job, give notice after a while, and return how that ended."""
    notifier = Notifier(lot, crcli.folder)
    every = lot.choice(("", "0.3s", "1s"))
    options = ["--every", every] if every else []
    notifier.file.unlink(missing_ok=True)
    with crcli.start(
        "watch", str(pid), "--name", "job", "--store", crcli.store, *notifier.sources, *options
    ) as watch:  # fmt: skip
        assert watch.stderr is not None
        for line in watch.stderr:
            if "watching process" in line:
                break
        time.sleep(lot.random() * 1.5)
        way = notifier.give(watch.pid)
        watch.communicate(timeout=LIMIT_S)
        return watch.returncode, f"{way} {options}"


# --- with notices of our own -------------------------------------------------------------------------------


class Said(Notices):
    """Notices that the test gives."""

    def __init__(self) -> None:
        super().__init__(["none"])

    def say(self, seconds: float | None, urgency: Urgency = Urgency.LEAVE) -> None:
        """Give notice; so many seconds are left."""
        deadline = None if seconds is None else time.monotonic() + seconds
        self._tell(Notice("test", "the test says so", urgency, deadline))


class Kept:
    """A vigil in a thread of its own; `end` is there once `wait` has returned."""

    def __init__(self, keeping: Keeping, pid: int, notices: Said, ended: int) -> None:
        self.events: list[Event] = []
        self.end: VigilEnd | None = None
        self.vigil = Vigil(keeping, identify(pid), notices, self.events.append)
        self._thread = threading.Thread(target=self._keep, args=(ended,))
        self._thread.start()

    def _keep(self, ended: int) -> None:
        self.end = self.vigil.keep(ended)

    def wait(self) -> VigilEnd:
        """Wait for its end."""
        self._thread.join(LIMIT_S)
        assert self.end is not None, self.events
        return self.end

    def wait_for(self, name: str, count: int = 1) -> Event:
        """Wait for so many events of that name."""
        wait_until(lambda: len(self.named(name)) >= count, f"no {name}: {self.events}", LIMIT_S)
        return self.named(name)[-1]

    def named(self, name: str) -> list[Event]:
        """The events of this name so far."""
        return [event for event in self.events if event.name == name]


@contextmanager
def kept(crcli: Crcli, program: Program, **more: Any) -> Iterator[tuple[Kept, Said]]:
    """A vigil over a program, whose dumps are called `job`."""
    dump = DumpOptions(pid=0, store=crcli.store, name="job", job={"identity": "test"})
    ended = os.pidfd_open(program.pid)
    with Said() as notices:
        found = Kept(replace(Keeping(dump), **more), program.pid, notices, ended)
        try:
            yield found, notices
        finally:
            found.vigil.interrupt()
            found.wait()
            os.close(ended)


@pytest.fixture(autouse=True)
def _places(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """What crcli keeps on this host is kept in the test's folder."""
    for name, value in crcli.environment.items():
        monkeypatch.setenv(name, value)


TOLD = textwrap.dedent("""
    import os, sys, time
    sys.path.insert(0, {root!r})
    from crcli import notify
    notify.on_checkpoint(lambda: (os.write(1, b"told\\n"), time.sleep(60)))
    os.write(1, b"ready\\n")
    while True:
        os.write(1, b"tick\\n")
        time.sleep(0.05)
    """).format(root=str(Path(__file__).parents[2]))
"""A program for which a dump waits, for a tenth of the time that it has."""


def ticks_on(program: Program) -> None:
    """Assert that such a program is running."""
    before = len(program.output)
    wait_until(lambda: len(program.output) > before, "it stands still")


SHARES_MEMORY = """
import ctypes, signal
libc = ctypes.CDLL(None)
libc.shmat.restype, libc.shmdt.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
segment = libc.shmget(0, ctypes.c_size_t(4096), 0o1600)
at = libc.shmat(segment, None, 0)
libc.shmctl(segment, 0, None)
signal.signal(signal.SIGUSR1, lambda *_: libc.shmdt(at))
"""
"""Memory of System V, outside an IPC namespace, which goes when the program does, or on a signal."""


def test_what_cannot_be_saved_is_said_before_there_is_notice(
    crcli: Crcli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree that is dumped on notice only is looked at again and again; it is watched on all the same. What
    is in the way is said once, and when it is not there any more."""
    monkeypatch.setattr("crcli.pipeline.vigil._LOOKS_S", (0.1,))
    with spawn_python(SHARES_MEMORY + counter()) as program, kept(crcli, program) as (vigil, _):
        said = vigil.wait_for("cannot-save")
        assert "System V" in said.message and said.data["hint"] in said.message
        looks = vigil.vigil._looks
        wait_until(lambda: vigil.vigil._looks > looks + 1, "it is not looked at again")
        assert_goes_on(program)
        os.kill(program.pid, signal.SIGUSR1)
        vigil.wait_for("can-save")
        assert len(vigil.events) == 2 and vigil.end is None and not (crcli.folder / "store").exists()


def test_nothing_is_said_of_a_tree_that_can_be_saved(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was looked at, and is dumped as ever when there is notice: also when it is being looked at."""
    monkeypatch.setattr("crcli.pipeline.vigil._LOOKS_S", (0.1, 900.0))
    for is_early in (False, True):
        with spawn_python(counter()) as program, kept(crcli, program) as (vigil, notices):
            tree = tree_of(program.pid)
            watch = vigil.vigil
            wait_until(lambda watch=watch: watch._looks > 0, "it is not looked at")
            if not is_early:
                wait_until(lambda watch=watch: watch._under_way is None, "the look has no end")
                assert not vigil.events
            notices.say(30)
            assert vigil.wait().why is Why.SAVED, vigil.events
            assert not vigil.named("cannot-save")
            reap(tree)


def test_nothing_is_said_of_a_tree_that_ends_while_it_is_looked_at(
    crcli: Crcli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it cannot be saved any more is nothing to be done about: its end is said soon."""
    monkeypatch.setattr("crcli.pipeline.vigil._LOOKS_S", (0.1,))
    told, tell = os.pipe()
    dump = DumpOptions(pid=0, store=crcli.store, name="job")
    with spawn_python(counter()) as program, Said() as notices:
        vigil = Kept(Keeping(dump), program.pid, notices, told)
        wait_until(lambda: vigil.vigil._looks > 0, "it is not looked at")
        program.process.kill()
        looks = vigil.vigil._looks
        wait_until(lambda: vigil.vigil._looks > looks + 2, "it is not looked at again")
        os.close(tell)
        assert vigil.wait().why is Why.ENDED and not vigil.events
    os.close(told)


def test_a_look_does_not_take_back_what_it_cannot_see(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU fails with this tree, which only a dump finds: that it could be saved is not said afterwards."""
    monkeypatch.setattr("crcli.pipeline.vigil._LOOKS_S", (0.1,))
    with (
        spawn_python(counter()) as program,
        started_with("exec setpriv --bounding-set=-sys_ptrace", tmp_path),
        kept(crcli, program) as (vigil, notices),
    ):
        notices.say(None, Urgency.RISK)
        vigil.wait_for("image-failed")
        looks = vigil.vigil._looks
        wait_until(lambda: vigil.vigil._looks > looks + 2, "it is not looked at again")
        assert not vigil.named("can-save") and not vigil.named("cannot-save")


def test_a_second_notice_may_come_closer(crcli: Crcli) -> None:
    """The dump under way then has until the earlier deadline, and no longer."""
    with spawn_python(TOLD) as program, kept(crcli, program) as (vigil, notices):
        notices.say(600)
        program.wait_for("told")
        notices.say(1)
        end = vigil.wait()
        assert end.why is Why.LEFT_BEHIND and end.timing["fact"] < 600 / 10
        assert end.error is not None and end.error.exit_code == 11
        ticks_on(program)


def test_a_later_deadline_changes_nothing(crcli: Crcli) -> None:
    """The earliest one counts, whoever said it."""
    with spawn_python(counter()) as program, kept(crcli, program) as (vigil, notices):
        tree = tree_of(program.pid)
        notices.say(30)
        notices.say(900)
        end = vigil.wait()
        reap(tree)
        assert end.why is Why.SAVED and end.timing["deadline"] <= 30.0


def test_far_away_is_no_trouble(crcli: Crcli) -> None:
    """Times that no timer of the kernel takes are waited for, and a notice may be of such a deadline."""
    with spawn_python(counter()) as program, kept(crcli, program, every_s=1e9) as (vigil, notices):
        tree = tree_of(program.pid)
        notices.say(1e300)
        assert vigil.wait().why is Why.SAVED, vigil.events
        reap(tree)


def test_a_risk_brings_an_image_and_no_end(crcli: Crcli) -> None:
    """The tree runs on and is watched on; a second warning about what has not moved brings nothing new."""
    with spawn_python(counter()) as program, kept(crcli, program) as (vigil, notices):
        notices.say(None, Urgency.RISK)
        image = vigil.wait_for("image").data["image"]
        assert_goes_on(program)
        notices.say(None, Urgency.RISK)
        assert vigil.wait_for("image", 2).data["image"] > image
        assert vigil.end is None


def test_who_lost_the_name_stops(crcli: Crcli) -> None:
    """Interrupted while it dumps, a vigil ends without an image, and the tree runs on."""
    with spawn_python(TOLD) as program, kept(crcli, program) as (vigil, notices):
        notices.say(600)
        program.wait_for("told")
        vigil.vigil.interrupt()
        assert vigil.wait().why is Why.STOPPED
        ticks_on(program)
        assert not (crcli.folder / "store" / "images").exists()


def test_a_dump_that_does_not_stop_is_killed(crcli: Crcli) -> None:
    """An image whose store hangs gives way to the dump that counts."""
    with (
        spawn_python(counter(kilobytes=4 << 10)) as program,
        kept(crcli, program, every_s=0.5) as (vigil, notices),
    ):
        tree = tree_of(program.pid)
        vigil.wait_for("image")
        dumper = psutil.Process(vigil.vigil._dumper.pid)
        while vigil.vigil._under_way is None:
            time.sleep(0.001)
        dumper.suspend()
        notices.say(12)
        end = vigil.wait()
        assert end.why is Why.SAVED, end
        reap([*tree])
        crcli.restore("job")
        assert_goes_on(program)


def test_a_tree_that_ends_is_no_failure(crcli: Crcli) -> None:
    """Nor is an image that was being taken just then."""
    with spawn_python(counter()) as program, kept(crcli, program, every_s=0.1) as (vigil, _notices):
        vigil.wait_for("image")
        program.process.kill()
        end = vigil.wait()
        assert end.why is Why.ENDED and end.images >= 1 and end.image


def test_saved_even_if_the_dumper_does_not_live_to_say_so(
    crcli: Crcli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tree is dead and its image is there: the store knows, if the dumper did not live to answer."""
    from crcli.pipeline import dumper as module

    heard = module.Dumper.hear

    def hear_nothing(self: module.Dumper, progress: Any = None) -> Any:
        if (report := heard(self, progress)) is None or report["outcome"] != Outcome.KILLED:
            return report
        self._asked = DumpOptions(pid=program.pid, store=crcli.store, name="job")
        raise self._lost()

    with spawn_python(counter()) as program, kept(crcli, program) as (vigil, notices):
        monkeypatch.setattr(module.Dumper, "hear", hear_nothing)
        tree = tree_of(program.pid)
        notices.say(60)
        end = vigil.wait()
        assert end.why is Why.SAVED and end.report is None and end.image.startswith("job@")
        reap(tree)
        crcli.restore(end.image)
        assert_goes_on(program)
