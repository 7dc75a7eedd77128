"""Settings that come from outside the command line: the environment and a YAML file.

The first file that exists counts: `$CRCLI_CONFIG`, `~/.config/crcli/config.yaml`, `/etc/crcli/config.yaml`.
Its keys are `store` (a URL) and `endpoint_url`. YAML is imported only when there is a file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from crcli.errors import UsageError

DEFAULT_STORE = "file:///var/lib/crcli/store"


@dataclass(frozen=True)
class StoreChoice:
    """Which store a command uses, and who said so."""

    url: str
    endpoint_url: str | None
    source: str


def choose_store(store: str | None, endpoint_url: str | None = None) -> StoreChoice:
    """Return the store to use: the command line's, $CRCLI_STORE, the file's, then the default."""
    if store:
        return StoreChoice(store, endpoint_url or _load().get("endpoint_url"), "--store")
    if named := os.environ.get("CRCLI_STORE"):
        return StoreChoice(named, endpoint_url or _load().get("endpoint_url"), "$CRCLI_STORE")
    settings = _load()
    endpoint = endpoint_url or settings.get("endpoint_url")
    if "store" in settings:
        return StoreChoice(settings["store"], endpoint, _path() or "")
    return StoreChoice(DEFAULT_STORE, endpoint, "the default")


def _path() -> str | None:
    """The configuration file that counts, if there is one."""
    if named := os.environ.get("CRCLI_CONFIG"):
        if not os.path.isfile(named):
            raise UsageError(f"CRCLI_CONFIG names {named}, which is not a file")
        return named
    places = (os.path.expanduser("~/.config/crcli/config.yaml"), "/etc/crcli/config.yaml")
    return next((place for place in places if os.path.isfile(place)), None)


def _load() -> dict[str, str]:
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
    if not isinstance(settings, dict) or not all(isinstance(value, str) for value in settings.values()):
        raise UsageError(f"{path} must hold lines like `store: s3://bucket/prefix`")
    if unknown := sorted(set(settings) - {"store", "endpoint_url"}):
        raise UsageError(
            f"{path} has settings that crcli does not know: {', '.join(map(str, unknown))}",
            hint="it knows `store` and `endpoint_url`",
        )
    return settings
