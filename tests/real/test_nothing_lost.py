"""Whatever fails, and whoever is killed when: the tree runs as before, or a durable image brings it back.

Random moments come from a seed that a failure shows (`CRCLI_FAULT_SEED` repeats it); `CRCLI_FAULT_ROUNDS`
makes more of them. They are spread over the whole command, so that few rounds reach every phase.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crcli import kernel
from crcli.criu import netlock
from crcli.process.tree import child_pids
from tests.support.crcli import COMMAND_LIMIT_SECONDS, wait_until
from tests.support.faults import Attempt, Looks, Victim, end_marked, network_of_our_own, victim
from tests.support.programs import Program, kill_all, spawn_python
from tests.support.s3servers import start_moto

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
    pytest.mark.timeout(600),
]

ROUNDS = int(os.environ.get("CRCLI_FAULT_ROUNDS", "6"))
SOAK = ROUNDS > 10
SEED = int(os.environ.get("CRCLI_FAULT_SEED") or random.randrange(1 << 32))

Disturb = Callable[[Attempt], object]

DISTURBANCES: dict[str, Disturb] = {
    "SIGKILL": lambda attempt: attempt.send(signal.SIGKILL),
    "SIGTERM": lambda attempt: attempt.send(signal.SIGTERM),
    "any signal": lambda attempt: attempt.send(
        random.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    ),
    "criu": Attempt.kill_criu,
    "deep criu": Attempt.kill_deep_criu,
    "helper": Attempt.kill_helper,
}


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    """Nobody else's connections and packet filters."""
    with network_of_our_own():
        yield


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Victim]:
    """A tree in which everything moves."""
    with victim(tmp_path / "victim") as found:
        yield found


class Dumps:
    """Dumps of one tree, disturbed one after the other, and what has become of the tree each time."""

    def __init__(self, tree: Victim, folder: Path) -> None:
        self.tree = tree
        self.folder = folder
        self.number = 0
        self.before: Looks = tree.look()

    @property
    def name(self) -> str:
        """The name of the image of this round."""
        return f"{self.tree.folder.name}-{self.number}"

    @property
    def store(self) -> str:
        """The URL of the store."""
        return f"file://{self.folder}/store"

    def begin(self, *options: str, **environment: str) -> Attempt:
        """Start the next dump."""
        self.number += 1
        self.before = self.tree.look()
        arguments = ("dump", str(self.tree.pid), "--store", self.store, "--name", self.name, *options)
        return Attempt(self.folder, arguments, environment)

    def image_exists(self) -> bool:
        """Whether the image of this round is published."""
        return any((self.folder / "store" / "images" / self.name).glob("*"))

    def assert_nothing_lost(self, attempt: Attempt) -> None:
        """Wait for the end of the round: the tree runs on as before, or its image brings it back.

        Whichever it is, the command (if it was left to speak) has said so.
        """
        attempt.end()
        self.tree.reap()
        try:
            if self.tree.remains():
                self._assert_runs(attempt)
            else:
                self._assert_came_back(attempt)
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, {self.name}: {error}\n{attempt.describe()}") from error

    def _assert_runs(self, attempt: Attempt) -> None:
        if "--leave-running" not in attempt.arguments:  # that may have been done before it was disturbed
            assert attempt.code != 0, "the command said that the tree was killed"
        self.tree.assert_runs_as(self.before, parasite="CRIU" in attempt.out)
        attempt.assert_nothing_left()
        if error := attempt.json.get("error"):
            began = error["code"] != "interrupted"
            assert error["state"] == ("running" if began else "untouched")
            assert attempt.code in ((11, 30) if began else (129, 130, 143))
        else:
            assert attempt.code < 0, "it ended without a word"

    def _assert_came_back(self, attempt: Attempt) -> None:
        assert self.image_exists(), "the tree is gone, and there is no image of it"
        assert attempt.code in (0, -signal.SIGKILL)
        attempt.assert_nothing_left(locked=True)
        back = Attempt(self.folder, ("restore", self.name, "--store", self.store))
        back.end(but=self.tree)
        assert back.code == 0, back.describe()
        self.tree.pid = back.json["host_pid"]
        self.tree.assert_goes_on()
        assert not netlock.tables(), "the restore left the lock"


def died_with_criu(attempt: Attempt) -> bool:
    """Whether CRIU was killed in the one moment in which nobody can help (see crcli.criu.standby).

    The command must have said so: exit 12, the tree dead.
    """
    error = attempt.json.get("error", {})
    return attempt.code == 12 and error["state"] == "dead" and "CRIU was killed while" in error["message"]


