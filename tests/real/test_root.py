"""`restore --root`: a tree that finds its paths below another folder."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from crcli import kernel
from tests.support.crcli import Crcli, counted, counter, launched, wait_until
from tests.support.programs import Program, spawn_python, then_wait

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

_EMPTY = ("dev", "proc", "sys", "tmp")


@contextmanager
def another_root(folder: Path) -> Iterator[Path]:
    """A root with all that this host's has, but for a /tmp of its own, until the block ends."""
    mounted = []
    try:
        for entry in os.scandir("/"):
            place = folder / entry.name
            if entry.is_symlink():
                place.symlink_to(os.readlink(entry.path))
            elif entry.is_dir():
                place.mkdir(parents=True)
                shutil.copymode(entry.path, place)  # CRIU compares that of folders too
                if entry.name not in _EMPTY:
                    kernel.mount(entry.path, str(place), "", kernel.MS_BIND)
                    mounted.append(place)
        yield folder
    finally:
        for place in mounted:
            kernel.unmount(str(place))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Another root."""
    (tmp_path / "root").mkdir()
    with another_root(tmp_path / "root") as folder:
        yield folder


def there(root: Path, program: Program) -> Program:
    """The program with its output as it is found below the root."""
    return Program(program.process, root / program.output_path.relative_to("/"))


def test_a_tree_goes_on_below_another_folder(crcli: Crcli, root: Path) -> None:
    """The tree goes on with its memory, writes below the folder, and sees the folder as its root."""
    seen = "import os; os.chdir('/tmp')\n"
    with spawn_python(seen + counter()) as program:
        image = crcli.dump(program.pid)["image"]
        before = program.output
        report = crcli.restore(image, "--root", str(root))
        inside = there(root, program)
        assert inside.output.startswith(before)  # the file that travelled in the image was laid out there
        wait_until(lambda: counted(inside)[-1] > counted(program)[-1] + 5, "it stands still")
        assert program.output == before
        numbers = counted(inside)
        assert numbers == list(range(len(numbers)))
        pid = report["host_pid"]
        assert report["pid"] == program.pid != pid and report["pid_namespace"] == "new"
        assert os.readlink(f"/proc/{pid}/cwd") == "/tmp" and os.readlink(f"/proc/{pid}/root") == "/"
        assert os.path.samefile(f"/proc/{pid}/root/tmp", root / "tmp")
        mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        assert [line.split()[4] for line in mounts].count("/") == 1


def test_it_ends_with_its_exit_code(crcli: Crcli, root: Path) -> None:
    """With --wait the tree's own exit code comes back, and nothing of its namespaces stays."""
    code = """
        import os, time
        print("ready")
        while not os.path.exists("/tmp/end"):
            time.sleep(0.01)
        os._exit(7)
        """
    with spawn_python(code, cwd="/") as program:
        image = crcli.dump(program.pid)["image"]
        arguments = ("restore", image, "--store", crcli.store, "--json", "--root", str(root), "--wait")
        with crcli.start(*arguments) as process:
            assert process.stdout is not None
            report = json.loads(process.stdout.readline())
            (root / "tmp" / "end").write_text("")
            assert process.wait(60) == 7
        assert not psutil.pid_exists(report["host_pid"])


def test_a_tree_that_was_restored_so_is_not_dumped(crcli: Crcli, root: Path) -> None:
    """A dump of it is refused by name, and it runs on."""
    with spawn_python(counter(), cwd="/") as program:
        report = crcli.move(program.pid, "--root", str(root))
        error = crcli.dump(report["host_pid"], code=10)["error"]
        assert error["findings"][0]["name"] == "root-elsewhere"
        inside = there(root, program)
        before = counted(inside)[-1]
        wait_until(lambda: counted(inside)[-1] > before + 5, "it stands still")


JAILED = """
import os
os.chroot({jail!r})
os.chdir("/")
out = os.open("/out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for fd in (0, 1, 2):
    os.dup2(out, fd)
count = "i=0; while :; do echo $i; i=$((i+1)); /busybox sleep 0.01; done"
os.execv("/busybox", ["busybox", "sh", "-c", count])
"""


