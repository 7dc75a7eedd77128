"""What CRIU finds out about the kernel, kept where /run is no tmpfs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crcli import kernel
from crcli.criu import kerndat
from crcli.criu.binary import criu_command
from crcli.criu.question import remove_question
from crcli.criu.workspace import Workspace
from crcli.image.manifest import load
from crcli.image.names import parse_image
from crcli.store.file import FileStore
from tests.support.crcli import Crcli, assert_goes_on, counter
from tests.support.faults import Attempt
from tests.support.programs import spawn_python

pytestmark = [
    pytest.mark.skipif(os.getuid() != 0, reason="needs root"),
    pytest.mark.skipif(not kerndat.is_wanted(), reason="CRIU keeps it itself: /run is a tmpfs"),
]


def kept(crcli: Crcli) -> list[Path]:
    """What was kept."""
    return sorted((crcli.folder / "state").glob("kernel-*"))


def test_a_trial_leaves_it_for_the_next(crcli: Crcli) -> None:
    """The first trial asks the kernel and leaves the answers; the host's /run stays as it is."""
    before = os.path.exists(kerndat.PATH)
    with spawn_python(counter()) as program:
        crcli.dump(program.pid, "--leave-running")
        (first,) = kept(crcli)
        found = first.read_bytes(), first.stat().st_mtime_ns
        crcli.dump(program.pid, "--leave-running")
        (second,) = kept(crcli)
        assert (second.read_bytes(), second.stat().st_mtime_ns) == found
        assert first.stat().st_mode & 0o777 == 0o600
        assert_goes_on(program)
    assert os.path.exists(kerndat.PATH) == before


@pytest.mark.parametrize("damage", [b"", b"x", b"y" * 4096])
def test_damage_is_no_harm(crcli: Crcli, damage: bytes) -> None:
    """CRIU asks again where the answers are not of its own making, and they are replaced."""
    with spawn_python(counter()) as program:
        crcli.dump(program.pid, "--leave-running")
        (path,) = kept(crcli)
        good = path.read_bytes()
        path.write_bytes(damage)
        crcli.dump(program.pid, "--leave-running")
        assert len(path.read_bytes()) == len(good)
        assert_goes_on(program)


def test_a_tree_with_a_file_in_run_is_tried_with_it(crcli: Crcli, tmp_path: Path) -> None:
    """A file, a folder and a socket right below /run are found by the trial, and restored."""
    path = f"/run/crcli-test-{os.getpid()}"
    code = f"file = open({path!r}, 'a')\nimport socket\nsock = socket.socket(socket.AF_UNIX)\n"
    code += f"sock.bind({path + '.sock'!r})\nsock.listen()\n" + counter()
    try:
        with spawn_python(code) as program:
            crcli.move(program.pid)
            assert_goes_on(program)
    finally:
        for one in (path, path + ".sock"):
            Path(one).unlink(missing_ok=True)


