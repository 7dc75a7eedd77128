"""When a job is the one that an image was taken of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crcli.errors import UsageError
from crcli.job.identity import identify_job


def test_weights_that_are_not_here_make_no_other_job(tmp_path: Path) -> None:
    """They may be in the store, and a restore compares their bytes; of another size they do."""
    model = tmp_path / "model.bin"
    model.write_bytes(b"w" * 100)
    here = identify_job(["job"], {}, weights=[str(model)]).as_json()
    model.unlink()
    away = identify_job(["job"], {}, weights=[str(model)])
    assert away.differs_from(here) == []
    model.write_bytes(b"w" * 101)
    other = identify_job(["job"], {}, weights=[str(model)])
    assert other.differs_from(away.as_json()) == []
    assert other.differs_from(here) == ["the weights model.bin changed"]


def test_files_that_are_named_or_not_did_not_change(tmp_path: Path) -> None:
    """Of another command line it is not said that the files of the first are others now."""
    program, other = tmp_path / "job.py", tmp_path / "other.py"
    program.write_text("1")
    other.write_text("2")
    was = identify_job([str(program)], {}).as_json()
    _, *files = identify_job([str(other)], {}).differs_from(was)
    assert files == [f"the file {program} is not named any more", f"the file {other} was not named before"]
    program.write_text("3")
    assert identify_job([str(program)], {}).differs_from(was) == [f"the file {program} changed"]


def test_a_folder_that_was_removed_is_none_to_start_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and no bug."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    os.rmdir(here)
    with pytest.raises(UsageError, match="was removed"):
        identify_job(["job"], {})
