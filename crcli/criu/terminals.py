"""Terminals in CRIU's images, edited for the place in which they are restored."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from crcli.criu import messages
from crcli.criu.images import ImageFile, holders_of, read_files

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from crcli.criu.workspace import Workspace

_PSEUDO_TERMINAL, _EXTERNAL_TERMINAL = 1, 5
_MASTERS = 5
"""The major device number of /dev/ptmx."""
_REACH = 32
"""How far CRIU looks for the number of a terminal, from the lowest that is free."""


def forget_foreign_sessions(images: Workspace, members: Collection[int]) -> None:
    """Let a terminal that controlled a session outside of the tree control none: its leader is not here."""
    if "tty-info.img" not in images.names():
        return
    info = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry)
    for entry in info.entries:
        if entry.type == _EXTERNAL_TERMINAL and entry.sid not in members:
            entry.sid = entry.pgrp = 0
    images.write("tty-info.img", info.encode())


def forget_control_of_devices(images: Workspace) -> None:
    """Let no terminal of the host's own (console, serial line) control a session.

    When the leader of that session ends, as it does after a trial, the kernel hangs the terminal up, for the
    original as well.
    """
    if "tty-info.img" not in images.names():
        return
    info = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry)
    for entry in info.entries:
        if entry.type not in (_PSEUDO_TERMINAL, _EXTERNAL_TERMINAL):
            entry.sid = entry.pgrp = 0
    images.write("tty-info.img", info.encode())


def move_terminals(
    images: Workspace, free_here: Callable[[Collection[int]], Sequence[int]], spared: int = 0
) -> None:
    """Give pseudo-terminals numbers (N of /dev/pts/N) that CRIU can get for them, the same where possible.

    The `spared` lowest free numbers are left to others, where CRIU gets at what is above them. `free_here`
    says which numbers new ones would get, ascending, as many as there could be need for.
    """
    if "tty-info.img" not in images.names():
        return
    info = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry)
    pairs = [entry for entry in info.entries if entry.type == _PSEUDO_TERMINAL]
    ours = {entry.pty.index for entry in pairs}
    moved = _numbers_to_change(sorted(ours), free_here(ours), spared) if ours else {}
    slaves: dict[int, int] = {}
    for entry in pairs:
        if entry.pty.index in moved:
            entry.pty.index = moved[entry.pty.index]
            if os.major(entry.rdev) != _MASTERS:
                entry.rdev = os.makedev(os.major(entry.rdev), entry.pty.index)
                slaves[entry.id] = entry.pty.index
    if moved:
        images.write("tty-info.img", info.encode())
        _rename_terminals(images, slaves)


def _numbers_to_change(ours: Sequence[int], free: Sequence[int], spared: int) -> dict[int, int]:
    """New numbers for those of `ours` that CRIU cannot get, when it takes one after the other.

    The kernel hands out the lowest: CRIU opens terminals until it has the number that it wants, but gives
    up at once when that is far above the first.
    """
    in_reach = sum(number - free[0] < _REACH for number in free)
    left = list(free[max(0, min(spared, in_reach - len(ours))) :])
    moved: dict[int, int] = {}
    for number in ours:
        if number in left and number - (free if spared else left)[0] < _REACH:
            left.remove(number)
        elif others := [other for other in left if other not in ours]:
            moved[number] = others[0]
            left.remove(others[0])
    return moved


def _rename_terminals(images: Workspace, slaves: Mapping[int, int]) -> None:
    """Have the files of these terminals (ids of `tty_info_entry`) be named after their new numbers."""
    files = read_files(images)
    ttys = [entry.tty for entry in files.entries if entry.type == messages.fd_types.TTY]
    names = {tty.regf_id: f"/dev/pts/{slaves[tty.tty_info_id]}" for tty in ttys if tty.tty_info_id in slaves}
    for entry in files.entries:
        if entry.type == messages.fd_types.REG and entry.id in names:
            entry.reg.name = names[entry.id]
    images.write("files.img", files.encode())


def hung_up_terminals(images: Workspace) -> list[tuple[int, int]]:
    """The masters of terminals that nobody has open any more, each as (pid inside the tree, descriptor)."""
    if "tty-info.img" not in images.names():
        return []
    entries = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry).entries
    pairs = [entry for entry in entries if entry.type == _PSEUDO_TERMINAL]
    used = {entry.pty.index for entry in pairs if os.major(entry.rdev) != _MASTERS}
    left = {entry.id for entry in pairs if entry.pty.index not in used}
    files = [e.tty for e in read_files(images).entries if e.type == messages.fd_types.TTY] if left else []
    masters = {tty.id for tty in files if tty.tty_info_id in left}
    return holders_of(images, masters)
