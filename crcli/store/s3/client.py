"""botocore's client, made from the settings: who we are, where the store is, how requests are sent.

botocore is the part of boto3 that resolves credentials and speaks the protocol; boto3's resource layer and
transfer manager would cost start-up time and bring threads and retries of their own.
"""

from __future__ import annotations

import fcntl
import http.client
import io
import ipaddress
import math
import os
import select
import sys
import termios
import time
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

from crcli.records import Struct

if TYPE_CHECKING:
    from crcli.store.s3.settings import S3Settings

CONNECT_TIMEOUT_S = 5
SILENCE_S = 14
"""How long a store may keep silent on all connections (seconds): two such silences, one after the other, are
over before whoever has 30 s notice has to leave."""
READ_TIMEOUT_S = 30
"""How long one answer is waited for from a store that answers others meanwhile, and for a line to take or
bring the next bytes (seconds)."""
_LOOK_S = 0.5
"""How often it is looked what became of a request that has no answer yet (seconds)."""
CONNECTIONS = 32
"""Kept open at most: the writers' threads and those of a caller that reads ranges in parallel."""


class Connection(Struct, frozen=True):
    """A client, and what had to be known to make it."""

    client: Any
    pulse: Pulse
    endpoint_url: str
    """As it may be shown."""
    region: str
    credentials_from: str
    """By which of botocore's ways the credentials were found (env, shared-credentials-file, iam-role, …)."""
    credentials: Any
    """botocore's; None without any."""
    is_aws: bool
    checksums: bool
    """Whether requests carry CRC32s. Stores that choke on them are used with request_checksum_calculation =
    when_required (AWS_REQUEST_CHECKSUM_CALCULATION), as with the AWS tools."""
    max_attempts: int | None

    def keys(self) -> Any:
        """What requests are signed with by now."""
        return self.credentials and self.credentials.get_frozen_credentials()


def connect(settings: S3Settings) -> Connection:
    """Make the client; nothing is sent yet. Raises botocore's errors for settings that make no sense."""
    session = botocore.session.Session(profile=settings.profile)
    _find_services_at_once(session)
    max_attempts = _configured_attempts(session)
    client = session.create_client(
        "s3",
        region_name=settings.region or _configured_region(session),
        endpoint_url=settings.endpoint_url,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=SILENCE_S,
            tcp_keepalive=True,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1, "mode": "standard"},
            user_agent_extra="crcli",
            s3={"addressing_style": settings.addressing_style} if settings.addressing_style else None,
        ),
    )
    _leave_payloads_unsigned_where_safe(client)
    client.meta.events.register_first("needs-retry.s3", _end_at_redirects)
    return Connection(
        client=client,
        pulse=_watch_over(client),
        endpoint_url=_without_credentials(client.meta.endpoint_url),
        region=client.meta.region_name,
        credentials_from=getattr(session.get_credentials(), "method", ""),
        credentials=session.get_credentials(),
        is_aws=_host(client).endswith((".amazonaws.com", ".amazonaws.com.cn")),
        checksums=client.meta.config.request_checksum_calculation == "when_supported",
        max_attempts=max_attempts,
    )


def _find_services_at_once(session: Any) -> None:
    """Spare botocore a look into each of its 400 folders for a model before it loads one (15 ms)."""
    loader = session.get_component("data_loader")

    def folders(type_name: str) -> list[str]:
        return sorted(
            {name for path in loader.search_paths if os.path.isdir(path) for name in os.listdir(path)}
        )

    loader.list_available_services = folders


def _end_at_redirects(response: tuple[Any, dict[str, Any]] | None, operation: Any, **_: Any) -> None:
    """Have a redirect that is none of S3's end a request. botocore takes it for a bucket in another region,
    asks for that, and is redirected again, until Python's stack is full."""
    if response is None or response[0].status_code // 100 != 3:
        return
    parsed = response[1]
    if (
        parsed.get("Error", {}).get("Code", "").isdigit()
        and "x-amz-bucket-region" not in parsed["ResponseMetadata"]["HTTPHeaders"]
    ):
        raise ClientError(parsed, operation.name)


def _configured_region(session: Any) -> str:
    """The region, from where the AWS tools take it; other stores mostly do not care."""
    return os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"


def _configured_attempts(session: Any) -> int | None:
    """AWS_MAX_ATTEMPTS or max_attempts of the profile, if the user set either."""
    try:
        value = session.get_config_variable("max_attempts")
    except ValueError:
        raise ValueError("AWS_MAX_ATTEMPTS, or max_attempts of the profile, is no whole number") from None
    return int(value) if value else None