def ran_and_died(attempt: Attempt) -> bool:
    """Whether a restore was whole, and its tree ended then (its pid 1 was killed): its files are its own.

    The command must have said so: exit 21, the tree dead.
    """
    return attempt.code == 21 and attempt.json["error"]["state"] == "dead"


def moments(rounds: int, seconds: float) -> list[float]:
    """Return random moments, one in each of as many equal parts of the time, in random order."""
    source = random.Random(SEED)
    spread = [(number + source.random()) * seconds / rounds for number in range(rounds)]
    source.shuffle(spread)
    return spread


# --- dumps that are disturbed ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["SIGKILL", "any signal", "criu", "deep criu", "helper"])
def test_a_dump_disturbed_at_any_moment_loses_nothing(what: str, tmp_path: Path) -> None:
    """At random moments of a dump crcli is killed or told to end, or CRIU or a helper is killed."""
    with victim(tmp_path / "first") as tree:
        dumps = Dumps(tree, tmp_path)
        whole = dumps.begin()
        whole.wait_for(lambda: tree.state() == "t")
        frozen_after = time.monotonic() - whole.began
        dumps.assert_nothing_lost(whole)
        left = moments(ROUNDS, whole.ended - whole.began - frozen_after + 0.05)
    losses = 0
    while left:
        with victim(tmp_path / f"victim-{losses}") as tree:
            losses += _disturb_until_lost(what, Dumps(tree, tmp_path), left)
    assert losses <= 1 + ROUNDS // 5, "CRIU died too often on the threshold of a process"


def _disturb_until_lost(what: str, dumps: Dumps, left: list[float]) -> int:
    """Disturb a dump at each moment; stop, and return 1, when the tree dies as nobody can help it."""
    while left:
        attempt = dumps.begin()
        attempt.wait_for(lambda: dumps.tree.state() == "t")
        time.sleep(left.pop())
        DISTURBANCES[what](attempt)
        attempt.end()
        if died_with_criu(attempt):
            return 1
        dumps.assert_nothing_lost(attempt)
    return 0


PHASES: dict[str, Callable[[Attempt, Dumps], object]] = {
    "CRIU has begun": lambda attempt, dumps: attempt.criu(),
    "the tree is frozen": lambda attempt, dumps: dumps.tree.state() == "t",
    "CRIU's code is inside": lambda attempt, dumps: "CRIUMFD" in _maps(dumps.tree.pid),
    "the trial runs": lambda attempt, dumps: attempt.deep_criu(),
    "the image is on its way": lambda attempt, dumps: any((dumps.folder / "store" / ".tmp").glob("*")),
    "the image is published": lambda attempt, dumps: dumps.image_exists(),
}


@pytest.mark.parametrize("what", ["SIGKILL", "SIGTERM", "criu"])
def test_a_dump_disturbed_in_any_phase_loses_nothing(what: str, tree: Victim, tmp_path: Path) -> None:
    """The same, in each phase of a dump at its beginning."""
    dumps = Dumps(tree, tmp_path)
    for phase, is_reached in PHASES.items():
        if (what, phase) == ("criu", "CRIU's code is inside"):
            continue  # the moment in which nobody can help is too near
        attempt = dumps.begin()
        attempt.wait_for(lambda is_reached=is_reached, attempt=attempt: is_reached(attempt, dumps))
        DISTURBANCES[what](attempt)
        dumps.assert_nothing_lost(attempt)


def _maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


def test_a_dump_is_deaf_while_it_undoes(tree: Victim, tmp_path: Path) -> None:
    """More signals, of every kind, that arrive while the first one is being dealt with change nothing."""
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin()
    attempt.wait_for(lambda: tree.state() == "t")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTERM) * 20:
        attempt.send(number)
        time.sleep(0.001)
    dumps.assert_nothing_lost(attempt)
    assert attempt.code == 11


def test_everything_killed_at_once_loses_nothing(tree: Victim, tmp_path: Path) -> None:
    """crcli and CRIU killed together while the tree stands frozen: it runs as before."""
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin()
    attempt.wait_for(attempt.deep_criu)
    criu = attempt.criu()
    assert criu, "there is no CRIU, and 0 would be all of us"
    attempt.send(signal.SIGKILL)
    os.kill(criu, signal.SIGKILL)
    dumps.assert_nothing_lost(attempt)


