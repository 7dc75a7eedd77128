"""A program whose cgroup is frozen, as `docker pause` does it."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.crcli import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.programs import Program


@contextmanager
def frozen(program: Program) -> Iterator[None]:
    """Within the block the program's cgroup (version 2) is frozen."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    roots = [fields[1] for fields in mounts if fields[2] == "cgroup2"]
    if not roots:
        pytest.skip("no cgroup2 is mounted here")
    own = Path(f"/proc/{program.pid}/cgroup").read_text().splitlines()
    path = next(line for line in own if line.startswith("0::"))[3:]
    before = Path(f"{roots[0]}{path}")
    group = before / f"crcli-test-{program.pid}"
    try:
        group.mkdir()
        (group / "cgroup.procs").write_text(str(program.pid))
        (group / "cgroup.freeze").write_text("1")
    except OSError as error:
        with suppress(OSError):
            group.rmdir()
        pytest.skip(f"no cgroup can be frozen here: {error}")
    try:
        wait_until(lambda: "frozen 1" in (group / "cgroup.events").read_text(), "it runs on")
        yield
    finally:
        (group / "cgroup.freeze").write_text("0")
        (before / "cgroup.procs").write_text(str(program.pid))
        group.rmdir()
