"""Settings that come from outside the command line: the environment and a YAML file.

The first file that exists counts: `$CRCLI_CONFIG`, `~/.config/crcli/config.yaml`, `/etc/crcli/config.yaml`.
Its keys are `store` (a URL), `endpoint_url`, and `weights` (folders in which a restore looks for files of
weights that are not where they were). YAML is imported only when there is a file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from crcli.errors import UsageError
from crcli.store.address import StoreAddress

DEFAULT_STORE = "file:///var/lib/crcli/store"


@dataclass(frozen=True)
class StoreChoice:
    """Which store a command uses, and who said so."""

    url: str
    endpoint_url: str | None
    source: str


def choose_store(store: str | None, endpoint_url: str | None = None) -> StoreChoice:
    """Return the store to use: the command line's, $CRCLI_STORE, the file's, then the default.

    Its URL is in canonical form. Raises UsageError when it is not the URL of a store.
    """
    settings = _load()
    named = (
        (store, "--store"),
        (os.environ.get("CRCLI_STORE"), "$CRCLI_STORE"),
        (settings.get("store"), _path() or ""),
        (DEFAULT_STORE, "the default"),
    )
    url, source = next((url, source) for url, source in named if url)
    address = StoreAddress.parse(url)
    endpoint = endpoint_url or (settings.get("endpoint_url") if address.scheme == "s3" else None)
    return StoreChoice(address.url, endpoint, source)


def weights_folders() -> tuple[str, ...]:
    """Return the folders in which files of weights are looked for; one or a list in the file."""
    named = _load().get("weights", ())
    return (named,) if isinstance(named, str) else tuple(named)


def _path() -> str | None:
    """The configuration file that counts, if there is one."""
    if named := os.environ.get("CRCLI_CONFIG"):
        if not os.path.isfile(named):
            raise UsageError(f"CRCLI_CONFIG names {named}, which is not a file")
        return named
    places = (os.path.expanduser("~/.config/crcli/config.yaml"), "/etc/crcli/config.yaml")
    return next((place for place in places if os.path.isfile(place)), None)


_KEYS = ("store", "endpoint_url", "weights")


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
        values = value if key == "weights" and isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in values):
            raise UsageError(f"{path} must hold lines like `store: s3://bucket/prefix`, not {key}: {value}")
    return settings
