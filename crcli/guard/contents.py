"""What is in a file: its build-id or the BLAKE3 hash of its bytes, found once and remembered.

The notes are kept between commands, keyed by everything that changes when the file does: device, inode,
size, and the times of its last change. A hash of a file that was changed a moment ago is not kept: within
one tick of the file system's clock a second change would look like the first.

A program's file is told apart by its build-id (a note that the linker writes into every ELF file, unless
asked not to); reading that takes two pages of the file, whatever its size.
"""

from __future__ import annotations

import os
import stat
import struct
import time
from typing import TYPE_CHECKING

from blake3 import blake3

from crcli.config import state_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KEPT_NOTES = 4096
"""So many files are remembered at most, those noted last."""

_NAME = "file-contents"
_BLOCK = 1 << 20
_SETTLED_NS = 2_000_000_000
_NOTE_BYTES = 1 << 14
_MAGIC = b"\x7fELF"
_PROGRAM_NOTE, _BUILD_ID = 4, 3


class Contents:
    """Build-ids and hashes of files, with the notes of earlier commands. Used by one thread at a time.

    Nothing that goes wrong with the notes is ever an error: they only save work.
    """

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder or state_folder()
        self._notes: dict[str, str] | None = None
        self._new: dict[str, str] = {}

    def build_id(self, path: str) -> str:
        """The file's build-id in hexadecimal, empty when it has none. Raises OSError."""
        return self.noted(path, "gnu", read_build_id)

    def digest(self, path: str, deadline: float | None = None) -> str:
        """The hash of the file's bytes in hexadecimal.

        Raises OSError; TimeoutError when the hash is not ready at `deadline` (time.monotonic()).
        """
        return self.noted(path, "b3", lambda fd: hash_of(fd, None, deadline))

    def has_digest(self, path: str) -> bool:
        """Whether `digest` would not have to read the file."""
        try:
            return self._known(_key(os.stat(path)), "b3") is not None
        except OSError:
            return False

    def noted(self, path: str, kind: str, find: Callable[[int], str]) -> str:
        """What `find` says of the open file (a word), remembered under `kind`. Raises OSError."""
        key = _key(os.stat(path))
        if (known := self._known(key, kind)) is not None:
            return known
        fd = open_quietly(path)
        try:
            before = os.fstat(fd)
            found = find(fd)
            after = os.fstat(fd)
        finally:
            os.close(fd)
        key = _key(before)
        if key != _key(after):
            raise OSError(f"{path} changes while it is read")
        if time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLED_NS:
            self._new[key + kind] = found
        return found

    def _known(self, key: str, kind: str) -> str | None:
        if self._notes is None:
            self._notes = dict(self._read())
        return self._new.get(key + kind, self._notes.get(key + kind))

    def _read(self) -> Iterator[tuple[str, str]]:
        try:
            with open(f"{self._folder}/{_NAME}", encoding="ascii") as file:
                lines = file.read().splitlines()
        except (OSError, ValueError):
            return
        for line in lines[-KEPT_NOTES:]:
            key, mark, value = line.partition("=")
            if mark:
                yield key, value

    def save(self) -> None:
        """Keep what was found for later commands; of two that save at once, one may be forgotten."""
        if not self._new:
            return
        notes = dict(self._read()) | self._new
        self._new = {}
        lines = [f"{key}={value}\n" for key, value in list(notes.items())[-KEPT_NOTES:]]
        temporary = f"{self._folder}/.{_NAME}-{os.getpid()}"
        try:
            os.makedirs(self._folder, 0o700, exist_ok=True)
            try:
                with open(temporary, "x", encoding="ascii", opener=_private) as file:
                    file.writelines(lines)
                os.rename(temporary, f"{self._folder}/{_NAME}")
            except OSError:
                os.unlink(temporary)
        except OSError:
            pass


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def _key(status: os.stat_result) -> str:
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "


def same_file(one: os.stat_result, other: os.stat_result) -> bool:
    """Whether these are the same file, not changed in between."""
    return _key(one) == _key(other)


def open_quietly(path: str) -> int:
    """Open a regular file for reading, leaving no trace and waiting for nobody. Raises OSError."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        fd = os.open(path, flags)  # only the owner may leave the time of access alone
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(f"{path} is not a regular file")
    return fd


def hash_of(fd: int, size: int | None = None, deadline: float | None = None) -> str:
    """Hash a file, or its first `size` bytes, in hexadecimal. Raises TimeoutError past the deadline."""
    digest = blake3()
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    at = 0
    while size is None or at < size:
        want = _BLOCK if size is None else min(_BLOCK, size - at)
        got = os.preadv(fd, [view[:want]], at)
        if not got:
            break
        digest.update(view[:got])
        at += got
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError("hashing took too long")
    return digest.hexdigest()


def read_build_id(fd: int) -> str:
    """Return the GNU build-id of an ELF file in hexadecimal; empty for a file without one.

    Notes are read on beyond the end of their segment, as CRIU does: Go's linker leaves this one right behind.
    """
    head = os.pread(fd, 4096, 0)
    if len(head) < 64 or head[:4] != _MAGIC or head[4] not in (1, 2) or head[5] != 1:
        return ""
    wide = head[4] == 2
    table, entry_size, count = (
        (*struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54))
        if wide
        else (*struct.unpack_from("<I", head, 28), *struct.unpack_from("<HH", head, 42))
    )
    headers = os.pread(fd, entry_size * count, table)
    for at in range(0, len(headers) - (55 if wide else 31), max(1, entry_size)):
        if struct.unpack_from("<I", headers, at)[0] == _PROGRAM_NOTE:
            (offset,) = (
                struct.unpack_from("<Q", headers, at + 8)
                if wide
                else struct.unpack_from("<I", headers, at + 4)
            )
            if found := _build_id_among(os.pread(fd, _NOTE_BYTES, offset)):
                return found
    return ""


def _build_id_among(notes: bytes) -> str:
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        body_at = name_at + (name_size + 3 & ~3)
        if kind == _BUILD_ID and notes[name_at : name_at + name_size] == b"GNU\0":
            return notes[body_at : body_at + size].hex()
        at = body_at + (size + 3 & ~3)
    return ""
