"""Where what is worth keeping of a failure is written: a file for each, that a user can read."""

from __future__ import annotations

import os
import time
from itertools import count

DEFAULT_FOLDER = "/var/log/crcli"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


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
                with open(path, "x", opener=_private) as file:
                    file.write(log)
            except FileExistsError:
                continue
            return path
    except OSError:
        pass
    return ""