def test_a_tree_is_not_touched_before_somebody_stands_by(tree: Victim, tmp_path: Path) -> None:
    """A standby that gets no processor for a while: the tree runs until it does, whoever is killed then."""
    dumps = Dumps(tree, tmp_path)
    for ending in (Attempt.kill_criu, lambda attempt: None):
        attempt = dumps.begin()
        attempt.wait_for(lambda attempt=attempt: standby_of(attempt))
        standby = standby_of(attempt)
        os.kill(standby, signal.SIGSTOP)
        attempt.wait_for(attempt.criu)
        time.sleep(1)
        assert tree.state() in ("S", "R"), "the tree was touched, and nobody stood by"
        ending(attempt)
        os.kill(standby, signal.SIGCONT)
        dumps.assert_nothing_lost(attempt)
    assert attempt.code == 0, attempt.describe()


def test_a_standby_that_is_killed_before_it_watches_holds_nothing_up(tree: Victim, tmp_path: Path) -> None:
    """It has not read yet whom it is to watch: the dump is made without it."""
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin("--leave-running")
    attempt.wait_for(lambda: standby_of(attempt))
    standby = standby_of(attempt)
    os.kill(standby, signal.SIGSTOP)
    attempt.wait_for(attempt.criu)
    time.sleep(1)
    os.kill(standby, signal.SIGKILL)
    attempt.end()
    assert attempt.code == 0, attempt.describe()
    tree.assert_runs_as(dumps.before)
    attempt.assert_nothing_left()


def standby_of(attempt: Attempt) -> int:
    """The pid of the command's standby, the only child with a session of its own; 0 when there is none."""
    return next((pid for pid in child_pids(attempt.pid) if os.getsid(pid) == pid), 0)


@pytest.mark.parametrize("outcome", ["--leave-running", "--leave-stopped"])
def test_a_tree_that_is_left_is_whole(outcome: str, tree: Victim, tmp_path: Path) -> None:
    """Left running, or stopped and continued, a tree goes on with all its connections, and no lock stays."""
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin(outcome)
    attempt.end()
    assert attempt.code == 0, attempt.describe()
    if outcome == "--leave-stopped":
        assert set(tree.remains().values()) == {"T"}
        for pid in tree.pids():
            os.kill(pid, signal.SIGCONT)
    tree.assert_runs_as(dumps.before)
    attempt.assert_nothing_left()


@pytest.mark.parametrize("outcome", ["--leave-running", "--leave-stopped"])
def test_a_tree_that_was_to_be_left_survives_the_death_of_criu(
    outcome: str, tree: Victim, tmp_path: Path
) -> None:
    """CRIU killed during the trial of a dump that leaves the tree: it runs as before."""
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin(outcome)
    attempt.wait_for(attempt.deep_criu)
    attempt.kill_criu()
    dumps.assert_nothing_lost(attempt)


@pytest.mark.skipif(
    tuple(map(int, os.uname().release.split(".")[:2])) < (6, 15),
    reason="the kernel tells nothing of a process that was reaped",
)
def test_whose_time_is_over_did_not_die_with_criu(tmp_path: Path) -> None:
    """A shell's `sleep` ends as soon as it is let go, and the shell reaps it: the tree is not called dead."""
    with subprocess.Popen(
        ["sh", "-c", "while sleep 0.03; do :; done"], stdin=subprocess.DEVNULL, start_new_session=True
    ) as shell:
        words = ("dump", str(shell.pid), "--store", f"file://{tmp_path}/store", "--name", "shell")
        attempt = Attempt(tmp_path, words, {})
        try:
            attempt.wait_for(attempt.deep_criu)
            attempt.kill_criu()
            attempt.end()
            assert attempt.code == 11 and attempt.json["error"]["state"] == "running", attempt.describe()
            assert shell.poll() is None
        finally:
            kill_all(shell.pid)


# --- stores that fail --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def refused(dumps: Dumps, attempt: Attempt, *words: str) -> None:
    """Assert that a dump ended with a store error, the tree running as before."""
    dumps.assert_nothing_lost(attempt)
    assert attempt.code == 30, attempt.describe()
    assert any(word in attempt.json["error"]["message"] for word in words), attempt.out


