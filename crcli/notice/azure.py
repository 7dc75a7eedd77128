"""Azure Scheduled Events: what is to happen to this VM, when at the earliest, and its acknowledgement.

https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events

An acknowledged event happens at once, for every VM that it names and everything on it. So it is acknowledged
only where it names this VM alone, once the last job that hears of events on it is saved: each holds a shared
lock for as long as it is not. A pod does not know the others on its VM, and acknowledges nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
from typing import TYPE_CHECKING, Any

from crcli.notice.base import Notice, Urgency, nothing
from crcli.notice.metadata import ANSWER_S, LINK_LOCAL, Metadata, ServiceSilent, keep_looking
from crcli.notice.places import AZURE_ENDPOINT, in_kubernetes

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from crcli.notice.base import Source, Surroundings, Tell

EVERY_S = 1.0
"""As Azure recommends."""

_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
_HEADERS = {"Metadata": "true"}
LOCKS = "/run/crcli"
_FIRST_ANSWER_S = 125.0
"""The first question of a VM switches its events on, which takes up to two minutes."""

_URGENCY = {
    "Preempt": Urgency.LEAVE,
    "Terminate": Urgency.LEAVE,
    "Reboot": Urgency.LEAVE,
    "Redeploy": Urgency.LEAVE,
    "Freeze": Urgency.RISK,  # stands still for some seconds, and goes on
}


class AzureEvents:
    """Tells of each event that names this VM, once."""

    name = "azure"

    def __init__(self, surroundings: Surroundings, every_s: float = EVERY_S) -> None:
        self._service = Metadata(surroundings.environ.get(AZURE_ENDPOINT) or LINK_LOCAL, AZURE_ENDPOINT)
        self._surroundings, self._every_s = surroundings, every_s
        self._patience_s = _FIRST_ANSWER_S
        self._unsaved = _Unsaved(os.path.join(LOCKS, f"azure-{self._service.address}.lock"))
        self._vm = ""
        self._told: set[str] = set()

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        """Look every second."""
        self._unsaved.enter()

        def look() -> None:
            answer = self._service.ask(
                _EVENTS, headers=_HEADERS, stopped=stopped, patience_s=self._patience_s
            )
            events = answer.json().get("Events")
            if not isinstance(events, list):
                raise ServiceSilent("the service answers without a list of events")
            self._patience_s = ANSWER_S
            for event in events:
                if self._is_news(event, stopped):
                    self._told.add(event["EventId"])
                    tell(self._notice(event, answer.deadline(str(event.get("NotBefore")))))

        keep_looking(look, self._every_s, stopped, lambda what: self._surroundings.silent(self.name, what))

    def _is_news(self, event: Any, stopped: threading.Event) -> bool:
        """Whether this is an event of a kind that matters, of this VM, and not told yet."""
        if not isinstance(event, dict) or event.get("EventType") not in _URGENCY:
            return False
        if not isinstance(event.get("EventId"), str) or event["EventId"] in self._told:
            return False
        if not self._vm:
            self._vm = self._service.ask(_NAME, headers=_HEADERS, stopped=stopped).text()
        return self._vm.lower() in _vms(event)

    def _notice(self, event: dict[str, Any], deadline: float | None) -> Notice:
        kind, status = event["EventType"], event.get("EventStatus")
        alone = _vms(event) == [self._vm.lower()] and not in_kubernetes(self._surroundings)
        return Notice(
            self.name,
            f"Azure event {kind}{' has begun' if status == 'Started' else ''}",
            _URGENCY[kind],
            deadline,
            self._acknowledge(event["EventId"]) if alone and status != "Started" else nothing,
        )

    def _acknowledge(self, event_id: str) -> Callable[[], None]:
        def acknowledge() -> None:
            if not self._unsaved.leave():
                return
            body = json.dumps({"StartRequests": [{"EventId": event_id}]}).encode()
            headers = {**_HEADERS, "Content-Type": "application/json"}
            status = self._service.ask(_EVENTS, method="POST", headers=headers, body=body).status
            if status // 100 != 2:
                raise ServiceSilent(f"the service answers {status}")

        return acknowledge


class _Unsaved:
    """Those on this machine who are not saved yet, as a lock that they share. Who dies is out of it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = -1

    def enter(self) -> None:
        """Be one of them. Where there is no place for a lock, be alone and never the last."""
        try:
            os.makedirs(os.path.dirname(self._path), exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        except OSError:
            pass

    def leave(self) -> bool:
        """Be none of them any more; return whether nobody is left. Of two who leave at once, one is last."""
        if self._fd < 0:
            return False
        try:
            # What fails here has given the shared lock up all the same (flock(2): not atomic).
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            return True
        except OSError:
            return False


def _vms(event: dict[str, Any]) -> list[str]:
    """The names of the VMs that an event is about, in lower case."""
    resources = event.get("Resources")
    return [str(name).lower() for name in resources] if isinstance(resources, list) else []


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The source of `--notice azure`."""
    return [AzureEvents(surroundings)]
