"""The parts of scripts/ that can be tried without a fresh machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crcli.guard.doctor import criu as doctor_of_criu

SCRIPTS = Path(__file__).parents[2] / "scripts"

# What a test would install by mistake would at least not land on the machine.
NOWHERE = "/nonexistent/crcli/criu"

DEPENDENCIES = """\
criu
  Depends: libc6
  Depends: libnet9
 |Depends: libold1
  Depends: <libvirtual1>
    libprovider1
  Depends: python3
python3
  Depends: libpython3-stdlib
libc6
  Depends: libgcc-s1
  Depends: libc-gconv-modules-extra
libnet9
  Depends: libc6
libgcc-s1
  Depends: gcc-16-base
  Depends: libc6
libprovider1
  Depends: libdeep1
"""

TARGETS = """\
http://vendor/debian/|bookworm|main|Vendor
http://mirror/debian/|bookworm|main|Debian
http://mirror/debian/|bookworm-updates|main|Debian
http://mirror/debian/|bookworm|contrib|Debian
http://mirror/security/|bookworm-security|main|Debian
"""


def install_criu(commands: str, given: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash commands with the functions of scripts/install-criu, which itself installs nothing then."""
    return subprocess.run(
        ["bash", "-c", f'source "$1"; {commands}', "a-test", str(SCRIPTS / "install-criu")],
        input=given,
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "CRCLI_CRIU_PREFIX": NOWHERE, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )


KERNELS = """\
linux-image-6.1.0-9-amd64
linux-image-6.1.0-50-amd64
linux-image-6.1.0-50-cloud-amd64
linux-image-6.1.0-50-amd64-dbg
linux-image-6.18.9+deb13-amd64
linux-image-6.18.15+deb13-amd64
linux-image-6.18.15+deb13-rt-amd64
linux-image-6.18.15+deb13-amd64-unsigned
linux-image-6.10.1-amd64
"""


@pytest.mark.skipif(not shutil.which("dpkg"), reason="dpkg names the architecture")
@pytest.mark.parametrize(
    ("version", "package"),
    [
        ("6.1", "linux-image-6.1.0-50-"),
        ("6.18", "linux-image-6.18.15+deb13-"),
        ("6.10", "linux-image-6.10.1-"),
        ("6.17", ""),
    ],
)
def test_the_newest_kernel_for_ordinary_machines_is_fetched(version: str, package: str) -> None:
    """Of a version's packages, by number: not those of clouds, nor for real time, debugging or signing."""
    stubs = 'dpkg() { echo amd64; }; apt-cache() { grep "^${!#}"; }'
    command = f'source "$1"; {stubs}; newest_of {version}'
    found = subprocess.run(
        ["bash", "-c", command, "a-test", str(SCRIPTS / "fetch-kernel")],
        input=KERNELS,
        capture_output=True,
        text=True,
    )
    assert found.stdout.strip() == (f"{package}amd64" if package else "")


def fake_criu(folder: Path, version: str, complaint: str = "") -> Path:
    binary = folder / "sbin" / "criu"
    binary.parent.mkdir(parents=True)
    check = f"echo '(00.1) Error ({complaint}' >&2; exit 1" if complaint else "exit 0"
    binary.write_text(f'#!/bin/sh\n[ "$1" = check ] || {{ echo "Version: {version}"; exit 0; }}\n{check}\n')
    binary.chmod(0o755)
    return binary


def with_kernel(folder: Path, release: str) -> str:
    """A PATH with which scripts take this for the kernel's release."""
    uname = folder / "uname"
    uname.write_text(f"#!/bin/sh\necho {release}\n")
    uname.chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


@pytest.mark.parametrize(
    "name",
    [
        "install-criu",
        "fetch-kernel",
        "quickstart",
        "test",
        "check",
        "lib/apt.sh",
        "lib/debian.sh",
        "lib/setup.sh",
        "../vagrant/demo-move",
        "../vagrant/provision/node",
        "../vagrant/provision/store",
        "../vagrant/provision/use-store",
    ],
)
def test_every_script_is_valid_bash(name: str) -> None:
    """A script with a syntax error would only be noticed on somebody's fresh machine."""
    assert subprocess.run(["bash", "-n", str(SCRIPTS / name)], capture_output=True, text=True).stderr == ""


def test_only_the_libraries_of_criu_are_fetched() -> None:
    """Libraries are followed through libraries and through virtual packages; Python and its own are not."""
    found = install_criu("libraries_of criu", DEPENDENCIES).stdout.split()
    assert sorted(found) == ["libc6", "libdeep1", "libgcc-s1", "libnet9", "libold1", "libprovider1"]


def test_the_mirror_that_calls_itself_debian_comes_first() -> None:
    """Vendors publish under Debian's suite names too; the security archive has no other suites."""
    found = install_criu("mirrors_among bookworm", TARGETS).stdout.split()
    assert found == ["http://mirror/debian/", "http://vendor/debian/"]


@pytest.mark.skipif(not shutil.which("dpkg"), reason="dpkg compares the versions")
@pytest.mark.parametrize(
    ("version", "complaint", "verdict"),
    [
        ("4.1", "", "fine"),
        ("4.2.1", "", "fine"),
        ("4.10", "", "fine"),
        ("3.17.1", "", "is 3.17.1, older than 4.1"),
        ("4.2", "vdso.c:1): bad", "is 4.2 but `criu check` fails: (00.1) Error (vdso.c:1): bad"),
        ("", "", "does not start"),
    ],
)
def test_a_criu_is_taken_only_when_it_works_here(
    tmp_path: Path, version: str, complaint: str, verdict: str
) -> None:
    """A version that is new enough is not enough: the kernel may refuse it, and the reason is told."""
    binary = fake_criu(tmp_path, version, complaint)
    path = with_kernel(tmp_path, "6.12.107")
    assert install_criu(f'runs {binary} && echo fine || echo "$why"', PATH=path).stdout.strip() == verdict


