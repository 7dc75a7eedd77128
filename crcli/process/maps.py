"""A process's memory as the kernel lists it: /proc/PID/maps and smaps, taken apart here and nowhere else.

    7f1c2a3b4000-7f1c2a3b6000 r--p 00001000 fe:00 2146308                    /usr/lib/libc.so.6

A line ends with a line feed, and with nothing else: a name may hold any other byte, and has `\\012` for its
own line feeds. Blanks stand before a name, as many as fill a column.
"""

from __future__ import annotations

import os
from functools import partial
from operator import methodcaller
from typing import TYPE_CHECKING, NamedTuple

from crcli.process.identity import read_proc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Area(NamedTuple):
    """One line: a piece of an address space, and what is mapped there.

    The fields are the kernel's own words; what they mean is worked out when somebody asks for it, for there
    are processes with tens of thousands of these.
    """

    span: bytes
    permissions: bytes
    """`rwx` or `-` for each, then `p` (private) or `s` (shared)."""

    offset: bytes
    device: bytes
    inode: bytes
    """`0` for what is no file's."""

    padded_name: bytes

    @property
    def start(self) -> int:
        """Its first address."""
        return int(self.span.partition(b"-")[0], 16)

    @property
    def bounds(self) -> tuple[int, int]:
        """Its first address, and the first one behind it."""
        start, _, end = self.span.partition(b"-")
        return int(start, 16), int(end, 16)

    @property
    def size(self) -> int:
        """How long it is (bytes)."""
        start, _, end = self.span.partition(b"-")
        return int(end, 16) - int(start, 16)

    @property
    def is_shared(self) -> bool:
        """Whether it is MAP_SHARED."""
        return self.permissions.endswith(b"s")

    @property
    def name(self) -> bytes:
        """What is mapped, as the kernel writes it: a path (also with ` (deleted)`), `[heap]`, nothing."""
        return self.padded_name.lstrip(b" ")

    @property
    def path(self) -> str:
        """The name with its own line feeds."""
        return os.fsdecode(self.name.replace(rb"\012", b"\n"))


_NAMES_BEGIN_AT = 72
"""The column of names, or a later one: 24, and 6 for each byte of an address (show_map_vma of the kernel)."""

_named_fields = methodcaller("split", None, 5)
_fields: Callable[[bytes], list[bytes]] = methodcaller("split", b" ", 5)
_area: Callable[[list[bytes]], Area] = partial(tuple.__new__, Area)
"""What makes a record in the least time: with Python's own code for each it is half as long again."""


def areas(pid: int, *, holding: bytes = b"", named: bool = False) -> Iterator[Area]:
    """The areas of a process, by address. Raises OSError when it is gone, or not ours to look into.

    With `holding` only lines are taken apart in which these bytes stand somewhere: what is looked for is
    among them, and others may be. With `named` those of anonymous memory without a name are left out.
    """
    return parse_maps(read_proc(f"/proc/{pid}/maps"), holding=holding, named=named)


def is_mapped(path: str) -> bool:
    """Whether a process that we see has this file in its memory, under whatever name."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    wanted = f" {device} {status.st_ino} ".encode()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if wanted in read_proc(f"/proc/{name}/maps"):
                    return True
            except OSError:
                continue
    return False


def flagged_areas(pid: int, flag: bytes) -> Iterator[Area]:
    """Those of them that have this flag (`VmFlags` in proc_pid_smaps(5)). Raises OSError as `areas` does.

    It is asked of smaps, for which the kernel walks all page tables.
    """
    return parse_smaps(read_proc(f"/proc/{pid}/smaps"), flag)


def parse_maps(raw: bytes, *, holding: bytes = b"", named: bool = False) -> Iterator[Area]:
    """The same as `areas`, from the text."""
    if holding:
        return map(_area, map(_fields, _lines_holding(raw, holding)))
    lines = raw.split(b"\n")
    lines.pop()  # behind the last line's end
    if named:
        return map(_area, map(_named_fields, [line for line in lines if len(line) > _NAMES_BEGIN_AT]))
    return map(_area, map(_fields, lines))


def _lines_holding(raw: bytes, wanted: bytes) -> Iterator[bytes]:
    at = raw.find(wanted)
    while at >= 0:
        end = raw.find(b"\n", at)
        yield raw[raw.rfind(b"\n", 0, at) + 1 : end]
        at = raw.find(wanted, end)


def parse_smaps(raw: bytes, flag: bytes) -> Iterator[Area]:
    """The same as `flagged_areas`, from the text."""
    line_of_area = b""
    for line in raw.split(b"\n"):
        if line.startswith(b"VmFlags:"):
            if flag in line.split():
                yield _area(_fields(line_of_area))
        elif not line[:1].isupper():  # what is said of an area begins with a capital
            line_of_area = line
