"""Where CUDA's driver has put what was on a process's GPUs: told from its memory map, before and after.

The driver keeps it in private memory of the process itself, which it makes for the checkpoint and removes
once it has brought everything back. What other threads of the process map meanwhile is told with it: they run
until CRIU comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.memory.extents import PAGE
from crcli.process.identity import read_proc
from crcli.process.tree import PID_GONE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Spans = list[tuple[int, int]]
"""Ascending, disjoint runs of memory, each as (first page number, pages)."""


def ordinary_memory(pid: int) -> Spans:
    """Return where a process has private memory of no file that it can write to; nothing when it is gone."""
    try:
        return list(_ordinary(read_proc(f"/proc/{pid}/maps")))
    except PID_GONE:
        return []


def _ordinary(maps: bytes) -> Iterator[tuple[int, int]]:
    for line in maps.splitlines():
        span, permissions, _, _, inode, *name = line.split(None, 5)
        is_writable = permissions.startswith(b"rw") and permissions.endswith(b"p")
        if is_writable and inode == b"0" and (not name or name[0].startswith(b"[anon")):
            start, _, end = span.partition(b"-")
            yield int(start, 16) // PAGE, (int(end, 16) - int(start, 16)) // PAGE


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
