"""The two ways to move a program: crcli without any option, and CRIU itself with one fixed set of options."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from crcli.criu.binary import criu_command
from crcli.criu.limits import with_limits_answered
from tests.support.crcli import ROOT
from tests.zdtm.program import Failed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Starter: TypeAlias = "Callable[[Callable[[], subprocess.Popen[bytes]]], subprocess.Popen[bytes]]"

LIMIT_S = 90.0
_BOTH = ("--tcp-established", "--file-locks", "--link-remap", "--manage-cgroups=ignore", "--ext-unix-sk")
_DUMP = (*_BOTH, "--network-lock", "nftables", "--ghost-limit", "1G", "--force-irmap", "--skip-in-flight")


class Way(Protocol):
    """How a tree is dumped and brought back; both raise Failed."""

    def dump(self, pid: int) -> None:
        """Dump a tree and have it killed."""

    def restore(self) -> int:
        """Bring it back; return the root's pid on the host."""


class Crcli:
    """`crcli dump PID` and `crcli restore NAME`.

    With `again` it is left running by a first dump, so that it is looked at, frozen and let go once more than
    that; with `lazy` it runs before its memory is there.
    """

    def __init__(self, name: str, folder: Path, *, lazy: bool = False, again: bool = False) -> None:
        self._name = name
        self._folder = folder
        self._lazy = ("--lazy",) if lazy else ()
        self._again = again
        self.findings: list[str] = []

    def dump(self, pid: int) -> None:
        """Dump a tree and have it killed."""
        if self._again:
            self._run("dump", str(pid), "--name", self._name, "--leave-running")
        self._note(self._run("dump", str(pid), "--name", self._name))

    def restore(self) -> int:
        """Bring it back; return the root's pid on the host."""
        report = self._run("restore", self._name, *self._lazy)
        self._note(report)
        return int(report["host_pid"])

    def _note(self, report: dict[str, Any]) -> None:
        self.findings += [found["name"] for found in report.get("findings", [])]

    def _run(self, verb: str, *arguments: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "crcli", verb, *arguments]
        command += ["--store", f"file://{self._folder}/store", "--json"]
        code, out, err = _run(command, self._folder, {"CRCLI_LOG_DIR": f"{self._folder}/logs"})
        if code:
            raise Failed(f"{verb}, exit {code}: {_error_of(out) or err[-500:]}")
        report: dict[str, Any] = json.loads(out)
        return report


class Raw:
    """`criu dump` and `criu restore`, to and from a folder.

    Without CAP_SYS_RESOURCE CRIU cannot read the limits of another user's process. So that more than that is
    seen, it is told them as crcli's own CRIU is, where the case asks for that.
    """

    def __init__(self, folder: Path, help_with_limits: bool) -> None:
        self._folder = folder
        self._help_with_limits = help_with_limits
        self._images = folder / "images"
        self._images.mkdir()
        self.findings: list[str] = []

    def dump(self, pid: int) -> None:
        """Dump a tree and have it killed."""
        self._run("dump", "-t", str(pid), *_DUMP)

    def restore(self) -> int:
        """Bring it back; return the root's pid on the host."""
        pidfile = self._folder / "pid"
        self._run("restore", "-d", "--pidfile", str(pidfile), *_BOTH)
        return int(pidfile.read_text())

    def _run(self, verb: str, *arguments: str) -> None:
        command = [*criu_command(), verb, "-D", str(self._images), "-v4", "-o", f"{verb}.log", *arguments]
        helped = self._help_with_limits and verb == "dump"
        code, _, err = _run(command, self._folder, {}, with_limits_answered if helped else _plainly)
        if code:
            raise Failed(f"{verb}, exit {code}: {self._complaints(verb) or err[-500:]}")

    def _complaints(self, verb: str) -> str:
        log = self._images / f"{verb}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        errors = [line for line in re.findall(r"Error \(.*", text) if "RLIMIT_NOFILE for self" not in line]
        return " | ".join(errors[:3])


def _plainly(start: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    return start()


def _run(
    command: list[str], folder: Path, more: dict[str, str], starter: Starter = _plainly
) -> tuple[int, str, str]:
    """Run a command to its end; its exit code and what it said. Killed when it takes too long."""
    with (folder / "out").open("w+b") as out, (folder / "err").open("w+b") as err:
        process = starter(
            lambda: subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | more,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                process_group=0,
            )
        )
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise Failed(f"no end within {LIMIT_S:.0f} s: {' '.join(command)}") from None
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(errors="replace"), err.read().decode(errors="replace")


def _error_of(out: str) -> str:
    try:
        error = json.loads(out)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    stops = [f"{found['name']}: {found['message']}" for found in error.get("findings") or []]
    return " | ".join(filter(None, [error["message"], error.get("hint") or "", *stops]))
