"""`crcli watch`: images of a running tree by and by, a dump in time when the node goes away, an honest word
when that cannot be."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.crcli import (
    Crcli,
    assert_goes_on,
    counted,
    counter,
    reap,
    tree_of,
    wait_until,
)
from tests.support.faults import give_to_another_thread
from tests.support.faulty_proxy import FaultyProxy, Throttle
from tests.support.programs import SLOWNESS, Program, spawn_python, then_wait
from tests.support.s3servers import start_moto

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

LIMIT_S = 60.0 * SLOWNESS


@dataclass
class Watch:
    """A `crcli watch --json` under way. `notice` gives it notice by a file."""

    process: subprocess.Popen[str]
    log: Path
    file: Path
    answer: str = field(default="")

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has said so far."""
        lines = [line for line in self.log.read_text().splitlines() if line.endswith("}")]
        return [json.loads(line) for line in lines]

    def named(self, name: str) -> list[dict[str, Any]]:
        """The events of this name so far."""
        return [event for event in self.events if event["event"] == name]

    def wait_for(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait for so many events of this name, and return the last."""
        wait_until(
            lambda: len(self.named(name)) >= count or self.process.poll() is not None,
            f"no {name}:\n{self.log.read_text()}", LIMIT_S,
        )  # fmt: skip
        assert len(self.named(name)) >= count, f"ended without {name}:\n{self.log.read_text()}"
        return self.named(name)[-1]

    def notice(self, seconds: float) -> None:
        """Give notice: so many seconds are left."""
        made = self.file.with_suffix(".new")
        made.write_text(f"{seconds}\n")
        made.rename(self.file)

    def ends(self, code: int) -> dict[str, Any]:
        """Wait for its end, and return its one JSON object."""
        out, _ = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == code, (
            f"exit {self.process.returncode}\n{out}\n{self.log.read_text()}"
        )
        found: dict[str, Any] = json.loads(out)
        return found


@contextmanager
def watching(crcli: Crcli, pid: int, *options: str, store: str = "", **popen: Any) -> Iterator[Watch]:
    """Watch a tree in images called `job`."""
    log, file = (
        crcli.folder / f"watch-{time.monotonic_ns()}.log",
        crcli.folder / f"notice-{time.monotonic_ns()}",
    )
    with log.open("w") as errors:
        arguments = ("--name", "job", "--store", store or crcli.store, "--notice", f"file:{file}", "--json")
        with crcli.start("watch", str(pid), *arguments, *options, stderr=errors, **popen) as process:
            watch = Watch(process, log, file)
            watch.wait_for("watching")
            yield watch


def images(crcli: Crcli) -> list[str]:
    """The images that there are."""
    found = crcli.run("ls", "--store", crcli.store, "--json").json["images"]
    return [one["image"] for one in found]


# --- images while it runs ----------------------------------------------------------------------------------


def test_images_are_taken_while_it_works(crcli: Crcli) -> None:
    """Every second one; the newest three stay; the tree runs on, and what it ends with is no failure."""
    with spawn_python(counter()) as program:
        with watching(crcli, program.pid, "--every", "1s") as watch:
            watch.wait_for("retired", 2)
            taken = [event["image"] for event in watch.named("image")]
            gone = [event["image"] for event in watch.named("retired")]
            assert gone == taken[: len(gone)]
            assert_goes_on(program)
            program.process.kill()
            done = watch.ends(0)
        assert done["outcome"] == "ended" and done["images"] >= 5
        left = images(crcli)
        assert left == sorted(left) and left[-1] == done["image"] and len(left) in (3, 4)
        program.process.wait()
        last = counted(program)[-1]
        crcli.restore("job")  # to the newest image: what came after it comes again
        wait_until(lambda: counted(program).count(last) == 2, "it does not go on")


def test_no_image_is_taken_of_a_tree_that_does_nothing(crcli: Crcli) -> None:
    """After the first one, which it has not yet."""
    with spawn_python(then_wait()) as program, watching(crcli, program.pid, "--every", "0.2s") as watch:
        watch.wait_for("skipped", 2)
        assert len(watch.named("image")) == 1


def test_what_is_pinned_or_anothers_stays(crcli: Crcli) -> None:
    """`--keep 1` removes neither an image by hand nor a pinned one, and `rm` refuses a pinned one as well."""
    with spawn_python(counter()) as program:
        by_hand = crcli.dump(program.pid, "--leave-running", "--name", "job")["image"]
        with watching(crcli, program.pid, "--every", "1s", "--keep", "1") as watch:
            watch.wait_for("image")
            pinned = crcli.run("pin", "job", "--store", crcli.store, "--json").json["image"]
            watch.wait_for("retired", 2)
        assert {by_hand, pinned} < set(images(crcli))
        error = crcli.run("rm", pinned, "--store", crcli.store, "--json", code=2).json["error"]
        assert error["code"] == "image-pinned"
        crcli.run("unpin", pinned, "--store", crcli.store)
        crcli.run("rm", pinned, "--store", crcli.store)


def test_a_name_is_watched_once(crcli: Crcli) -> None:
    """Who watches holds the name; another is refused, and nothing is touched."""
    with spawn_python(counter()) as program:
        with watching(crcli, program.pid):
            error = crcli.run(
                "watch", str(program.pid), "--name", "job", "--store", crcli.store, "--json", code=23
            ).json["error"]
            assert error["code"] == "name-claimed"
        assert_goes_on(program)


def test_what_cannot_be_watched_is_refused(crcli: Crcli) -> None:
    """No such process, a time that is none, a source that nobody knows."""
    with spawn_python(then_wait()) as program:
        pid = str(program.pid)
        for arguments in ((pid, "--every", "often"), (pid, "--mtbf", "1h"), (pid, "--notice", "oracle")):
            crcli.run("watch", *arguments, "--store", crcli.store, code=2)
        program.process.kill()
        program.process.wait()
        crcli.run("watch", pid, "--store", crcli.store, code=10)


# --- notices -----------------------------------------------------------------------------------------------


def test_on_notice_the_tree_is_saved(crcli: Crcli) -> None:
    """It is killed once its image is durable (75); the report says deadline, forecast and fact; restored, it
    goes on; and whoever gave notice is told."""
    with spawn_python(counter()) as program:
        tree = tree_of(program.pid)
        with watching(crcli, program.pid) as watch:
            watch.notice(30)
            done = watch.ends(75)
            assert Path(f"{watch.file}.saved").exists()
        reap(tree)
        assert done["outcome"] == "saved" and done["dump"]["outcome"] == "killed"
        timing = done["timing"]
        assert (
            0 < timing["fact"] < timing["deadline"] <= 30
            and timing["forecast"] > 0
            and timing["reserve"] == 1.0
        )
        crcli.restore("job")
        assert_goes_on(program)


def test_weights_that_are_not_there_do_not_keep_it_from_being_saved(crcli: Crcli) -> None:
    """It is said at once that there is nothing at that path; on notice all of the memory is stored."""
    with spawn_python(counter()) as program:
        tree = tree_of(program.pid)
        with watching(crcli, program.pid, "--weights", "/nowhere/model") as watch:
            assert watch.wait_for("finding")["finding"]["name"] == "weights-absent"
            watch.notice(30)
            watch.ends(75)
        reap(tree)
        crcli.restore("job")
        assert_goes_on(program)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_notices(crcli: Crcli, number: signal.Signals) -> None:
    """Of no deadline; those that mean the watcher do not harm its dump when they come again."""
    with spawn_python(counter()) as program:
        tree = tree_of(program.pid)
        with watching(crcli, program.pid, "--notice", number.name.lower()) as watch:
            watch.process.send_signal(number)
            watch.wait_for("saving")
            watch.process.send_signal(number)
            done = watch.ends(75)
        reap(tree)
        assert done["timing"]["deadline"] is None
        crcli.restore("job")
        assert_goes_on(program)


def test_a_signal_is_a_notice_whichever_thread_gets_it(crcli: Crcli) -> None:
    """The kernel may give a signal to a thread of the watcher that is just being started."""
    with spawn_python(counter()) as program:
        tree = tree_of(program.pid)
        with watching(crcli, program.pid, "--notice", "sigusr1") as watch:
            pid = watch.process.pid
            wait_until(
                lambda: give_to_another_thread(pid, signal.SIGUSR1), "all but the main thread block it"
            )
            watch.ends(75)
        reap(tree)
        crcli.restore("job")
        assert_goes_on(program)


def test_the_tree_may_be_left_running(crcli: Crcli) -> None:
    """With `--leave-running` it is saved and goes on."""
    with spawn_python(counter()) as program:
        with watching(crcli, program.pid, "--leave-running") as watch:
            watch.notice(30)
            assert watch.ends(75)["dump"]["outcome"] == "running"
        assert_goes_on(program)


def test_an_image_under_way_gives_way(crcli: Crcli) -> None:
    """Notice while a periodic image is taken: the tree is saved all the same, and nothing is lost."""
    with spawn_python(counter(kilobytes=8 << 10)) as program:
        tree = tree_of(program.pid)
        with watching(crcli, program.pid, "--every", "0.1s") as watch:
            watch.wait_for("image")
            watch.notice(30)
            watch.ends(75)
        reap(tree)
        crcli.restore("job")
        assert_goes_on(program)


def test_a_dump_that_fails_is_tried_again(crcli: Crcli) -> None:
    """The process that dumps is killed; another saves the tree."""
    with spawn_python(counter(kilobytes=8 << 10)) as program:
        tree = tree_of(program.pid)
        with watching(crcli, program.pid) as watch:
            watch.notice(60)
            watch.wait_for("saving")
            (dumper,) = psutil.Process(watch.process.pid).children()
            dumper.kill()
            watch.wait_for("retry")
            watch.ends(75)
            assert len(watch.named("saving")) == 2
        reap(tree)
        crcli.restore("job")
        assert_goes_on(program)


WAITS = textwrap.dedent("""
    import os, sys, time
    sys.path.insert(0, {root!r})
    from crcli import notify
    notify.on_checkpoint(lambda: time.sleep(60))
    os.write(1, b"ready\\n")
    while True:
        os.write(1, b"tick\\n")
        time.sleep(0.05)
    """).format(root=str(Path(__file__).parents[2]))
"""A program for which a dump waits for as long as it may."""


def ticks_on(program: Program) -> None:
    """Assert that such a program is running."""
    before = len(program.output)
    wait_until(lambda: len(program.output) > before, "it stands still")


def refused(watch: Watch, seconds: float, code: int = 11) -> dict[str, Any]:
    """See a notice answered, before it runs out, with the word that the tree is left behind."""
    told = watch.wait_for("notice")
    error: dict[str, Any] = watch.ends(code)["error"]
    timing = next(one for one in error["findings"] if one["name"] == "left-behind")["evidence"]
    assert told["event"] == "notice" and timing["fact"] < timing["deadline"] <= round(seconds, 3)
    return error


def test_a_tree_that_ends_while_it_is_saved_has_ended(crcli: Crcli) -> None:
    """Its end is its own; there is nothing to try again."""
    with spawn_python(WAITS) as program, watching(crcli, program.pid) as watch:
        watch.notice(60)
        watch.wait_for("saving")
        time.sleep(0.3)
        program.process.kill()
        program.process.wait()
        assert watch.ends(0)["outcome"] == "ended"


def test_a_store_that_is_gone_is_said_in_time(crcli: Crcli) -> None:
    """The tree runs on, the newest whole image is named, and nothing half-written is there."""
    with spawn_python(counter()) as program:
        with watching(crcli, program.pid, "--every", "1s") as watch:
            newest = watch.wait_for("image")["image"]
            folder = crcli.folder / "store"
            folder.rename(crcli.folder / "away")
            folder.write_text("no folder")
            watch.notice(5)
            error = refused(watch, 5, 30)
            folder.unlink()
            (crcli.folder / "away").rename(folder)
        assert error["state"] in ("untouched", "running") and newest.partition("@")[0] in error["message"]
        assert_goes_on(program)
        assert images(crcli)[-1] in error["message"]


def test_no_time_at_all_is_said_at_once(crcli: Crcli) -> None:
    """A notice that leaves no time is no reason to touch the tree."""
    with spawn_python(counter()) as program:
        with watching(crcli, program.pid) as watch:
            watch.notice(0.1)
            assert watch.ends(11)["error"]["state"] == "running"
            assert not watch.named("saving")
        assert_goes_on(program)


def test_the_watcher_can_be_killed(crcli: Crcli) -> None:
    """Even while it saves the tree: that runs on, and can be watched by another at once."""
    with spawn_python(counter(kilobytes=8 << 10)) as program:
        tree = tree_of(program.pid)
        with watching(crcli, program.pid) as watch:
            watch.notice(60)
            watch.wait_for("saving")
            dumpers = psutil.Process(watch.process.pid).children()
            time.sleep(random.random())
            watch.process.kill()
            watch.process.wait()
            reap(dumpers, LIMIT_S)
        if not program.process.poll() and tree[0].is_running() and tree[0].status() != psutil.STATUS_ZOMBIE:
            assert_goes_on(program)
            with watching(crcli, program.pid) as watch:
                watch.notice(60)
                watch.ends(75)
        reap(tree)
        crcli.restore("job")
        assert_goes_on(program)


# --- a slow store ------------------------------------------------------------------------------------------


BIG = """
import hashlib, itertools, os, time
memory = [os.urandom(1 << 20) for _ in range({mib})]
print('ready')
for number in itertools.count():
    print(number, hashlib.blake2b(memory[0], digest_size=8).hexdigest())
    time.sleep(0.02)
"""
"""A counter with so much memory."""


@contextmanager
def slow_store(crcli: Crcli, monkeypatch: pytest.MonkeyPatch, mib_per_s: float) -> Iterator[str]:
    """The URL of an S3 store that takes so much."""
    with start_moto() as server, FaultyProxy(server) as proxy:
        proxy.inject(Throttle(mib_per_s * 2**20), method="P", times=float("inf"))
        for name, value in (server.env | {"AWS_ENDPOINT_URL": proxy.endpoint_url}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("CRCLI_CACHE_SIZE", "0")
        yield server.url("slow")


def test_a_gibibyte_and_three_seconds(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a store that takes 20 MiB/s: an honest refusal before the deadline, the tree runs on, and there is
    no image, not even half of one."""
    with (
        slow_store(crcli, monkeypatch, 20) as store,
        spawn_python(BIG.format(mib=1024), ready_line="") as program,
    ):
        program.wait_for("ready", LIMIT_S)
        with watching(crcli, program.pid, store=store) as watch:
            time.sleep(1.5)  # for the dumper to be ready
            watch.notice(3 * SLOWNESS)
            error = refused(watch, 3 * SLOWNESS)
        assert error["state"] == "running"
        assert_goes_on(program)
        assert crcli.run("ls", "--store", store, "--json").json["images"] == []


def test_three_seconds_are_enough_with_an_image_before(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with images taken in time: what has changed since fits, or is refused in time, with the
    earlier image named."""
    with (
        slow_store(crcli, monkeypatch, 20) as store,
        spawn_python(BIG.format(mib=100)) as program,
    ):
        tree = tree_of(program.pid)
        with watching(crcli, program.pid, "--every", "1s", store=store) as watch:
            image = watch.wait_for("image")["image"]
            watch.notice(6)
            watch.process.wait(LIMIT_S)
            if watch.process.returncode == 75:
                saved = watch.ends(75)
                assert saved["timing"]["fact"] < 6
                reap(tree)
                restored = crcli.run("restore", saved["image"], "--store", store, "--json").json
                crcli.adopt(restored["host_pid"])
                assert_goes_on(program)
            else:
                error = refused(watch, 6)
                assert error["state"] == "running" and image in error["message"]
                assert_goes_on(program)
