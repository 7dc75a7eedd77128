"""botocore's client, made from the settings: who we are, where the store is, how requests are sent.

botocore is the part of boto3 that resolves credentials and speaks the protocol; boto3's resource layer and
transfer manager would cost start-up time and bring threads and retries of their own.
"""

from __future__ import annotations

import ipaddress
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.session
from botocore.config import Config

from crcli.records import Struct

if TYPE_CHECKING:
    from crcli.store.s3.settings import S3Settings

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 30
CONNECTIONS = 32
"""Kept open at most: the writers' threads and those of a caller that reads ranges in parallel."""


class Connection(Struct, frozen=True):
    """A client, and what had to be known to make it."""

    client: Any
    endpoint_url: str
    region: str
    credentials_from: str
    """By which of botocore's ways the credentials were found (env, shared-credentials-file, iam-role, …)."""
    is_aws: bool
    checksums: bool
    """Whether requests carry CRC32s. Stores that choke on them are used with request_checksum_calculation =
    when_required (AWS_REQUEST_CHECKSUM_CALCULATION), as with the AWS tools."""
    max_attempts: int | None


def connect(settings: S3Settings) -> Connection:
    """Make the client; nothing is sent yet. Raises botocore's errors for settings that make no sense."""
    session = botocore.session.Session(profile=settings.profile)
    _find_services_at_once(session)
    client = session.create_client(
        "s3",
        region_name=settings.region or _configured_region(session),
        endpoint_url=settings.endpoint_url,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            tcp_keepalive=True,
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1, "mode": "standard"},
            user_agent_extra="crcli",
            s3={"addressing_style": settings.addressing_style} if settings.addressing_style else None,
        ),
    )
    _leave_payloads_unsigned_where_safe(client)
    _send_as_patiently_as_read(client)
    return Connection(
        client=client,
        endpoint_url=client.meta.endpoint_url,
        region=client.meta.region_name,
        credentials_from=getattr(session.get_credentials(), "method", ""),
        is_aws=_host(client).endswith((".amazonaws.com", ".amazonaws.com.cn")),
        checksums=client.meta.config.request_checksum_calculation == "when_supported",
        max_attempts=_configured_attempts(session),
    )


def _find_services_at_once(session: Any) -> None:
    """Spare botocore a look into each of its 400 folders for a model before it loads one (15 ms)."""
    loader = session.get_component("data_loader")

    def folders(type_name: str) -> list[str]:
        return sorted(
            {name for path in loader.search_paths if os.path.isdir(path) for name in os.listdir(path)}
        )

    loader.list_available_services = folders


def _configured_region(session: Any) -> str:
    """The region, from where the AWS tools take it; other stores mostly do not care."""
    return os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"


def _configured_attempts(session: Any) -> int | None:
    """AWS_MAX_ATTEMPTS or max_attempts of the profile, if the user set either."""
    value = session.get_config_variable("max_attempts")
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


class _PatientConnection:
    """Waits for a socket that takes no bytes as long as for one that brings none. urllib3 waits as long as
    for a new connection to stand: of parts that shared a line of 20 Mbit/s none came to its end."""

    sock: Any

    def send(self, data: Any) -> None:
        """As http.client's connections."""
        if self.sock is not None:
            self.sock.settimeout(READ_TIMEOUT_S)
        super().send(data)  # type: ignore[misc]


def _send_as_patiently_as_read(client: Any) -> None:
    """Have connections be patient when they send; botocore takes no word for that."""
    pools = getattr(client._endpoint.http_session, "_pool_classes_by_scheme", {})
    for scheme, pool in list(pools.items()):
        connection = type("Connection", (_PatientConnection, pool.ConnectionCls), {})
        pools[scheme] = type("Pool", (pool,), {"ConnectionCls": connection})


def _host(client: Any) -> str:
    return urlsplit(client.meta.endpoint_url).hostname or ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
