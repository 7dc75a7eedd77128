"""Pseudo-terminals of this host by their numbers (N of /dev/pts/N): which are free, and whose turn it is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.process.host_turn import HostTurn

if TYPE_CHECKING:
    from collections.abc import Collection

_TERMINALS = "/dev/pts"


def free_terminals(wanted: Collection[int], more: int) -> list[int]:
    """The numbers that new pseudo-terminals get here (N of /dev/pts/N), ascending.

    They reach to the greatest `wanted`, and are twice as many and so many `more`, where this process can open
    so many. What is not among them is in use: /dev/pts does not show those whose other side is closed, but
    that somebody has still open.
    """
    opened: list[int] = []
    numbers: list[int] = []
    try:
        while len(numbers) < 2 * len(wanted) + more or numbers[-1] < max(wanted):
            opened.append(os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
            numbers.append(kernel.terminal_number(opened[-1]))
    except OSError:
        pass  # none there, or no more of them
    finally:
        for fd in opened:
            os.close(fd)
    return numbers


def terminal_turn() -> HostTurn:
    """Our turn to open terminals under chosen numbers."""
    return HostTurn("terminals", _TERMINALS)
