"""/dev/tty, open in a pseudo-terminal that the tree drives itself: an interactive dash, a pager, an editor.

CRIU takes /dev/tty only where its holder was also the first of the tree to hold the terminal, and leads its
foreground ("ctty inheritance detected"): never where the other side is in the tree as well. So it is told
that /dev/tty is external, and writes down next to nothing of it. Here, in its images, each becomes the
terminal's own device, /dev/pts/N: the same terminal to the kernel, with its session, settings and unread
bytes, opened by another name.

CRIU's records of terminals have the numbers 2N (the device /dev/pts/N) and 2N + 1 (its other side). All
external ones share number 0, which is also that of /dev/pts/0: whichever comes first is written down.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from crcli.criu import messages
from crcli.criu.images import ImageFile, holders_of, read_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.criu.workspace import Workspace

_PSEUDO_TERMINAL = 1
_MASTERS, _DEVICES = 5, 136
"""The major device numbers of /dev/ptmx and /dev/pts/N."""
_SHARED, _OUTSIDE = 0, 2046
"""The record of all external terminals: as CRIU numbers it, and as no other is numbered (below its 2048)."""


class Unclear(Exception):
    """The image says too little of a terminal for it to be restored."""


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
    CRIU has not saved. Raises Unclear; the images are as they were then.
    """
    if "tty-info.img" not in images.names():
        return []
    terminals = _Terminals(images, status_of)
    outside = []
    reopened: list[tuple[Any, int]] = []
    for file in terminals.files:
        if _is_external(file):
            holder = holders_of(images, {file.id})
            number = _number(device_of(*holder[0])) if holder else -1
            if number in terminals.masters:
                reopened.append((file, number))
            else:
                outside.append(file)
    if outside and not may_stay:
        raise Unclear("a program has /dev/tty open, which has become another terminal meanwhile")
    if not reopened and not (outside and terminals.has_device_0()):
        return []
    terminals.part_shared_record(outside)
    for file, number in reopened:
        terminals.open_device(file, number)
    lacking = terminals.describe_lacking()
    terminals.write(images)
    unsaved = lacking | {number + 1 for number in lacking}  # of such a pair CRIU saves neither side's
    return holders_of(images, {file.id for file in terminals.files if file.tty_info_id in unsaved})


def _is_external(file: Any) -> bool:
    """CRIU notes no name of these."""
    return not file.HasField("regf_id")


def _is_master(record: Any) -> bool:
    return record.type == _PSEUDO_TERMINAL and os.major(record.rdev) == _MASTERS


def _number(device: int) -> int:
    """N of /dev/pts/N; -1 for other terminals."""
    return os.minor(device) if os.major(device) == _DEVICES else -1


class _Terminals:
    """The terminals of an image: open files (`tty_file_entry`), and a record (`tty_info_entry`) of each terminal."""

    def __init__(self, images: Workspace, status_of: Callable[[str], os.stat_result]) -> None:
        self._status_of = status_of
        self._all_files = read_files(images)
        self.files = [e.tty for e in self._all_files.entries if e.type == messages.fd_types.TTY]
        self._info = ImageFile.parse(images.read("tty-info.img"), messages.tty_info_entry)
        self._records = {record.id: record for record in self._info.entries}
        self.masters = {record.pty.index: record for record in self._info.entries if _is_master(record)}
        self._named = {e.id: e.reg for e in self._all_files.entries if e.type == messages.fd_types.REG}

    def has_device_0(self) -> bool:
        """Whether /dev/pts/0 is open by its name."""
        return any(file.tty_info_id == _SHARED and not _is_external(file) for file in self.files)

    def part_shared_record(self, outside: list[Any]) -> None:
        """Leave number 0 to /dev/pts/0, and give the terminals outside a record of their own."""
        first = next(file for file in self.files if file.tty_info_id == _SHARED)  # CRIU has described that one
        if outside and first not in outside:
            raise Unclear("CRIU has described another terminal in the place of the one outside")
        if _is_external(first):
            record = self._records.pop(_SHARED)
            if outside:
                record.id = _OUTSIDE
                self._records[_OUTSIDE] = record
        for file in outside:
            file.tty_info_id = _OUTSIDE

    def open_device(self, file: Any, number: int) -> None:
        """Have an open file be /dev/pts/N, opened as it was."""
        opened = self._device(number)
        opened.id = max(entry.id for entry in self._all_files.entries) + 1
        opened.flags = file.flags
        opened.fown.CopyFrom(file.fown)
        self._all_files.entries.append(
            messages.file_entry(type=messages.fd_types.REG, id=opened.id, reg=opened)
        )
        file.tty_info_id = 2 * number
        file.regf_id = opened.id

    def describe_lacking(self) -> set[int]:
        """Describe devices that CRIU has not, and return the numbers of their records.

        Settings, size and session are the same for the kernel on both sides.
        """
        lacking = {file.tty_info_id for file in self.files} - self._records.keys()
        if not lacking <= {2 * number for number in self.masters}:
            raise Unclear("CRIU has described a terminal outside in the place of one that was hung up")
        for number in lacking:
            record = messages.tty_info_entry.FromString(self.masters[number // 2].SerializeToString())
            status = self._status_of(f"/dev/pts/{number // 2}")
            record.id, record.rdev, record.dev = number, status.st_rdev, status.st_dev
            record.uid, record.gid = status.st_uid, status.st_gid
            record.locked = record.packet_mode = False  # these are of the other side
            self._records[number] = record
        return lacking

    def write(self, images: Workspace) -> None:
        """Write them into the images. The masters come first: CRIU links each to the first device after it."""
        self._info.entries = sorted(self._records.values(), key=lambda record: not _is_master(record))
        images.write("tty-info.img", self._info.encode())
        images.write("files.img", self._all_files.encode())

    def _device(self, number: int) -> Any:
        """A name (`reg_file_entry`) for /dev/pts/N: as it is open elsewhere, or where it usually stands."""
        for file in self.files:
            if file.tty_info_id == 2 * number and not _is_external(file):
                return messages.reg_file_entry.FromString(self._named[file.regf_id].SerializeToString())
        path = f"/dev/pts/{number}"
        return messages.reg_file_entry(pos=0, name=path, mode=self._status_of(path).st_mode)