def test_a_full_disk_loses_nothing(tree: Victim, tmp_path: Path, small_disk: Path) -> None:
    """A store that runs out of space in the middle refuses the dump, and holds no part of it."""
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin("--store", f"file://{small_disk}/store")
    refused(dumps, attempt, "No space left")
    assert [path for path in (small_disk / "store").rglob("*") if path.is_file()] == []


def test_a_disk_that_becomes_read_only_loses_nothing(tree: Victim, tmp_path: Path, small_disk: Path) -> None:
    """A store that takes nothing more once the tree is frozen refuses the dump."""
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin("--store", f"file://{small_disk}/store")
    attempt.wait_for(lambda: tree.state() == "t")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=False)
    refused(dumps, attempt, "Read-only", "No space left")


def test_a_store_that_is_removed_loses_nothing(tree: Victim, tmp_path: Path) -> None:
    """A store whose directory goes away while packs are written: no image, or one that is whole."""
    dumps = Dumps(tree, tmp_path)
    for moment in (0.0, 0.02, 0.05):
        attempt = dumps.begin()
        attempt.wait_for(lambda: tree.state() == "t")
        attempt.wait_for(lambda: any((tmp_path / "store" / ".tmp").glob("*")))
        time.sleep(moment)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        dumps.assert_nothing_lost(attempt)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="dies"),
        pytest.param(signal.SIGSTOP, id="hangs", marks=pytest.mark.skipif(not SOAK, reason="takes minutes")),
    ],
)
def test_a_server_that_fails_loses_nothing(how: signal.Signals, tree: Victim, tmp_path: Path) -> None:
    """An S3 server that dies, or answers no more, while the tree is frozen: the dump is refused."""
    dumps = Dumps(tree, tmp_path)
    with start_moto() as server:
        attempt = dumps.begin("--store", server.url("images"), **server.env, AWS_MAX_ATTEMPTS="2")
        attempt.wait_for(lambda: tree.state() == "t")
        server.process.send_signal(how)
        refused(dumps, attempt, "no connection", "does not answer")


# --- trees and hosts that resist ---------------------------------------------------------------------------


def test_a_criu_that_dies_at_once_loses_nothing(tree: Victim, tmp_path: Path) -> None:
    """A CRIU that ends before it has done anything: the tree was never touched."""
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin(CRCLI_CRIU="/bin/false")
    dumps.assert_nothing_lost(attempt)
    assert attempt.code == 11


def test_a_tree_held_by_a_debugger_loses_nothing(tree: Victim, tmp_path: Path) -> None:
    """A process of the tree that somebody else begins to trace meanwhile: CRIU refuses, the dump says why."""
    debugger = """
        import ctypes, sys, time
        pid = int(open("{folder}/pid").read())
        ctypes.CDLL(None).ptrace(0x4206, pid, None, None)
        print("ready")
        while True: time.sleep(60)
        """
    dumps = Dumps(tree, tmp_path)
    attempt = dumps.begin()
    (tmp_path / "pid").write_text(str(tree.pids()[-1]))
    attempt.wait_for(attempt.criu)
    with spawn_python(debugger.replace("{folder}", str(tmp_path))):
        attempt.end()
    dumps.assert_nothing_lost(attempt)


FORKING = """
    import os, time
    print("ready")
    numbers = 0
    while True:
        if os.fork() == 0:
            if numbers % 3 == 0 and os.fork() == 0:
                time.sleep(0.001)
            os._exit(0)
        numbers += 1
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            pass
        if numbers % 50 == 0:
            print(numbers)
    """


@pytest.fixture
def forking() -> Iterator[Program]:
    """A tree that starts and ends processes all the time; it is gone afterwards, wherever it has got to."""
    mark = f"FORKING_MARK={uuid.uuid4().hex}"
    kernel.become_subreaper()
    with spawn_python(FORKING, env=os.environ | dict([mark.split("=")])) as program:
        try:
            yield program
        finally:
            end_marked(mark)


def test_a_tree_that_forks_madly_is_taken_whole_or_left(forking: Program, tmp_path: Path) -> None:
    """A tree that starts and ends processes all the time is dumped and comes back, or runs on."""
    for number in range(3):
        arguments = ("dump", str(forking.pid), "--store", f"file://{tmp_path}/store", "--name", "mad")
        attempt = Attempt(tmp_path, arguments)
        attempt.end()
        attempt.assert_nothing_left()
        if attempt.code == 0:
            assert forking.process.wait(10) is not None
            back = Attempt(tmp_path, ("restore", "mad", "--store", f"file://{tmp_path}/store"))
            out, _ = back.process.communicate(timeout=COMMAND_LIMIT_SECONDS)
            assert back.code == 0, out
        else:
            assert attempt.json["error"]["state"] in ("running", "untouched"), attempt.describe()
        assert_prints_on(forking, f"it stands still after dump {number}")
        if attempt.code == 0:
            return


