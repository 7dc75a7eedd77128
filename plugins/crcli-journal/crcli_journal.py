"""A journal of what crcli does here: one JSON line per event, in a file, and posted if there is a URL."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from crcli.plugins import hookimpl

if TYPE_CHECKING:
    from crcli.plugins.spec import DumpTarget, Failure, RestoreTarget

DEFAULT_PATH = "/var/log/crcli/journal.jsonl"
_POST_LIMIT_S = 5.0


@hookimpl
def crcli_dump_before_freeze(target: DumpTarget) -> None:
    """Note that a dump begins."""
    _note("dump-begins", **_dump(target))


@hookimpl
def crcli_dump_finished(target: DumpTarget, report: dict[str, Any]) -> None:
    """Note how a dump went."""
    _note("dump-finished", **_dump(target), **_short(report))


@hookimpl
def crcli_dump_failed(target: DumpTarget, failure: Failure) -> None:
    """Note how a dump failed, and what the tree does."""
    _note("dump-failed", **_dump(target), **vars(failure))


@hookimpl
def crcli_restore_before(target: RestoreTarget) -> None:
    """Note that a restore begins."""
    _note("restore-begins", **_restore(target))


@hookimpl
def crcli_restore_finished(target: RestoreTarget, report: dict[str, Any]) -> None:
    """Note how a restore went."""
    _note("restore-finished", **_restore(target), **_short(report))


@hookimpl
def crcli_restore_failed(target: RestoreTarget, failure: Failure) -> None:
    """Note how a restore failed."""
    _note("restore-failed", **_restore(target), **vars(failure))


def _dump(target: DumpTarget) -> dict[str, Any]:
    return {"pid": target.pid, "image": target.image, "store": target.store}


def _restore(target: RestoreTarget) -> dict[str, Any]:
    return {"image": target.image, "store": target.store}


def _short(report: dict[str, Any]) -> dict[str, Any]:
    """The report without what the line says already, its findings by name only."""
    names = [finding["name"] for finding in report.get("findings", ())]
    kept = {key: value for key, value in report.items() if key not in ("pid", "image", "store", "findings")}
    if "host_pid" in report:  # of a restore: who to look for on this host
        kept["pid"] = report.get("pid")
    return {**kept, "findings": names}


def _note(event: str, **facts: Any) -> None:
    line = {"time": round(time.time(), 3), "event": event, "host": os.uname().nodename, **facts}
    data = json.dumps(line).encode() + b"\n"
    path = os.environ.get("CRCLI_JOURNAL", DEFAULT_PATH)
    if path and path != "off":
        _append(path, data)
    if url := os.environ.get("CRCLI_JOURNAL_URL"):
        _post(url, data)


def _append(path: str, data: bytes) -> None:
    """Add one line, in one write, durably: others may be writing to the same file."""
    os.makedirs(os.path.dirname(path) or ".", mode=0o700, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def _post(url: str, data: bytes) -> None:
    from urllib.request import Request, urlopen

    if not url.startswith(("http://", "https://")):
        raise ValueError(f"CRCLI_JOURNAL_URL is not an http(s) URL: {url}")
    request = Request(url, data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=_POST_LIMIT_S) as answer:
        answer.read(1)
