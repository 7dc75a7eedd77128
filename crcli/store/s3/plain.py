"""Settings that are so plain that no AWS library is needed to understand them.

Keys in the environment or in the credentials file, an endpoint, a region: that is all, in most pods and on
most machines. The rules below follow botocore's. What they do not know, a variable or a line of a file, makes
the settings not plain, whatever it means.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from crcli.records import Struct

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crcli.store.s3.settings import S3Settings

_HARMLESS = frozenset(
    (
        "AWS_ACCESS_KEY_ID",
        "AWS_CONFIG_FILE",
        "AWS_DEFAULT_OUTPUT",
        "AWS_DEFAULT_REGION",
        "AWS_EC2_METADATA_DISABLED",
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_EXECUTION_ENV",
        "AWS_PAGER",
        "AWS_REGION",
        "AWS_REQUEST_CHECKSUM_CALCULATION",
        "AWS_RETRY_MODE",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_SHARED_CREDENTIALS_FILE",
    )
)
"""Variables that are understood here, or say nothing about how an object is read."""

_ON_THE_WAY = {
    "http": frozenset(("ALL_PROXY", "HTTP_PROXY")),
    "https": frozenset(("ALL_PROXY", "AWS_CA_BUNDLE", "HTTPS_PROXY", "REQUESTS_CA_BUNDLE")),
}
"""Variables that change how a store is reached, by the scheme of its URL."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")
_SPECIAL_BUCKET = ("--x-s3", "--ol-s3", "-s3alias")
_CREDENTIALS = {"aws_access_key_id", "aws_secret_access_key", "aws_session_token"}
_ABOUT_NO_STORE = {"region", "output", "cli_pager", "cli_auto_prompt", "cli_history"}


class PlainAccess(Struct, frozen=True):
    """All that a request needs: where the store is (None: at AWS), and whose it is."""

    endpoint_url: str | None
    region: str
    key_id: str
    secret: str
    token: str | None


def plain_access(bucket: str, settings: S3Settings, environ: Mapping[str, str]) -> PlainAccess | None:
    """Return what botocore would make of the settings, or None where that takes botocore to tell."""
    if settings.profile or settings.addressing_style not in (None, "auto", "path"):
        return None
    endpoint_url = (
        settings.endpoint_url or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None
    )
    scheme = _scheme(endpoint_url) if endpoint_url else "https"
    if scheme not in _ON_THE_WAY or not _are_understood(environ, _ON_THE_WAY[scheme]):
        return None
    if not _BUCKET.fullmatch(bucket) or bucket.endswith(_SPECIAL_BUCKET):
        return None
    config = _default_profile(environ.get("AWS_CONFIG_FILE", "~/.aws/config"))
    if config is None or not config.keys() <= _ABOUT_NO_STORE:
        return None
    region = (
        settings.region
        or environ.get("AWS_REGION")
        or environ.get("AWS_DEFAULT_REGION")
        or config.get("region")
        or "us-east-1"
    )
    if endpoint_url is None and (region.startswith("cn-") or settings.addressing_style == "path"):
        return None
    keys = _keys(environ)
    if keys is None or not all(_may_stand_in_a_header(word or "") for word in (region, *keys)):
        return None
    return PlainAccess(endpoint_url, region, *keys)


def _scheme(endpoint_url: str) -> str:
    """The scheme of a server's URL; empty where it is not one."""
    try:
        parts = urlsplit(endpoint_url)
        return parts.scheme if parts.hostname and parts.port != 0 else ""
    except ValueError:  # a port that is no number, or none of TCP's
        return ""


def _may_stand_in_a_header(word: str) -> bool:
    """Whether a client can send it: one with a line break at its end would bring obstore down."""
    return word.isascii() and word.isprintable()


def _are_understood(environ: Mapping[str, str], on_the_way: frozenset[str]) -> bool:
    """Whether no variable says anything that is not known here."""
    harmless = _HARMLESS.union(*_ON_THE_WAY.values()) - on_the_way
    names = {name.upper() for name, value in environ.items() if value}
    return on_the_way.isdisjoint(names) and all(name in harmless for name in names if name.startswith("AWS_"))


def _keys(environ: Mapping[str, str]) -> tuple[str, str, str | None] | None:
    """The access key's id, its secret and a session's token."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
    key_id, secret, token = (environ.get(name) for name in names)
    if not key_id and not secret:
        kept = _default_profile(environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"))
        if kept is None or not kept.keys() <= _CREDENTIALS:
            return None
        key_id, secret, token = (kept.get(name.lower()) for name in names)
    return (key_id, secret, token or None) if key_id and secret else None


def _default_profile(path: str) -> dict[str, str] | None:
    """What such a file says of the profile `default`; nothing if it is not there, None if it is not read."""
    try:
        with open(os.path.expanduser(os.path.expandvars(path)), encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError):
        return None
    if not text.strip():
        return {}
    import configparser

    parser = configparser.RawConfigParser(default_section="")
    try:
        parser.read_string(text)
    except configparser.Error:
        return None
    return dict(parser["default"]) if parser.has_section("default") else {}
