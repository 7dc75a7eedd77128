"""systemd: a service that is stopped gets SIGTERM, and SIGKILL after TimeoutStopSec.

The unit says the latter once more as $CRCLI_GRACE (scripts/hooks/systemd), or `--grace` does.
"""

from __future__ import annotations

from signal import SIGTERM
from typing import TYPE_CHECKING

from crcli.notice.signals import OnSignal

if TYPE_CHECKING:
    from crcli.notice.base import Source, Surroundings


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The source of `--notice systemd`."""
    return [OnSignal(name, [SIGTERM], surroundings, "systemd stops the service")]
