"""Objects kept on this host, so that they need not be fetched again: a folder of files.

The cache saves time and decides nothing. Whatever is wrong with it (no folder, no rights, no room, a disk
that fails, files that were removed or damaged meanwhile), it only holds less, and nothing here raises for it.
Its contents are the memory of processes: it works only in a folder that is ours and closed to everybody else.

Processes share it without locks. An object that is kept in pieces (a pack) is a sparse file: a piece is
written at its offset, and the file itself says which pieces it has (SEEK_HOLE). Who reads a piece compares it
with a hash of their own, because blocks at its ends may be half written. An object that is kept whole appears
by a rename, under a seal. What goes is unlinked: whoever has it open reads on.

Writing is left to a thread, and is given up rather than waited for: nobody is slower because of the cache,
but for the copy.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import stat
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from crcli.records import Struct
from crcli.store.mapped import mapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.store.base import Buffer

DEFAULT_MOST_BYTES = 16 << 30
DEFAULT_SHARE = 10
"""Without a size of the user's it may take this much, and one part in so many of the free disk at most."""

RESERVE_SHARE, RESERVE_MOST_BYTES = 20, 10 << 30
"""One part in so many of the file system is left free, but not more than so many bytes, whatever the size
says."""

MOST_FILES = 4096
"""A bound on the time that it takes to look through the folder."""

WAITING_BYTES = 32 << 20
"""What may wait to be written (bytes): more is not kept."""

AT_ONCE_BYTES = 8 << 20
"""Less than this waits until the end: it is not written while a tree stands frozen or is on its way back."""

PUT_OFF_BYTES = 96 << 20
"""So much more may wait, and does, while writing is put off (bytes)."""

LOOK_EVERY_BYTES = 32 << 20
"""After so much was written (bytes), the folder is looked through: others may write into it too."""

LEAST_BYTES = 64 << 10
"""A smaller write counts for as much as this, so that many small files are noticed as well."""

IN_USE_S = 600.0
"""What was used so recently (seconds), or since we began, does not go to make room."""

FLUSH_LIMIT_S = 5.0
"""How long the end waits for the disk (seconds)."""

