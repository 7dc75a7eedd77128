"""What a run leaves behind on the machine, undone: files of the suite, control groups."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crcli import kernel
from tests.zdtm.suite import STATIC

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MOUNT_WITHIN_S = 10.0
_HIERARCHIES = ("name=zdtmtst", "name=zdtmtst.defaultroot")
_OTHERS = frozenset({".d", ".o", ".gitignore"})


class Before:
    """What lay in the suite's folders before the run."""

    def __init__(self, source: Path) -> None:
        tests = source / "test"
        self._entries = {folder: set(os.listdir(folder)) for folder in (tests, tests / STATIC)}

    def restore(self) -> list[Path]:
        """Remove what is new there; return it."""
        found = [
            folder / name
            for folder, names in self._entries.items()
            for name in os.listdir(folder)
            if name not in names and Path(name).suffix not in _OTHERS
        ]
        for path in found:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        return found


@contextmanager
def suite_cgroups() -> Iterator[None]:
    """The hierarchies of control groups that programs of the suite use exist during the block.

    One that came and went with its program would change the control groups of everything else meanwhile.
    """
    holder = f"holder.{os.getpid()}"
    for name in _HIERARCHIES:
        _in_hierarchy(name, lambda root: (root / holder).mkdir())
    try:
        yield
    finally:
        for name in _HIERARCHIES:
            _forget(name)


def hierarchies() -> frozenset[str]:
    """The hierarchies of control groups that there are now."""
    return frozenset(line.split(":")[1] for line in Path("/proc/self/cgroup").read_text().splitlines())


def have_only(known: frozenset[str]) -> None:
    """Have every other hierarchy cease: programs have mounted them.

    Whoever mounts such a one again and lets it go ends it with that, as CRIU does in a dump. What is there at
    the next program's dump and gone at its restore changes the control groups that this one sees:
    `cgroup_ignore` passed by that.
    """
    for name in hierarchies() - known:
        _forget(name)


def _in_hierarchy(name: str, action: Callable[[Path], None]) -> None:
    """Do something in a mounted hierarchy. One that is on its way out cannot be mounted for a while."""
    folder = Path(tempfile.mkdtemp(prefix="crcli-zdtm-"))
    end = time.monotonic() + MOUNT_WITHIN_S
    try:
        while not _mounted(name, folder):
            if time.monotonic() > end:
                return
            time.sleep(0.2)
        try:
            action(folder)
        finally:
            kernel.unmount(str(folder))
    finally:
        folder.rmdir()


def _forget(name: str) -> None:
    """Have a hierarchy cease: it does with its last mount, if the kernel has freed its groups by then."""
    end = time.monotonic() + MOUNT_WITHIN_S
    while name in hierarchies() and time.monotonic() < end:
        _in_hierarchy(name, _empty)
        time.sleep(0.2)


def _empty(root: Path) -> None:
    """Remove every group below a hierarchy's root; programs leave some."""
    for folder, _, _ in os.walk(root, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:  # the root itself, or a group that is in use
            pass


def _mounted(name: str, folder: Path) -> bool:
    try:
        kernel.mount("zdtm", str(folder), "cgroup", data=f"none,{name}" if "=" in name else name)
    except OSError:
        return False
    return True
