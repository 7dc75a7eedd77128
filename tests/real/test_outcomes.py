"""What the two commands leave behind: the tree's fate, exit codes, copies side by side, other pids."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from crcli import kernel
from crcli.criu import netlock
from crcli.image import lease
from crcli.image.lease import Lease
from crcli.image.manifest import load
from crcli.image.names import pack_key, parse_image
from crcli.image.owner import describe_owner
from crcli.store import open_store
from tests.support.crcli import (
    COMMAND_LIMIT_SECONDS,
    ROOT,
    Crcli,
    assert_goes_on,
    counted,
    counter,
    end,
    install_plugin,
    launched,
    reap,
    tree_of,
    wait_until,
)
from tests.support.faults import network_of_our_own
from tests.support.programs import Program, spawn_python, then_wait

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

ENDS_WITH_7 = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
    signal.signal(signal.SIGUSR1, lambda number, frame: print("usr1"))
    print("ready")
    while True: time.sleep(60)
    """

WHAT_IS_IMPORTED = """
    import sys
    from crcli.__main__ import main
    from crcli.pipeline.dump import _Dump
    answer = _Dump._on_notify
    def note_imports(dump, script, receiver):
        try:
            return answer(dump, script, receiver)
        finally:
            if script == "pre-dump":
                dump.imported = set(sys.modules)
            elif script == "post-dump":
                print("late:", *sorted(set(sys.modules) - dump.imported), file=sys.stderr)
    _Dump._on_notify = note_imports
    sys.exit(main())
    """
"""A dump that says what it has imported between the freeze and the thaw."""

FAMILY = """
    import os, time
    child = os.fork()
    print(f"{'child' if child == 0 else 'parent'}={os.getpid()}")
    if child == 0:
        while True: time.sleep(60)
    print("ready")
    number = 0
    while True:
        os.kill(child, 0)
        number += 1
        print(f"number={number} pid={os.getpid()} child={child}")
        time.sleep(0.01)
    """


def goes_on(program: Program) -> None:
    """Assert that a program writes on."""
    before = program.output
    wait_until(lambda: len(program.output) > len(before) + 100, "it stands still")


def counts_on_from(image: str, crcli: Crcli, program: Program) -> None:
    """Assert that a counter which is ended comes back from its image, and comes as far as it had come."""
    end(tree_of(program.pid))
    last = counted(program)[-1]
    crcli.restore(image)
    wait_until(lambda: counted(program).count(last) == 2, "the copy does not come so far")


def untraced(pid: int) -> bool:
    """Whether nobody traces a process, and it is not stopped."""
    status = Path(f"/proc/{pid}/status").read_text()
    return "TracerPid:\t0\n" in status and "State:\tT" not in status and "State:\tt" not in status


def tables_in(network: int) -> set[str]:
    """CRIU's filter tables in the network of this descriptor."""

    def look() -> set[str]:
        kernel.setns(network, kernel.CLONE_NEWNET)
        return netlock.tables()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(look).result()


# --- what becomes of the tree ------------------------------------------------------------------------------


def test_leave_running_leaves_it_running(crcli: Crcli) -> None:
    """The tree counts on without a gap, untraced, and its image restores after its end."""
    with spawn_python(counter()) as program:
        report = crcli.dump(program.pid, "--leave-running")
        assert report["outcome"] == "running"
        assert untraced(program.pid)
        assert_goes_on(program)
        counts_on_from(report["image"], crcli, program)


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that a plug-in removes while the tree is frozen, as the tree would before its trial begins.

    When the dump is made again the plug-in sends a signal, if the file `SIGNAL WHOM` is beside that one.
    """
    path, site = tmp_path / "opened", tmp_path / "site"
    code = f"""
        import os, pathlib, signal
        from crcli.plugins import hookimpl
        opened = pathlib.Path({str(path)!r})

        @hookimpl
        def crcli_dump_frozen(target):
            opened.unlink(missing_ok=True)

        @hookimpl
        def crcli_dump_before_freeze(target):
            if not opened.exists():
                for number, whom in (file.name.split() for file in opened.parent.glob("* *")):
                    os.kill(os.getpid() if whom == "crcli" else target.pid, int(number))

        @hookimpl
        def crcli_dump_failed(target, failure):
            if (opened.parent / "9 tree").exists():
                os.kill(target.pid, signal.SIGKILL)
        """
    install_plugin(site, "remover", code, monkeypatch)
    return path


def test_a_tree_that_outruns_its_trial_is_dumped_again(crcli: Crcli, opened: Path) -> None:
    """What it had open is gone when the trial looks for it: it is frozen again, until the trial is over."""
    with spawn_python(f"file = open({str(opened)!r}, 'w+')\n{counter()}") as program:
        report = crcli.dump(program.pid, "--leave-running")
        assert report["outcome"] == "running"
        (again,) = (finding for finding in report["findings"] if finding["name"] == "trial-again")
        assert report["frozen_ms"] > again["evidence"]["frozen_ms"] > 0
        assert untraced(program.pid)
        assert_goes_on(program)
        counts_on_from(report["image"], crcli, program)


def test_a_dump_is_announced_as_the_image_that_it_becomes(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when dated after one of a host whose clock is ahead: else `gc` may wait for it in vain."""
    store, seen = tmp_path / "store", tmp_path / "seen"
    code = f"""
        import os, pathlib
        from crcli.plugins import hookimpl

        @hookimpl
        def crcli_dump_frozen(target):
            pathlib.Path({str(seen)!r}).write_text(" ".join(os.listdir({str(store / "sessions")!r})))
        """
    with spawn_python(counter()) as program:
        first = crcli.dump(program.pid, "--leave-running", "--name", "x")["id"]
        folder = store / "images" / "x"
        (folder / first).rename(folder / f"2999{first[4:]}")
        install_plugin(tmp_path / "site", "watcher", code, monkeypatch)
        second = crcli.dump(program.pid, "--leave-running", "--name", "x")["id"]
        assert second.startswith("2999") and seen.read_text() == second


