"""From a URL to a store. Only the store that is named is imported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.store.address import StoreAddress, check_endpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.store.base import Store

PATIENCE_S = 20.0
"""How long a request is tried again that fails for a passing reason (seconds): longer than AWS's own tools
do, but so that whoever has 30 s notice hears of it in time. A tree may stand still meanwhile."""


def open_store(url: str, *, endpoint_url: str | None = None, patience_s: float = PATIENCE_S) -> Store:
    """Return the store at `url`; nothing is read, written or connected to yet.

    `url` is `file:///path`, an absolute path, or `s3://bucket/prefix`, which takes options as a query
    (`?endpoint_url=…&region=…&profile=…&addressing_style=…&sse=…&sse_kms_key_id=…`). `endpoint_url` is the
    command line's and wins over the query, which wins over the environment. A request that fails for a
    passing reason is tried again for `patience_s` seconds. Raises UsageError for any other URL.
    """
    address = StoreAddress.parse(url)
    return _OPENERS[address.scheme](address, endpoint_url, patience_s)


def _open_file(address: StoreAddress, _endpoint_url: str | None, _patience_s: float) -> Store:
    from crcli.store.file import FileStore

    return FileStore(address.place)


def _open_s3(address: StoreAddress, endpoint_url: str | None, patience_s: float) -> Store:
    from crcli.store.s3 import S3Settings, S3Store

    options = dict(address.options)
    if endpoint_url:
        options["endpoint_url"] = check_endpoint(endpoint_url)
    return S3Store(address, S3Settings.gather(options, os.environ, patience_s))


_OPENERS: dict[str, Callable[[StoreAddress, str | None, float], Store]] = {
    "file": _open_file,
    "s3": _open_s3,
}
