"""A limit of crcli's own on the size of files (`ulimit -f`) is lifted, or told before anything is touched."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.crcli import COMMAND_LIMIT_SECONDS, Crcli, assert_goes_on, counter, crcli_in, reap, tree_of
from tests.support.programs import spawn_python

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

SMALL = 10_000


def run_limited(crcli: Crcli, hard: int, *arguments: str) -> tuple[int, str]:
    """Run a command that may write small files; return its exit code and what it printed."""
    limited: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, hard))  # noqa: E731
    with crcli.start(*arguments, "--store", crcli.store, "--json", preexec_fn=limited) as process:
        out, err = process.communicate(timeout=COMMAND_LIMIT_SECONDS)
    return process.returncode, out + err


def test_a_soft_limit_is_lifted_for_the_dump_and_the_restore(tmp_path: Path) -> None:
    """Neither CRIU nor the store is ended by it, and the tree comes back with limits of its own."""
    code = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 31))\n{counter()}"
    with crcli_in(tmp_path) as crcli, spawn_python(code) as program:
        tree = tree_of(program.pid)
        done, text = run_limited(crcli, resource.RLIM_INFINITY, "dump", str(program.pid), "--name", "limited")
        assert done == 0, text
        reap(tree)
        done, text = run_limited(crcli, resource.RLIM_INFINITY, "restore", "limited")
        crcli.adopt(program.pid)
        assert done == 0, text
        assert psutil.Process(program.pid).rlimit(resource.RLIMIT_FSIZE) == (1 << 30, 1 << 31)
        assert_goes_on(program)


def test_a_hard_limit_is_told_with_its_remedy(tmp_path: Path) -> None:
    """Where it may not be lifted nothing is begun (exit 40), and the tree runs on."""
    with crcli_in(tmp_path) as crcli, spawn_python(counter()) as program:
        done, text = run_limited(crcli, SMALL, "dump", str(program.pid))
        if done == 0:
            pytest.skip("CAP_SYS_RESOURCE lifts hard limits too")
        assert done == 40, text
        assert "RLIMIT_FSIZE" in text and "ulimit -f unlimited" in text and '"untouched"' in text
        image = crcli.dump(program.pid)["image"]
        done, text = run_limited(crcli, SMALL, "restore", image)
        assert done == 40, text
        assert "RLIMIT_FSIZE" in text
        crcli.restore(image, "--files", "host")
        assert_goes_on(program)
