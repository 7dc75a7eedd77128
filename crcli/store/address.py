"""URLs of stores, taken apart and put together. What is wrong with one is said here, with a right one."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from crcli.errors import UsageError
from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Mapping
    from urllib.parse import SplitResult

S3_OPTIONS = ("endpoint_url", "region", "profile", "addressing_style", "sse", "sse_kms_key_id")
ADDRESSING_STYLES = ("auto", "path", "virtual")

_PLAIN_FOLDER = re.compile(r"file://(/[\w/.+-]*)", re.ASCII)
"""Most URLs of directories: to take these apart needs no urllib, whose import takes 3 ms."""

_EXAMPLES = "Write file:///absolute/path or s3://bucket/prefix."
_NO_CREDENTIALS = "Put them where the AWS tools look: AWS_PROFILE, ~/.aws/credentials, a role, …."


class StoreAddress(Struct, frozen=True):
    """A store's URL taken apart: `scheme`, `place` (a path, or bucket/prefix), and the query's `options`."""

    scheme: str
    place: str
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, url: str) -> StoreAddress:
        """Take `url` apart; raises UsageError if it is not a store's."""
        if not _is_text(url):
            raise UsageError(f"not the URL of a store, but bytes that are no UTF-8: {url!r}", hint=_EXAMPLES)
        if not url.isprintable():  # a line end of Windows, say
            raise UsageError(
                f"not the URL of a store: {url!r} has a character that nobody sees", hint=_EXAMPLES
            )
        if url.startswith("/"):
            return cls("file", _folder(url))
        if plain := _PLAIN_FOLDER.fullmatch(url):
            return cls("file", _folder(plain[1]))
        if "://" not in url:
            raise UsageError(f"not the URL of a store: {url!r}", hint=_absolute_hint(url))
        parts = _split(url)
        if parts.scheme not in _PARSERS:
            known = ", ".join(f"{name}://" for name in _PARSERS)
            raise UsageError(f"no store is known for {parts.scheme}:// (known: {known})", hint=_EXAMPLES)
        if parts.fragment:
            raise UsageError(f"a store's URL has no #fragment: {url!r}", hint="Write # as %23.")
        return _PARSERS[parts.scheme](parts)

    @property
    def url(self) -> str:
        """The URL in its canonical form; `parse` takes it apart again to the same address."""
        from urllib.parse import quote, urlencode

        query = "?" + urlencode(self.options, safe=":") if self.options else ""
        return f"{self.scheme}://{quote(self.place, safe='/@+:')}{query}"


def split_name(url: str) -> tuple[str, str]:
    """The store's URL and the name of `s3://bucket/prefix/name?region=…`; a plain path has no options."""
    place, mark, query = (url, "", "") if url.startswith("/") else url.partition("?")
    store, _, name = place.rpartition("/")
    return store + mark + query, name


def check_endpoint(endpoint_url: str) -> str:
    """Return `endpoint_url` if it is the URL of a server, else raise UsageError."""
    parts = _split(endpoint_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        hint = f"Write http://{endpoint_url} or https://…." if "://" not in endpoint_url else _EXAMPLES
        raise UsageError(f"not the URL of a server: {endpoint_url!r}", hint=hint)
    if "@" in parts.netloc:
        raise UsageError("credentials do not belong in the endpoint's URL", hint=_NO_CREDENTIALS)
    return endpoint_url


def _split(url: str) -> SplitResult:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError as error:
        raise UsageError(f"not a URL: {url!r} ({error})", hint=_EXAMPLES) from None
    return parts


def _absolute_hint(url: str) -> str:
    if ":" in url.partition("/")[0] or not url:
        return _EXAMPLES
    from urllib.parse import quote

    return f"{_EXAMPLES} For that directory: file://{quote(os.path.abspath(os.path.expanduser(url)))}"


def _parse_file(parts: SplitResult) -> StoreAddress:
    from urllib.parse import unquote

    if parts.netloc not in ("", "localhost"):
        raise UsageError(
            f"a directory's URL names no host, and this one names {parts.netloc!r}",
            hint=f"Three slashes make it a path of this machine: file:///{parts.netloc}{parts.path}",
        )
    if parts.query:
        raise UsageError(
            f"a directory store has no options: ?{parts.query}", hint="Write ? in a path as %3F."
        )
    if not parts.path:
        raise UsageError("the URL of a directory store names a path", hint=_EXAMPLES)
    return StoreAddress("file", _folder(unquote(parts.path)))


def _folder(path: str) -> str:
    """The path in its shortest form; raises UsageError for the one that a variable without a value leaves."""
    found = os.path.normpath(f"/{path.lstrip('/')}")
    if found == "/" or "\0" in found:
        raise UsageError(f"a store is a directory of its own, not {found!r}", hint=_EXAMPLES)
    return found


def _is_text(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_s3(parts: SplitResult) -> StoreAddress:
    from urllib.parse import unquote

    if "@" in parts.netloc:
        raise UsageError("credentials do not belong in a store's URL", hint=_NO_CREDENTIALS)
    if not parts.netloc:
        raise UsageError("the URL of an S3 store names a bucket", hint="Write s3://bucket/prefix.")
    prefix = "/".join(segment for segment in unquote(parts.path).split("/") if segment)
    return StoreAddress("s3", f"{parts.netloc}/{prefix}".rstrip("/"), _parse_options(parts.query))


def _parse_options(query: str) -> dict[str, str]:
    from urllib.parse import parse_qsl

    try:
        options = dict(parse_qsl(query, strict_parsing=True)) if query else {}
    except ValueError as error:
        raise UsageError(f"cannot read ?{query}: {error}", hint="Write ?name=value&name=value.") from None
    if unknown := sorted(set(options) - set(S3_OPTIONS)):
        raise UsageError(
            f"no such option of an S3 store: {', '.join(unknown)}", hint=f"There are {', '.join(S3_OPTIONS)}."
        )
    if "endpoint_url" in options:
        check_endpoint(options["endpoint_url"])
    if options.get("addressing_style", "auto") not in ADDRESSING_STYLES:
        raise UsageError(
            f"no such addressing style: {options['addressing_style']}",
            hint=f"There are {', '.join(ADDRESSING_STYLES)}.",
        )
    return options


_PARSERS = {"file": _parse_file, "s3": _parse_s3}
