"""From the folder that was carried to an environment in which crcli runs. Only the standard library is used.

The interpreter that runs this keeps its own packages (PyTorch among them); what was carried stands before
them on PYTHONPATH. A virtual environment made from that of PyTorch would not see PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from tests.gpu.real.prepare import COMMIT, CRIU, MANIFEST, ROOT, WHEELS

PATH_BEFORE = "CRCLI_GPU_PYTHONPATH_BEFORE"


class Unusable(Exception):
    """What was carried is not whole, or is for another Python."""


def unpack(folder: Path, work: Path) -> dict[str, str]:
    """Everything is laid out below `work`; return what the environment of crcli's commands must hold."""
    manifest = _checked(folder)
    site = work / "site"
    with tarfile.open(folder / CRIU) as archive:
        archive.extractall(work, filter="tar")
    for wheel in sorted((folder / WHEELS).glob("*.whl")):
        _lay_out(wheel, site)
    pycriu = next((work / "criu").glob("usr/lib/python3*/*-packages/pycriu"))
    (site / "pycriu").symlink_to(pycriu)
    places = map(str, (site, pycriu, ROOT / "crcli", ROOT / "tests"))
    subprocess.run([sys.executable, "-m", "compileall", "-qq", "-j0", *places], check=False)
    return {
        "PYTHONPATH": f"{site}:{ROOT}",
        "CRCLI_CRIU_PREFIX": str(work / "criu"),
        COMMIT: manifest.get("crcli", ""),
    }


def _checked(folder: Path) -> dict[str, Any]:
    """The manifest; all that it lists is there."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise Unusable(f"{folder} was not made by `prepare`, or not to its end: {error}") from error
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest["python"] != here:
        raise Unusable(
            f"{folder} was prepared for Python {manifest['python']}; this is {here}: {sys.executable}"
        )
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise Unusable(f"{path} is missing or damaged")
    return dict(manifest)


def _lay_out(wheel: Path, site: Path) -> None:
    """What is in a wheel, where an installer would put it. Scripts are left out: nothing here calls any."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if path.parts[0].endswith(".data"):
                if path.parts[1] not in ("purelib", "platlib"):
                    continue
                member.filename = str(PurePosixPath(*path.parts[2:])) + ("/" if member.is_dir() else "")
            archive.extract(member, site)


def environment_with(added: dict[str, str]) -> dict[str, str]:
    """Our environment with these variables; modules may be compiled, as everywhere.

    What PYTHONPATH was before is kept for programs that are to find nothing of ours.
    """
    before = os.environ.get("PYTHONPATH", "")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    path = ":".join(filter(None, (added["PYTHONPATH"], before)))
    return kept | added | {"PYTHONPATH": path, PATH_BEFORE: before}
