"""Programs on a real GPU, dumped, killed and restored: all of scenarios.py, where there is such a GPU.

Where there is none they are skipped; README.md says how they are run on a lent machine, with figures.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.gpu.real.runner import tried
from tests.gpu.real.scenarios import SCENARIOS
from tests.gpu.real.setting import Setting


def why_not_here() -> str:
    """Why this machine cannot take part; empty where it can."""
    if not os.path.exists("/proc/driver/nvidia/version"):
        return "no GPU here: NVIDIA's kernel driver is not loaded"
    if os.geteuid():
        return "only root can dump and restore"
    return ""


@pytest.mark.alone
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SCENARIOS)
def test_it_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    """What is dumped, killed and restored goes on, and its GPU memory and results are what they would be."""
    if reason := why_not_here():
        pytest.skip(reason)
    found = tried(name, Setting.of("gpu", str(tmp_path), sys.executable), SCENARIOS[name].limit_s)
    if found["outcome"] == "skipped":
        pytest.skip(found["why"])
    assert found["outcome"] == "passed", f"{found['why']}\n{found.get('evidence', '')}"
