"""What a command waits for that should not take long, said to whoever watches.

Whether somebody does the command line knows; what is waited for is known far below it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_tell: Callable[[str], None] | None = None


def told_to(tell: Callable[[str], None] | None) -> None:
    """Have `tell` say it from here on in this process; None: nobody watches."""
    global _tell
    _tell = tell


def say(text: str) -> None:
    """Say that something is waited for, and why."""
    if _tell is not None:
        _tell(text)
