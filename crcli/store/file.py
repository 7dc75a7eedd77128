"""A directory as a store: one file per object.

Objects are written under a temporary name in `.tmp/` (same file system), synced, and linked or renamed into
place, so that a reader sees a whole object or none, whoever is killed when. Images hold the memory of
processes, secrets included: directories are 0700 and files 0600.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

from crcli.errors import NotFound, ObjectExists, StoreError
from crcli.store.address import StoreAddress
from crcli.store.base import ObjectInfo, check_key, check_prefix, is_key, is_there, taken
from crcli.store.mapped import mapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from crcli.store.base import Buffer

TEMPORARY = ".tmp"
_NAME_OF_A_WRITERS = re.compile(r"\d+-[0-9a-f]{16}")
"""Files that are called otherwise are not ours."""

WRITE_BACK_BYTES = 8 << 20
"""How much a writer lets the kernel hold back before it asks it to start writing to the disk."""


class FileStore:
    """A store in the directory `root` (absolute). Safe with several processes at work in it."""

    def __init__(self, root: str) -> None:
        self.root = os.path.normpath(root)

    @property
    def url(self) -> str:
        """`file://` and the absolute path."""
        return StoreAddress("file", self.root).url

    @property
    def creates_atomically(self) -> bool:
        """link(2) does, also over NFS. On a file system without it only those on one host are kept apart."""
        return True

    def warm(self, *, for_writing: bool = False) -> None:
        """See whether the directory can be read; with `for_writing`, create it and try a file in it."""
        with self._translating(self.root, writing=for_writing):
            if for_writing:
                with FileWriter(self, "probe") as writer:
                    writer.write(b"?")
            else:
                os.scandir(self.root).close()

    def room(self) -> int | None:
        """What is free where the directory is, or will be; the kernel is asked for a file without a name."""
        place = self.root
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        with self._translating(place, writing=True):
            free = os.statvfs(place)
            _try_nameless_file(place)
        # Blocks that are kept back for root (5 % of an ext4) are left out of f_bavail, but root gets them.
        blocks = free.f_bfree if os.geteuid() == 0 else free.f_bavail
        return blocks * free.f_frsize if free.f_blocks else None

    def put(self, key: str, data: Buffer, *, if_absent: bool = False) -> None:
        """Write, sync, then rename into place (or link, which the kernel refuses if the name is taken)."""
        if if_absent and os.path.lexists(self._path(key)):
            raise taken(key)
        with self.writer(key, if_absent=if_absent) as writer:
            writer.write(data)
            writer.commit()

    def writer(self, key: str, *, if_absent: bool = False) -> FileWriter:
        """Begin a file in `.tmp/`; what is written goes straight to it."""
        with self._translating(self._path(key), writing=True):
            return FileWriter(self, key, if_absent=if_absent)

    def get(self, key: str) -> bytes:
        """Read the file; once more, where another host has replaced it since it was looked up."""
        try:
            return self._read(key)
        except StoreError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ESTALE:
                raise
            return self._read(key)

    def _read(self, key: str) -> bytes:
        with self._reading(key) as descriptor, open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()

    def get_range(self, key: str, offset: int, length: int) -> bytes:
        """Read at an offset, leaving no position behind for other threads to trip over."""
        with self._reading(key) as descriptor:
            data = os.pread(descriptor, length, offset)
            while len(data) < length:  # the kernel hands out at most 2 GiB at a time
                more = os.pread(descriptor, length - len(data), offset + len(data))
                if not more:
                    raise StoreError(
                        f"{key} ends after {offset + len(data)} bytes, before {offset + length}",
                        hint="The object is damaged or was replaced; `crcli verify` reads the whole image.",
                    )
                data += more
            return data

    def mapped(self, key: str, offset: int, length: int) -> Buffer | None:
        """A part of the file, where the page cache has it."""
        try:
            with self._reading(key) as descriptor:
                return mapped(descriptor, offset, length)
        except StoreError:  # `get_range` says what is wrong
            return None

    def fetch_again(self, key: str, offset: int, length: int) -> None:
        """There is no cache."""

    def is_near(self, key: str, offset: int, length: int) -> bool:
        """Whether the file is there, and long enough."""
        try:
            return os.stat(self._path(key)).st_size >= offset + length
        except OSError:
            return False

    def stat(self, key: str) -> ObjectInfo:
        """Describe the file."""
        with self._reading(key) as descriptor:
            return _describe(key, os.fstat(descriptor))

    def missing(self, keys: Iterable[str]) -> set[str]:
        """Look for each of the files."""
        return {key for key in keys if not is_there(self, key)}

    def list(self, prefix: str = "", after: str = "") -> Iterator[ObjectInfo]:
        """Walk the directories that can hold such keys, one at a time."""
        directory = check_prefix(prefix).rpartition("/")[0]
        with self._translating(self.root):
            os.scandir(self.root).close()
        return self._walk(directory + "/" if directory else "", prefix, after)

    def delete(self, key: str) -> None:
        """Remove the file, and sync its directory so that it stays removed."""
        path = self._path(key)
        with self._translating(path):
            try:
                os.unlink(path)
            except (FileNotFoundError, NotADirectoryError):
                return
            _sync_directory(os.path.dirname(path))

    def sweep(self, before: float, is_ours: Callable[[str], bool] = is_key) -> int:
        """Remove temporary files whose writers are gone: old, and locked by nobody."""
        swept = 0
        temporary = os.path.join(self.root, TEMPORARY)
        with self._translating(temporary):
            try:
                names = os.listdir(temporary)
            except FileNotFoundError:
                return 0
            for name in filter(_NAME_OF_A_WRITERS.fullmatch, names):
                swept += _remove_if_abandoned(os.path.join(temporary, name), before)
        return swept

    def give_up(self) -> None:
        """Nothing is ever tried again."""

    def reopened(self) -> FileStore:
        """Another, at the same place."""
        return FileStore(self.root)

    def close(self) -> None:
        """Nothing is held between calls."""

    def _path(self, key: str) -> str:
        return os.path.join(self.root, check_key(key))

    @contextmanager
    def _reading(self, key: str) -> Iterator[int]:
        path = self._path(key)
        with self._translating(path, key):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    raise FileNotFoundError(errno.ENOENT, "a directory, not an object", path)
                yield descriptor
            finally:
                os.close(descriptor)

    def _walk(self, directory: str, prefix: str, after: str) -> Iterator[ObjectInfo]:
        """Yield in key order: a directory sorts as its name and the slash that follows it in keys."""
        path = os.path.join(self.root, directory)
        with self._translating(path):
            try:
                with os.scandir(path) as entries:
                    names = sorted(
                        directory + entry.name + "/" * entry.is_dir()
                        for entry in entries
                        if not entry.name.startswith(".")
                    )
            except (FileNotFoundError, NotADirectoryError):
                return
        for name in names:
            if name.endswith("/"):
                is_asked_for = name.startswith(prefix) or prefix.startswith(name)
                if is_asked_for and (name > after or after.startswith(name)):
                    yield from self._walk(name, prefix, after)
            elif name.startswith(prefix) and name > after and is_key(name):
                try:
                    yield _describe(name, os.stat(os.path.join(self.root, name)))
                except FileNotFoundError:
                    pass  # deleted since the directory was read

    @contextmanager
    def _translating(self, path: str, key: str = "", *, writing: bool = False) -> Iterator[None]:
        """Turn the kernel's refusals into StoreError, with what can be done about them."""
        try:
            yield
        except OSError as error:
            raise self._translate(error, path, key, writing) from error

    def _translate(self, error: OSError, path: str, key: str, writing: bool) -> StoreError:
        if error.errno == errno.ENOENT and not writing and not os.path.lexists(self.root):
            return NotFound(
                f"there is no store at {self.root}",
                hint="Check --store; a directory store is created by the first dump into it.",
            )
        if error.errno in (errno.ENOENT, errno.ENOTDIR) and key and os.path.isdir(self.root):
            return NotFound(f"no object {key} in {self.url}")
        return StoreError(
            f"the store at {self.root} failed: {error.strerror or error} ({error.filename or path})",
            hint=_hint(error, self.root),
        )