def assert_prints_on(program: Program, otherwise: str) -> None:
    """Wait until a program, or what was restored of it, has printed more."""
    lines = len(program.output)
    wait_until(lambda: len(program.output) > lines, otherwise)


# --- restores that are disturbed ---------------------------------------------------------------------------


class Restores:
    """Restores of one image, disturbed one after the other; before each, files stand as at the dump."""

    def __init__(self, tree: Victim, folder: Path) -> None:
        self.tree = tree
        self.folder = folder
        self.saved = folder / "saved"
        done = Attempt(folder, ("dump", str(tree.pid), "--store", self.store, "--name", "image"))
        done.end()
        assert done.code == 0, done.describe()
        tree.end()
        shutil.copytree(tree.folder, self.saved)

    @property
    def store(self) -> str:
        """The URL of the store."""
        return f"file://{self.folder}/store"

    def clear(self) -> None:
        """End what runs of the tree, and remove its files, as on a host that it comes to."""
        self.tree.end()
        for name in netlock.tables():
            netlock.remove(name)
        shutil.rmtree(self.tree.folder, ignore_errors=True)

    def begin(self, *options: str, image: str = "image", **environment: str) -> Attempt:
        """Start the next restore."""
        return Attempt(self.folder, ("restore", image, "--store", self.store, *options), environment)

    def assert_whole_or_nothing(self, attempt: Attempt) -> None:
        """Wait for the end of the round: the whole tree runs, or nothing is left of it, files included."""
        attempt.end(but=self.tree)
        try:
            if remains := self.tree.remains():
                assert attempt.code in (0, -signal.SIGKILL, -signal.SIGTERM), "the command said otherwise"
                assert len(remains) == 3 and "t" not in remains.values(), f"a part is left: {remains}"
                self.tree.assert_goes_on()
            else:
                assert attempt.code != 0, "the command said that it runs"
                left = [] if ran_and_died(attempt) else list(self.tree.folder.rglob("*"))
                assert not left, f"left: {left}"
            attempt.assert_nothing_left()
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}: {error}\n{attempt.describe()}") from error

    def assert_works(self) -> None:
        """Assert that a plain restore works now."""
        self.clear()
        attempt = self.begin()
        attempt.end(but=self.tree)
        assert attempt.code == 0, attempt.describe()
        self.tree.assert_goes_on()
        self.clear()


@pytest.fixture
def restores(tree: Victim, tmp_path: Path) -> Restores:
    """An image to restore, its tree gone."""
    return Restores(tree, tmp_path)


@pytest.mark.parametrize("what", ["SIGKILL", "any signal", "deep criu", "helper"])
def test_a_restore_disturbed_at_any_moment_leaves_all_or_nothing(what: str, restores: Restores) -> None:
    """At random moments of a restore crcli is killed or told to end, or CRIU is killed."""
    restores.clear()
    whole = restores.begin("--pid-namespace", "new")
    whole.wait_for(lambda: len(restores.tree.remains()) == 3)
    took = time.monotonic() - whole.began
    restores.assert_whole_or_nothing(whole)
    for number, moment in enumerate(moments(ROUNDS, took / 2)):
        restores.clear()
        eagerly = (number // 2) % 2 == 0
        attempt = restores.begin(
            "--pid-namespace", ("host", "new")[number % 2], "--eager" if eagerly else "--lazy"
        )
        time.sleep(took / 2 + moment)
        DISTURBANCES[what](attempt)
        restores.assert_whole_or_nothing(attempt)
    restores.assert_works()


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """Remove the second half of a file."""
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "a chunk is damaged": lambda manifest, pack: flip(pack),
    "a pack is cut short": lambda manifest, pack: cut(pack),
    "a pack is missing": lambda manifest, pack: pack.unlink(),
    "the manifest is altered": lambda manifest, pack: flip(manifest),
    "the manifest is cut short": lambda manifest, pack: cut(manifest),
    "the pack is another image's": lambda manifest, pack: pack.write_bytes(_other(pack).read_bytes()),
    "the manifest is another image's": lambda manifest, pack: manifest.write_bytes(
        next((manifest.parents[1] / "other").iterdir()).read_bytes()
    ),
}


