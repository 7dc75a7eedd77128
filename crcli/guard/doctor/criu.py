"""CRIU: where it is, what it says of this kernel; and the Python packages that stand between it and us."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import TYPE_CHECKING

from crcli.criu.binary import criu_command
from crcli.errors import HostLacks
from crcli.guard.doctor.check import Check, lacks, note, passed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_OLDEST = (4, 1)
_OLDEST_FOR_SOCKETS = (4, 2)  # on kernels that do not say SO_PASSCRED of every socket: Linux 6.16 and newer
_INSTALL = "run scripts/install-criu"
_CHECK_LIMIT_S = 20.0
_FEATURES = {
    # CRIU's name: what it is for, and how to get it (nothing: crcli does without)
    "uffd-noncoop": (
        "userfaultfd, for lazy restores",
        "a kernel with CONFIG_USERFAULTFD and vm.unprivileged_userfaultfd or root",
    ),
    "network_lock_nftables": ("locking connections with nftables", "a kernel with CONFIG_NF_TABLES"),
    "clone3_set_tid": ("giving restored processes their pids back", "Linux 5.5 or newer"),
    "pagemap_scan": ("finding a tree's pages quickly", "Linux 6.7 or newer"),
    "mem_dirty_track": (
        "tracking of dirty pages, for --pre-copy",
        "a kernel with CONFIG_MEM_SOFT_DIRTY, as Debian's and Ubuntu's; dumps work without",
    ),
    "timens": ("clocks that go on from where they were", "Linux 5.6 or newer with CONFIG_TIME_NS"),
    "get_rseq_conf": ("restartable sequences, which every glibc program uses", "Linux 5.13 or newer"),
}
_PACKAGES = (
    *("typer", "rich", "protobuf", "psutil", "blake3", "zstandard", "numpy"),
    *("boto3", "obstore", "pyyaml", "pluggy"),
)
"""What pyproject.toml asks for."""


def _criu() -> Iterator[Check]:
    try:
        command = criu_command()
    except HostLacks as error:
        yield lacks("criu", error.message, error.hint or _INSTALL)
        return
    said = _ask(command, "--version")
    found = re.search(r"Version: (\d+)\.(\d+)(\S*)", said.stdout)
    if found is None:
        text = (said.stderr or said.stdout).strip()
        yield lacks("criu", f"{command[-1]} does not start: {text}", _INSTALL, command=command)
        return
    version = f"{found[1]}.{found[2]}{found[3]}"
    source = _source(command)
    says = f"CRIU {version} ({command[-1]}, from {source})"
    evidence = {"command": command, "version": version, "from": source}
    number = int(found[1]), int(found[2])
    if number < _OLDEST:
        yield lacks("criu", says, f"crcli needs CRIU 4.1 or newer: {_INSTALL}", **evidence)
    elif number < _OLDEST_FOR_SOCKETS and not _all_sockets_say_passcred():
        remedy = f"with Linux 6.16 and newer, CRIU dumps connections only since 4.2: {_INSTALL}"
        yield lacks("criu", says, remedy, **evidence)
    else:
        yield passed("criu", says, **evidence)
    yield from _what_criu_says(command)


def _all_sockets_say_passcred() -> bool:
    """Whether this kernel answers what an older CRIU asks of every socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as any_socket:
        try:
            any_socket.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError:
            return False
    return True


def _source(command: list[str]) -> str:
    """Who said where it is: the same order as in `criu_command`."""
    if os.environ.get("CRCLI_CRIU"):
        return "$CRCLI_CRIU"
    if len(command) == 1:
        return "$PATH"
    return "$CRCLI_CRIU_PREFIX" if os.environ.get("CRCLI_CRIU_PREFIX") else "the default folder"


def _what_criu_says(command: list[str]) -> Iterator[Check]:
    with ThreadPoolExecutor(4) as threads:
        checking = threads.submit(_ask, command, "check")
        asked = {name: threads.submit(_ask, command, "check", "--feature", name) for name in _FEATURES}
        said = checking.result()
        works = {name: answer.result().returncode == 0 for name, answer in asked.items()}
    text = said.stdout.strip() if said.returncode == 0 else said.stderr.strip()
    last = text.splitlines()[-1] if text else f"`criu check` ended with {said.returncode}"
    if said.returncode != 0:
        remedy = "what CRIU names is missing in this kernel, or not allowed here"
        if "No parent found for mountpoint" in text:
            remedy = "this root (a chroot) is no mount point: mount --bind FOLDER FOLDER before chroot FOLDER"
        yield lacks("criu-check", last, remedy, output=text)
        return  # what it says of single features would mislead
    yield passed("criu-check", last, output=text)
    for feature, (purpose, remedy) in _FEATURES.items():
        name = feature.replace("_", "-")
        if works[feature]:
            yield passed(name, f"{purpose}: works", feature=feature)
        elif remedy:
            yield note(name, f"{purpose}: not here", remedy, feature=feature)
        else:
            yield passed(name, f"{purpose}: not here, and not needed", feature=feature)


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

        from crcli.criu.messages import import_all

        import_all()
    except (ImportError, HostLacks) as error:
        remedy = "run scripts/quickstart, which makes CRIU's pycriu reachable from this Python"
        yield lacks("pycriu", str(error), remedy, python=sys.executable)
        return
    yield passed("pycriu", "CRIU's Python package is here", path=pycriu.__file__)


def _python() -> Iterator[Check]:
    versions: dict[str, str | None] = {name: _version_of(name) for name in _PACKAGES}
    missing = [name for name, version in versions.items() if version is None]
    version = ".".join(map(str, sys.version_info[:3]))
    evidence = {"python": version, "executable": sys.executable, "packages": versions}
    if missing:
        remedy = f"install them for {sys.executable}: pip install {' '.join(missing)}"
        yield lacks("python", f"Python {version} lacks {', '.join(missing)}", remedy, **evidence)
    else:
        yield passed("python", f"Python {version} with all packages ({sys.executable})", **evidence)


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (_criu, _pycriu, _python)