MAKES_A_PROGRAM = """
import os, time
print("ready")
while True:
    with open(PATH, "wb") as file:
        os.fchmod(file.fileno(), 0o755)
        file.write(b"#!/bin/sh")
        file.flush()
        before = time.monotonic()
        while time.monotonic() < before + 0.01:  # until it was frozen
            before = time.monotonic()
            time.sleep(0.0002)
    try:
        os.waitpid(os.posix_spawn(PATH, [PATH], {}), 0)
        print("started")
    except OSError as error:
        print(error)
"""


def test_a_program_that_is_being_made_can_be_started_at_once(crcli: Crcli, tmp_path: Path) -> None:
    """A tree that goes on finds it open for writing nowhere else: what its trial has restored is gone."""
    with spawn_python(MAKES_A_PROGRAM.replace("PATH", repr(str(tmp_path / "program")))) as program:
        for number in range(5):
            crcli.dump(program.pid, "--leave-running")
            wait_until(lambda number=number: program.output.count("\n") > number + 1, "it was not frozen")
        assert set(program.output.split("\n")) == {"ready", "started", ""}


def test_a_dump_that_is_made_again_can_be_interrupted(crcli: Crcli, opened: Path) -> None:
    """A signal that comes in the second dump is heard as it is in the first."""
    (opened.parent / f"{int(signal.SIGTERM)} crcli").touch()
    with spawn_python(f"file = open({str(opened)!r}, 'w+')\n{counter()}") as program:
        error = crcli.dump(program.pid, "--leave-running", code=128 + signal.SIGTERM)["error"]
        assert error["code"] == "interrupted"
        assert_goes_on(program)


def test_a_tree_that_ends_before_it_is_dumped_again_is_told_so(crcli: Crcli, opened: Path) -> None:
    """It was frozen, and is gone: not said to be untouched, and nobody else is dumped in its place."""
    (opened.parent / "9 tree").touch()
    with spawn_python(f"file = open({str(opened)!r}, 'w+')\n{counter()}") as program:
        error = crcli.dump(program.pid, "--leave-running", code=12)["error"]
        assert "trial" in error["message"] and error["state"] == "dead"