def test_criu_takes_what_was_asked_for_ahead() -> None:
    """Asked before a tree is frozen, a CRIU leaves answers that the next one takes for its own."""
    before = os.path.exists(kerndat.PATH)
    child = os.fork()
    if child == 0:
        os._exit(0 if _takes_answers() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert os.path.exists(kerndat.PATH) == before


def _takes_answers() -> bool:
    signal.alarm(20)
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    kerndat.lay_out(kerndat.ask(), ())
    return _loads_answers()


def test_the_new_run_is_the_old_one() -> None:
    """Folders, files, sockets and links are the same objects; what is mounted below is there as well."""
    child = os.fork()
    if child == 0:
        os._exit(0 if _same_after_laying_out() else 1)
    assert os.waitpid(child, 0)[1] == 0


def _same_after_laying_out() -> bool:
    signal.alarm(20)
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    names = [name for name in os.listdir("/run") if not name.startswith("criu.kdat")]
    status = os.stat("/run")
    before = {name: _what(name) for name in names}
    kerndat.lay_out(b"answers", ())
    after = os.stat("/run")
    same = {name: _what(name) for name in names} == before
    with open("/run/criu.kdat", "rb") as file:
        told = file.read() == b"answers"
    return same and told and (status.st_mode, status.st_uid) == (after.st_mode, after.st_uid)


def _what(name: str) -> object:
    path = f"/run/{name}"
    if os.path.islink(path):
        return os.readlink(path)
    status = os.stat(path)
    return status.st_dev, status.st_ino


# --- what dumps and restores find ---------------------------------------------------------------------------


class HeldCriu:
    """A CRIU that does not begin, where `hold` is there, before it finds answers, and `go` is there too.

    What it finds it leaves in `found`.
    """

    def __init__(self, folder: Path) -> None:
        self.hold, self.found, self.go = (folder / name for name in ("hold", "found", "go"))
        self.command = folder / "criu"
        self.command.write_text(
            f"""#!/bin/sh
                if [ -e {self.hold} ]; then
                    until cp {kerndat.PATH} {self.found}.new 2>/dev/null || [ -e {self.go} ]
                    do sleep 0.01; done
                    mv {self.found}.new {self.found}
                    until [ -e {self.go} ]; do sleep 0.01; done
                fi
                exec {" ".join(criu_command())} "$@"
            """
        )
        self.command.chmod(0o700)


@pytest.fixture
def held_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldCriu]:
    """crcli's CRIU from now on. One that a failed test has left waiting goes on in the end, and ends."""
    criu = HeldCriu(tmp_path)
    monkeypatch.setenv("CRCLI_CRIU", str(criu.command))
    yield criu
    criu.go.touch()


def wait_for(path: Path) -> None:
    """Return when it is there."""
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


@pytest.mark.parametrize("namespace", ["host", "new"])
def test_a_restore_finds_what_a_trial_has_left(crcli: Crcli, held_criu: HeldCriu, namespace: str) -> None:
    """Its CRIU finds the answers; nobody else finds anything, nor does anything stay."""
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid)["image"]
        program.process.wait()
        report = assert_finds(crcli, held_criu, "restore", image, "--pid-namespace", namespace)
        crcli.adopt(report["host_pid"])
        assert_goes_on(program)


@pytest.mark.parametrize("outcome", ["running", "killed"])
def test_a_dump_finds_what_a_trial_has_left(crcli: Crcli, held_criu: HeldCriu, outcome: str) -> None:
    """The same; it is no part of the image."""
    with spawn_python(counter()) as program:
        crcli.dump(program.pid, "--leave-running")
        words = ["--leave-running"] if outcome == "running" else []
        report = assert_finds(crcli, held_criu, "dump", str(program.pid), *words)
        if outcome == "killed":
            program.process.wait()
            crcli.restore(report["image"])
        assert_goes_on(program)
    skeleton = load(FileStore(str(crcli.folder / "store")), parse_image(report["image"])[1]).skeleton
    assert "criu.kdat" not in {file.name for file in skeleton}


def assert_finds(crcli: Crcli, criu: HeldCriu, *words: str) -> dict[str, Any]:
    """Run a command: its CRIU finds what is kept. Return its report."""
    before = os.path.exists(kerndat.PATH)
    criu.hold.touch()
    with crcli.start(*words, "--store", crcli.store, "--json") as command:
        wait_for(criu.found)
        assert os.path.lexists(kerndat.PATH) and os.path.exists(kerndat.PATH) == before
        criu.go.touch()
        out, err = command.communicate(timeout=60)
    assert command.returncode == 0, err
    criu.hold.unlink()
    assert criu.found.read_bytes() == kept(crcli)[0].read_bytes()
    assert os.path.lexists(kerndat.PATH) == before
    return json.loads(out)


@pytest.mark.parametrize("what", ["dump", "restore"])
def test_a_command_that_is_killed_leaves_no_answers(crcli: Crcli, held_criu: HeldCriu, what: str) -> None:
    """Who is left removes what was there for CRIU."""
    before = os.path.lexists(kerndat.PATH)
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid, *["--leave-running"] * (what == "dump"))["image"]
        if what == "restore":
            program.process.wait()
        held_criu.hold.touch()
        with crcli.start(
            what, {"dump": str(program.pid)}.get(what, image), "--store", crcli.store
        ) as command:
            wait_for(held_criu.found)
            command.kill()
            command.wait()
        held_criu.go.touch()
        end = time.monotonic() + 30
        while os.path.lexists(kerndat.PATH) != before and time.monotonic() < end:
            time.sleep(0.01)
        assert os.path.lexists(kerndat.PATH) == before
        if what == "dump":
            assert_goes_on(program)