_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""Nobody waits for what is no file but has the name of one."""

_OPEN_FILES = 128
_SEAL = 32


class Contents(Struct, frozen=True):
    """What a cache holds: names with the bytes of disk that each takes, and the bound on all (bytes)."""

    files: dict[str, int]
    limit: int
    trouble: str = ""
    """Why it holds nothing and takes nothing; empty where it works."""

    @property
    def bytes(self) -> int:
        """The disk that it takes."""
        return sum(self.files.values())


class Cache:
    """The cache in `folder`, of `limit` bytes (None: what suits the disk). Threads may share it."""

    def __init__(self, folder: str, limit: int | None = None) -> None:
        self.folder = folder
        self._limit = limit
        self._began = time.time()
        self._lock = threading.Lock()
        self._descriptor: _Descriptor | None = None
        self._files: OrderedDict[str, _Descriptor] = OrderedDict()
        self._trouble = ""
        self._is_full = False
        self._until_look = 0
        self._waiting: queue.SimpleQueue[tuple[int, Callable[..., None], tuple[Any, ...]] | None]
        self._waiting = queue.SimpleQueue()
        self._waiting_bytes = self._put_off_bytes = 0
        self._writer: threading.Thread | None = None

    # Objects in pieces.

    def holds(self, name: str, offset: int, length: int) -> bool:
        """Whether this piece of an object is here (its first and last block perhaps in part)."""
        file = self._opened(name)
        return file is not None and _has_data(file.fd, offset, length)

    def read(self, name: str, offset: int, length: int) -> bytes | None:
        """A piece of an object, if it is here. The caller must compare it with a hash."""
        file = self._opened(name)
        if file is None or not _has_data(file.fd, offset, length):
            return None
        try:
            data = os.pread(file.fd, length, offset)
        except OSError:
            return None
        return data if len(data) == length else None

    def mapped(self, name: str, offset: int, length: int) -> Buffer | None:
        """The same, where the page cache has it."""
        file = self._opened(name)
        has_it = file is not None and _has_data(file.fd, offset, length)
        return mapped(file.fd, offset, length) if file is not None and has_it else None

    def add(self, name: str, offset: int, data: Buffer) -> None:
        """Keep a piece of an object, if there is room and time for it."""
        self._later(len(data), self._write, name, offset, data)

    # Objects as a whole.

    def get(self, name: str) -> bytes | None:
        """An object that is kept whole, exactly as it was put; None when it is not here or damaged."""
        try:
            folder = self._folder(create=False)
            fd = os.open(name, os.O_RDONLY | _FLAGS, dir_fd=folder.fd)
            with open(fd, "rb", buffering=0) as file:
                data = file.read()
                _note_use(fd)
        except OSError:
            return None
        body = memoryview(data)[:-_SEAL]
        if len(data) < _SEAL or blake3(body).digest() != data[-_SEAL:]:
            self.drop(name)
            return None
        return bytes(body)

    def put(self, name: str, data: Buffer) -> None:
        """Keep a whole object, if there is room and time for it."""
        writer = self.writer(name)
        writer.write(bytes(data))
        writer.commit()

    def writer(self, name: str) -> WholeWriter:
        """Begin to keep a whole object."""
        return WholeWriter(self, name)

    # Both.

    def put_off(self) -> None:
        """Leave the processors to others: write nothing before `go_on`, unless much waits."""
        self._put_off_bytes = PUT_OFF_BYTES

    def go_on(self) -> None:
        """Write what was put off, and whatever comes, as usual."""
        self._put_off_bytes = 0
        if not self._waiting.empty():
            self._writing()

    def drop(self, name: str) -> None:
        """Keep an object no longer, nor what waits to be written of it."""
        self._remove(name)
        if self._waiting_bytes:
            self._later(0, self._remove, name)

    def names(self) -> list[str]:
        """The names of all objects here."""
        return list(self.contents().files)

    def contents(self) -> Contents:
        """What is here now."""
        try:
            folder = self._folder(create=False)
            entries = _entries(folder.fd)
            limit = self._bound(folder.fd, sum(entry.bytes for entry in entries))
            return Contents({entry.name: entry.bytes for entry in entries}, limit)
        except FileNotFoundError:
            return Contents({}, self._bound(_existing(self.folder), 0))
        except OSError as error:
            return Contents({}, self._limit or 0, error.strerror or str(error))

    def clear(self) -> Contents:
        """Remove everything; return what it was, with the trouble if some of it could not be removed."""
        before = self.contents()
        for name in before.files:
            self._remove(name)
        if not before.trouble and (left := before.files.keys() & self.contents().files.keys()):
            return Contents(before.files, before.limit, f"{len(left)} files cannot be removed")
        return before

    def reopened(self) -> Cache:
        """The same cache, open again after `close`, without another look through the folder."""
        again = Cache(self.folder, self._limit)
        again._until_look, again._is_full = self._until_look, self._is_full
        return again

    def close(self) -> None:
        """Have what waits written, if that takes no longer than FLUSH_LIMIT_S."""
        with self._lock:
            is_idle = self._writer is None and self._waiting.empty()
        if not is_idle and (writer := self._writing()) is not None:
            self._waiting.put(None)
            writer.join(FLUSH_LIMIT_S)
        self._trouble = self._trouble or "closed"
        with self._lock:
            self._files.clear()

    # What the thread does.

    def _later(self, size: int, work: Callable[..., None], *arguments: Any) -> bool:
        """Have the thread do some work that holds `size` bytes; False when too much waits already."""
        if self._trouble:
            return False
        with self._lock:
            if self._waiting_bytes + size > WAITING_BYTES + self._put_off_bytes:
                return False
            self._waiting_bytes += size
            is_much = self._waiting_bytes >= AT_ONCE_BYTES + self._put_off_bytes
        self._waiting.put((size, work, arguments))
        if is_much:
            self._writing()
        return True

    def _writing(self) -> threading.Thread | None:
        """The thread; None where no more threads can be had: then nothing is kept any more."""
        with self._lock:
            if self._writer is None:
                writer = threading.Thread(target=self._work, name="cache", daemon=True)
                try:
                    writer.start()
                except RuntimeError as error:
                    self._trouble = str(error)
                    return None
                self._writer = writer
            return self._writer

    def _work(self) -> None:
        while (task := self._waiting.get()) is not None:
            size, work, arguments = task
            try:
                if not self._trouble:
                    work(*arguments)
            except OSError as error:
                self._trouble = error.strerror or str(error)
            finally:
                with self._lock:
                    self._waiting_bytes -= size

    def _write(self, name: str, offset: int, data: Buffer) -> None:
        if self._has_room(len(data)) and (file := self._opened(name, create=True)) is not None:
            _write_all(file.fd, offset, data)

    def _remove(self, name: str) -> None:
        with self._lock:
            self._files.pop(name, None)
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder(create=False).fd)

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes may be written; older files are removed for them if need be."""
        self._until_look -= max(size, LEAST_BYTES)
        if self._until_look < 0:
            folder = self._folder(create=True)
            self._is_full = not self._make_room(folder.fd, size)
        return not self._is_full

    def _make_room(self, folder: int, size: int) -> bool:
        """Remove what was used longest ago until `size` bytes and some more can be written; say whether they
        can."""
        entries = _entries(folder)
        used = sum(entry.bytes for entry in entries)
        limit = self._bound(folder, used)
        step = max(size, min(LOOK_EVERY_BYTES, limit // 8))
        self._until_look = step - size
        excess = max(used + step - limit, step - _spare(folder))
        too_many = len(entries) - MOST_FILES
        horizon = max(self._began, time.time() - IN_USE_S)
        for entry in sorted(entries, key=lambda entry: entry.used_at):
            if entry.used_at >= horizon or (excess <= 0 and too_many < 0):
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.name, dir_fd=folder)
            excess -= entry.bytes
            too_many -= 1
        return excess <= 0 and too_many < 0 and limit > 0

    def _bound(self, folder: int | str, used: int) -> int:
        if self._limit is not None:
            return self._limit
        disk = os.statvfs(folder)
        return min(DEFAULT_MOST_BYTES, (disk.f_bavail * disk.f_frsize + used) // DEFAULT_SHARE)

    # Descriptors.

    def _folder(self, *, create: bool) -> _Descriptor:
        """The folder, open; it is ours, and nobody else can look into it. Raises OSError."""
        if self._descriptor is None:
            if create:
                os.makedirs(self.folder, 0o700, exist_ok=True)
            fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            found = _Descriptor(fd)
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise PermissionError(errno.EPERM, "it must be ours alone (mode 0700)", self.folder)
            self._descriptor = found
        return self._descriptor

    def _opened(self, name: str, *, create: bool = False) -> _Descriptor | None:
        """The file of an object, kept open; None when there is none."""
        with self._lock:
            if (file := self._files.get(name)) is not None:
                self._files.move_to_end(name)
                return file
        try:
            folder = self._folder(create=create)
            flags = os.O_RDWR | _FLAGS | (os.O_CREAT if create else 0)
            file = _Descriptor(os.open(name, flags, 0o600, dir_fd=folder.fd))
            _note_use(file.fd)
        except OSError:
            if create:
                raise
            return None
        with self._lock:
            file = self._files.setdefault(name, file)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
        return file


class WholeWriter:
    """An object on its way into the cache, beside its way into the store; kept if `commit` is called."""

    def __init__(self, cache: Cache, name: str) -> None:
        self._cache = cache
        self._name = name
        self._temporary = f".{name}.{os.getpid()}-{os.urandom(4).hex()}"
        self._hash = blake3()
        self._size = 0
        self._is_whole = True

    def write(self, data: bytes) -> None:
        """Append `data`."""
        if self._is_whole:
            self._hash.update(data)
            self._is_whole = self._cache._later(
                len(data), self._cache._write, self._temporary, self._size, data
            )
            self._size += len(data)

    def commit(self) -> None:
        """Keep it."""
        if self._is_whole:
            self.write(self._hash.digest())
            self._is_whole = self._is_whole and self._cache._later(0, self._publish)
        if not self._is_whole:
            self.abort()

    def abort(self) -> None:
        """Forget it."""
        self._is_whole = False
        self._cache.drop(self._temporary)

    def _publish(self) -> None:
        cache = self._cache
        file = cache._opened(self._temporary)
        if file is None or os.fstat(file.fd).st_size != self._size:
            cache.drop(self._temporary)  # there was no room for all of it
            return
        folder = cache._folder(create=True).fd
        os.rename(self._temporary, self._name, src_dir_fd=folder, dst_dir_fd=folder)
        with cache._lock:
            cache._files.pop(self._temporary, None)


class _Entry(Struct, frozen=True):
    name: str
    bytes: int
    used_at: float


class _Descriptor:
    """A descriptor that is closed once nobody has it any more."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)


def _entries(folder: int) -> list[_Entry]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                found.append(_Entry(entry.name, status.st_blocks * 512, status.st_mtime))
    return found


def _existing(path: str) -> str:
    """The nearest folder above that is there."""
    while not os.path.isdir(path):
        path = os.path.dirname(path) or "/"
    return path


def _spare(folder: int) -> int:
    """How many bytes the disk can give without going below the reserve."""
    disk = os.statvfs(folder)
    reserve = min(RESERVE_MOST_BYTES, disk.f_blocks * disk.f_frsize // RESERVE_SHARE)
    return disk.f_bavail * disk.f_frsize - reserve


def _has_data(fd: int, offset: int, length: int) -> bool:
    """Whether a file has no hole in this range, and does not end before it does."""
    try:
        return os.lseek(fd, offset, os.SEEK_HOLE) >= offset + length
    except OSError:  # ENXIO: it ends before
        return False


def _note_use(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.utime(fd)


def _write_all(fd: int, offset: int, data: Buffer) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
