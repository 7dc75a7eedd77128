"""Folders of files that travel: see crcli.pipeline.capture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.image.manifest import StoredFile
from crcli.pipeline.capture import folders_of

if TYPE_CHECKING:
    from pathlib import Path


def test_a_folder_that_somebody_removed_meanwhile_is_no_reason_to_fail(tmp_path: Path) -> None:
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.mkdir(mode=0o750)
    files = [StoredFile(str(folder / "file"), 0, ()) for folder in (there, gone)]

    found = {one["path"]: one for one in folders_of(os.getpid(), files)}

    assert found[str(there)]["mode"] == 0o750
    assert str(tmp_path) in found
    assert str(gone) not in found