@pytest.mark.skipif(not shutil.which("dpkg"), reason="dpkg compares the versions")
@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [
        ("6.12.107+deb13-amd64", "fine"),
        ("6.16.3+deb13-amd64", "older than 4.2"),
        ("6.18.44", "older than 4.2"),
    ],
)
def test_a_criu_is_new_enough_for_this_kernel(tmp_path: Path, kernel: str, verdict: str) -> None:
    """CRIU 4.1 says that all is well on Linux 6.16, but dumps no connection there."""
    binary = fake_criu(tmp_path, "4.1.1")
    path = with_kernel(tmp_path, kernel)
    said = install_criu(f'runs {binary} && echo fine || echo "$why"', PATH=path).stdout
    assert said.strip().endswith(verdict)


@pytest.mark.parametrize(
    ("complaint", "remedy"),
    [
        ("criu/mount.c:381): mnt: No parent found for mountpoint 71 (@./proc)", "mount --bind"),
        ("criu/x.c:1): Can not do that: Operation not permitted", "CAP_SYS_ADMIN"),
    ],
)
def test_why_this_machine_refuses_a_criu(complaint: str, remedy: str) -> None:
    """A chroot in a folder that is no mount point lacks no capability; the doctor says so, too."""
    commands = 'works_in() { why="$0"; false; }; criu=(criu); (refuse) 2>&1 || echo "$?"'
    said = install_criu(commands.replace("$0", f"is 4.2 but \\`criu check\\` fails: Error ({complaint}"))
    assert remedy in said.stdout and said.stdout.split()[-1] == "3"
    assert ("mount --bind" in said.stdout) == (remedy == "mount --bind")


def test_the_doctor_knows_a_root_that_is_no_mount_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CRIU names a mount that has no parent, and not why."""
    binary = fake_criu(tmp_path, "4.2", "mount.c:381): mnt: No parent found for mountpoint 71 (@./proc)")
    monkeypatch.setenv("CRCLI_CRIU", str(binary))
    (refused,) = (check for check in doctor_of_criu._criu() if check.name == "criu-check")
    assert "mount --bind" in refused.remedy


def test_lists_past_their_date_are_taken_when_nothing_newer_helps() -> None:
    """A mirror that lags, or a clock ahead: those suites, and no others, are asked again, last."""
    commands = """
        work=$(mktemp -d); debian_mirrors() { echo http://mirror/; }
        source_of() { echo "E: Release file for $1 is expired" >$work/log; [[ $2 == stable || -n ${3:-} ]]; }
        try() { echo "$suite"; [[ $suite == testing ]]; }
        each_source "sid testing stable" try && echo found
        rm -r "$work"
        """
    found = install_criu(commands)
    assert found.stdout.split() == ["stable", "sid", "testing", "found"]


def test_each_lane_is_set_up_once() -> None:
    """Of tests that are named by their paths, scripts/test finds the lanes whose set-up they need."""
    named = "tests/real/test_move.py tests/real/test_run.py::test_x tests/store -k real/ tests/unit/ -x tests"
    command = f'source "$1"; lanes_of {named}'
    found = subprocess.run(
        ["bash", "-c", command, "a-test", str(SCRIPTS / "test")], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["real", "store", "unit"]


@pytest.mark.skipif(not shutil.which("dpkg"), reason="dpkg compares the versions")
def test_a_criu_without_pycriu_is_not_taken(tmp_path: Path) -> None:
    """crcli talks to CRIU through pycriu, which must be of the same root as the binary."""
    binary = fake_criu(tmp_path / "bare", "4.2")
    assert "has no pycriu" in install_criu(f'has_pycriu {binary} || echo "$why"').stdout
    package = tmp_path / "bare/lib/python3/dist-packages/pycriu"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert install_criu(f'has_pycriu {binary} && echo "$pycriu"').stdout.strip() == str(package)


def test_a_venv_sees_pycriu_and_nothing_else_beside_it(tmp_path: Path) -> None:
    """The path in the .pth file holds one link, so the distribution's other packages stay out of the venv."""
    packages = tmp_path / "dist-packages"
    for name in ("pycriu", "yaml"):
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").touch()
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    home = f"{tmp_path}/home/criu"
    shown = install_criu(f"pycriu={packages}/pycriu; pycriu_shown_to {venv}", CRCLI_CRIU_PREFIX=home)
    assert shown.returncode == 0, shown.stderr
    look = "import pycriu, importlib.util; print(importlib.util.find_spec('yaml'))"
    looked = subprocess.run([venv / "bin/python", "-c", look], capture_output=True, text=True)
    assert looked.stdout.strip() == "None", looked.stderr


def test_a_line_of_a_package_list_is_one_package() -> None:
    """scripts/test reads each line of tests/*/apt.txt as one package, or as first|second."""
    for listing in SCRIPTS.parent.glob("tests/*/apt.txt"):
        for line in listing.read_text().splitlines():
            assert " " not in line.split("#")[0].strip(), f"{listing}: {line}"
