"""Writes that bring an object into being, in one request or out of parts; only if absent, if asked."""

from __future__ import annotations

import base64
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any

from crcli.errors import NotFound, StoreError
from crcli.store.base import taken

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.store.s3.body import Body
    from crcli.store.s3.bucket import Bucket
    from crcli.store.s3.quick import QuickRequests

SEND_WITHOUT_ASKING = 64 << 10
"""Up to here a body is handed over as bytes. With anything longer botocore sends the headers first and waits
for the store's `100 Continue`: a round trip, or a second with servers that never say it."""


def put_soon(bucket: Bucket, quick: QuickRequests, key: str, body: Body, *, if_absent: bool) -> None:
    """Write `body` in one request, by whichever client is at hand."""
    done = None if bucket.is_connected else quick.put(key, bytes(body), if_absent=if_absent)
    if not done:
        put_whole(bucket, key, body, if_absent=if_absent, was_tried=done is False)


def put_whole(bucket: Bucket, key: str, body: Body, *, if_absent: bool, was_tried: bool) -> None:
    """Write `body` in one request. `was_tried`: somebody has sent one for us, and does not know what came
    of it."""
    parameters = {**bucket.of(key), **bucket.settings.encryption, **bucket.checksum(body)}
    small = bytes(body) if len(body) <= SEND_WITHOUT_ASKING else None

    def write(condition: dict[str, str]) -> None:
        body.seek(0)
        bucket.send("put_object", {**parameters, **condition, "Body": body if small is None else small})

    is_ours = partial(_holds, bucket, key, body)
    _create(bucket, key, write, is_ours, if_absent=if_absent, was_tried=was_tried)


def complete_upload(
    bucket: Bucket, key: str, upload_id: str, parts: list[dict[str, Any]], size: int, *, if_absent: bool
) -> None:
    """Make one object of `size` bytes out of the parts of an upload."""
    parameters = {**bucket.of(key), "UploadId": upload_id, "MultipartUpload": {"Parts": parts}}

    def write(condition: dict[str, str]) -> None:
        bucket.send("complete_multipart_upload", parameters | condition)

    _create(bucket, key, write, partial(_consists_of, bucket, key, parts, size), if_absent=if_absent)


def _create(
    bucket: Bucket,
    key: str,
    write: Callable[[dict[str, str]], None],
    is_ours: Callable[[], bool],
    *,
    if_absent: bool,
    was_tried: bool = False,
) -> None:
    """Write until the object is there. With `if_absent`, raise ObjectExists if it is there but not ours.

    AWS is known to check `If-None-Match` atomically. Other stores may refuse the header (501), or accept and
    ignore it: there we look before, and read back after.
    """
    trusted = bucket.connection.is_aws or not if_absent
    if not trusted and _exists(bucket, key):
        if was_tried and is_ours():
            return
        raise taken(key)
    try:
        condition = {"IfNoneMatch": "*"} if if_absent else {}
        _write(bucket, key, write, is_ours, condition, attempts=int(was_tried))
    except StoreError as error:
        from crcli.store.s3.errors import refuses_conditions

        if not if_absent or not refuses_conditions(error.__cause__):
            raise
        _write(bucket, key, write, is_ours, {})
    if not trusted and not is_ours():
        raise taken(key)


def _write(
    bucket: Bucket,
    key: str,
    write: Callable[[dict[str, str]], None],
    is_ours: Callable[[], bool],
    condition: dict[str, str],
    attempts: int = 0,
) -> None:
    """Write, and see through a lost answer: the next attempt then finds the key taken, or the upload gone.

    `attempts` were made before.
    """

    def attempt() -> None:
        nonlocal attempts
        attempts += 1
        write(condition)

    try:
        bucket.patiently(attempt, key)
    except StoreError as error:
        from crcli.store.s3.errors import says_it_was_done

        if attempts == 1 or not says_it_was_done(error.__cause__) or not is_ours():
            raise


def _exists(bucket: Bucket, key: str) -> bool:
    try:
        bucket.request("head_object", bucket.of(key), key)
    except NotFound:
        return False
    return True


def _holds(bucket: Bucket, key: str, body: Body) -> bool:
    """Whether the object is `body`, byte for byte."""

    def fetch() -> bytes:
        with bucket.send("get_object", bucket.of(key))["Body"] as stream:
            data: bytes = stream.read()
            return data

    try:
        return bucket.patiently(fetch, key) == bytes(body)
    except NotFound:
        return False


def _consists_of(bucket: Bucket, key: str, parts: list[dict[str, Any]], size: int) -> bool:
    """Whether the object is the one made of `parts`, by size and, where the store keeps it, by checksum."""
    try:
        head = bucket.request("head_object", bucket.of(key) | {"ChecksumMode": "ENABLED"}, key)
    except NotFound:
        return False
    checksum = head.get("ChecksumCRC32", "")
    is_composite = "-" in checksum  # the checksum of the parts' checksums, and how many there are
    return head["ContentLength"] == size and (not is_composite or checksum == _composite(parts))


def _composite(parts: list[dict[str, Any]]) -> str:
    checksums = b"".join(base64.b64decode(part.get("ChecksumCRC32", "")) for part in parts)
    return f"{base64.b64encode(zlib.crc32(checksums).to_bytes(4, 'big')).decode()}-{len(parts)}"
