"""The sources that crcli brings itself; each module is imported when its source is made."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from crcli.notice import places
from crcli.notice.base import SourceKind
from crcli.notice.signals import NAMES
from crcli.notice.signals import make as make_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.notice.base import Make, Source, Surroundings


def crcli_notice_sources(register: Callable[[SourceKind], None]) -> None:
    """The hook of the plug-in contract."""
    for kind in _KINDS:
        register(kind)


def _of(module: str) -> Make:
    def make(name: str, argument: str, surroundings: Surroundings) -> Sequence[Source]:
        made: Sequence[Source] = import_module(module).make(name, argument, surroundings)
        return made

    return make


# In the order in which `auto` takes them: of two that want a signal, the first is told.
_KINDS = (
    SourceKind(
        ("kubernetes",),
        "a pod that is stopped: its preStop hook, SIGTERM",
        _of("crcli.notice.kubernetes"),
        places.in_kubernetes,
    ),
    SourceKind(
        ("slurm",),
        "preemption and the time limit, by the signal of sbatch --signal=B:USR1@SECONDS",
        _of("crcli.notice.slurm"),
        places.in_slurm,
        "slurm[:USR1]",
    ),
    SourceKind(
        ("systemd",),
        "a service that is stopped, SIGTERM",
        _of("crcli.notice.systemd"),
        places.is_systemd_service,
    ),
    SourceKind(
        ("aws",),
        "EC2 Spot interruptions and rebalance recommendations",
        _of("crcli.notice.aws"),
        places.on_aws,
    ),
    SourceKind(
        ("gcp",),
        "preemption and maintenance of a Compute Engine VM",
        _of("crcli.notice.gcp"),
        places.on_gcp,
    ),
    SourceKind(
        ("azure",),
        "Scheduled Events of a VM, acknowledged once the job is saved",
        _of("crcli.notice.azure"),
        places.on_azure,
    ),
    SourceKind(
        ("file",),
        "a file that appears; it may hold the seconds that are left",
        _of("crcli.notice.file"),
        form="file:/PATH",
    ),
    SourceKind(
        ("http",),
        'a POST, with {"reason", "seconds"} if wanted',
        _of("crcli.notice.hook"),
        form="http:HOST:PORT[,allow=NET]",
    ),
    SourceKind(tuple(NAMES), f"a signal: {', '.join(NAMES)}", make_signal, lambda surroundings: True),
)