def test_a_criu_takes_answers_that_it_is_lent_and_no_other_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link leads to a folder that this CRIU has open; for one that has not there is nothing."""
    (tmp_path / "state").mkdir()
    monkeypatch.setenv("CRCLI_STATE_DIR", str(tmp_path / "state"))
    answers = kerndat.Answers()
    (tmp_path / "root/run").mkdir(parents=True)
    (tmp_path / "root/run/criu.kdat").write_bytes(_asked())
    answers.learn(str(tmp_path / "root"))
    with Workspace.create() as folder:
        os.symlink("/proc/self/fd/1000000/criu.kdat", kerndat.PATH)  # of a crcli that was killed
        try:
            kerndat.lend(folder)
            assert _loads_answers(pass_fds=[folder.fd])
            assert not _loads_answers()
        finally:
            kerndat.take_back(folder)
        assert folder.names() == [] and not os.path.lexists(kerndat.PATH)


def _asked() -> bytes:
    """What a CRIU finds out now."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        kernel.unshare(kernel.CLONE_NEWNS)
        kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        os.write(writer, kerndat.ask())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        found = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return found


def _loads_answers(**popen: Any) -> bool:
    command = [*criu_command(), "check", "-v4", "--feature", "pidfd_store"]
    done = subprocess.run(command, capture_output=True, check=False, **popen)
    return b"Loaded kdat cache" in done.stdout + done.stderr


# --- a CRIU that is killed while it asks --------------------------------------------------------------------


@contextmanager
def question(root: str = "/") -> Iterator[Path]:
    """A folder in /tmp with something mounted there, as CRIU has it for a tenth of a millisecond."""
    path = Path(tempfile.mkdtemp(prefix=".criu.move_mount_set_group.", dir=os.path.join(root, "tmp")))
    kernel.mount("criu.move_mount_set_group", str(path), "tmpfs", 0)
    try:
        yield path
    finally:
        if path.exists():  # nobody else's, whose CRIU was killed beside this, either
            kernel.unmount(str(path))
            path.rmdir()


def test_an_older_question_is_another_crius(tmp_path: Path) -> None:
    """Only what was asked since goes, with its mount."""
    (tmp_path / "tmp").mkdir()
    with question(str(tmp_path)) as older:
        time.sleep(0.1)
        since = time.time()
        with question(str(tmp_path)) as newer:
            remove_question(since, str(tmp_path))
            assert older.exists() and not newer.exists() and str(newer) not in kernel.mount_points()


def assert_cut_short(attempt: Attempt, code: int) -> None:
    """Kill the command's CRIU: what looks like a question of its is gone."""
    assert attempt.wait_for(lambda: attempt.criu() or attempt.deep_criu()), attempt.describe()
    attempt.send(signal.SIGSTOP)  # so that CRIU, which asks it first, begins nothing
    criu = attempt.criu() or attempt.deep_criu()
    assert criu, "there is no CRIU, and 0 would be all of us"
    with question() as asked:
        os.kill(criu, signal.SIGKILL)
        attempt.send(signal.SIGCONT)
        attempt.end()
        assert attempt.code == code, attempt.describe()
        assert not asked.exists() and str(asked) not in kernel.mount_points()


def test_a_dump_whose_criu_is_killed_while_it_asks_leaves_nothing(tmp_path: Path) -> None:
    """What CRIU had in /tmp is gone when the command has ended, and the tree runs."""
    with spawn_python(counter()) as program:
        assert_cut_short(Attempt(tmp_path, ("dump", str(program.pid), "--store", f"file://{tmp_path}/x")), 11)
        assert_goes_on(program)


@pytest.mark.parametrize("namespace", ["host", "new"])
def test_a_restore_whose_criu_is_killed_while_it_asks_leaves_nothing(crcli: Crcli, namespace: str) -> None:
    """The same, below a warden."""
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid)["image"]
        program.process.wait()
        words = ("restore", image, "--store", crcli.store, "--pid-namespace", namespace)
        assert_cut_short(Attempt(crcli.folder, words), 21)
