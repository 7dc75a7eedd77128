"""The places that crcli writes to: the store, asked what it can do, and the log and temporary folders."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from crcli.criu.workspace import temporary_folder
from crcli.errors import CrcliError
from crcli.guard.doctor.check import Check, lacks, note, passed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.config import StoreChoice

_SCARCE_STORE_BYTES = 1 << 30
_SCARCE_FOLDER_BYTES = 64 << 20
_PATIENCE_S = 5.0


def examine(choice: StoreChoice) -> Iterator[Check]:
    """Look at the store that commands would use, and at the folders."""
    yield from _store(choice)
    yield _folder(
        "logs", os.environ.get("CRCLI_LOG_DIR", "/var/log/crcli"), "CRIU's logs are kept after failures"
    )
    yield _folder("temporary-folder", temporary_folder(), "CRIU mounts cgroups there")


def _store(choice: StoreChoice) -> Iterator[Check]:
    evidence: dict[str, Any] = {"store": choice.url, "from": choice.source}
    try:
        yield _bucket(choice, evidence) if choice.url.startswith("s3:") else _directory(choice, evidence)
    except CrcliError as error:
        yield lacks("store", f"{choice.url}: {error.message}", error.hint, **evidence)


def _bucket(choice: StoreChoice, evidence: dict[str, Any]) -> Check:
    """Write a small object, ask for it, and remove it."""
    from crcli.store.address import StoreAddress, check_endpoint
    from crcli.store.s3 import S3Settings, S3Store

    address = StoreAddress.parse(choice.url)
    options = dict(address.options)
    if choice.endpoint_url:
        options["endpoint_url"] = check_endpoint(choice.endpoint_url)
    store = S3Store(address, S3Settings.gather(options, os.environ, _PATIENCE_S))
    try:
        found = store.survey()
    finally:
        store.close()
    says = f"{choice.url} takes objects, {found.round_trip_ms:.0f} ms for a request (from {choice.source})"
    return passed("store", says, **evidence, **found.as_json())


def _directory(choice: StoreChoice, evidence: dict[str, Any]) -> Check:
    from crcli.store.address import StoreAddress

    root = StoreAddress.parse(choice.url).place
    there = _nearest(root)
    if not _can_write(there):
        remedy = "choose another --store, or run crcli as a user who may write there"
        return lacks("store", f"{there} cannot be written to", remedy, **evidence)
    before = time.monotonic()
    free = _free_bytes(there)
    evidence |= {
        "free": free,
        "round_trip_ms": round((time.monotonic() - before) * 1000, 2),
        "conditional_writes": "honoured",
    }
    will = "" if there == root else " (the first dump creates it)"
    says = f"{root}{will}: {free >> 20} MiB free (from {choice.source})"
    if free < _SCARCE_STORE_BYTES:
        return note("store", says, "free space there, or choose another --store", **evidence)
    if there == root and _is_open_to_others(root):
        remedy = f"who can put an image there decides what a restore runs: chown and chmod go-w {root}"
        return note("store", f"{says}; others may write there", remedy, **evidence)
    return passed("store", says, **evidence)


def _folder(name: str, path: str, purpose: str) -> Check:
    there = _nearest(path)
    if not _can_write(there):
        return note(name, f"{there} cannot be written to: {purpose}", "make it writable", path=path, free=0)
    free = _free_bytes(there)
    if free < _SCARCE_FOLDER_BYTES:
        return note(name, f"{path}: only {free >> 20} MiB free", "free space there", path=path, free=free)
    return passed(name, f"{path}: {free >> 20} MiB free", path=path, free=free)


def _nearest(path: str) -> str:
    """The path, or the nearest folder above it that is there."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _is_open_to_others(folder: str) -> bool:
    """Whether somebody who is neither root nor ourselves may write there."""
    status = os.stat(folder)
    return status.st_uid not in (0, os.geteuid()) or bool(status.st_mode & 0o022)


def _can_write(path: str) -> bool:
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


def _free_bytes(path: str) -> int:
    room = os.statvfs(path)
    return room.f_bavail * room.f_frsize
