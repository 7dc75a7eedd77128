"""When a job is the one that an image was taken of."""

from __future__ import annotations

from pathlib import Path

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
