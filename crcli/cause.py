"""Why CRIU failed, as its log has it: what an error carries along."""

from __future__ import annotations

from crcli.records import Struct


class Cause(Struct, frozen=True):
    """Why CRIU failed, read from its log.

    `name` is stable (scripts match on it) and empty where the cause is not a known one; `said` is CRIU's own
    line, `meaning` what it means, `remedy` what the user can do (may be empty). `retry` says whether trying
    again with nothing changed can help; None where that is not known. `log` is the path of the whole log
    (empty where it could not be kept).
    """

    name: str
    said: str
    meaning: str
    remedy: str
    retry: bool | None
    log: str = ""
