"""What earlier commands left on this host, as far as it can be told: some of it on purpose."""

from __future__ import annotations

import glob
import os
from typing import TYPE_CHECKING

from crcli.criu import netlock
from crcli.criu.workspace import temporary_folder
from crcli.guard.doctor.check import Check, note, passed
from crcli.process.identity import read_proc, read_stat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _locks() -> Iterator[Check]:
    tables = sorted(netlock.tables())
    if tables:
        yield note(
            "network-locks",
            f"connections of dumped trees are still held ({len(tables)})",
            "restore those images here or remove them with `crcli rm`; `crcli doctor --fix` lets go of all",
            tables=tables,
        )
    else:
        yield passed("network-locks", "no connections are held", tables=tables)


def release_locks() -> list[str]:
    """Remove every packet filter table that a dump left on this host; return their names.

    Peers of the trees that were dumped find their connections closed then.
    """
    tables = sorted(netlock.tables())
    for name in tables:
        netlock.remove(name)
    return tables


def _killed_commands() -> Iterator[Check]:
    orphans = sorted(_orphaned_criu())
    folders = sorted(glob.glob(f"{glob.escape(temporary_folder())}/crcli-cgroups-*"))
    if orphans or folders:
        parts = [f"CRIU as process {pid}, without its crcli" for pid in orphans]
        parts += [f"the folder {path}" for path in folders]
        yield note(
            "killed-commands",
            f"crcli commands that were killed, or are at work now, left {', '.join(parts)}",
            "when no crcli is at work: kill those processes; umount what is mounted below those folders, and "
            "remove them",
            criu=orphans,
            folders=folders,
        )
    else:
        yield passed("killed-commands", "nothing is left of killed commands", criu=orphans, folders=folders)


def _orphaned_criu() -> Iterator[int]:
    """`criu swrk` processes whose parent has gone: they wait for nobody."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                words = read_proc(f"/proc/{name}/cmdline").split(b"\0")
                is_criu = b"swrk" in words and any(word.endswith(b"/criu") for word in words)
                if is_criu and read_stat(int(name)).ppid == 1:
                    yield int(name)
            except OSError:
                continue


def _temporary_names() -> Iterator[Check]:
    names = sorted(glob.glob("/dev/shm/link_remap.*"))
    if names:
        yield note(
            "temporary-names",
            f"{len(names)} names in /dev/shm were made by dumps, for files that had none",
            "restores use them; remove them when no tree that was dumped here is to come back here",
            names=names[:20],
        )
    else:
        yield passed("temporary-names", "none in /dev/shm", names=names)


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (_locks, _killed_commands, _temporary_names)
