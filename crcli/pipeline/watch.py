"""What a tree's processes are doing: asked of /proc, never assumed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from crcli.errors import TreeState
from crcli.process.identity import ProcessId, read_stat

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crcli.process.tree import Tree

_STEP_S = 0.005

_LET_GO_S = 2.0
"""How long a tree may take to be let go (seconds)."""


def wait_until_dead(processes: Iterable[ProcessId], limit_s: float) -> None:
    """Return when none of the processes runs any more, or so many seconds have passed.

    A zombie is dead: who reaps it, and when, is its parent's affair.
    """
    left = list(processes)
    end = time.monotonic() + limit_s
    while True:
        left = [process for process in left if process.alive()]
        if not left or time.monotonic() >= end:
            return
        time.sleep(_STEP_S)


def tree_state(tree: Tree) -> TreeState:
    """Say what the tree does now, after giving it a moment to be let go.

    RUNNING when every process that lived lives, and none is stopped that was not before.
    """
    end = time.monotonic() + _LET_GO_S
    while True:
        states = [_state(process.identity) for process in tree.living]
        held = [
            state
            for state, process in zip(states, tree.living, strict=True)
            if state in ("t", "T") and not process.is_stopped
        ]
        if not held or time.monotonic() >= end:
            break
        time.sleep(_STEP_S)
    if all(state == "" for state in states):
        return TreeState.DEAD
    if held:
        return TreeState.STOPPED
    return TreeState.RUNNING if states[0] else TreeState.DEAD


def _state(process: ProcessId) -> str:
    """The process's state letter; empty when it is gone or a zombie, or about to be."""
    try:
        stat = read_stat(process.pid)
    except ProcessLookupError:
        return ""
    is_over = stat.start_time != process.start_time or stat.is_zombie or stat.is_ending
    return "" if is_over else stat.state
