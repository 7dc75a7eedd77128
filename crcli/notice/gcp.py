"""Google Compute Engine: preemption, 30 s ahead, and maintenance, 60 s ahead.

https://cloud.google.com/compute/docs/instances/create-use-spot
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice

Both are keys whose change one can wait for; each has a source, and a thread, of its own. Only who has read
`maintenance-event` since the last maintenance is warned at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from crcli.notice.base import Notice, Urgency
from crcli.notice.metadata import LINK_LOCAL, Metadata, ServiceSilent, keep_looking
from crcli.notice.places import GCE_HOST

if TYPE_CHECKING:
    import threading
    from collections.abc import Mapping

    from crcli.notice.base import Source, Surroundings, Tell

WAIT_S = 60
"""How long the service holds an answer back while nothing changes."""

EVERY_S = 1.0
"""Between two questions; a service that knows nothing of waiting is asked no more often."""

_FLAVOR = {"Metadata-Flavor": "Google"}
_LATE_S = 10.0

PREEMPTED = {"TRUE": ("the VM is preempted", Urgency.LEAVE, 30.0)}
MAINTENANCE = {
    "TERMINATE_ON_HOST_MAINTENANCE": ("the VM is stopped for maintenance", Urgency.LEAVE, 60.0),
    "MIGRATE_ON_HOST_MAINTENANCE": ("the VM is migrated for maintenance", Urgency.RISK, 60.0),
}


class GcpKey:
    """Tells when a key of the instance's metadata takes a value that means something."""

    name = "gcp"

    def __init__(
        self,
        key: str,
        meanings: Mapping[str, tuple[str, Urgency, float]],
        surroundings: Surroundings,
        every_s: float = EVERY_S,
    ) -> None:
        host = surroundings.environ.get(GCE_HOST)
        self._service = Metadata(f"http://{host}" if host else LINK_LOCAL, GCE_HOST)
        self._key, self._meanings = key, meanings
        self._surroundings, self._every_s = surroundings, every_s
        self._etag = "0"  # of no value: the present one is answered at once
        self._value = ""

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        """Wait for one change after another."""

        def look() -> None:
            value, at = self._next(stopped)
            before, self._value = self._value, value
            if value != before and value in self._meanings:
                says, urgency, seconds = self._meanings[value]
                tell(Notice(self.name, says, urgency, at + seconds))

        def silent(what: str) -> None:
            self._surroundings.silent(self.name, f"{self._key}: {what}")

        keep_looking(look, self._every_s, stopped, silent)

    def _next(self, stopped: threading.Event) -> tuple[str, float]:
        """The key's value once it has changed, or nothing has for WAIT_S, and when it came."""
        path = (
            f"/computeMetadata/v1/instance/{self._key}"
            f"?wait_for_change=true&timeout_sec={WAIT_S}&last_etag={quote(self._etag, safe='')}"
        )
        answer = self._service.ask(path, headers=_FLAVOR, stopped=stopped, patience_s=WAIT_S + _LATE_S)
        value = answer.text().upper()
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise ServiceSilent("the service is not Google's")
        self._etag = answer.headers.get("ETag") or "0"
        return value, answer.at


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The sources of `--notice gcp`."""
    keys = (("preempted", PREEMPTED), ("maintenance-event", MAINTENANCE))
    return [GcpKey(key, meanings, surroundings) for key, meanings in keys]
