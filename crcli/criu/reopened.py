"""/dev/tty, open in a pseudo-terminal that the tree drives itself: an interactive dash, a pager, an editor.

CRIU takes /dev/tty only where its holder was also the first of the tree to hold the terminal, and leads its
foreground ("ctty inheritance detected"): never where the other side is in the tree as well. So it is told
that /dev/tty is external, and writes down its settings, but no name. Here, in its images, each becomes the
terminal's own device, /dev/pts/N: the same terminal to the kernel, with its session, settings and unread
bytes, opened by another name.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from crcli.criu import messages
from crcli.criu.images import ImageFile, holder_by_id, holders_of, read_files, text_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.criu.workspace import Workspace

_PSEUDO_TERMINAL = 1
_MASTERS, _DEVICES = 5, 136
"""The major device numbers of /dev/ptmx and /dev/pts/N."""


class TerminalLost(Exception):
    """A program has /dev/tty open, and there is no saying what it will be after a restore."""


def name_reopened(
    images: Workspace,
    device_of: Callable[[int, int], int],
    status_of: Callable[[str], os.stat_result],
    *,
    may_stay: bool,
) -> list[tuple[int, int]]:
    """Make external terminals whose other side is in the tree their own devices, in the images.

    `device_of` says which terminal a process (as the tree sees it) has open as a descriptor, by its device
    number; `status_of` what the tree finds under a path; `may_stay` whether others are put in the place of
    those that stay external. Returns descriptors, each as (pid, descriptor), of terminals whose unread bytes
    CRIU has not saved. Raises TerminalLost; the images are as they were then.
    """
    if "tty-info.img" not in images.names():
        return []
    terminals = _Terminals(images)
    reopened: dict[int, int] = {}
    holders = holder_by_id(images, {file.id for file in terminals.external})
    for file in terminals.external:
        number = _number(device_of(*holders[file.id])) if file.id in holders else -1
        if number in terminals.driven:
            reopened[file.id] = number
        elif not may_stay:
            raise TerminalLost(
                "a program has /dev/tty open, and its terminal has become another one meanwhile"
            )
    if not reopened:
        return []
    unsaved: set[int] = set()
    for file in terminals.external:
        if file.id in reopened and terminals.name(file, reopened[file.id], status_of):
            unsaved |= {_record_of(reopened[file.id]), _record_of(reopened[file.id]) + 1}
    terminals.write(images)
    return holders_of(images, {file.id for file in terminals.files if file.tty_info_id in unsaved})


def _number(device: int) -> int:
    """N of /dev/pts/N; -1 for other terminals."""
    return os.minor(device) if os.major(device) == _DEVICES else -1


def _record_of(number: int) -> int:
    """How CRIU numbers the record of /dev/pts/N; the next number is that of its other side."""
    return 2 * number


def _is_driver(record: Any) -> bool:
    return record.type == _PSEUDO_TERMINAL and os.major(record.rdev) == _MASTERS


class _Terminals:
    """The terminals of an image: open files (`tty_file_entry`), and a record of each (`tty_info_entry`)."""

    def __init__(self, images: Workspace) -> None:
        self._all = read_files(images)
        self._info = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry)
        self._records = {record.id: record for record in self._info.entries}
        self.files = [entry.tty for entry in self._all.entries if entry.type == messages.fd_types.TTY]
        self.external = [file for file in self.files if not file.HasField("regf_id")]
        self.driven = {record.pty.index for record in self._info.entries if _is_driver(record)}

    def name(self, file: Any, number: int, status_of: Callable[[str], os.stat_result]) -> bool:
        """Have an external file be /dev/pts/N, opened as it was; say whether CRIU has no record of that."""
        name = self._name(number, status_of)
        name.id = 1 + max(entry.id for entry in self._all.entries)
        name.flags = file.flags
        name.fown.CopyFrom(file.fown)
        self._all.entries.append(messages.file_entry(type=messages.fd_types.REG, id=name.id, reg=name))
        record = self._records.pop(file.tty_info_id)
        file.regf_id, file.tty_info_id = name.id, _record_of(number)
        if file.tty_info_id in self._records:
            return False
        status = status_of(text_of(name.name))
        record.id, record.type, record.pty.index = file.tty_info_id, _PSEUDO_TERMINAL, number
        record.rdev, record.dev, record.uid, record.gid = (
            status.st_rdev,
            status.st_dev,
            status.st_uid,
            status.st_gid,
        )
        self._records[record.id] = record
        return True

    def _name(self, number: int, status_of: Callable[[str], os.stat_result]) -> Any:
        """A name (`reg_file_entry`) of /dev/pts/N: as it is open elsewhere, or where it usually stands."""
        named = (file for file in self.files if file.tty_info_id == _record_of(number))
        known = next((file.regf_id for file in named), None)
        for entry in self._all.entries:
            if entry.type == messages.fd_types.REG and entry.id == known:
                return messages.reg_file_entry.FromString(entry.reg.SerializeToString())
        path = f"/dev/pts/{number}"
        return messages.reg_file_entry(pos=0, name=path, mode=status_of(path).st_mode)

    def write(self, images: Workspace) -> None:
        """Write them into the images, drivers first: to those CRIU links the first device that follows."""
        self._info.entries = sorted(self._records.values(), key=lambda record: not _is_driver(record))
        images.write("tty-info.img", self._info.encode())
        images.write("files.img", self._all.encode())
