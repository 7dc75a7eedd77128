"""CRIU's logs, kept where a user can read them after a failure."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

from crcli.criu.log import explain
from crcli.criu.options import LOG_NAME

if TYPE_CHECKING:
    from crcli.criu.workspace import Workspace
    from crcli.errors import Cause

DEFAULT_FOLDER = "/var/log/crcli"


def keep_log(log: str, kind: str) -> str:
    """Write a whole log to `$CRCLI_LOG_DIR` (by default /var/log/crcli), and return its path.

    Returns an empty string when there is nothing to keep, or no place to keep it.
    """
    if not log:
        return ""
    folder = os.environ.get("CRCLI_LOG_DIR", DEFAULT_FOLDER)
    stem = f"{folder}/{time.strftime('%Y%m%dT%H%M%S')}-{kind}-{os.getpid()}"
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        for number in count(1):  # one process may dump several trees within a second
            path = f"{stem}.log" if number == 1 else f"{stem}-{number}.log"
            try:
                with open(path, "x") as file:
                    file.write(log)
            except FileExistsError:
                continue
            return path
    except OSError:
        pass
    return ""


def explain_failure(folder: Workspace, kind: str, said: str = "") -> Cause:
    """Return why CRIU failed, from its log in `folder`, having kept that log where the user can read it.

    `kind` (dump, trial, restore) becomes part of its file's name; `said` is what CRIU answered, for want of a
    log.
    """
    log = folder.read(LOG_NAME).decode(errors="replace") if LOG_NAME in folder.names() else ""
    return replace(explain(log or said), log=keep_log(log, kind))
