"""Errors, for people on stderr and for programs as one JSON object on stdout."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

from crcli.cause import Cause
from crcli.errors import CrcliError, DumpFailed, PreflightRefused, TreeState
from crcli.findings import Severity
from crcli.ui.output import has_answered
from crcli.ui.text import json_text, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.findings import Finding

_STATES = {
    TreeState.UNTOUCHED: "The tree was not touched.",
    TreeState.RUNNING: "The tree is running.",
    TreeState.STOPPED: "The tree is stopped: `kill -CONT` lets it go on.",
    TreeState.DEAD: "The tree is not running any more.",
}


def show(error: CrcliError, as_json: bool) -> int:
    """Show an error that crcli raised on purpose; return its exit code."""
    if as_json:
        print(json_text({"error": as_object(error)}), flush=True)
        return error.exit_code
    lines = [f"crcli: {error.message}"]
    for finding in error.findings:
        if finding.severity == Severity.BLOCKER and finding.message not in error.message:
            lines.append(f"  - {finding.message}" + (f" ({finding.remedy})" if finding.remedy else ""))
    if isinstance(error, DumpFailed | PreflightRefused) or error.state != TreeState.UNTOUCHED:
        lines.append(_STATES[error.state])
    if error.hint:
        lines.append(f"Hint: {error.hint}")
    if error.cause is not None:
        lines += _cause(error.cause)
    _say("\n".join(lines))
    if os.environ.get("CRCLI_DEBUG"):
        traceback.print_exception(error)
    return error.exit_code


def _cause(cause: Cause) -> list[str]:
    """What to know of CRIU's part in it, beside the message and the hint, which come from its cause."""
    lines = []
    if cause.retry is not None:
        lines.append("Trying again can help." if cause.retry else "Trying again as it is will not help.")
    if cause.said and cause.said not in cause.meaning:
        lines.append(f"CRIU said: {cause.said}")
    if cause.log:
        lines.append(f"CRIU's whole log: {cause.log}")
    return lines


def show_usage(error: Any, as_json: bool) -> int:
    """Show what typer found wrong with a command line; return 2."""
    message = error.format_message()
    if as_json:
        _emit("usage", message, _usage_hint(error), TreeState.UNTOUCHED, ())
    elif not message or type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        usage = error.ctx.get_usage() + "\n" if error.ctx is not None else ""
        _say(f"{usage}crcli: {message}\nHint: {_usage_hint(error)}")
    return 2


def show_interrupt(error: BaseException, as_json: bool) -> int:
    """Say that a signal ended the command; return 128 and its number."""
    message = str(error) or "interrupted"
    if as_json and not has_answered():
        _emit("interrupted", message, "", TreeState.UNTOUCHED, ())
    elif not as_json:
        _say(f"crcli: {message}")
    return 128 + int(getattr(error, "number", 2))


def show_unexpected(error: BaseException, as_json: bool) -> int:
    """Show a bug of crcli's; return 1."""
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({os.path.basename(where[0].filename)}:{where[0].lineno})" if where else ""
    message = f"crcli itself failed: {type(error).__name__}: {error}{place}"
    hint = "this is a bug: run it again with CRCLI_DEBUG=1 and report what it prints"
    if as_json:
        _emit("internal", message, hint, getattr(error, "state", TreeState.UNTOUCHED), ())
    else:
        _say(f"{message}\nHint: {hint}")
    if os.environ.get("CRCLI_DEBUG"):
        traceback.print_exception(error)
    return 1


def _usage_hint(error: Any) -> str:
    return f"`{error.ctx.command_path if error.ctx is not None else 'crcli'} --help` says more"


def as_object(error: CrcliError) -> dict[str, Any]:
    """The error as programs read it."""
    return _object(error.code, error.message, error.hint, error.state, error.findings, error.cause)


def what_of_the_tree(error: CrcliError) -> str:
    """A sentence that says what became of the tree."""
    return _STATES[error.state]


def _emit(code: str, message: str, hint: str, state: TreeState, findings: Sequence[Finding]) -> None:
    print(json_text({"error": _object(code, message, hint, state, findings)}), flush=True)


def _object(
    code: str,
    message: str,
    hint: str,
    state: TreeState,
    findings: Sequence[Finding],
    cause: Cause | None = None,
) -> dict[str, Any]:
    return {
        "code": code,
        "message": message,
        "hint": hint,
        "state": state.value,
        "findings": [finding.as_json() for finding in findings],
        "cause": cause.name if cause is not None else "",
        "criu": cause.said if cause is not None else "",
        "retry": cause.retry if cause is not None else None,
        "log": cause.log if cause is not None else "",
    }


def _say(text: str) -> None:
    try:
        print(printable(text), file=sys.stderr, flush=True)
    except OSError:
        pass  # a closed stderr changes neither what happened nor the exit code
