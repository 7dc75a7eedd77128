"""What crcli inherits from whoever starts it, and must not be disturbed by: limits, signals, a folder."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest

import crcli.__main__ as starting
from tests.support.crcli import (
    COMMAND_LIMIT_SECONDS,
    ROOT,
    Crcli,
    assert_goes_on,
    counter,
    crcli_in,
    reap,
    tree_of,
)
from tests.support.programs import spawn_python, then_wait

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

SMALL = 10_000


def run_limited(crcli: Crcli, limits: Mapping[int, tuple[int, int]], *arguments: str) -> tuple[int, str]:
    """Run a command that has these limits; return its exit code and what it printed."""

    def limited() -> None:
        for number, pair in limits.items():
            resource.setrlimit(number, pair)

    words = [arguments[0], "--store", crcli.store, "--json", *arguments[1:]]
    words.remove("--json") if arguments[0] == "run" else None
    with crcli.start(*words, preexec_fn=limited) as process:
        out, err = process.communicate(timeout=COMMAND_LIMIT_SECONDS)
    return process.returncode, out + err


def test_soft_limits_are_lifted_for_the_dump_and_the_restore(tmp_path: Path) -> None:
    """Neither CRIU nor the store is ended by them, and the tree comes back with limits of its own."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 500))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 31))
kept = [open('/dev/null') for _ in range(300)]
{counter()}"""
    soft = {resource.RLIMIT_FSIZE: SMALL, resource.RLIMIT_NOFILE: 32, resource.RLIMIT_NPROC: 1}
    limits = {number: (least, resource.getrlimit(number)[1]) for number, least in soft.items()}
    with crcli_in(tmp_path) as crcli, spawn_python(code) as program:
        tree = tree_of(program.pid)
        done, text = run_limited(crcli, limits, "dump", str(program.pid), "--name", "limited")
        assert done == 0, text
        reap(tree)
        done, text = run_limited(crcli, limits, "restore", "limited")
        crcli.adopt(program.pid)
        assert done == 0, text
        restored = psutil.Process(program.pid)
        assert restored.rlimit(resource.RLIMIT_FSIZE) == (1 << 30, 1 << 31)
        assert restored.rlimit(resource.RLIMIT_NOFILE) == (400, 500)
        assert_goes_on(program)


def test_a_hard_limit_is_told_with_its_remedy(tmp_path: Path) -> None:
    """Where it may not be lifted nothing is begun (exit 40), and the tree runs on."""
    hard = {resource.RLIMIT_FSIZE: (SMALL, SMALL)}
    with crcli_in(tmp_path) as crcli, spawn_python(counter()) as program:
        done, text = run_limited(crcli, hard, "dump", str(program.pid))
        if done == 0:
            pytest.skip("CAP_SYS_RESOURCE lifts hard limits too")
        assert done == 40, text
        assert "RLIMIT_FSIZE" in text and "ulimit -f unlimited" in text and '"untouched"' in text
        image = crcli.dump(program.pid)["image"]
        done, text = run_limited(crcli, hard, "restore", image)
        assert done == 40, text
        assert "RLIMIT_FSIZE" in text
        crcli.restore(image, "--files", "host")
        assert_goes_on(program)


@pytest.mark.parametrize("megabytes", [60, 100, 120])
@pytest.mark.parametrize("number,option", [(resource.RLIMIT_DATA, "-d"), (resource.RLIMIT_AS, "-v")])
def test_too_little_memory_is_told_with_its_remedy(
    tmp_path: Path, number: int, option: str, megabytes: int
) -> None:
    """Where limits leave none to work with nothing is begun (exit 40), and the tree runs on."""
    limit = {number: (megabytes << 20, megabytes << 20)}
    with crcli_in(tmp_path) as crcli, spawn_python(counter()) as program:
        image = crcli.dump(program.pid, "--leave-running")["image"]
        for command in (("dump", str(program.pid)), ("restore", image)):
            done, text = run_limited(crcli, limit, *command)
            assert done == 40, text
            assert f"ulimit {option}" in text and '"untouched"' in text and "Traceback" not in text
        assert_goes_on(program)


@pytest.mark.parametrize("files", [8, 10, 16, 60, 120])
def test_too_few_files_are_told_with_their_remedy(tmp_path: Path, files: int) -> None:
    """Where fewer may be open than are needed nothing is begun (exit 40), and the tree runs on."""
    limit = {resource.RLIMIT_NOFILE: (files, files)}
    with crcli_in(tmp_path) as crcli, spawn_python(counter()) as program:
        image = crcli.dump(program.pid, "--leave-running")["image"]
        commands = [("dump", str(program.pid)), ("restore", image), ("run", "--name", "job", "--", "true")]
        for command in commands:
            done, text = run_limited(crcli, limit, *command)
            assert done == 40, text
            assert "ulimit -n" in text and "Traceback" not in text
        assert_goes_on(program)


@pytest.mark.parametrize("command", [("check", "PID"), ("run", "--name", "job", "--", "true"), ("ls",)])
def test_few_files_are_no_bug(tmp_path: Path, command: tuple[str, ...]) -> None:
    """A command that gets no descriptor in the midst of its work says so, if it does not do with few."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with crcli_in(tmp_path) as crcli, spawn_python(counter()) as program:
        crcli.dump(program.pid, "--leave-running")
        words = [word.replace("PID", str(program.pid)) for word in command]
        for files in range(8, 24, 2):
            done, text = run_limited(crcli, {resource.RLIMIT_NOFILE: (files, hard)}, *words)
            assert done == 0 or "ulimit -n" in text, text
        assert_goes_on(program)


