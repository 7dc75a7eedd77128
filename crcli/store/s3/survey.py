"""What a bucket can do, found out by writing one small object and removing it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from crcli.errors import ObjectExists, StoreError
from crcli.records import Struct, asdict

if TYPE_CHECKING:
    from crcli.store.s3.bucket import Bucket


class Survey(Struct, frozen=True):
    """What was found. `conditional_writes` is honoured, ignored or refused; no field holds a secret."""

    round_trip_ms: float
    conditional_writes: str
    bucket: str
    prefix: str
    endpoint: str
    region: str
    profile: str
    credentials_from: str
    encryption: str
    checksums: bool

    def as_json(self) -> dict[str, Any]:
        """The survey as a JSON object."""
        return asdict(self)


def survey(bucket: Bucket) -> Survey:
    """Write, ask for, and remove one object. Raises StoreError where the store does not allow that."""
    key = f"probe-{os.urandom(6).hex()}"
    written = {**bucket.of(key), **bucket.settings.encryption, "Body": b"crcli doctor\n"}
    bucket.request("put_object", written, key)
    try:
        before = time.monotonic()
        bucket.request("head_object", bucket.of(key), key)
        round_trip_ms = round((time.monotonic() - before) * 1000, 2)
        conditions = _conditions(bucket, written, key)
    finally:
        bucket.request("delete_object", bucket.of(key), key)
    connection, settings = bucket.connection, bucket.settings
    return Survey(
        round_trip_ms=round_trip_ms,
        conditional_writes=conditions,
        bucket=bucket.name,
        prefix=bucket.prefix,
        endpoint=connection.endpoint_url,
        region=connection.region,
        profile=settings.profile or os.environ.get("AWS_PROFILE", ""),
        credentials_from=connection.credentials_from,
        encryption=settings.sse or "",
        checksums=connection.checksums,
    )


def _conditions(bucket: Bucket, written: dict[str, Any], key: str) -> str:
    """What becomes of a write that is to happen only if the object is absent, while it is there."""
    from crcli.store.s3.errors import refuses_conditions

    try:
        bucket.request("put_object", written | {"IfNoneMatch": "*"}, key)
    except ObjectExists:
        return "honoured"
    except StoreError as error:
        if refuses_conditions(error.__cause__):
            return "refused"
        raise
    return "ignored"
