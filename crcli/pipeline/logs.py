"""CRIU's logs, kept where a user can read them after a failure."""

from __future__ import annotations

import os
import time

DEFAULT_FOLDER = "/var/log/crcli"


def keep_log(log: str, kind: str) -> str:
    """Write a whole log to `$CRCLI_LOG_DIR` (by default /var/log/crcli), and return its path.

    Returns an empty string when there is nothing to keep, or no place to keep it.
    """
    if not log:
        return ""
    folder = os.environ.get("CRCLI_LOG_DIR", DEFAULT_FOLDER)
    path = f"{folder}/{time.strftime('%Y%m%dT%H%M%S')}-{kind}-{os.getpid()}.log"
    try:
        os.makedirs(folder, 0o700, exist_ok=True)
        with open(path, "w") as file:
            file.write(log)
    except OSError:
        return ""
    return path
