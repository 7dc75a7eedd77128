"""`crcli watch`: a vigil over a tree that somebody else has started."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from crcli.errors import PreflightRefused, UsageError
from crcli.image.names import check_name, suggested_name
from crcli.notice.notices import Notices
from crcli.pipeline.vigil import Ending, Event, Keeping, Vigil
from crcli.process.identity import read_stat
from crcli.process.tree import refuse_bad_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.findings import Finding
    from crcli.process.identity import ProcessId

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_time(text: str, option: str) -> float:
    """Return the seconds that `90s`, `10m`, `2h`, `1.5d` or `90` stand for; raise UsageError for others."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([smhd]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{option} takes a time such as 90s, 10m or 2h, not {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def watch_tree(
    keeping: Keeping, notices: Sequence[str], grace_s: float | None, tell: Callable[[Event], None]
) -> Ending:
    """Watch the tree of `keeping.dump.pid` until it ends, is saved on notice, or cannot be.

    Its images are noted as of one job, known by the process that was watched. Raises UsageError or
    PreflightRefused, with nothing touched, when there is no such tree; call it from the main thread.
    """

    def found(finding: Finding) -> None:
        tell(Event("finding", finding.message, {"finding": finding.as_json()}))

    root = refuse_bad_target(keeping.dump.pid)
    try:
        stat = read_stat(root.pid)
        ended = os.pidfd_open(root.pid)
    except ProcessLookupError as error:
        raise PreflightRefused(f"process {root.pid} has ended") from error
    try:
        name = check_name(keeping.dump.name or suggested_name(stat.comm))
        dump = replace(keeping.dump, name=name, job=_job(root))
        with (
            Notices(notices, grace_s, found=found) as heard,
            Vigil(replace(keeping, dump=dump), root, heard, tell) as vigil,
        ):
            vigil.keep(ended)
        assert vigil.ending is not None
        return vigil.ending
    finally:
        os.close(ended)


def _job(root: ProcessId) -> dict[str, Any]:
    """What the images say of the job."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return {"watched": f"{boot}/{root.pid}/{root.start_time}"}
