"""CRIU's logs, kept where a user can read them after a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.criu.options import LOG_NAME
from crcli.logs import keep_log
from crcli.records import replace

if TYPE_CHECKING:
    from crcli.cause import Cause
    from crcli.criu.workspace import Workspace


def explain_failure(folder: Workspace, kind: str, said: str = "") -> Cause:
    """Return why CRIU failed, from its log in `folder`, having kept that log where the user can read it.

    `kind` (dump, trial, restore) becomes part of its file's name; `said` is what CRIU answered, for want of a
    log.
    """
    from crcli.criu.log import explain  # what goes well needs none of it

    log = folder.read(LOG_NAME).decode(errors="replace") if LOG_NAME in folder.names() else None
    return replace(explain(log or said or log), log=keep_log(log or "", kind))
