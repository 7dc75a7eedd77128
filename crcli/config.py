"""Settings that come from outside the command line: the environment and a YAML file.

The first file that exists counts: `$CRCLI_CONFIG`, `~/.config/crcli/config.yaml`, `/etc/crcli/config.yaml`.
Its keys are `store` (a URL), `endpoint_url`, `weights` (folders in which a restore looks for files of
weights that are not where they were), and `cache` (`folder` and `size` of what this host keeps of remote
stores). YAML is imported only when there is a file.
"""

from __future__ import annotations

import os
import re
from typing import Any

from crcli.errors import UsageError
from crcli.records import Struct
from crcli.store.address import StoreAddress

DEFAULT_STORE = "file:///var/lib/crcli/store"
DEFAULT_CACHE = "/var/cache/crcli"
DEFAULT_STATE = "/var/lib/crcli"

_UNITS = {"": 1} | {
    unit: factor**power
    for power, letter in enumerate("kMGT", start=1)
    for unit, factor in ((f"{letter}B", 1000), (f"{letter.upper()}iB", 1024))
}

_MOST = 1e15
"""Larger figures count as this."""


class StoreChoice(Struct, frozen=True):
    """Which store a command uses, and who said so."""

    url: str
    endpoint_url: str | None
    source: str


def choose_store(
    store: str | None, endpoint_url: str | None = None, *, endpoint_is_for_another: bool = False
) -> StoreChoice:
    """Return the store to use: the command line's, $CRCLI_STORE, the file's, then the default.

    Its URL is in canonical form. Raises UsageError when it is not the URL of a store, and when an S3 server
    is named and no store: images would go to this host's own disk. A folder that is named is what is meant:
    scripts give all stores the same options.
    """
    settings = _load()
    named = (
        (store, "--store"),
        (os.environ.get("CRCLI_STORE"), "$CRCLI_STORE"),
        (settings.get("store"), _path() or ""),
        (DEFAULT_STORE, "the default"),
    )
    url, source = next((url, source) for url, source in named if url)
    address = _parsed(url, source)
    if endpoint_url and source == "the default" and not endpoint_is_for_another:
        raise UsageError(
            f"--endpoint-url names an S3 server, but no store is named, and images would be in {url}",
            hint="name the store with --store s3://bucket/prefix, $CRCLI_STORE or the configuration file",
        )
    endpoint = endpoint_url or (settings.get("endpoint_url") if address.scheme == "s3" else None)
    return StoreChoice(address.url, endpoint, source)


def _parsed(url: str, source: str) -> StoreAddress:
    """The address of the store that `source` names; raise UsageError, with the source, for no such URL."""
    try:
        return StoreAddress.parse(url)
    except UsageError as error:
        if source == "--store":
            raise
        raise UsageError(f"{source}: {error.message}", hint=error.hint) from None


def weights_folders() -> tuple[str, ...]:
    """Return the folders in which files of weights are looked for; one or a list in the file."""
    named = _load().get("weights", ())
    return (named,) if isinstance(named, str) else tuple(named)


class CacheChoice(Struct, frozen=True):
    """Where what was stored or fetched is kept on this host, and its bound in bytes (None: what suits the
    disk; 0: nothing is kept)."""

    folder: str
    limit: int | None


def state_folder() -> str:
    """Return where what crcli has found out about this host is noted: $CRCLI_STATE_DIR, then the default."""
    return os.environ.get("CRCLI_STATE_DIR") or DEFAULT_STATE


def choose_cache() -> CacheChoice:
    """Return the cache to use: $CRCLI_CACHE_DIR and $CRCLI_CACHE_SIZE, the file's, then the default."""
    settings = _load().get("cache", {})
    base = os.environ.get("CRCLI_CACHE_DIR") or settings.get("folder") or DEFAULT_CACHE
    if not os.path.isabs(base):
        raise UsageError(f"the folder of the cache is an absolute path, not {base!r}")
    named = os.environ.get("CRCLI_CACHE_SIZE")
    size = named or settings.get("size")
    source = "$CRCLI_CACHE_SIZE" if named else f"`size` in {_path()}"
    return CacheChoice(os.path.join(base, "objects"), None if size is None else parse_size(str(size), source))


def parse_size(text: str, source: str) -> int:
    """Return the bytes that `10GiB`, `500 MB` or `4096` stand for; raise UsageError for anything else, with
    the source."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text.strip())
    if found is None or found[2] not in _UNITS:
        raise UsageError(f"{source}: {text!r} is not a size", hint="sizes look like 10GiB, 500MB or 0")
    return int(min(float(found[1]), _MOST) * _UNITS[found[2]])


def _path() -> str | None:
    """The configuration file that counts, if there is one."""
    if named := os.environ.get("CRCLI_CONFIG"):
        if not os.path.isfile(named) and named != os.devnull:
            raise UsageError(f"CRCLI_CONFIG names {named}, which is not a file")
        return named
    places = (os.path.expanduser("~/.config/crcli/config.yaml"), "/etc/crcli/config.yaml")
    return next((place for place in places if os.path.isfile(place)), None)


_KEYS = ("store", "endpoint_url", "weights", "cache")
_CACHE_KEYS: dict[Any, Any] = {"folder": str, "size": str | int}


def _load() -> dict[str, Any]:
    path = _path()
    if path is None:
        return {}
    import yaml

    try:
        with open(path, "rb") as file:
            settings: Any = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read the configuration file {path}: {error}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{path} must hold lines like `store: s3://bucket/prefix`")
    if unknown := sorted(set(map(str, settings)) - set(_KEYS)):
        raise UsageError(
            f"{path} has settings that crcli does not know: {', '.join(unknown)}",
            hint=f"it knows {', '.join(_KEYS)}",
        )
    for key, value in settings.items():
        if key == "cache":
            _check_cache(value, path)
            continue
        values = value if key == "weights" and isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in values):
            raise UsageError(f"{path} must hold lines like `store: s3://bucket/prefix`, not {key}: {value}")
    return settings


def _check_cache(value: Any, path: str) -> None:
    """Raise UsageError unless `value` is a folder and a size, or one of them."""
    is_right = isinstance(value, dict) and all(
        name in _CACHE_KEYS and isinstance(one, _CACHE_KEYS[name]) for name, one in value.items()
    )
    if not is_right:
        raise UsageError(f"{path} must hold `cache: {{folder: /path, size: 10GiB}}`, not cache: {value}")
