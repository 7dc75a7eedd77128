"""What this host lacks for the main job, each with its evidence and its remedy.

Each check tries the thing itself where that leaves no trace, and asks the kernel or CRIU where it would.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any

from crcli import kernel
from crcli.criu import netlock
from crcli.criu.binary import criu_command
from crcli.errors import CrcliError, HostLacks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from crcli.config import StoreChoice

_NEEDED = {
    "CAP_SYS_ADMIN": (21, "namespaces, mounts and the pids of restored processes"),
    "CAP_SYS_PTRACE": (19, "looking into other processes"),
    "CAP_NET_ADMIN": (12, "connections, and the lock on them while a tree stands frozen"),
    "CAP_DAC_OVERRIDE": (1, "files of other users"),
    "CAP_SETUID": (7, "the users of restored processes"),
    "CAP_SETGID": (6, "the groups of restored processes"),
    "CAP_KILL": (5, "stopping processes of other users"),
}
_USEFUL = {
    "CAP_SYS_RESOURCE": (24, "trees of other users, and limits above the hard limit, cannot be restored"),
}
_OLDEST_CRIU = (4, 1)
_FEATURES = {
    "uffd-noncoop": (
        "lazy restores",
        "a kernel with CONFIG_USERFAULTFD and vm.unprivileged_userfaultfd or root",
    ),
    "network_lock_nftables": ("locking connections with nftables", "a kernel with CONFIG_NF_TABLES"),
    "clone3_set_tid": ("giving restored processes their pids back", "Linux 5.5 or newer"),
    "pagemap_scan": ("finding a tree's pages quickly", "Linux 6.7 or newer"),
}
_SCARCE_BYTES = 1 << 30
_CHECK_LIMIT_S = 20.0


class Status(StrEnum):
    """What a check found: all is well, something to know, or the main job cannot run."""

    OK = "ok"
    NOTE = "note"
    LACKS = "lacks"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: Status
    message: str
    evidence: dict[str, Any] = field(default_factory=dict)
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        """The check as `crcli doctor --json` prints it."""
        return {**self.__dict__, "status": self.status.value}


def examine(store: StoreChoice) -> list[Check]:
    """Look at everything that the main job needs; `store` is the one that commands would use."""
    checks: list[Check] = []
    for look in (_kernel, _capabilities, _criu, _pycriu, _private_tmpfs, _namespaces, _locks):
        checks += look()
    checks += _store(store)
    return checks


def _kernel() -> Iterator[Check]:
    name = os.uname()
    evidence = {"release": name.release, "machine": name.machine}
    numbers = re.match(r"(\d+)\.(\d+)", name.release)
    version = (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    fits = version >= (5, 5) and name.machine in ("x86_64", "aarch64")
    yield Check(
        "kernel",
        Status.OK if fits else Status.LACKS,
        f"Linux {name.release} on {name.machine}",
        evidence,
        "" if fits else "crcli needs Linux 5.5 or newer on x86_64 or aarch64",
    )


def _capabilities() -> Iterator[Check]:
    held = _effective_capabilities()
    lacking = {name: why for name, (bit, why) in _NEEDED.items() if not held >> bit & 1}
    is_root = os.geteuid() == 0
    yield Check(
        "capabilities",
        Status.LACKS if lacking else Status.OK,
        "; ".join(f"no {name}: {why}" for name, why in lacking.items()) or "all that is needed",
        {
            "uid": os.geteuid(),
            "effective": f"{held:x}",
            "lacking": list(lacking),
            "cap_checkpoint_restore": bool(held >> 40 & 1),  # CAP_SYS_ADMIN stands in for it
        },
        "" if not lacking else _capability_remedy(is_root),
    )
    for name, (bit, why) in _USEFUL.items():
        if not held >> bit & 1:
            yield Check(name.lower(), Status.NOTE, f"no {name}: {why}", {}, _capability_remedy(is_root))


def _effective_capabilities() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def _capability_remedy(is_root: bool) -> str:
    return "start this container with it (--cap-add)" if is_root else "run crcli as root"


def _criu() -> Iterator[Check]:
    try:
        command = criu_command()
    except HostLacks as error:
        yield Check("criu", Status.LACKS, error.message, {}, error.hint or "run scripts/install-criu")
        return
    said = _ask(command, "--version")
    found = re.search(r"Version: (\d+)\.(\d+)(\S*)", said.stdout)
    if found is None:
        text = (said.stderr or said.stdout).strip()
        yield Check(
            "criu",
            Status.LACKS,
            f"{command[-1]} does not start: {text}",
            {"command": command},
            "run scripts/install-criu",
        )
        return
    version = (int(found[1]), int(found[2]))
    fits = version >= _OLDEST_CRIU
    yield Check(
        "criu",
        Status.OK if fits else Status.LACKS,
        f"CRIU {found[1]}.{found[2]}{found[3]} ({command[-1]})",
        {"command": command, "version": f"{found[1]}.{found[2]}{found[3]}"},
        "" if fits else "crcli needs CRIU 4.1 or newer: run scripts/install-criu",
    )
    yield from _criu_check(command)


def _criu_check(command: list[str]) -> Iterator[Check]:
    said = _ask(command, "check")
    text = said.stdout.strip() if said.returncode == 0 else said.stderr.strip()
    yield Check(
        "criu-check",
        Status.OK if said.returncode == 0 else Status.LACKS,
        text.splitlines()[-1] if text else f"`criu check` ended with {said.returncode}",
        {"output": text},
        "" if said.returncode == 0 else "what CRIU names is missing in this kernel, or not allowed here",
    )
    if said.returncode != 0:
        return  # what it says of single features would mislead
    for feature, (purpose, remedy) in _FEATURES.items():
        there = _ask(command, "check", "--feature", feature).returncode == 0
        yield Check(
            feature.replace("_", "-"),
            Status.OK if there else Status.NOTE,
            f"{purpose}: {'works' if there else 'not here'}",
            {"feature": feature},
            "" if there else remedy,
        )


def _ask(command: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, errors="replace", timeout=_CHECK_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


def _pycriu() -> Iterator[Check]:
    try:
        import pycriu

        import crcli.criu.messages  # noqa: F401  # as the pipelines do
    except (ImportError, HostLacks) as error:
        remedy = "run scripts/quickstart, which makes CRIU's pycriu reachable from this Python"
        yield Check("pycriu", Status.LACKS, str(error), {"python": sys.executable}, remedy)
        return
    yield Check("pycriu", Status.OK, "CRIU's Python package is here", {"path": pycriu.__file__})


def _private_tmpfs() -> Iterator[Check]:
    try:
        os.close(kernel.tmpfs_fd())
    except OSError as error:
        remedy = (
            "crcli needs CAP_SYS_ADMIN and Linux 5.2 or newer; a container's seccomp filter may be in the way"
        )
        yield Check("private-tmpfs", Status.LACKS, f"no private tmpfs: {error.strerror}", {}, remedy)
        return
    from crcli.criu.workspace import spare_memory

    spare = spare_memory()
    yield Check(
        "memory",
        Status.OK if spare > _SCARCE_BYTES else Status.NOTE,
        f"a private tmpfs works; {spare >> 20} MiB of memory are free",
        {"free": spare},
        "" if spare > _SCARCE_BYTES else "large trees freeze longer when little memory is free",
    )


def _namespaces() -> Iterator[Check]:
    kinds = {
        "pid": kernel.CLONE_NEWPID,
        "mount": kernel.CLONE_NEWNS,
        "network": kernel.CLONE_NEWNET,
        "ipc": kernel.CLONE_NEWIPC,
    }
    refused = [name for name, flag in kinds.items() if not _works_in_child(partial(kernel.unshare, flag))]
    yield Check(
        "namespaces",
        Status.LACKS if refused else Status.OK,
        f"cannot make namespaces: {', '.join(refused)}"
        if refused
        else "can be made, for trials and restores",
        {"refused": refused},
        "grant CAP_SYS_ADMIN, and let the container's seccomp filter pass unshare" if refused else "",
    )


def _works_in_child(attempt: Callable[[], None]) -> bool:
    child = os.fork()
    if child == 0:
        try:
            attempt()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _locks() -> Iterator[Check]:
    tables = sorted(netlock.tables())
    yield Check(
        "network-locks",
        Status.NOTE if tables else Status.OK,
        f"connections of {len(tables)} dumped trees are still held" if tables else "no connections are held",
        {"tables": tables},
        "restore those images here or remove them with `crcli rm`; `crcli doctor --fix` lets go of all"
        if tables
        else "",
    )


def release_locks() -> list[str]:
    """Remove every packet filter table that a dump left on this host; return their names.

    Peers of the trees that were dumped find their connections closed then.
    """
    tables = sorted(netlock.tables())
    for name in tables:
        netlock.remove(name)
    return tables


def _store(choice: StoreChoice) -> Iterator[Check]:
    from crcli.store.open import open_store

    evidence: dict[str, Any] = {"store": choice.url, "from": choice.source}
    try:
        store = open_store(choice.url, endpoint_url=choice.endpoint_url, patience_s=5.0)
        if store.url.startswith("file:"):
            yield from _directory(choice, evidence)
            return
        try:
            key = f"probe-{os.urandom(6).hex()}"
            store.put(key, b"crcli doctor\n")
            store.delete(key)
        finally:
            store.close()
    except CrcliError as error:
        yield Check("store", Status.LACKS, f"{choice.url}: {error.message}", evidence, error.hint)
        return
    yield Check("store", Status.OK, f"{choice.url} takes objects (from {choice.source})", evidence)


def _directory(choice: StoreChoice, evidence: dict[str, Any]) -> Iterator[Check]:
    from crcli.store.address import StoreAddress

    root = StoreAddress.parse(choice.url).place
    there = root
    while not os.path.exists(there):
        there = os.path.dirname(there)
    if not os.access(there, os.W_OK | os.X_OK) or not os.path.isdir(there):
        remedy = "choose another --store, or run crcli as a user who may write there"
        yield Check("store", Status.LACKS, f"{there} cannot be written to", evidence, remedy)
        return
    room = os.statvfs(there)
    free = room.f_bavail * room.f_frsize
    will = "" if there == root else " (the first dump creates it)"
    scarce = free < _SCARCE_BYTES
    yield Check(
        "store",
        Status.NOTE if scarce else Status.OK,
        f"{root}{will}: {free >> 20} MiB free (from {choice.source})",
        {**evidence, "free": free},
        "free space there, or choose another --store" if scarce else "",
    )
