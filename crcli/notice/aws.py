"""EC2 Spot: the interruption notice, two minutes ahead, and the rebalance recommendation.

https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from crcli.notice.base import Notice, Urgency
from crcli.notice.metadata import LINK_LOCAL, Answer, Metadata, ServiceSilent, keep_looking
from crcli.notice.places import AWS_ENDPOINT

if TYPE_CHECKING:
    import threading

    from crcli.notice.base import Source, Surroundings, Tell

EVERY_S = 5.0
"""As AWS recommends."""

_ACTION = "/latest/meta-data/spot/instance-action"
_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
_TOKEN = "/latest/api/token"
_TOKEN_S = 21600
_IPV6 = "http://[fd00:ec2::254]"


class AwsSpot:
    """Tells of an interruption (LEAVE) and of a rebalance recommendation (RISK), each once."""

    name = "aws"

    def __init__(self, surroundings: Surroundings, every_s: float = EVERY_S) -> None:
        environ = surroundings.environ
        usual = _IPV6 if environ.get(f"{AWS_ENDPOINT}_MODE", "").lower() == "ipv6" else LINK_LOCAL
        self._service = Metadata(environ.get(AWS_ENDPOINT) or usual, AWS_ENDPOINT)
        self._surroundings = surroundings
        self._every_s = every_s
        self._token: str | None = None
        self._token_until = 0.0
        self._told: set[str] = set()

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        """Look every few seconds."""

        def look() -> None:
            try:
                look_at_both()
            except ServiceSilent:
                self._token = None  # forgotten, or what the service stumbles over
                raise

        def look_at_both() -> None:
            for path, notice_of in ((_ACTION, _interruption), (_REBALANCE, _recommendation)):
                answer = self._service.ask(path, headers=self._with_token(stopped), stopped=stopped)
                if answer.status == 404:  # nothing of the kind
                    continue
                said = answer.text()
                notice = notice_of(answer)
                if said not in self._told:
                    self._told.add(said)
                    tell(notice)

        keep_looking(look, self._every_s, stopped, self._silent)

    def _with_token(self, stopped: threading.Event) -> dict[str, str]:
        if self._token is None or time.monotonic() > self._token_until:
            lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_S)}
            answer = self._service.ask(_TOKEN, method="PUT", headers=lifetime, stopped=stopped)
            # Where there is only version 1, as behind some proxies, it has no tokens.
            self._token = "" if answer.status in (403, 404, 405) else answer.text()
            self._token_until = time.monotonic() + _TOKEN_S / 2
        return {"X-aws-ec2-metadata-token": self._token} if self._token else {}

    def _silent(self, what: str) -> None:
        remedy = "in a container, the instance's metadata hop limit must be 2 or more"
        self._surroundings.silent(self.name, what, remedy)


def _interruption(answer: Answer) -> Notice:
    said = answer.json()
    action = said.get("action")
    if action not in ("terminate", "stop", "hibernate"):
        raise ServiceSilent(f"the service names an action that is none: {action!r:.40}")
    return Notice(
        "aws", f"the Spot instance is interrupted ({action})", deadline=answer.deadline(str(said.get("time")))
    )


def _recommendation(answer: Answer) -> Notice:
    if "noticeTime" not in answer.json():
        raise ServiceSilent("the service recommends something else than a rebalance")
    return Notice("aws", "the Spot instance is at elevated risk of interruption", Urgency.RISK)


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The source of `--notice aws`."""
    return [AwsSpot(surroundings)]
