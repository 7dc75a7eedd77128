"""Whether a job is the one that an image was taken of: the same command, configuration and weights.

An image goes on with the program that it was taken of, whatever stands on the disk today. So `crcli run`
restores it only for a job that is the same in all that its user can change: the command line, the working
folder, programs and configuration named on it (by content), files and variables that the user names, and the
files of weights (by size; a restore compares their bytes anyway).
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from blake3 import blake3

from crcli.errors import UsageError
from crcli.records import Struct, field, replace

_LOOKED_INTO = re.compile(r".*\.(cfg|conf|ini|jar|js|lua|mjs|php|pl|py|rb|sh|toml|ts|wasm|ya?ml)", re.DOTALL)
"""Of files on the command line that are looked into: programs and configuration. Others may be what the job
writes."""

_LARGEST = 64 << 20
"""A larger file on the command line is known by its size."""

ABSENT = "absent"

_NOT_HERE = {"0", ABSENT}
"""The size of weights that are not here."""


class Identity(Struct, frozen=True):
    """What makes a job the same job. `files` maps paths, as the user wrote them, to what they hold: a BLAKE3
    in hexadecimal, a size, or ABSENT; `environment` names to hashes of values; `weights` names to sizes."""

    argv: tuple[str, ...]
    cwd: str
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The same for the same job, in hexadecimal."""
        return blake3(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """As it stands in the manifest (FORMAT.md, `job`)."""
        return {"identity": self.digest, **self._plain()}

    def differs_from(self, facts: Mapping[str, Any]) -> list[str]:
        """What is not the same as in an image with these facts, in words; empty: it is the same job."""
        if facts.get("identity") == self._with_weights_of(facts).digest:
            return []
        mine = self._with_weights_of(facts)._plain()
        said = [
            f"{what} was {_shown(facts.get(name))}, and is {_shown(mine[name])}"
            for name, what in (("argv", "the command"), ("cwd", "its folder"))
            if facts.get(name) != mine[name]
        ]
        for name, what in (("files", "file"), ("environment", "variable"), ("weights", "weights")):
            old = facts.get(name) or {}
            new = mine[name]
            changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
            said += [f"the {what} {key} {_how(key in old, key in new)}" for key in changed]
        return said or ["it was taken of another kind of job"]

    def _with_weights_of(self, facts: Mapping[str, Any]) -> Identity:
        """The same, but for weights that were not there, or are not: they may be in the store, and a restore
        compares their bytes."""
        old = facts.get("weights") or {}
        weights = {
            name: old[name] if name in old and {old[name], size} & _NOT_HERE else size
            for name, size in self.weights.items()
        }
        return replace(self, weights=weights)

    def _plain(self) -> dict[str, Any]:
        return {
            "argv": list(self.argv),
            "cwd": self.cwd,
            "files": dict(self.files),
            "environment": dict(self.environment),
            "weights": dict(self.weights),
        }


def _how(was_named: bool, is_named: bool) -> str:
    if was_named and is_named:
        return "changed"
    return "was not named before" if is_named else "is not named any more"


def identify_job(
    command: Sequence[str],
    environ: Mapping[str, str],
    *,
    config: Sequence[str] = (),
    variables: Sequence[str] = (),
    weights: Sequence[str] = (),
) -> Identity:
    """Return the identity of a job that is to be started here, now.

    Raises UsageError when there is no such command, variable or file of `config`.
    """
    if not command[0]:
        raise UsageError("the command to run has no name")
    if wrong := [name for name in variables if not name or "=" in name]:
        raise UsageError(f"--variable takes the name of one, not {wrong[0]!r}")
    files = {path: _content(path) for path in command if _is_looked_into(path)}
    for path in config:
        try:
            files[path] = _hash(path)
        except OSError as error:
            raise UsageError(f"--config {path} cannot be read: {error.strerror}") from error
    values = {name: environ.get(name) for name in variables}
    return Identity(
        argv=tuple(command),
        cwd=_here(),
        files=files,
        environment={
            name: ABSENT if value is None else blake3(os.fsencode(value)).hexdigest()
            for name, value in values.items()
        },
        weights={os.path.basename(path): str(_size(path)) for path in weights if path != "auto"},
    )


def _here() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError as error:
        raise UsageError(
            "the folder that this is started in was removed", hint="start it in the job's own folder"
        ) from error


def _is_looked_into(path: str) -> bool:
    return _LOOKED_INTO.fullmatch(path) is not None and os.path.isfile(path)


def _content(path: str) -> str:
    try:
        size = os.path.getsize(path)
        return _hash(path) if size <= _LARGEST else str(size)
    except OSError:
        return ABSENT


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        hasher = blake3()
        while piece := file.read(1 << 20):
            hasher.update(piece)
    return hasher.hexdigest()


def _size(pattern: str) -> int:
    """The bytes of all files that a path of weights stands for."""
    total = 0
    for path in [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True):
        below = (
            (os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
            if os.path.isdir(path)
            else (path,)
        )
        total += sum(os.path.getsize(one) for one in below if os.path.isfile(one))
    return total


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value or "unknown")
