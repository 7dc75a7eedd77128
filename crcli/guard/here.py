"""What this host is and has, looked up when a check asks for it, and once."""

from __future__ import annotations

import os
import re
import subprocess
import time
from functools import cached_property
from typing import TYPE_CHECKING

from crcli.guard import cpu
from crcli.guard.carried import compare
from crcli.guard.contents import Contents
from crcli.process import here
from crcli.process.maps import is_mapped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.gpu.facts import GpuHost
    from crcli.guard.carried import Standing
    from crcli.image.manifest import StoredFile
    from crcli.image.tables import Chunk
    from crcli.process.here import UnixSocket
    from crcli.process.sockets import Socket

_VERSION_LIMIT_S = 10.0


class Here:
    """This host. Tests set single attributes to another host's."""

    def __init__(self, contents: Contents | None = None) -> None:
        self.contents = contents or Contents()
        self._standings: dict[str, Standing] = {}
        self._left_behind: dict[str, bool] = {}

    @cached_property
    def machine(self) -> str:
        """The architecture: `x86_64`, `aarch64`…"""
        return os.uname().machine

    @cached_property
    def kernel(self) -> str:
        """The kernel's release."""
        return os.uname().release

    @cached_property
    def hostname(self) -> str:
        """The host's name."""
        return os.uname().nodename

    @cached_property
    def page_size(self) -> int:
        """The kernel's page size in bytes."""
        return os.sysconf("SC_PAGE_SIZE")

    @cached_property
    def now(self) -> float:
        """The wall clock, in seconds since the epoch."""
        return time.time()

    @cached_property
    def cpu_flags(self) -> set[str]:
        """The CPU's features as the kernel names them."""
        return cpu.flags_here()

    @cached_property
    def cpu_words(self) -> dict[int, int]:
        """The CPU's features as CRIU reads them."""
        return cpu.words_here()

    @cached_property
    def spare_memory(self) -> int:
        """Bytes that can be used without pushing anything out."""
        from crcli.process.memory_room import spare_memory

        return spare_memory()

    @cached_property
    def capabilities(self) -> int:
        """The capabilities that a program which crcli starts can get, a bit for each."""
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            sets = {key: value for key, _, value in (line.partition(":") for line in file)}
        return int(sets["CapPrm" if os.geteuid() else "CapBnd"], 16)

    @cached_property
    def cgroups(self) -> list[str]:
        """The cgroups that crcli runs in, as /proc/self/cgroup has them."""
        with open("/proc/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()

    @cached_property
    def cgroup_mounts(self) -> list[str]:
        """Where cgroup hierarchies are mounted: CRIU makes the folders of the tree's cgroups anew there."""
        from crcli.process.files import mounts

        return [mount.point for mount in mounts(os.getpid()) if mount.fstype in ("cgroup", "cgroup2")]

    @cached_property
    def criu_version(self) -> str:
        """CRIU's version, such as `4.2.1`; empty where it cannot be told. Remembered with its binary."""
        from crcli.criu.binary import criu_command
        from crcli.errors import HostLacks

        try:
            command = criu_command()
            return self.contents.noted(command[-1], "criu", lambda _: _ask_version(command))
        except (HostLacks, OSError, subprocess.SubprocessError):
            return ""

    @cached_property
    def sockets(self) -> list[Socket]:
        """The TCP, UDP and unix sockets of our network namespace that somebody has open."""
        return here.sockets_here()

    @cached_property
    def unix_sockets(self) -> dict[str, list[UnixSocket]]:
        """The unix sockets of our network namespace that have a name, by that name."""
        return here.unix_sockets_here()

    @cached_property
    def gpus(self) -> GpuHost:
        """The GPUs and their driver. CUDA is started to ask, unless we were told. Raises HostLacks."""
        from crcli.gpu.hand import Hand
        from crcli.gpu.words import Purpose

        with Hand(Purpose.RESTORE) as hand:
            return hand.host()

    @cached_property
    def plugins(self) -> dict[str, str]:
        """The plug-ins that work here, with the versions of their packages."""
        from crcli.plugins.loader import load_hooks

        return {one.name: one.version for one in load_hooks().plugins if not one.error}

    def taken_pids(self, numbers: frozenset[int], insist: bool) -> list[int]:
        """Which of these pids and thread ids stay in use: see await_pids."""
        return here.await_pids(numbers, insist=insist)

    def is_left_behind(self, file: StoredFile) -> bool:
        """Whether what has this name of a file is nobody's any more: no program has it in memory."""
        if not file.same_as:
            return False
        if file.name not in self._left_behind:
            self._left_behind[file.name] = not is_mapped(file.name)
        return self._left_behind[file.name]

    def standing(self, file: StoredFile, chunks: Sequence[Chunk]) -> Standing:
        """How the file that stands where one of the image belongs compares with that."""
        if file.name not in self._standings:
            self._standings[file.name] = compare(file, chunks)
        return self._standings[file.name]


def _ask_version(command: list[str]) -> str:
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=_VERSION_LIMIT_S)
    found = re.search(r"Version: ([\w.-]+)", said.stdout)
    return found[1] if found else ""
