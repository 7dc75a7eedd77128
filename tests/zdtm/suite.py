"""The programs of CRIU's suite, as they lie in its source: which there are, what each asks for.

What a program asks for stands in its `.desc` file, a Python literal. The options for CRIU that stand there
are not read: crcli has to know by itself.
"""

from __future__ import annotations

import ast
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crcli.criu.binary import criu_command

STATIC = "zdtm/static"
CHECK_LIMIT_S = 60.0
_NOT_TESTS = frozenset({"route_rules"})
"""Executables that CRIU's own runner leaves out as well."""


@dataclass(frozen=True)
class Case:
    """One program, and what its description says."""

    tests: Path
    name: str
    description: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the program lies and writes."""
        return self.tests / STATIC

    @property
    def flags(self) -> set[str]:
        """Its flags: `suid` keeps it root, `crfail` says that its dump is to fail."""
        return set(self.description.get("flags", "").split())

    @property
    def limit_s(self) -> float:
        """How long it may take to start, and to end."""
        return float(self.description.get("timeout") or 30)

    def script(self, kind: str) -> Path | None:
        """Its `hook` or `checkskip`, where it has one."""
        path = self.folder / f"{self.name}.{kind}"
        return path if os.access(path, os.X_OK) else None


def build(source: Path) -> None:
    """Compile what can be compiled here; what cannot will not be among the cases."""
    for folder in ("lib", "static"):
        command = ["make", "-k", f"-j{os.cpu_count()}", "-C", str(source / "test/zdtm" / folder)]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)


def cases(source: Path) -> list[Case]:
    """Every program that was compiled, in the order of their names."""
    tests = source / "test"
    programs = (path.with_suffix("") for path in (tests / STATIC).glob("*.c"))
    names = sorted(path.name for path in programs if os.access(path, os.X_OK) and path.name not in _NOT_TESTS)
    return [Case(tests, name, _description(tests / STATIC / f"{name}.desc")) for name in names]


def _description(path: Path) -> dict[str, Any]:
    text = path.read_text().strip() if path.exists() else ""
    if not text:
        return {}
    try:
        found: dict[str, Any] = ast.literal_eval(text)
    except ValueError:  # code that looks for a device: run by hand only
        return {"flags": "noauto"}
    return found


class Reasons:
    """Why a case is not run here; what CRIU says about its features is asked once."""

    def __init__(self) -> None:
        self._features: dict[str, bool] = {}

    def to_skip(self, case: Case) -> str:
        """The first reason not to run a case, or an empty string."""
        description = case.description
        machine = os.uname().machine
        if machine not in description.get("arch", machine).split():
            return f"arch {description['arch']}"
        if "noauto" in case.flags:
            return "run by hand only"
        if "h" not in description.get("flavor", "h").split():
            return f"no host flavor ({description['flavor']})"
        for feature in description.get("feature", "").split():
            if not self._has(feature):
                return f"CRIU has no {feature} here"
        checkskip = case.script("checkskip")
        return "its own check says no" if checkskip and not _agrees(checkskip, case.tests) else ""

    def _has(self, feature: str) -> bool:
        if feature not in self._features:
            command = [*criu_command(), "check", "--feature", feature]
            done = subprocess.run(command, capture_output=True, timeout=CHECK_LIMIT_S, check=False)
            self._features[feature] = done.returncode == 0
        return self._features[feature]


def _agrees(checkskip: Path, folder: Path) -> bool:
    command = [str(checkskip)]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=CHECK_LIMIT_S, check=False)
    return done.returncode == 0
