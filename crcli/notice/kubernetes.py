"""Kubernetes: a pod that is stopped.

The preStop hook runs first (scripts/hooks/kubernetes/pre-stop writes a file and waits until the job is
saved), then SIGTERM comes; terminationGracePeriodSeconds counts from the start of the hook, and no API within
the pod says how long it is: $CRCLI_GRACE must.
"""

from __future__ import annotations

from signal import SIGTERM
from typing import TYPE_CHECKING

from crcli.notice.file import FileAppears
from crcli.notice.signals import OnSignal

if TYPE_CHECKING:
    from crcli.notice.base import Source, Surroundings

FILE_VARIABLE = "CRCLI_NOTICE_FILE"
DEFAULT_FILE = "/run/crcli/leave"
_SAYS = "the pod is stopped"


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The sources of `--notice kubernetes`."""
    path = surroundings.environ.get(FILE_VARIABLE) or DEFAULT_FILE
    return [
        OnSignal(name, [SIGTERM], surroundings, _SAYS),
        FileAppears(name, path, surroundings, f"{_SAYS} (preStop)"),
    ]
