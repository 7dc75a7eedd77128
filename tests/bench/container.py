"""A subject in a container of runc's: host's programs and network, and everything else of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crcli.criu.binary import criu_command
from tests.bench.commands import BenchError, Ran, Subject, run
from tests.support.crcli import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable

_FOLDERS = ("/usr", "/etc", "/bin", "/sbin", "/lib", "/lib64")
_NAMESPACES = ("pid", "ipc", "uts", "mount")
_MOUNTS = ("/proc", "/dev", "/dev/pts", "/dev/shm")


@dataclass
class Container(Subject):
    """A subject that runc started, and that is dumped and restored with its container.

    Nothing of the host is mounted outside of mount namespaces of its own: runc binds folders of the host
    below the container's root while it restores, too. A runc that is killed, or unmounts in the wrong order,
    would leave them there, and whoever removed the bundle would remove the host's folders with it.
    """

    def start(self) -> int:
        """Make the bundle and run it; return the subject's pid on this host."""
        bundle = self.folder / "bundle"
        (bundle / "rootfs").mkdir(parents=True)
        subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        config = bundle / "config.json"
        config.write_text(json.dumps(self._adapted(json.loads(config.read_text()), bundle / "rootfs")))
        self._write_criu()
        self._runc("run", "--detach", "--pid-file", str(self._pid_file), "--bundle", str(bundle))
        return int(self._pid_file.read_text())

    def end(self) -> None:
        """Kill it, and remove what runc made for it."""
        super().end()
        command = [*self._runc_command, "delete", "--force", self._name]
        subprocess.run(command, capture_output=True, check=False)

    def checkpoint(self, images: Path, *options: str) -> Ran:
        """Dump it into this folder."""
        return self._runc("checkpoint", *_places(images), *options)

    def restore(self, images: Path) -> Ran:
        """Bring it back from this folder."""
        bundle = ["--bundle", str(self.folder / "bundle"), "--pid-file", str(self._pid_file)]
        done = self._runc("restore", "--detach", *_places(images), *bundle)
        self.came_back(int(self._pid_file.read_text()))
        return done

    @property
    def _name(self) -> str:
        return f"crcli-bench-{os.getpid()}"

    @property
    def _pid_file(self) -> Path:
        return self.folder / "pid"

    @property
    def _runc_command(self) -> list[str]:
        alone = ["unshare", "--mount", "--propagation", "private", "--"]
        return [*alone, "runc", "--root", f"{self.folder}/runc", "--criu", f"{self.folder}/criu"]

    def _runc(self, *arguments: str) -> Ran:
        """Run a command of runc's; the container inherits no file of ours, which CRIU could not dump."""
        log = self.folder / "runc.log"
        try:
            return run(
                [*self._runc_command, "--log", str(log), *arguments, self._name], self.limit_s, silent=True
            )
        except BenchError as error:
            raise BenchError(f"{error}{log.read_text()[-2000:] if log.exists() else ''}") from error

    def _write_criu(self) -> None:
        """One file that is CRIU, for runc, and its configuration: no connection is to be locked."""
        criu = self.folder / "criu"
        criu.write_text(f'#!/bin/sh\nexec {" ".join(criu_command())} "$@"\n')
        criu.chmod(0o755)
        (self.folder / "criu.conf").write_text("network-lock skip\n")

    def _adapted(self, spec: dict[str, Any], root: Path) -> dict[str, Any]:
        """runc's default configuration with our command, the host's programs, and no network of its own."""
        spec["process"] |= {"terminal": False, "cwd": str(ROOT), "args": self.command}
        spec["process"]["env"] = [f"{name}={value}" for name, value in os.environ.items() if name == "PATH"]
        spec["root"] = {"path": str(root), "readonly": False}
        spec["linux"]["namespaces"] = [{"type": kind} for kind in _NAMESPACES]
        spec["annotations"] = {"org.criu.config": f"{self.folder}/criu.conf"}
        needed = [*_FOLDERS, sys.base_prefix, sys.prefix, str(ROOT), str(self.folder)]
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] in _MOUNTS]
        spec["mounts"] += [
            {"destination": path, "source": path, "type": "bind", "options": ["bind"]}
            for path in _brought_in(needed, root)
        ]
        return spec


def _places(images: Path) -> list[str]:
    return ["--image-path", str(images), "--work-path", str(images)]


def _brought_in(paths: Iterable[str], root: Path) -> list[str]:
    """Which of these folders are to be mounted below `root`.

    Links become links there, and what is inside of another comes with it.
    """
    found: list[str] = []
    for path in sorted(set(paths)):  # a folder before what is in it
        if os.path.islink(path):
            shutil.copy(path, root / path[1:], follow_symlinks=False)
        elif os.path.isdir(path) and not any(path.startswith(f"{one}/") for one in found):
            found.append(path)
    return found
