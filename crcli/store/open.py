"""From a URL to a store. Only the store that is named is imported."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from crcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from crcli.store.base import Store

_EXAMPLES = "Write file:///absolute/path or s3://bucket/prefix."


def open_store(url: str, *, endpoint_url: str | None = None, patience_s: float = 60.0) -> Store:
    """Return the store at `url`; nothing is read, written or connected to yet.

    `url` is `file:///path`, an absolute path, or `s3://bucket/prefix`, which takes options as a query
    (`?endpoint_url=…&region=…&profile=…&sse=…&sse_kms_key_id=…`). `endpoint_url` is the command line's and
    wins over the query and the environment. A request that fails for a passing reason is retried for
    `patience_s` seconds. Raises UsageError for anything else.
    """
    address = StoreAddress.parse(url)
    return _STORES[address.scheme](address, endpoint_url, patience_s)


@dataclass(frozen=True)
class StoreAddress:
    """A store's URL taken apart: `scheme`, `place` (a path, or bucket/prefix), and the query's options."""

    scheme: str
    place: str
    options: Mapping[str, str]

    @classmethod
    def parse(cls, url: str) -> StoreAddress:
        """Take `url` apart; UsageError says what is wrong with it and shows a right one."""
        if url.startswith("/"):
            return cls("file", os.path.normpath(url), {})
        parts = urlsplit(url)
        if "://" not in url:
            raise UsageError(f"not the URL of a store: {url!r}", hint=_absolute_hint(url))
        if parts.scheme not in _STORES:
            known = ", ".join(f"{name}://" for name in _STORES)
            raise UsageError(f"no store is known for {parts.scheme}:// (known: {known})", hint=_EXAMPLES)
        if parts.fragment:
            raise UsageError(f"a store's URL has no #fragment: {url!r}", hint="Write # as %23.")
        return _PARSERS[parts.scheme](url, parts.netloc, parts.path, parts.query)


def _absolute_hint(url: str) -> str:
    if not url:
        return _EXAMPLES
    return f"{_EXAMPLES} For this directory: {'file://' + quote(os.path.abspath(os.path.expanduser(url)))}"


def _parse_file(url: str, host: str, path: str, query: str) -> StoreAddress:
    if host not in ("", "localhost"):
        raise UsageError(
            f"a file URL names no host, and this one names {host!r}",
            hint=f"Three slashes make it a path of this machine: file:///{host}{path}",
        )
    if query:
        raise UsageError(f"a directory store takes no options: ?{query}", hint="Write ? in a path as %3F.")
    if not path:
        raise UsageError(f"no path in {url!r}", hint=_EXAMPLES)
    return StoreAddress("file", os.path.normpath(unquote(path)), {})


def _parse_s3(url: str, bucket: str, path: str, query: str) -> StoreAddress:
    if "@" in bucket:
        raise UsageError(
            "credentials do not belong in a store's URL",
            hint="Put them where the AWS tools look: AWS_PROFILE, ~/.aws/credentials, a role, ….",
        )
    if not bucket:
        raise UsageError(f"no bucket in {url!r}", hint="Write s3://bucket/prefix.")
    try:
        options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise UsageError(
            f"cannot read the options ?{query}: {error}", hint="Write ?name=value&name=value."
        ) from None
    unknown = sorted(set(options) - set(S3_OPTIONS))
    if unknown:
        raise UsageError(
            f"unknown option {', '.join(unknown)} in the store's URL",
            hint=f"Known are {', '.join(S3_OPTIONS)}.",
        )
    prefix = "/".join(segment for segment in unquote(path).split("/") if segment)
    return StoreAddress("s3", f"{bucket}/{prefix}".rstrip("/"), options)


S3_OPTIONS = ("endpoint_url", "region", "profile", "addressing_style", "sse", "sse_kms_key_id")


def _open_file(address: StoreAddress, endpoint_url: str | None, patience_s: float) -> Store:
    from crcli.store.file import FileStore

    return FileStore(address.place)


def _open_s3(address: StoreAddress, endpoint_url: str | None, patience_s: float) -> Store:
    from crcli.store.s3 import S3Settings, S3Store

    bucket, _, prefix = address.place.partition("/")
    options = dict(address.options)
    if endpoint_url:
        options["endpoint_url"] = endpoint_url
    return S3Store(bucket, prefix, S3Settings.gather(options, os.environ, patience_s))


_STORES: dict[str, Callable[[StoreAddress, str | None, float], Store]] = {"file": _open_file, "s3": _open_s3}
_PARSERS = {"file": _parse_file, "s3": _parse_s3}
