"""What CRIU takes out of the terminals of a tree, given back to a tree that lives on after all.

At the end of a dump that is to kill the tree, CRIU reads from both sides of each pseudo-terminal what nobody
has read yet, for which it makes them non-blocking. It puts that back only where the tree was to run on from
the beginning. When the dump fails later (a trial, a store), a shell would find its input gone, and itself
unable to wait for more.
"""

from __future__ import annotations

import fcntl
import os
import termios
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from crcli import kernel
from crcli.criu import messages
from crcli.criu.images import ImageFile, holder_by_id, read_files
from crcli.process.identity import read_proc
from crcli.process.tree import child_pids

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.criu.workspace import Workspace

_RECORDS, _UNREAD = "tty-info.img", "tty-data.img"
_MOST = 4096
"""Bytes that a terminal takes of one line."""
_INPUT, _OUTPUT, _LOCAL, _KEYS = 0, 1, 3, 6
"""Where termios.tcgetattr has the modes."""


def give_back_unread(images: Workspace, root: int) -> None:
    """Have the terminals of a tree, whose root is this pid, be as CRIU found them, if it left them otherwise.

    To be called while the tree stands still, or as soon after as possible; the second time nothing happens.
    Never raises: what cannot be given back is lost.
    """
    try:
        if _RECORDS in images.names():
            _give_back(images, pids_inside(root))
    except Exception:  # whatever is wrong with it: there is more to undo than this
        return


def pids_inside(root: int) -> dict[int, int]:
    """The pids of a tree here, by what the tree itself has them for; none when its root is gone."""
    pids = [root]
    for pid in pids:
        pids += child_pids(pid)
    numbers = {pid: _numbers(pid) for pid in pids}
    depth = len(numbers[root])
    return {found[depth - 1]: pid for pid, found in numbers.items() if len(found) >= depth > 0}


def _numbers(pid: int) -> list[int]:
    try:
        lines = read_proc(f"/proc/{pid}/status").splitlines()
    except OSError:
        return []
    return [int(word) for line in lines if line.startswith(b"NSpid:") for word in line.split()[1:]]


def _give_back(images: Workspace, pids: dict[int, int]) -> None:
    files = [entry.tty for entry in read_files(images).entries if entry.type == messages.fd_types.TTY]
    with ExitStack() as closing:
        sides: dict[int, int] = {}
        opened: list[tuple[int, int]] = []
        holders = holder_by_id(images, {file.id for file in files})
        for file in files:
            if file.id in holders:
                pid, fd = holders[file.id]
                copy = kernel.copy_descriptor(pids[pid], fd)
                closing.callback(os.close, copy)
                sides.setdefault(file.tty_info_id, copy)
                opened.append((copy, file.flags))
        try:
            for entry in _unread(images):
                device = sides[entry.tty_id & ~1]  # 2N is /dev/pts/N, 2N + 1 what drives it
                if entry.tty_id & 1:
                    _show_again(device, entry.data)
                else:
                    _type_again(device, sides[entry.tty_id | 1], entry.data)
        finally:
            for copy, flags in opened:
                fcntl.fcntl(copy, fcntl.F_SETFL, flags)
            for name in (_UNREAD, _RECORDS):
                images.remove(name)


def _unread(images: Workspace) -> list[Any]:
    if _UNREAD not in images.names():
        return []
    return ImageFile.parse(images.read(_UNREAD), messages.tty_data_entry).entries


def _show_again(device: int, data: bytes) -> None:
    """Put output where what drives the terminal reads it; it is in its final form already."""
    with _modes(device) as modes:
        modes[_OUTPUT] &= ~termios.OPOST
        termios.tcsetattr(device, termios.TCSANOW, modes)
        os.write(device, data)


def _type_again(device: int, driver: int, data: bytes) -> None:
    """Put whole lines (or keys, where those are read singly) before a line that is not finished yet."""
    with _modes(device) as modes:
        modes[_INPUT] = 0
        modes[_LOCAL] &= ~(termios.ECHO | termios.ECHONL | termios.ISIG | termios.IEXTEN)
        if modes[_LOCAL] & termios.ICANON:
            data += _unfinished(device, modes)
        termios.tcsetattr(device, termios.TCSANOW, modes)
        os.write(driver, data)


def _unfinished(device: int, modes: list[Any]) -> bytes:
    """Take what was typed of a line, which can be read only where keys are read singly."""
    single = [*modes[:_LOCAL], modes[_LOCAL] & ~termios.ICANON, *modes[_LOCAL + 1 :]]
    single[_KEYS] = [*modes[_KEYS]]
    single[_KEYS][termios.VMIN], single[_KEYS][termios.VTIME] = 0, 0
    termios.tcsetattr(device, termios.TCSANOW, single)
    return os.read(device, _MOST)


@contextmanager
def _modes(device: int) -> Iterator[list[Any]]:
    """The modes of a terminal, for a change; they are as before in the end."""
    before = termios.tcgetattr(device)
    try:
        yield [*before]
    finally:
        termios.tcsetattr(device, termios.TCSANOW, before)