@pytest.mark.parametrize(
    "error,option",
    [
        (MemoryError(), "-d"),
        (ImportError("mmap.so: failed to map segment from shared object"), "-d"),
        (ImportError("mmap.so: cannot open shared object file: Too many open files"), "-n"),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE), "app.py"), "-n"),
    ],
)
def test_not_even_what_it_takes_to_start_is_told(
    capfd: pytest.CaptureFixture[str], error: Exception, option: str
) -> None:
    """Where modules cannot be imported for want of memory or descriptors, a line says so, and the exit code
    (40)."""
    with patch.object(starting, "_main", side_effect=error):
        assert starting.main() == 40
    assert f"ulimit {option}" in capfd.readouterr().err


def test_children_are_waited_for_whoever_started_us(tmp_path: Path) -> None:
    """Ignoring SIGCHLD, as some supervisors pass on, has children vanish: crcli takes it back."""

    def ignoring() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    with crcli_in(tmp_path) as crcli, spawn_python(counter()) as program:
        tree = tree_of(program.pid)
        for command in (("dump", str(program.pid), "--name", "moved"), ("restore", "moved")):
            with crcli.start(*command, "--store", crcli.store, preexec_fn=ignoring) as process:
                out, err = process.communicate(timeout=COMMAND_LIMIT_SECONDS)
            if command[0] == "dump":
                reap(tree)
            assert process.returncode == 0, out + err
        crcli.adopt(program.pid)
        assert_goes_on(program)


def test_nothing_is_imported_from_the_folder_that_we_are_started_in(tmp_path: Path) -> None:
    """Files there that are called like Python's own modules, a user's or an attacker's, are left alone."""
    folder, marker = tmp_path / "project", tmp_path / "imported"
    folder.mkdir()
    for name in ("json", "os", "select", "signal", "socket", "subprocess", "time"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'a').write('{name} ')")
    with crcli_in(tmp_path) as crcli, spawn_python(then_wait(), stdout=subprocess.PIPE) as program:
        assert program.process.stdout is not None and program.process.stdout.readline() == b"ready\n"
        image = crcli.dump(program.pid)["image"]
        command = [sys.executable, "-P", "-m", "crcli", "restore", image, "--store", crcli.store, "--json"]
        with (tmp_path / "report").open("w+") as report:
            subprocess.run(
                [*command, "--pid-namespace", "new"],
                cwd=folder,
                env=crcli.environment | {"PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=report,
                timeout=COMMAND_LIMIT_SECONDS,
                check=True,
            )
            report.seek(0)
            crcli.adopt(json.load(report)["host_pid"])
    assert not marker.exists(), marker.read_text()