def test_a_connection_that_was_used_before_it_was_accepted_is_waited_for(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU gives up on a message to who has not accepted the connection yet (an X client's first, say): when
    that came after the tree was looked at, it is dumped again."""
    code = """
        import os, signal, time
        from crcli.pipeline import dump
        from crcli.plugins import hookimpl

        calls = []

        @hookimpl
        def crcli_dump_before_freeze(target):
            dump._FRESH_S = 1e9
            if not calls:
                os.kill(target.pid, signal.SIGUSR1)
                time.sleep(0.3)
            calls.append(1)

        @hookimpl
        def crcli_dump_failed(target):
            os.kill(target.pid, signal.SIGUSR2)
            time.sleep(0.3)
        """
    install_plugin(tmp_path / "site", "late", code, monkeypatch)
    talks = f"""
        import signal, socket
        server = socket.socket(socket.AF_UNIX); server.bind({str(tmp_path / "s")!r}); server.listen()
        kept = []
        def connect(*_):
            client = socket.socket(socket.AF_UNIX); client.connect(server.getsockname()); client.send(b"x")
            kept.append(client)
        signal.signal(signal.SIGUSR1, connect)
        signal.signal(signal.SIGUSR2, lambda *_: kept.append(server.accept()))
        """
    with spawn_python(textwrap.dedent(talks) + counter()) as program:
        report = crcli.dump(program.pid)
        assert "moment-again" in {finding["name"] for finding in report["findings"]}
        crcli.restore(report["image"])
        assert_goes_on(program)


@pytest.mark.parametrize("outcome", [("--leave-running",), ()])
def test_a_connection_that_is_opened_late_is_held_too(
    outcome: tuple[str, ...], crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tree without sockets needs no lock on them, unless it opens one after it was looked at."""
    code = """
        import os, signal, time
        from crcli.pipeline import dump
        from crcli.plugins import hookimpl

        @hookimpl
        def crcli_dump_before_freeze(target):
            dump._FRESH_S = 1e9  # nor looks anybody again, however slow this machine is
            os.kill(target.pid, signal.SIGUSR1)
            time.sleep(0.3)
        """
    install_plugin(tmp_path / "site", "late", code, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as server:
        connects = f"""
            import signal, socket
            kept = []
            connect = lambda *_: kept or kept.append(socket.create_connection({server.getsockname()!r}))
            signal.signal(signal.SIGUSR1, connect)
            """
        with spawn_python(textwrap.dedent(connects) + counter()) as program:
            before = netlock.tables()
            report = crcli.dump(program.pid, *outcome)
            assert "connection-again" in {finding["name"] for finding in report["findings"]}
            left = netlock.tables() - before
            assert len(left) == (0 if outcome else 1)  # the lock stays until a restore
            if outcome:
                assert_goes_on(program)
                end(tree_of(program.pid))
            crcli.restore(report["image"])
            wait_until(lambda: netlock.tables() <= before, "the lock is still there")


def test_what_was_seen_long_ago_is_looked_at_again(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While large files of weights are indexed a program goes on: what it becomes, and CRIU would lose
    without a word, is found before the freeze."""
    code = """
        import os, signal, time
        from crcli.plugins import hookimpl

        @hookimpl
        def crcli_dump_before_freeze(target):
            os.kill(target.pid, signal.SIGUSR1)
            time.sleep(1.5)
        """
    install_plugin(tmp_path / "site", "late", code, monkeypatch)
    becomes = """
        import os, signal
        made = []
        signal.signal(signal.SIGUSR1, lambda *_: made.append(os.eventfd(5, os.EFD_SEMAPHORE)))
        """
    with spawn_python(textwrap.dedent(becomes) + counter()) as program:
        error = crcli.dump(program.pid, code=10)["error"]
        assert [one["name"] for one in error["findings"]][:1] == ["eventfd-semaphore"]
        assert_goes_on(program)


@pytest.mark.alone
def test_a_tree_without_connections_needs_no_lock(crcli: Crcli) -> None:
    """Nothing is held back for it, so that nothing need be let go while it stands still."""
    with spawn_python(counter()) as program:
        before = netlock.tables()
        crcli.dump(program.pid, "--leave-stopped")
        assert netlock.tables() == before
        end(tree_of(program.pid))


def test_nothing_is_imported_while_a_tree_stands_still(crcli: Crcli) -> None:
    """Between the freeze and the thaw a dump imports no module: each would cost the tree a millisecond."""
    with spawn_python(counter()) as program:
        options = ("dump", str(program.pid), "--leave-running", "--store", crcli.store)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WHAT_IS_IMPORTED), *options],
            cwd=ROOT,
            env=crcli.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_SECONDS,
        )
        assert done.returncode == 0, done.stderr
        assert "late:" in done.stderr.splitlines()


def test_leave_stopped_leaves_it_stopped(crcli: Crcli) -> None:
    """The tree stands still until it gets SIGCONT, and goes on then; no filter of CRIU's is left."""
    with network_of_our_own(), spawn_python(counter()) as program:
        report = crcli.dump(program.pid, "--leave-stopped")
        assert report["outcome"] == "stopped"
        assert psutil.Process(program.pid).status() == psutil.STATUS_STOPPED
        numbers = counted(program)
        time.sleep(0.1)
        assert counted(program) == numbers
        os.kill(program.pid, signal.SIGCONT)
        assert_goes_on(program)
        assert netlock.tables() == set()


@pytest.mark.parametrize("as_json", [True, False])
def test_leave_stopped_says_how_all_of_it_goes_on(crcli: Crcli, as_json: bool) -> None:
    """A tree of several processes: the command that is named continues each of them."""
    with spawn_python(then_wait("import os, time\nos.fork() or time.sleep(999)")) as program:
        json_or_not = ("--json",) if as_json else ()
        done = crcli.run("dump", str(program.pid), "--store", crcli.store, "--leave-stopped", *json_or_not)
        processes = tree_of(program.pid)
        assert {process.status() for process in processes} == {psutil.STATUS_STOPPED}
        (command,) = re.findall("`(kill -CONT .*?)`", done.out)
        subprocess.run(command.split(), check=True)
        assert len(processes) == 2
        assert psutil.STATUS_STOPPED not in {process.status() for process in processes}


@pytest.mark.parametrize("outcome", [(), ("--leave-stopped",), ("--leave-running",)])
def test_a_network_that_outlives_the_tree_works_afterwards(crcli: Crcli, outcome: tuple[str, ...]) -> None:
    """CRIU locks all of a network that is the tree's own; who else lives there has it back after the dump."""
    with spawn_python(counter(), before=("unshare", "--net")) as program:
        network = netlock.other_network(program.pid)
        assert network is not None
        try:
            crcli.dump(program.pid, *outcome)
            assert tables_in(network) == set()
        finally:
            os.close(network)


def test_a_deadline_that_passes_before_the_freeze_is_a_failed_dump(crcli: Crcli) -> None:
    """It ends with 11 as a later one does, not as if a signal had ended the command."""
    with spawn_python(counter()) as program:
        error = crcli.dump(program.pid, "--deadline", "0", code=11)["error"]
        assert "deadline" in error["message"] and error["state"] == "running"
        assert_goes_on(program)


def test_a_dry_run_touches_nothing(crcli: Crcli, tmp_path: Path) -> None:
    """It reports what it would do; the tree runs on, and the store does not even exist."""
    with spawn_python(counter()) as program:
        report = crcli.dump(program.pid, "--dry-run")
        assert report["outcome"] == "" and report["processes"] == 1
        assert "files-written" in {finding["name"] for finding in report["findings"]}
        assert_goes_on(program)
        assert not (tmp_path / "store").exists()


def test_a_dump_leaves_no_process_mount_or_table_behind(crcli: Crcli) -> None:
    """After dump and restore this process has no child but the tree, the kernel no table or mount of ours."""
    mounts = _mounts()
    mine = set(psutil.Process().children(recursive=True))
    with network_of_our_own(), spawn_python(counter()) as program:
        crcli.move(program.pid)
        children = set(psutil.Process().children(recursive=True)) - mine
        assert {child.pid for child in children} == {program.pid}, children
        assert netlock.tables() == set()
        assert _mounts() == mounts


@pytest.mark.parametrize("how", ["--eager", "--lazy"])
def test_memory_that_criu_needs_and_is_damaged(crcli: Crcli, how: str) -> None:
    """It is found when CRIU already works: the restore ends with 22, and leaves no process and no mount."""
    mounts, mine = _mounts(), _living()
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid)["image"]
    folder = crcli.store.removeprefix("file://")
    manifest = load(open_store(crcli.store), parse_image(image)[1])
    for chunk in (chunk for chunk in manifest.chunks if chunk.is_memory):
        with Path(folder, pack_key(manifest.packs[chunk.pack])).open("r+b") as pack:
            pack.seek(chunk.offset + chunk.stored - 1)
            byte = pack.read(1)[0]
            pack.seek(chunk.offset + chunk.stored - 1)
            pack.write(bytes([byte ^ 1]))
    error = crcli.restore(image, how, code=22)["error"]
    assert error["state"] == "untouched"
    wait_until(lambda: not _living() - mine, "a process is left")
    assert _mounts() == mounts


def _living() -> set[psutil.Process]:
    """What is below us, but for what has ended and is left for us to reap."""
    living = set()
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            living |= {one} if one.status() != psutil.STATUS_ZOMBIE else set()
    return living


def _mounts() -> list[str]:
    """What is mounted, but for what tests beside this one mount in their folders."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if "/pytest-of-" not in line]


# --- targets that are none ---------------------------------------------------------------------------------


def refused(crcli: Crcli, pid: int) -> dict[str, object]:
    """Dump what cannot be dumped, and return the error, after asserting that the tree is untouched."""
    error: dict[str, object] = crcli.dump(pid, code=10)["error"]
    assert error["state"] == "untouched" and error["code"] == "preflight-refused"
    return error


def test_a_pid_that_is_not_there_is_refused(crcli: Crcli) -> None:
    """The error names the pid."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert str(process.pid) in str(refused(crcli, process.pid)["message"])


def test_init_and_kernel_threads_are_refused(crcli: Crcli) -> None:
    """Neither process 1 nor a thread of the kernel is a program that could be dumped."""
    assert "init" in str(refused(crcli, 1)["message"])
    kernel = [p for p in psutil.process_iter() if p.ppid() == 2]
    if kernel:
        assert "kernel" in str(refused(crcli, kernel[0].pid)["message"])


def test_our_own_parents_are_refused(crcli: Crcli) -> None:
    """crcli does not freeze the tree that it runs in."""
    assert "inside" in str(refused(crcli, os.getpid())["message"])


def test_a_zombie_is_refused(crcli: Crcli) -> None:
    """A process that has ended and waits for its parent cannot be dumped."""
    with subprocess.Popen(["true"]) as process:
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE, "true runs on")
        assert "ended" in str(refused(crcli, process.pid)["message"])


def test_a_blocker_is_refused_with_its_remedy(crcli: Crcli) -> None:
    """A tree with something that CRIU cannot take is not touched, and told what to do."""
    code = "import mmap, os\nos.close(os.eventfd(0))\n" + then_wait(
        "import ctypes; ctypes.CDLL(None).unshare(0x40000000)"
    )
    nested = f"""
        import os
        if os.fork() == 0:
            exec({code!r})
        {then_wait().strip().replace(chr(10), chr(10) + " " * 8)}
        """
    with spawn_python(nested) as program:
        wait_until(lambda: program.output.count("ready") == 2, "the child is late")
        error = refused(crcli, program.pid)
        assert "namespace" in str(error["message"]) and error["findings"]
        assert untraced(program.pid)


def test_closed_streams_are_no_trouble(crcli: Crcli) -> None:
    """Without stdin, stdout and stderr, as some daemons start programs, a tree is dumped and comes back; with
    a full disk for the report, the dump is done all the same."""
    with spawn_python(counter()) as program:
        tree = tree_of(program.pid)
        line = f"{sys.executable} -m crcli"
        where = f"--store {crcli.store}"
        for words in (
            f"dump {program.pid} --name job --leave-running {where} >/dev/full",
            f"dump {program.pid} --name job {where} <&- >&- 2>&-",
            f"restore job {where} <&- >&- 2>&-",
        ):
            done = subprocess.run(["bash", "-c", f"{line} {words}"], env=crcli.environment, cwd=ROOT)
            assert done.returncode == 0, words
            if "<&-" in words and "dump" in words:
                reap(tree)
        assert_goes_on(program)
        end([psutil.Process(program.pid)])


def test_without_criu_nothing_is_begun(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that would need it, now or later, ends with 40, and says how to get it."""
    with spawn_python(counter()) as program:
        pid, image = str(program.pid), crcli.dump(program.pid, "--leave-running", "--name", "job")["image"]
        monkeypatch.setenv("CRCLI_CRIU_PREFIX", "/nonexistent")
        monkeypatch.setattr(
            "tests.support.crcli.Crcli.environment", crcli.environment | {"PATH": "/nonexistent"}
        )
        for command in (
            ("dump", pid), ("dump", pid, "--dry-run"), ("check", pid), ("watch", pid),
            ("check", image), ("restore", image), ("run", "--name", "other", "--", "/bin/true"),
        ):  # fmt: skip
            done = crcli.run(command[0], "--store", crcli.store, *command[1:], code=40)
            assert "install-criu" in done.err, command
        assert_goes_on(program)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not here")
def test_without_rights_nothing_is_begun(crcli: Crcli) -> None:
    """Who may not freeze or restore is told so before a job is started, and by `crcli check` of an image."""
    less = ("setpriv", "--bounding-set=-sys_admin,-setpcap", "--inh-caps=-all")
    with spawn_python(counter()) as program:
        pid, image = str(program.pid), crcli.dump(program.pid, "--leave-running", "--name", "job")["image"]
        for command in (
            ("dump", pid), ("dump", pid, "--dry-run"), ("check", pid), ("watch", pid),
            ("check", image), ("restore", image), ("run", "--name", "other", "--", "/bin/true"),
        ):  # fmt: skip
            done = subprocess.run(
                [*less, sys.executable, "-m", "crcli", command[0], "--store", crcli.store, *command[1:]],
                capture_output=True, text=True, env=crcli.environment, cwd=ROOT,
            )  # fmt: skip
            assert done.returncode == 40 and "CAP_SYS_ADMIN" in done.stderr, command
        assert_goes_on(program)


def test_a_criu_that_cannot_be_run_is_named(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of another machine, or without its interpreter, is no CRIU (40); one that ends at once says nothing
    (11, 21), and the doctor is named."""
    broken = tmp_path / "criu"
    broken.write_bytes(b"\x7fELF of something else")
    broken.chmod(0o755)
    with spawn_python(counter()) as program:
        crcli.dump(program.pid, "--leave-running", "--name", "job")
        monkeypatch.setenv("CRCLI_CRIU", str(broken))
        assert str(broken) in crcli.dump(program.pid, code=40)["error"]["message"]
        monkeypatch.setenv("CRCLI_CRIU", "/bin/false")
        assert "doctor" in crcli.dump(program.pid, code=11)["error"]["hint"]
        assert "doctor" in crcli.restore("job", code=21)["error"]["hint"]
        assert_goes_on(program)


def test_who_ends_while_criu_does_not_start_did_not_die_of_it(
    crcli: Crcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell's child that is over by then is no reason to call the tree dead, and have the user end it."""
    ending = tmp_path / "criu"
    with spawn_python(
        """
        import subprocess, time
        child = subprocess.Popen(["sleep", "60"])
        print(f"child={child.pid}\\nready")
        child.wait()
        while True: time.sleep(60)
        """
    ) as program:
        ending.write_text(f"#!/bin/sh\nkill {program.value_of('child')}\n")
        ending.chmod(0o755)
        monkeypatch.setenv("CRCLI_CRIU", str(ending))
        assert crcli.dump(program.pid, code=11)["error"]["state"] == "running"
        assert program.process.poll() is None


def test_an_image_that_is_not_there_is_exit_31(crcli: Crcli) -> None:
    """A restore of an unknown name says so, and starts nothing."""
    assert crcli.restore("nobody", code=31)["error"]["code"] == "not-found"


@pytest.mark.parametrize("code", [0, 3])
def test_a_tree_that_ends_at_once(crcli: Crcli, code: int) -> None:
    """A root that ends well right after the restore was restored; one that fails was not."""
    watches = f"""
        import os, sys, time
        if os.fork() == 0:
            while True: time.sleep(60)
        print("ready")
        while True:
            before = time.time()
            time.sleep(0.01)
            if time.time() - before > 0.8:
                os._exit({code})
        """
    with spawn_python(watches) as program:
        image = crcli.dump(program.pid)["image"]
        time.sleep(0.8)
        if code == 0:
            assert crcli.run("restore", image, "--store", crcli.store, "--json").json["pid"] == program.pid
        else:
            error = crcli.restore(image, code=21)["error"]
            assert error["state"] == "dead" and "exit code 3" in error["message"]
            assert not psutil.pid_exists(program.pid)


# --- copies ------------------------------------------------------------------------------------------------


def test_a_name_that_somebody_holds_is_warned_of(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore of a name that a holder elsewhere has claimed works, and says that two copies may run; check
    says it too. What was given up is no matter."""
    monkeypatch.setattr(lease, "describe_owner", lambda: describe_owner() | {"boot": "another"})
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid, "--name", "job")["image"]
        held = Lease.claim(open_store(crcli.store), "job", "a test")
        warned = [one for one in crcli.restore(image)["findings"] if one["name"] == "name-claimed"]
        assert [one["severity"] for one in warned] == ["change"] and "a test on" in warned[0]["message"]
        checked = crcli.run("check", image, "--store", crcli.store, "--json").json["findings"]
        assert "name-claimed" in {one["name"] for one in checked}
        held.release()
        assert "name-claimed" not in {one["name"] for one in crcli.restore(image)["findings"]}


_INTERRUPTED_AS_IT_WRITES = """
    import os, signal, sys, threading, time
    write, begun = os.pwrite, threading.Lock()
    def file_of(fd):
        try: return os.readlink(f"/proc/self/fd/{fd}")
        except OSError: return "nothing"
    def slowly(fd, data, at):
        if file_of(fd).endswith("/mem") and begun.acquire(blocking=False):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
            print("then it wrote to", file_of(fd).rpartition("/")[2], file=sys.stderr)
        return write(fd, data, at)
    os.pwrite = slowly
    from crcli.__main__ import main
    sys.exit(main())
    """


def test_who_is_interrupted_writes_to_no_other_file(crcli: Crcli) -> None:
    """The files of a tree's memory stay open until no thread writes there: their numbers are taken again."""
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid)["image"]
        options = ("restore", image, "--store", crcli.store)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_INTERRUPTED_AS_IT_WRITES), *options],
            cwd=ROOT,
            env=crcli.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 21, done.stderr
        assert "then it wrote to mem" in done.stderr
        crcli.restore(image)


def test_two_restores_of_one_image_run_side_by_side(crcli: Crcli) -> None:
    """The second finds the pids taken, and gets a pid namespace of its own, where it has the same pids."""
    with spawn_python(FAMILY) as program:
        image = crcli.dump(program.pid)["image"]
        first = crcli.restore(image)
        second = crcli.restore(image)
        third = crcli.restore(image)
        assert first["pid"] == second["pid"] == third["pid"] == program.pid
        assert second["pid_namespace"] == third["pid_namespace"] == "new"
        assert len({report["host_pid"] for report in (first, second, third)}) == 3
        for report in (first, second, third):
            assert len(tree_of(report["host_pid"])) == 2
            assert untraced(report["host_pid"])
        nspid = (
            Path(f"/proc/{second['host_pid']}/status")
            .read_text()
            .partition("NSpid:")[2]
            .split("\n")[0]
            .split()
        )
        assert nspid == [str(second["host_pid"]), str(program.pid)]
        goes_on(program)


def test_two_restores_at_once_both_work(crcli: Crcli) -> None:
    """Started in the same moment, the two share out the pids by themselves."""
    with spawn_python(FAMILY) as program:
        image = crcli.dump(program.pid)["image"]
        arguments = ("restore", image, "--store", crcli.store, "--json")
        with crcli.start(*arguments) as one, crcli.start(*arguments) as other:
            done = [process.communicate(timeout=COMMAND_LIMIT_SECONDS) for process in (one, other)]
        reports = [json.loads(out) for out, _ in done]
        for report in reports:
            assert "error" not in report, done
            crcli.adopt(report["host_pid"])
        assert len({report["host_pid"] for report in reports}) == 2
        assert all(len(tree_of(report["host_pid"])) == 2 for report in reports)


def test_taken_pids_lead_to_a_namespace_of_its_own(crcli: Crcli) -> None:
    """While the original runs its copy is restored beside it; --pid-namespace host refuses that."""
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid, "--leave-running")["image"]
        error = crcli.restore(image, "--pid-namespace", "host", code=20)["error"]
        assert error["findings"][0]["name"] == "pid-taken"
        report = crcli.restore(image)
        assert report["pid_namespace"] == "new" and report["host_pid"] != program.pid
        assert untraced(report["host_pid"]) and untraced(program.pid)


def test_a_namespace_can_be_asked_for(crcli: Crcli) -> None:
    """With --pid-namespace new the tree has its old pid inside, and its own /proc shows only itself."""
    code = """
        import os, signal, time
        def answer(*_):
            print(f"seen={os.getpid()} {[p for p in os.listdir('/proc') if p.isdigit() and int(p) > 1]}")
        signal.signal(signal.SIGUSR1, answer)
        print("ready")
        while True: time.sleep(60)
        """
    with spawn_python(code) as program:
        report = crcli.restore(crcli.dump(program.pid)["image"], "--pid-namespace", "new")
        assert report["pid_namespace"] == "new" and report["pid"] == program.pid != report["host_pid"]
        os.kill(report["host_pid"], signal.SIGUSR1)
        wait_until(lambda: "seen=" in program.output, "no answer")
        assert program.value_of("seen") == f"{program.pid} ['{program.pid}']"


def test_a_namespace_ends_with_its_tree(crcli: Crcli) -> None:
    """When a tree in a pid namespace of its own ends, nothing of it stays."""
    with spawn_python(ENDS_WITH_7) as program:
        report = crcli.restore(crcli.dump(program.pid)["image"], "--pid-namespace", "new")
        processes = list(crcli.restored)
        os.kill(report["host_pid"], signal.SIGTERM)
        reap(processes)


def test_a_tree_in_a_namespace_can_be_dumped_again(crcli: Crcli) -> None:
    """What was restored into a pid namespace of its own is dumped from outside, and comes back once more."""
    with spawn_python(counter()) as program:
        report = crcli.restore(crcli.dump(program.pid)["image"], "--pid-namespace", "new")
        assert_goes_on(program)
        again = crcli.dump(report["host_pid"])
        reap(crcli.restored)
        crcli.restore(again["image"])
        assert_goes_on(program)


# --- waiting -----------------------------------------------------------------------------------------------


def test_wait_passes_signals_on_and_the_exit_code_back(crcli: Crcli) -> None:
    """`restore --wait` ends when the tree does, with its exit code, and hands it the signals that it gets."""
    with spawn_python(ENDS_WITH_7) as program:
        image = crcli.dump(program.pid)["image"]
        with crcli.start("restore", image, "--store", crcli.store, "--wait", "--json") as waiting:
            assert waiting.stdout is not None
            assert json.loads(waiting.stdout.readline())["host_pid"] == program.pid
            waiting.send_signal(signal.SIGUSR1)
            wait_until(lambda: "usr1" in program.output, "SIGUSR1 did not arrive")
            waiting.terminate()
            assert waiting.wait(timeout=COMMAND_LIMIT_SECONDS) == 7
        assert not psutil.pid_exists(program.pid)


def test_wait_passes_nothing_on_that_is_ignored(crcli: Crcli) -> None:
    """Under nohup a tree outlives the terminal that its restore was started from."""

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with spawn_python(ENDS_WITH_7) as program:
        image = crcli.dump(program.pid)["image"]
        arguments = ("restore", image, "--store", crcli.store, "--wait", "--json")
        with crcli.start(*arguments, preexec_fn=nohup) as waiting:
            assert waiting.stdout is not None
            waiting.stdout.readline()
            waiting.send_signal(signal.SIGHUP)
            waiting.terminate()
            assert waiting.wait(timeout=COMMAND_LIMIT_SECONDS) == 7


def test_wait_passes_on_what_comes_early(crcli: Crcli) -> None:
    """A SIGTERM that comes as soon as the tree runs, before the report, is not lost."""
    with spawn_python(ENDS_WITH_7) as program:
        image = crcli.dump(program.pid)["image"]
        with crcli.start("restore", image, "--store", crcli.store, "--wait", "--json") as waiting:
            wait_until(lambda: runs(program.pid), "it does not start", 30)
            waiting.terminate()
            assert waiting.wait(timeout=COMMAND_LIMIT_SECONDS) == 7


def runs(pid: int) -> bool:
    """Whether a process is there and nobody holds it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_SLEEPING and untraced(pid)
    except psutil.NoSuchProcess:
        return False


def test_wait_in_a_namespace_works_the_same(crcli: Crcli) -> None:
    """Signals and exit code pass through the small first process of the namespace."""
    with spawn_python(ENDS_WITH_7) as program:
        image = crcli.dump(program.pid)["image"]
        arguments = ("restore", image, "--store", crcli.store, "--wait", "--json", "--pid-namespace", "new")
        with crcli.start(*arguments) as waiting:
            assert waiting.stdout is not None
            assert json.loads(waiting.stdout.readline())["pid"] == program.pid
            waiting.terminate()
            assert waiting.wait(timeout=COMMAND_LIMIT_SECONDS) == 7


def test_wait_reports_a_killed_root(crcli: Crcli) -> None:
    """A root that a signal ends gives 128 + the signal's number, as in a shell."""
    with spawn_python(counter()) as program:
        image = crcli.dump(program.pid)["image"]
        with crcli.start("restore", image, "--store", crcli.store, "--wait", "--json") as waiting:
            assert waiting.stdout is not None
            os.kill(json.loads(waiting.stdout.readline())["host_pid"], signal.SIGKILL)
            assert waiting.wait(timeout=COMMAND_LIMIT_SECONDS) == 128 + signal.SIGKILL


def test_a_stopped_tree_comes_back_stopped(crcli: Crcli) -> None:
    """Stopped by job control before the dump, it is stopped after the restore, and goes on when told to."""
    with spawn_python(counter()) as program:
        wait_until(lambda: program.output.count("\n") > 5, "it does not count")
        os.kill(program.pid, signal.SIGSTOP)
        report = crcli.move(program.pid)
        assert psutil.Process(report["host_pid"]).status() == psutil.STATUS_STOPPED
        os.kill(report["host_pid"], signal.SIGCONT)
        assert_goes_on(program)


ENDS_AT_ONCE = """
    import os, sys, time
    went = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    child = os.fork()
    if child == 0:
        while True: time.sleep(60)
    print("ready", flush=True)
    before = os.stat("/proc/self/ns/pid").st_ino, os.getppid()
    while (os.stat("/proc/self/ns/pid").st_ino, os.getppid()) == before:
        time.sleep(0.002)
    os.write(went, b"RESULT")
    os._exit(CODE)
    """


@pytest.mark.parametrize("namespace", ["host", "new"])
@pytest.mark.parametrize("code", [0, 3])
def test_a_root_that_ends_at_once_says_how(namespace: str, code: int, crcli: Crcli, tmp_path: Path) -> None:
    """Ended well the restore has worked, and its child lives on; ended badly it has not. Its files stay."""
    result = tmp_path / "result"
    program_text = textwrap.dedent(ENDS_AT_ONCE).replace("CODE", str(code))
    command = [sys.executable, "-u", "-c", program_text, str(result)]
    with launched(command, tmp_path) as program:
        program.wait_for("ready")
        image = crcli.dump(program.pid)["image"]
        result.unlink()
        options = ("restore", image, "--store", crcli.store, "--pid-namespace", namespace, "--json")
        done = crcli.run(*options, code=21 if code else 0)
        left = [one for one in psutil.process_iter(["cmdline"]) if str(result) in (one.info["cmdline"] or ())]
        for one in left:  # its root is gone: nothing else finds it again
            one.kill()
        assert result.read_bytes() == b"RESULT"
        assert len(left) == (0 if code else 1)
        if code:
            assert f"exit code {code}" in done.json["error"]["message"]


def test_nohup_is_respected(crcli: Crcli) -> None:
    """A dump whose hang-up is ignored goes on when the terminal goes away."""
    with spawn_python(counter(kilobytes=200 << 10)) as program:
        command = ("dump", str(program.pid), "--store", crcli.store, "--leave-running", "--json")
        ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with crcli.start(*command) as process:
                while process.poll() is None:
                    process.send_signal(signal.SIGHUP)
                    time.sleep(0.01)
                assert process.returncode == 0, process.communicate()
        finally:
            signal.signal(signal.SIGHUP, ignored)
