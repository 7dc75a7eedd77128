"""CRIU's own plug-in for CUDA is kept out of trees that crcli puts to sleep itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.crcli import assert_goes_on, counter
from tests.support.gpu_simulator import GpuCrcli, SimulatedHost
from tests.support.programs import spawn_python

PLUGIN = """
#include <fcntl.h>
__attribute__((constructor)) static void loaded(void) { open(TRACE, O_CREAT | O_WRONLY, 0600); }
"""


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that appears when CRIU loads a plug-in (one of no use) out of the folder that it is given."""
    folder, trace = tmp_path / "plugins", tmp_path / "loaded"
    folder.mkdir()
    (tmp_path / "plugin.c").write_text(PLUGIN)
    command = ["gcc", "-shared", "-fPIC", f'-DTRACE="{trace}"', "-o", str(folder / "cuda_plugin.so")]
    subprocess.run([*command, str(tmp_path / "plugin.c")], check=True)
    monkeypatch.setenv("CRIU_LIBS_DIR", str(folder))
    return trace


def test_criu_has_no_plugins_where_crcli_does_their_work(
    sim: SimulatedHost, crcli: GpuCrcli, trace: Path
) -> None:
    """Neither the dump, nor its trial, nor the restore of a tree that uses GPUs loads any."""
    with sim.start_program("--megabytes", "4") as program:
        crcli.restore(crcli.dump(program.pid)["image"])
        assert_goes_on(program)
    assert not trace.exists()


def test_criu_has_its_plugins_for_all_other_trees(crcli: GpuCrcli, trace: Path) -> None:
    """They may be what other devices need."""
    with spawn_python(counter()) as program:
        crcli.dump(program.pid)
        assert trace.exists()