def test_a_chroot_is_dumped_wherever_it_was_restored(crcli: Crcli, tmp_path: Path) -> None:
    """A tree in a chroot goes on in it, moved again and again into pid namespaces of its own."""
    busybox = shutil.which("busybox")
    if busybox is None or subprocess.run(["ldd", busybox], capture_output=True, check=False).returncode == 0:
        pytest.skip("there is no statically linked busybox")
    jail = tmp_path / "jail"
    jail.mkdir()
    shutil.copy(busybox, jail / "busybox")

    def shown() -> list[int]:
        return [int(line) for line in (jail / "out").read_text().splitlines()]

    with launched([sys.executable, "-c", JAILED.format(jail=str(jail))], tmp_path) as program:
        wait_until(lambda: (jail / "out").exists() and len(shown()) > 3, "it does not begin")
        pid = program.pid
        for _ in range(3):
            pid = crcli.move(pid, "--pid-namespace", "new")["host_pid"]
            assert os.path.samefile(f"/proc/{pid}/root", jail)
            before = len(shown())
            wait_until(lambda before=before: len(shown()) > before + 3, "it stands still")  # type: ignore[misc]
        assert shown() == list(range(len(shown())))


def test_roots_that_will_not_do_are_refused(crcli: Crcli, tmp_path: Path) -> None:
    """A folder that lacks what a root has, or what the tree has open, starts nothing and gets no file."""
    bare = tmp_path / "bare"
    bare.mkdir()
    with spawn_python(then_wait(), cwd="/") as program:
        image = crcli.dump(program.pid)["image"]
        error = crcli.restore(image, "--root", str(bare), code=20)["error"]
        assert error["findings"][0]["name"] == "root-incomplete" and error["state"] == "untouched"
        assert list(bare.iterdir()) == []
        for name in ("dev", "proc", "sys"):
            (bare / name).mkdir()
        error = crcli.restore(image, "--root", str(bare), code=20)["error"]
        assert error["findings"][0]["name"] == "file-missing" and f"{bare}/" in error["message"]
        assert len(list(bare.iterdir())) == 3
        crcli.restore(image, "--root", str(tmp_path / "nowhere"), code=2)
        crcli.restore(image, "--root", "/", "--pid-namespace", "host", code=2)


def test_a_root_without_the_kernels_folders_is_refused(crcli: Crcli, root: Path) -> None:
    """Without /dev, /proc and /sys to mount over, the remedy is named and nothing was started."""
    with spawn_python(then_wait(), cwd="/") as program:
        image = crcli.dump(program.pid)["image"]
        (root / "sys").rmdir()
        error = crcli.restore(image, "--root", str(root), code=20)["error"]
        assert error["findings"][0]["name"] == "root-incomplete" and error["hint"] == f"mkdir {root}/sys"


def test_a_restore_that_fails_leaves_nothing_below_it(
    crcli: Crcli, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When CRIU fails, the files that were laid out below the root are gone again."""
    with tempfile.NamedTemporaryFile("r+", dir="/var/tmp") as file:
        locks = f"import fcntl; file = open({file.name!r}, 'r+'); fcntl.lockf(file, fcntl.LOCK_EX)\n"
        with spawn_python(locks + then_wait(), cwd="/") as program:
            image = crcli.dump(program.pid)["image"]
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which CRIU would wait for, for ever
            monkeypatch.setenv("CRCLI_RESTORE_LIMIT", "1")
            copy = root / file.name[1:]
            (finding,) = crcli.restore(image, "--root", str(root), code=20)["error"]["findings"]
            assert finding["evidence"]["path"] == str(copy)
            crcli.restore(image, "--root", str(root), "--force-guard", "lock-taken", code=21)
            assert list((root / "tmp").iterdir()) == []
            monkeypatch.delenv("CRCLI_RESTORE_LIMIT")
            fcntl.lockf(file, fcntl.LOCK_UN)
            crcli.restore(image, "--root", str(root))
            assert there(root, program).output == program.output