def _other(path: Path) -> Path:
    """The largest pack but this one."""
    files = [one for one in path.parents[1].rglob("*") if one.is_file() and one != path]
    return max(files, key=lambda one: one.stat().st_size)


def test_an_image_that_is_not_what_it_claims_starts_nothing(restores: Restores, tmp_path: Path) -> None:
    """However an image is damaged or exchanged, the restore refuses it with exit 22 and leaves nothing."""
    code = "import os, time; block = os.urandom(1 << 20); print('ready'); time.sleep(600)"
    with spawn_python(code) as other:
        done = Attempt(tmp_path, ("dump", str(other.pid), "--store", restores.store, "--name", "other"))
        done.end()
        assert done.code == 0, done.describe()
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "store", whole)
    for damage, do in DAMAGES.items():
        restores.clear()
        shutil.rmtree(tmp_path / "store")
        shutil.copytree(whole, tmp_path / "store")
        manifest = next((tmp_path / "store" / "images" / "image").iterdir())
        packs = [path for path in (tmp_path / "store" / "packs").rglob("*") if path.is_file()]
        do(manifest, max(packs, key=lambda path: path.stat().st_size))
        attempt = restores.begin()
        restores.assert_whole_or_nothing(attempt)
        assert attempt.code == 22, f"{damage}: {attempt.describe()}"
        assert not restores.tree.remains()
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(whole, tmp_path / "store")
    restores.assert_works()


def test_a_store_that_goes_away_during_a_restore_leaves_nothing(restores: Restores, tmp_path: Path) -> None:
    """The store's directory vanishes while its image is read: nothing is left, or all had been read."""
    for moment in (0.0, 0.01, 0.03):
        restores.clear()
        attempt = restores.begin()
        attempt.wait_for(attempt.deep_criu)
        time.sleep(moment)
        (tmp_path / "store").rename(tmp_path / "gone")
        restores.assert_whole_or_nothing(attempt)
        assert attempt.code in (0, 22, 30, 31), attempt.describe()
        (tmp_path / "gone").rename(tmp_path / "store")
    restores.assert_works()


@pytest.mark.parametrize("killed", [False, True], ids=["time limit", "SIGKILL"])
def test_a_lock_that_another_process_holds_does_not_hang_a_restore(killed: bool, restores: Restores) -> None:
    """The restore is refused. CRIU would wait for the lock for ever: where it is to try all the same the
    restore does not, nor does CRIU outlive a killed crcli."""
    restores.clear()
    shutil.copytree(restores.saved, restores.tree.folder)
    with (restores.tree.folder / "lock").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused = restores.begin()
        refused.end()
        assert refused.code == 20, refused.describe()
        assert refused.json["error"]["findings"][0]["name"] == "lock-taken"
        forced = ("--force-guard", "lock-taken")
        attempt = restores.begin(*forced, CRCLI_RESTORE_LIMIT="60" if killed else "2")
        if killed:
            attempt.wait_for(restores.tree.remains)
            time.sleep(0.5)
            attempt.send(signal.SIGKILL)
        attempt.end(but=restores.tree)
        assert attempt.code == (-signal.SIGKILL if killed else 21), attempt.describe()
        assert not restores.tree.remains()
        attempt.assert_nothing_left()
    restores.assert_works()


def test_files_that_are_replaced_are_kept_whatever_happens(restores: Restores) -> None:
    """`--files image` keeps what stood there; a restore that fails puts it back, and never writes over it."""
    restores.clear()
    shutil.copytree(restores.saved, restores.tree.folder)
    board = restores.tree.folder / "board"
    board.write_bytes(b"today's")
    for _ in range(2):
        attempt = restores.begin("--files", "image", CRCLI_CRIU="/bin/false")
        attempt.end()
        assert attempt.code == 21, attempt.describe()
        assert board.read_bytes() == b"today's"
    attempt = restores.begin("--files", "image")
    attempt.end(but=restores.tree)
    assert attempt.code == 0, attempt.describe()
    restores.tree.end()
    board.write_bytes(b"tomorrow's")
    again = restores.begin("--files", "image")
    again.end(but=restores.tree)
    assert again.code == 0, again.describe()
    kept = {path.read_bytes() for path in restores.tree.folder.glob("board.before-*")}
    assert kept == {b"today's", b"tomorrow's"}
    restores.clear()
