"""Where a command line is run: errors rendered, exit codes."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

from crcli import waiting
from crcli.errors import CrcliError, UsageError
from crcli.pipeline.interrupts import Interrupted
from crcli.wakeups import heard_at_once

if TYPE_CHECKING:
    from collections.abc import Sequence

_NOWHERE = UsageError(
    "the folder that this is started in was removed", hint="start it in another, or name all paths in full"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (this process's own by default) and return its exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in (argv[: argv.index("--")] if "--" in argv else argv)
    waiting.told_to(None if as_json else _say)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # by who started us: no child could be waited for
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        with heard_at_once():
            if argv[:1] in (["dump"], ["restore"]):
                from crcli.cli.quick import quick

                if (command := quick(argv)) is not None:
                    return command()
            from crcli import app

            return app.run(argv, as_json)
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        return _report(error, as_json)


def _is_nowhere() -> bool:
    """Whether the folder that this is started in was removed, so that a path means nothing but in full."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _say(text: str) -> None:
    from crcli.ui.progress import remark

    remark(text)


def _report(error: BaseException, as_json: bool) -> int:
    """Render what ended a command; return the exit code."""
    from crcli.ui import errors

    if isinstance(error, CrcliError):
        return errors.show(error, as_json)
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return errors.show_interrupt(error, as_json)
    if isinstance(error, FileNotFoundError) and error.filename is None and _is_nowhere():
        return errors.show(_NOWHERE, as_json)
    from crcli.pipeline.own_limits import shortage

    if (short := shortage(error)) is not None:
        return errors.show(short, as_json)
    return errors.show_unexpected(error, as_json)
