"""Where CUDA's driver has put what was on a process's GPUs: told from its memory map, before and after.

The driver keeps it in private memory of the process itself, which it makes for the checkpoint and removes
once it has brought everything back. What other threads of the process map meanwhile is told with it: they run
until CRIU comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.memory.extents import PAGE
from crcli.process.maps import areas
from crcli.process.tree import PID_GONE

if TYPE_CHECKING:
    from collections.abc import Sequence

_WRITABLE = frozenset((b"rw-p", b"rwxp"))

Spans = list[tuple[int, int]]
"""Ascending, disjoint runs of memory, each as (first page number, pages)."""


def ordinary_memory(pid: int) -> Spans:
    """Return where a process has private memory of no file that it can write to; nothing when it is gone."""
    try:
        found = areas(pid)
    except PID_GONE:
        return []
    spans: Spans = []
    for area in found:
        is_ordinary = area.permissions in _WRITABLE and area.inode == b"0"
        if is_ordinary and (not area.padded_name or area.name.startswith(b"[anon")):
            start, end = area.bounds
            spans.append((start // PAGE, (end - start) // PAGE))
    return spans


def added(before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]) -> Spans:
    """Return the parts of `after` that are not in `before`; neighbours are one."""
    found: Spans = []
    at = 0
    for start, pages in after:
        end = start + pages
        while at < len(before) and sum(before[at]) <= start:
            at += 1
        position, other = start, at
        while position < end:
            next_start, next_end = (
                (before[other][0], sum(before[other])) if other < len(before) else (end, end)
            )
            if position < (until := min(next_start, end)):
                if found and sum(found[-1]) == position:
                    position, _ = found.pop()
                found.append((position, until - position))
            position = max(position, until, next_end)
            other += 1
    return found
