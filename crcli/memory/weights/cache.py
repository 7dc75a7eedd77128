"""Sample indexes kept from one dump to the next, by the identity of the file; a changed file has another name
here.

An entry is a few arrays under one BLAKE3 seal. Whatever is wrong with it, or with the folder, the index is
made anew: the cache saves time and decides nothing.
"""

from __future__ import annotations

import contextlib
import os
import struct
from typing import TYPE_CHECKING, NamedTuple

from blake3 import blake3

from crcli.errors import HostLacks
from crcli.memory.weights.samples import Index, Stream, index_of
from crcli.memory.weights.views import View
from crcli.records import asdict

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.memory.weights.files import Identity, WeightsFile

FOLDER = "/var/cache/crcli/weights"
LIMIT_BYTES = 2 << 30
"""When the entries are larger than this together, those that were used longest ago go."""

_VERSION = 1
_HEAD = struct.Struct("<8sIIQ32s")
_STREAM = struct.Struct("<IQQ")
_MAGIC = b"crclwix\0"


class Indexed(NamedTuple):
    """A file's samples, and the BLAKE3 of its bytes (hexadecimal) as they were when those were taken."""

    samples: Index
    digest: str


def folder() -> str:
    """Where the cache is: `$CRCLI_CACHE_DIR/weights`, or below /var/cache."""
    base = os.environ.get("CRCLI_CACHE_DIR")
    return os.path.join(base, "weights") if base else FOLDER


def see_that_it_keeps() -> None:
    """Raise HostLacks where we may not keep anything here."""
    try:
        os.makedirs(folder(), 0o700, exist_ok=True)
    except OSError as error:
        why = error.strerror
    else:
        if os.access(folder(), os.W_OK):
            return
        why = "it cannot be written to"
    raise HostLacks(
        f"no index can be kept in {folder()}: {why}",
        hint="run crcli as root, or name another folder with $CRCLI_CACHE_DIR",
    )


_PIECE = 16 << 20
"""So much of an entry is read at a time (bytes)."""


def indexed(file: WeightsFile, amount: Callable[[int], None] = lambda done: None) -> Indexed:
    """Return a file's index, from the cache or, where it has none, made and kept there.

    `amount` is told now and then how many bytes of the file are done; what it raises ends the work.
    """
    if (known := kept(file, lambda: amount(0))) is not None:
        return known
    index, digest = index_of(file, amount=amount)
    made = Indexed(index, digest.hex())
    if not file.has_changed():
        _keep(_path(file), made)
    return made


def kept(file: WeightsFile, look: Callable[[], None] = lambda: None) -> Indexed | None:
    """Return a file's index if the cache has it. What `look`, called now and then, raises ends the work."""
    return _load(_path(file), look)


def _path(file: WeightsFile) -> str:
    return os.path.join(folder(), _name(file.identity))


def _name(identity: Identity) -> str:
    words = struct.pack("<5Q", *(value & (1 << 64) - 1 for value in asdict(identity).values()))
    return f"{blake3(words).hexdigest()[:40]}.{_VERSION}"


def _load(path: str, look: Callable[[], None]) -> Indexed | None:
    import numpy as np

    try:
        data = _read_sealed(path, look)
        os.utime(path)
    except OSError:
        return None
    if data is None:
        return None
    magic, version, streams, count, digest = _HEAD.unpack_from(data)
    at = _HEAD.size + streams * _STREAM.size
    if magic != _MAGIC or version != _VERSION or len(data) != at + count * 20 + 32:
        return None
    table = [
        Stream(0, View(view), start, length)
        for view, start, length in _STREAM.iter_unpack(data[_HEAD.size : at])
    ]
    keys = np.frombuffer(data, "<u8", count, at)
    places = np.frombuffer(data, "<u8", count, at + 8 * count)
    owners = np.frombuffer(data, "<u4", count, at + 16 * count)
    return Indexed(Index(table, keys, owners, places), digest.hex())


def _read_sealed(path: str, look: Callable[[], None]) -> bytearray | None:
    """An entry, if its seal is right."""
    digest = blake3()
    with open(path, "rb", buffering=0) as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        body = max(0, len(data) - 32)
        view, at = memoryview(data), 0
        while at < len(data):
            look()
            got = file.readinto(view[at : at + _PIECE])
            if not got:
                return None
            digest.update(view[at : min(at + got, body)])
            at += got
        return data if len(data) >= _HEAD.size + 32 and digest.digest() == view[body:] else None


def _keep(path: str, made: Indexed) -> None:
    index = made.samples
    body = b"".join(
        [
            _HEAD.pack(_MAGIC, _VERSION, len(index.streams), len(index.keys), bytes.fromhex(made.digest)),
            *(_STREAM.pack(one.view, one.start, one.length) for one in index.streams),
            index.keys.astype("<u8").tobytes(),
            index.places.astype("<u8").tobytes(),
            index.owners.astype("<u4").tobytes(),
        ]
    )
    temporary = f"{path}.{os.getpid()}-{os.urandom(4).hex()}"
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(body)
            file.write(blake3(body).digest())
        os.rename(temporary, path)
        _forget_oldest()
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _forget_oldest() -> None:
    with os.scandir(folder()) as entries:
        found = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in entries)
    total = sum(size for _, size, _ in found)
    for _, size, path in found:
        if total <= LIMIT_BYTES:
            return
        os.unlink(path)
        total -= size
