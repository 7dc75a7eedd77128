"""The folder that makes a machine without registries able to run crcli: CRIU, Python packages, a manifest.

    FOLDER/criu.tar.gz     a relocatable prefix of CRIU, as scripts/install-criu makes it, pycriu in it
    FOLDER/wheels/*.whl    Python packages for that machine's Python
    FOLDER/MANIFEST.json   what is in it: versions, hashes, the commit; what it takes to be there already

Only the standard library is used here. Packages come from wherever pip on this machine is set up to get them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
CRIU, WHEELS, MANIFEST = "criu.tar.gz", "wheels", "MANIFEST.json"
DEFAULT_PYTHON = "3.12"
MOST_MIB = 60

COMMIT = "CRCLI_GPU_COMMIT"
"""The variable that says which commit was carried: what carries a checkout may leave git's folder behind."""

ASSUMED = ("numpy", "torch", "cupy", "safetensors")
"""What that machine has by itself. numpy is crcli's, the others the programs' that are dumped."""

LEFT_OUT = ("boto3",)
"""What crcli imports only for S3, which is not used there."""

BESIDE = ("cuda-bindings", "cuda-core", "nvidia-ml-py")
"""What is carried beside crcli's own requirements; their own come along, as everybody's do."""

_GLIBC = (5, 12, 17, *range(24, 40))
"""Minor versions of the manylinux_2_N tags that are accepted: pip takes each by its name only."""


def prepare(folder: Path, python: str = DEFAULT_PYTHON) -> dict[str, Any]:
    """The folder holds everything, its manifest written last; return that. What was there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder / WHEELS, ignore_errors=True)
    criu = _pack_criu(folder / CRIU)
    _fetch_wheels(folder / WHEELS, python)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    manifest = {
        "made": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "crcli": commit(),
        "criu": criu,
        "python": python,
        "assumed": list(ASSUMED),
        "left_out": list(LEFT_OUT),
        "bytes": size,
        "files": {str(path.relative_to(folder)): _sha256(path) for path in files},
    }
    if size > MOST_MIB << 20:
        raise SystemExit(f"{folder} holds {size >> 20} MiB, more than {MOST_MIB}")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def _pack_criu(target: Path) -> dict[str, str]:
    """Pack this machine's prefix if it is one that can be moved, else one made for it; say which."""
    from crcli.criu.binary import DEFAULT_PREFIX

    prefix = Path(os.environ.get("CRCLI_CRIU_PREFIX", DEFAULT_PREFIX))
    with tempfile.TemporaryDirectory(prefix="crcli-carry-") as made:
        if not (prefix / "PACKAGES").is_file():
            prefix = Path(made) / "criu"
            environment = {**os.environ, "CRCLI_CRIU_PREFIX": str(prefix)}
            environment.pop("CRCLI_CRIU", None)
            subprocess.run([str(ROOT / "scripts/install-criu"), "--fresh"], env=environment, check=True)
        with tarfile.open(target, "w:gz") as archive:
            archive.add(prefix, "criu", filter=_without_bytecode)
        return {"packages": (prefix / "PACKAGES").read_text(), "version": _version(prefix / "bin/criu")}


def _without_bytecode(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if member.name.endswith("__pycache__") else member


def _version(criu: Path) -> str:
    said = subprocess.run([str(criu), "--version"], capture_output=True, text=True, check=True).stdout
    return next(line.split()[1] for line in said.splitlines() if line.startswith("Version:"))


def _fetch_wheels(target: Path, python: str) -> None:
    """What crcli needs, and what that needs in turn, in the versions that are installed here."""
    wanted = [*_requirements(), *BESIDE]
    with tempfile.TemporaryDirectory(prefix="crcli-carry-") as made:
        constraints = Path(made) / "constraints"
        constraints.write_text("".join(f"{one}\n" for one in _installed_here()))
        platforms = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC]
        platforms += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
        subprocess.run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
                "--only-binary=:all:", "--implementation=cp", f"--python-version={python}",
                *(f"--platform={platform}" for platform in platforms),
                f"--constraint={constraints}", f"--dest={target}", *wanted,
            ],
            check=True,
        )  # fmt: skip
    for wheel in target.iterdir():
        if _name_of(wheel) in ASSUMED:
            wheel.unlink()


def _requirements() -> list[str]:
    """What pyproject.toml says that crcli needs, without what is there or is not used there."""
    import tomllib

    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted: list[str] = tomllib.load(file)["project"]["dependencies"]
    return [one for one in wanted if not one.startswith((*ASSUMED, *LEFT_OUT))]


def _installed_here() -> list[str]:
    """`NAME==VERSION` of this environment's packages: what the tests here ran with."""
    names = {found.name.lower().replace("_", "-"): found.version for found in metadata.distributions()}
    return [
        f"{name}=={version}" for name, version in sorted(names.items()) if name not in (*ASSUMED, "crcli")
    ]


def _name_of(wheel: Path) -> str:
    return wheel.name.partition("-")[0].lower().replace("_", "-")


def commit() -> str:
    """The commit of this checkout, or that of the one which it is a copy of; empty where nobody knows."""
    if told := os.environ.get(COMMIT):
        return told
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
