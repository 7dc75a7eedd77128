"""Logs lie in a folder that a user may name, and that others may be able to look into."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from crcli.errors import RestoreFailed
from crcli.logs import keep_log
from crcli.pipeline.stdio import Replacements, _open_log


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that everybody may write to."""
    tmp_path.chmod(0o777)
    monkeypatch.setenv("CRCLI_LOG_DIR", str(tmp_path))
    return tmp_path


def test_logs_are_for_ourselves_alone(folder: Path) -> None:
    """What a tree writes, and what CRIU says of it, is for nobody else."""
    os.close(_open_log("agent@1", Replacements()))
    keep_log("(00.1) opening /home/alice/private", "restore")
    assert [stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()] == [0o600, 0o600]


def test_a_log_is_not_written_to_where_a_link_leads(folder: Path) -> None:
    """Somebody who knows what the log will be called has put a link to another file there."""
    other = folder / "precious"
    other.write_text("precious")
    (folder / "agent@1.log").symlink_to(other)
    with pytest.raises(RestoreFailed, match="symbolic links"):
        _open_log("agent@1", Replacements())
    assert other.read_text() == "precious"