class FileWriter:
    """A temporary file that becomes the object on `commit`.

    Holds a lock on the file while it lives, so that `sweep` can tell a slow writer from a dead one. The
    kernel is asked to write back as the file grows: the sync in `commit` then waits for the last part only.
    """

    def __init__(self, store: FileStore, key: str, *, if_absent: bool = False) -> None:
        self._store = store
        self._key = check_key(key)
        self._if_absent = if_absent
        self._written = 0
        self._asked = 0
        self._temporary = os.path.join(store.root, TEMPORARY, f"{os.getpid()}-{os.urandom(8).hex()}")
        self._descriptor = _create(self._temporary)

    def write(self, data: Buffer) -> None:
        """Write `data` out; nothing of it is kept here."""
        with self._store._translating(self._temporary, writing=True):
            view = memoryview(data).cast("B")
            while view:
                count = os.write(self._descriptor, view)
                self._written += count
                view = view[count:]
            if self._written - self._asked >= WRITE_BACK_BYTES:
                _start_write_back(self._descriptor, self._asked, self._written - self._asked)
                self._asked = self._written

    def commit(self) -> None:
        """Sync the file, give it its name, sync the directory."""
        destination = self._store._path(self._key)
        try:
            with self._store._translating(destination, writing=True):
                os.fsync(self._descriptor)
                self._publish(destination)
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove the temporary file, if it still has that name."""
        if self._descriptor < 0:
            return
        try:
            os.unlink(self._temporary)
        except OSError:
            pass  # renamed into place; or the disk is gone, and `sweep` will find the file
        try:
            os.close(self._descriptor)
        except OSError:
            pass  # what the close could complain about, the sync has complained about
        self._descriptor = -1

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _publish(self, destination: str) -> None:
        try:
            self._name(destination)
        except FileNotFoundError:
            _make_directories(os.path.dirname(destination))
            self._name(destination)
        except ObjectExists:
            if not self._is_there(destination):
                raise
        _sync_directory(os.path.dirname(destination))

    def _is_there(self, destination: str) -> bool:
        """Whether the file has its name, whatever was answered: a server may lose its answer, and be asked
        again for what it has done."""
        try:
            return os.path.samestat(os.lstat(destination), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _name(self, destination: str) -> None:
        if not self._if_absent:
            self._rename(destination)
            return
        try:
            os.link(self._temporary, destination)
        except FileExistsError:
            raise taken(self._key) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise
            self._rename_if_absent(destination)  # a file system without hard links

    def _rename_if_absent(self, destination: str) -> None:
        """Look and rename under a lock that every crcli on this host takes for it."""
        lock = os.open(os.path.dirname(self._temporary), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.lexists(destination):
                raise taken(self._key)
            self._rename(destination)
        finally:
            os.close(lock)

    def _rename(self, destination: str) -> None:
        try:
            os.rename(self._temporary, destination)
        except FileNotFoundError:
            if not self._is_there(destination):
                raise


def _describe(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key, status.st_size, status.st_mtime)


def _create(path: str) -> int:
    """Create a new file, and the store around it if need be; it is locked by us."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileNotFoundError:
        _make_directories(os.path.dirname(path))
        descriptor = os.open(path, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass  # a file system without locks: age alone protects the file from `sweep`
    return descriptor


def _try_nameless_file(directory: str) -> None:
    """See whether files can be made there: one is, and is gone. Some file systems do not know how."""
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        if not os.access(directory, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory) from None


def _make_directories(path: str) -> None:
    """Create a directory and its ancestors, each durable in its parent."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directories(parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, "is a file, not a directory", path) from None
    _sync_directory(parent)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # so say SMB and vboxsf, where it is the server's to do
            raise
    finally:
        os.close(descriptor)


@cache
def _sync_file_range() -> Callable[..., int] | None:
    """The system call that starts write-back without waiting for it; Python has no name for it."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call


def _start_write_back(descriptor: int, offset: int, length: int) -> None:
    """Have the kernel begin to write these bytes to the disk; where it cannot, the sync has more to do."""
    call = _sync_file_range()
    if call is not None:
        call(descriptor, offset, length, 2)  # SYNC_FILE_RANGE_WRITE


def _remove_if_abandoned(path: str, modified_before: float) -> bool:
    """Remove a temporary file unless it is fresh or its writer holds the lock; say whether it went."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS gives no lock to who may not write
    except FileNotFoundError:
        return False
    try:
        if os.fstat(descriptor).st_mtime >= modified_before:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # there are no locks: its age has to do
        os.unlink(path)
    except FileNotFoundError:
        return False
    finally:
        os.close(descriptor)
    return True


def _hint(error: OSError, root: str) -> str:
    """What the user can do about a refusal of the kernel, or nothing."""
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"Free space on the file system of {root}, run `crcli gc`, or choose another --store."
        case errno.EMFILE:
            return "Raise the limit on open files (`ulimit -n`)."
        case errno.EFBIG:
            return "Raise the limit on file size (`ulimit -f`)."
        case errno.EROFS:
            return f"The file system of {root} is mounted read-only; choose another --store."
        case errno.EACCES | errno.EPERM if os.geteuid() != 0:
            return f"Run as a user who may write below {root}, or choose another --store."
        case errno.EACCES | errno.EPERM:
            return "Even root is refused: look for an immutable flag, a security module, or a remote export."
        case errno.ENOTDIR | errno.EEXIST | errno.EISDIR:
            return "A part of the path is a file, not a directory; check --store."
        case errno.EXDEV:
            return f"All of {root} must be on one file system: objects are renamed into place."
        case errno.EIO | errno.ESTALE:
            return "The disk or the remote file system is failing; the kernel's log says more."
        case _:
            return ""
