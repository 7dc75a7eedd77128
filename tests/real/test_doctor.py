"""The doctor in places that lack something for real: it names what, and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.crcli import COMMAND_LIMIT_SECONDS, ROOT

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

FILTERED = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None)
program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7fff0000))
header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 1, ctypes.addressof(program)))
assert libc.prctl(22, 2, header, 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
"""A program that lays a seccomp filter on itself, and goes on as Python."""


def doctor(
    *before: str, code: int = 0, options: tuple[str, ...] = (), **environment: str
) -> dict[str, dict[str, Any]]:
    """Run `crcli doctor` after these words of a command line; return its checks by name."""
    interpreter = [] if before[-1:] == (FILTERED,) else [sys.executable]
    done = subprocess.run(
        [*before, *interpreter, "-m", "crcli", "doctor", "--json", *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=COMMAND_LIMIT_SECONDS,
    )
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_a_host_that_works() -> None:
    """Here the main job can run: nothing is lacking, and each note says what it found."""
    checks = doctor()
    assert {check["status"] for check in checks.values()} <= {"ok", "note"}
    assert {"tracing", "pidfd", "io-uring", "pid-max", "seccomp", "security-profile"} <= set(checks)
    assert {"memory", "swap", "huge-pages", "cgroup", "container", "clock", "gpu"} <= set(checks)
    assert {"bounding-set", "limits", "python", "killed-commands", "temporary-names", "logs"} <= set(checks)
    assert checks["criu"]["evidence"]["version"] and checks["criu"]["evidence"]["from"]
    assert checks["python"]["evidence"]["packages"]["numpy"]


def test_no_place_for_temporary_files() -> None:
    """As on a full disk: the doctor says what there is."""
    checks = doctor("prlimit", "--fsize=0:0")
    assert {"temporary-folder", "killed-commands"} <= set(checks)


def test_missing_capabilities() -> None:
    """Without them nothing can be dumped: they are named, and what cannot be done without them."""
    checks = doctor("setpriv", "--bounding-set=-sys_ptrace,-sys_admin", "--inh-caps=-all", code=40)
    assert checks["capabilities"]["evidence"]["lacking"] == ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE"]
    assert checks["namespaces"]["status"] == checks["private-tmpfs"]["status"] == "lacks"
    assert {"sys_admin", "sys_ptrace"} <= set(checks["bounding-set"]["evidence"]["absent"])


def test_another_user() -> None:
    """A user who is not root is told to be."""
    become = ("setpriv", "--reuid", "1", "--regid", "1", "--clear-groups")
    if subprocess.run([*become, sys.executable, "-c", "import typer"], cwd=ROOT).returncode != 0:
        pytest.skip("another user cannot read this checkout, or its Python")
    checks = doctor(*become, code=40)
    assert "run crcli as root" in checks["capabilities"]["remedy"]


def test_no_criu() -> None:
    """Where there is no CRIU, the doctor says how to get one."""
    checks = doctor(code=40, CRCLI_CRIU_PREFIX="/nonexistent", PATH="/nonexistent")
    assert "install-criu" in checks["criu"]["remedy"] and "criu-check" not in checks


def test_a_kernel_that_criu_cannot_work_with() -> None:
    """What `criu check` finds missing is shown: here a network without its loopback."""
    checks = doctor("unshare", "--net", code=40)
    assert checks["criu-check"]["status"] == "lacks" and checks["criu-check"]["evidence"]["output"]


def test_limits() -> None:
    """Limits that CRIU would inherit are named with their values."""
    checks = doctor("prlimit", "--as=8000000000", "--nofile=500")
    assert checks["limits"]["status"] == "note"
    assert checks["limits"]["evidence"]["open_files"] == [500, 500]
    assert "address space" in checks["limits"]["message"] and "ulimit" in checks["limits"]["remedy"]


def test_a_seccomp_filter() -> None:
    """A filter on crcli itself, as containers have one, is seen."""
    assert doctor()["seccomp"]["evidence"] == {"mode": int(_mode_here())}
    checks = doctor(sys.executable, "-c", FILTERED)
    assert checks["seccomp"]["status"] == "note" and checks["seccomp"]["evidence"] == {"mode": 2}


def _mode_here() -> str:
    return Path("/proc/self/status").read_text().partition("\nSeccomp:")[2].split()[0]


def test_a_container() -> None:
    """A pid namespace of its own is a container's mark."""
    checks = doctor("unshare", "--pid", "--fork", "--mount-proc")
    assert "a pid namespace of its own" in checks["container"]["evidence"]["signs"]


@pytest.mark.skipif(not Path("/sys/fs/cgroup/pids/pids.max").parent.is_dir(), reason="needs cgroups v1")
def test_limits_of_the_cgroup() -> None:
    """The limit of a cgroup above crcli's own counts too."""
    above = Path("/sys/fs/cgroup/pids/crcli-test-doctor")
    own = above / "own"
    own.mkdir(parents=True)
    try:
        (above / "pids.max").write_text("123")
        checks = doctor("sh", "-c", f'echo $$ >{own}/cgroup.procs; exec "$@"', "sh")
    finally:
        own.rmdir()
        above.rmdir()
    assert (
        checks["cgroup"]["evidence"]["pids_limit"] == 123 and "123 processes" in checks["cgroup"]["message"]
    )


def test_leftovers(tmp_path: Path) -> None:
    """A folder that a killed restore left is named, with what to do about it."""
    left = tmp_path / "crcli-cgroups-0123"
    assert doctor(TMPDIR=str(tmp_path))["killed-commands"]["evidence"]["folders"] == []
    left.mkdir()
    check = doctor(TMPDIR=str(tmp_path))["killed-commands"]
    assert check["evidence"]["folders"] == [str(left)] and check["status"] == "note"
    assert left.exists()


def test_little_room(tmp_path: Path) -> None:
    """A full disk below the store or the logs is seen before a dump needs it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path], check=True)
    try:
        checks = doctor(options=("--store", f"{tmp_path}/store"), CRCLI_LOG_DIR=f"{tmp_path}/logs")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert checks["store"]["status"] == checks["logs"]["status"] == "note"
    assert 0 < checks["store"]["evidence"]["free"] <= 1 << 20