def _leave_payloads_unsigned_where_safe(client: Any) -> None:
    """Do not hash bodies with SHA-256 where nobody can change them on their way: over TLS and on loopback.

    That hash is the slowest step of an upload (0.15–2 GB/s per core). The CRC32 of the body is still among
    the signed headers. botocore does the same by itself only where it computes the checksum. A
    payload_signing_enabled of the user's own is left alone.
    """
    s3 = dict(client.meta.config.s3 or {})
    if "payload_signing_enabled" in s3:
        return
    if client.meta.endpoint_url.startswith("https:") or _is_loopback(_host(client)):
        client.meta.config.s3 = {**s3, "payload_signing_enabled": False}


class Pulse:
    """When a store was last seen to live, on whichever connection: it answered, or took or sent bytes."""

    def __init__(self) -> None:
        self._last = -math.inf

    def beat(self) -> None:
        """It lives."""
        self._last = time.monotonic()

    @property
    def is_felt(self) -> bool:
        """Whether it has lived of late."""
        return self.felt_since(time.monotonic() - SILENCE_S)

    def felt_since(self, when: float) -> bool:
        """Whether it has lived since then."""
        return self._last > when


class _Felt(io.RawIOBase):
    """What a connection brings: each piece is a sign of life, for those who wait on others."""

    def __init__(self, raw: io.RawIOBase, pulse: Pulse) -> None:
        self._raw = raw
        self._pulse = pulse

    def readable(self) -> bool:
        """As all that is read from."""
        return True

    def readinto(self, buffer: Any) -> int | None:
        """As a socket's."""
        size: int | None = self._raw.readinto(buffer)
        if size:
            self._pulse.beat()
        return size

    def close(self) -> None:
        """As a socket's."""
        self._raw.close()
        super().close()


class _FeltResponse(http.client.HTTPResponse):
    """An answer whose bytes are felt as they come: a large one on a slow line takes long."""

    def __init__(self, sock: Any, *arguments: Any, pulse: Pulse, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp = io.BufferedReader(_Felt(self.fp.detach(), pulse))


class _PatientConnection:
    """Tells a silent store from one that is slow, or is behind a slow line.

    It waits for a socket that takes no bytes longer than urllib3, for which a new connection's time is
    enough: of parts that shared a line of 20 Mbit/s none came to its end. An answer is waited for while the
    kernel still sends what was asked, or the store answers others, or brings them bytes.
    """

    sock: Any
    pulse: Pulse
    _response_received: bool

    def send(self, data: Any) -> None:
        """As http.client's connections."""
        if self.sock is not None:
            self.sock.settimeout(READ_TIMEOUT_S)
        super().send(data)  # type: ignore[misc]

    def getresponse(self) -> Any:
        """As http.client's connections. Raises TimeoutError when the store keeps silent.

        TLS may have something to say by itself, right after a connection stands: then silence is all that the
        first answer on it is given.
        """
        if not self._has_come():
            self._wait()
        sock = self.sock
        response = super().getresponse()  # type: ignore[misc]
        self.pulse.beat()
        if sock.fileno() >= 0:  # else there was no body
            sock.settimeout(READ_TIMEOUT_S)
        return response

    def _has_come(self) -> bool:
        """Whether an answer, or a part of it, has been taken from the kernel already.

        botocore reads the first line of what comes in place of `100 Continue`; TLS takes all of a record.
        """
        pending = getattr(self.sock, "pending", None)
        return self._response_received or (pending is not None and pending() > 0)

    def _wait(self) -> None:
        began, unsent = time.monotonic(), 0
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while not poll.poll(_LOOK_S * 1000):
            if (left := _unsent(self.sock)) != unsent:  # the other side takes it
                began, unsent = time.monotonic(), left
                self.pulse.beat()
            now = time.monotonic()
            is_slow = self.pulse.felt_since(now - SILENCE_S) and now < began + READ_TIMEOUT_S
            if now >= began + SILENCE_S and not is_slow:
                raise TimeoutError("no answer")


def _unsent(connection: Any) -> int:
    """How many bytes the other side's kernel has not taken yet."""
    held = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    return int.from_bytes(held, sys.byteorder)


def _watch_over(client: Any) -> Pulse:
    """Have a client's connections be patient; botocore takes no word for that."""
    pulse = Pulse()
    pools = getattr(client._endpoint.http_session, "_pool_classes_by_scheme", {})
    for scheme, pool in list(pools.items()):
        parts = {"pulse": pulse, "response_class": partial(_FeltResponse, pulse=pulse)}
        connection = type("Connection", (_PatientConnection, pool.ConnectionCls), parts)
        pools[scheme] = type("Pool", (pool,), {"ConnectionCls": connection})
    return pulse


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _host(client: Any) -> str:
    return urlsplit(client.meta.endpoint_url).hostname or ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
