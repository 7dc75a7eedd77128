"""Places found by value: the same words are picked in a file and in memory, whatever lies between the two.

A word of 8 bytes is a sample when the product of its value and a large odd number is small: one word in 256,
the same ones wherever they stand, and of any distribution of values, zero apart. A sample's key is made of
the word and its neighbour. An index holds the keys of a file, sorted, with the place of each.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import struct
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

from blake3 import blake3

from crcli import kernel
from crcli.memory.weights.layout import WORD, regions
from crcli.memory.weights.views import CASTS_OF, View, apply, element_bytes, source_element
from crcli.process.processors import usable_processors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crcli.memory.weights.files import WeightsFile
    from crcli.memory.weights.layout import Region

RARITY_BITS = 8
"""One word in 2**8 is a sample: one in 2 KiB."""

_LARGE_BYTES = 8 << 30
"""Of larger files only each second, fourth, … sample is kept: an index has 4 million at most (80 MB)."""

_BLOCK = 1 << 20
_MOST_PER_BLOCK = 4 * (_BLOCK // WORD >> RARITY_BITS)
_MOST_PER_KEY = 4
_ROWS = struct.Struct("<Q")
_FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F


def samples(data: Any, rarity_bits: int = RARITY_BITS) -> tuple[Any, Any]:
    """Return where in `data` (a numpy array of bytes) samples are, and their keys.

    Places are multiples of 8 bytes. Of equal samples in a row only the first counts, and no more of all than
    four times what is usual.
    """
    import numpy as np

    words = data[: len(data) // WORD * WORD].view("<u8")
    if len(words) < 2:
        return np.empty(0, np.int64), np.empty(0, np.uint64)
    products = words * np.uint64(_FIRST)
    places = np.flatnonzero(products < np.uint64(1 << (64 - rarity_bits)))
    places = places[(places < len(words) - 1) & (products[places] != 0)]
    keys = products[places] ^ (words[places + 1] * np.uint64(_SECOND))
    if len(places) > 1:
        is_new = np.concatenate(([True], keys[1:] != keys[:-1]))
        places, keys = places[is_new], keys[is_new]
    most = max(16, _MOST_PER_BLOCK * len(data) // _BLOCK)
    if len(places) > most:
        _, firsts = np.unique(keys, return_index=True)
        firsts = np.sort(firsts)[:most]
        places, keys = places[firsts], keys[firsts]
    return places * WORD, keys


class Stream(NamedTuple):
    """A run of a file as a view shows it: where it begins in the file, and its size in memory."""

    file: int
    view: View
    start: int
    length: int


class Index:
    """The samples of one file, or of several: sorted keys, and for each the stream and the place in it."""

    def __init__(self, streams: Sequence[Stream], keys: Any, owners: Any, places: Any) -> None:
        self.streams = list(streams)
        self.keys = keys
        self.owners = owners
        self.places = places

    def thinned(self, bits: int) -> Index:
        """Only one sample in 2**bits, which are the same ones in every index."""
        import numpy as np

        end = int(np.searchsorted(self.keys, np.uint64(1 << (64 - bits)))) if bits else len(self.keys)
        return Index(self.streams, self.keys[:end].copy(), self.owners[:end].copy(), self.places[:end].copy())

    @classmethod
    def joined(cls, parts: Sequence[Index]) -> Index:
        """One index of all files, which are numbered in the order of `parts`."""
        import numpy as np

        streams: list[Stream] = []
        owners = []
        for number, part in enumerate(parts):
            owners.append(part.owners + np.uint32(len(streams)))
            streams += (stream._replace(file=number) for stream in part.streams)
        keys = np.concatenate([part.keys for part in parts])
        order = np.argsort(keys, kind="stable")
        places = np.concatenate([part.places for part in parts])[order]
        return cls(streams, keys[order], np.concatenate(owners)[order], places)

    def find(self, keys: Any) -> tuple[Any, Any]:
        """For each key, the first row that has it, and how many have (0: none)."""
        import numpy as np

        first = np.searchsorted(self.keys, keys)
        return first, np.searchsorted(self.keys, keys, side="right") - first


def index_of(file: WeightsFile, *, amount: Callable[[int], None] = lambda done: None) -> tuple[Index, bytes]:
    """Read a file; return its samples, and the BLAKE3 of all of its bytes.

    Of a large one other processes take the samples while this one hashes. `amount` is told now and then how
    many bytes are done; what it raises ends the work.
    """
    found = _Sampling(file)
    count = min(usable_processors(), _MOST_PROCESSES) if file.size >= _WORTH_BYTES else 0
    digest = blake3()
    with _Samplers(found, count) as samplers:
        samplers.start()
        for at in range(0, file.size, _BLOCK):
            digest.update(file.read(at, min(_BLOCK, file.size - at)))
            amount(at)
        while not samplers.hear(_LOOK_S):
            amount(file.size)
    for share in samplers.undone:
        found.take(share, lambda: amount(file.size))
    return found.index(), digest.digest()


_WORTH_BYTES = 128 << 20
"""Files of this size and larger are worth processes: each takes a few ms to start."""

_MOST_PROCESSES = 8
_LOOK_S = 0.1
_OVERLAP = 4 * WORD
"""Bytes of the next block that a block is read with: no sample or neighbour is lost at the border."""

_STRIPE = 16
"""So many blocks in a row are of one share: a disk is read in long pieces."""

_PIPE_READ = 1 << 20


class Share(NamedTuple):
    """Every `of`-th stripe of a file, from number `first` on."""

    first: int
    of: int


class _Samplers:
    """Processes that take samples, a share of the file each. A context manager that ends them.

    Nothing depends on them: `undone` are the shares of which nothing came.
    """

    def __init__(self, found: _Sampling, count: int) -> None:
        self._found = found
        self._shares = [Share(number, count) for number in range(count)]
        self._at_work: dict[int, tuple[int, Share, bytearray]] = {}
        """By the descriptor through which they send: pid, share, and what has come."""
        self.undone = [] if count else [Share(0, 1)]

    def __enter__(self) -> _Samplers:
        return self

    def start(self) -> None:
        """Fork them, or as many as we may."""
        for share in self._shares:
            try:
                self._start(share)
            except OSError:
                self.undone.append(share)

    def _start(self, share: Share) -> None:
        reader, writer = os.pipe()
        try:
            pid = kernel.quiet_fork()
            if pid == 0:
                _sample_and_exit(self._found, share, writer)
            self._at_work[reader] = pid, share, bytearray()
        except OSError:
            os.close(reader)
            raise
        finally:
            os.close(writer)

    def hear(self, limit_s: float) -> bool:
        """Take in what they have sent, waiting for so long (seconds); return whether all have ended.

        Who was stopped is ended: nobody may ever let it go on.
        """
        ready = select.select(list(self._at_work), [], [], limit_s)[0] if self._at_work else []
        for reader in ready:
            _, share, sent = self._at_work[reader]
            if data := os.read(reader, _PIPE_READ):
                sent += data
                continue
            if not self._found.unpack(sent):
                self.undone.append(share)
            self._end(reader)
        if not ready:
            self._end_stopped()
        return not self._at_work

    def _end_stopped(self) -> None:
        for reader, (pid, share, _) in list(self._at_work.items()):
            if os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None:
                self.undone.append(share)
                self._end(reader)

    def _end(self, reader: int) -> None:
        pid, _, _ = self._at_work.pop(reader)
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def __exit__(self, *_: object) -> None:
        for reader in list(self._at_work):
            self._end(reader)


def _sample_and_exit(found: _Sampling, share: Share, writer: int) -> NoReturn:
    """What such a process does."""
    try:
        kernel.die_with_parent(signal.SIGKILL)
        kernel.close_all_but(found.file.fd, writer)
        gc.disable()  # it would touch, and so copy, all of the memory that is our parent's too
        found.take(share)
        with open(writer, "wb") as pipe:
            found.pack(pipe)
    finally:
        os._exit(0)


class _Sampling:
    """The samples of a file as they are gathered."""

    def __init__(self, file: WeightsFile) -> None:
        self.file = file
        self.rarity_bits = RARITY_BITS + max(0, (file.size - 1) // _LARGE_BYTES).bit_length()
        self.rarities: list[int] = []
        self.streams: list[Stream] = []
        self.parts: list[tuple[Any, Any, Any]] = []
        """Keys, owners and places, block by block, in any order."""
        self.regions = [(region, self._streams_of(region)) for region in regions(file)]

    def take(self, share: Share, note: Callable[[], None] = lambda: None) -> None:
        """Take the samples of this share; `note` is called now and then."""
        blocks = (
            (begin, region.end, streams)
            for region, streams in self.regions
            for begin in range(region.start, region.end, _BLOCK)
        )
        for number, (begin, end, streams) in enumerate(blocks):
            if number // _STRIPE % share.of == share.first:
                raw = self.file.read(begin, min(_BLOCK + _OVERLAP, end - begin))
                if raw:  # else it was cut short meanwhile
                    for stream in streams:
                        self._add(stream, begin, raw)
                note()

    def pack(self, pipe: BinaryIO) -> None:
        """Write down what was gathered."""
        keys, owners, places = self._joined()
        pipe.write(_ROWS.pack(len(keys)))
        for column in (keys, places, owners):
            pipe.write(memoryview(column).cast("B") if len(column) else b"")

    def unpack(self, packed: bytearray) -> bool:
        """Add what was written down elsewhere; return whether it is whole."""
        import numpy as np

        if len(packed) < _ROWS.size or len(packed) != _ROWS.size + 20 * (
            rows := _ROWS.unpack_from(packed)[0]
        ):
            return False
        keys = np.frombuffer(packed, np.uint64, rows, _ROWS.size)
        places = np.frombuffer(packed, np.uint64, rows, _ROWS.size + 8 * rows)
        self.parts.append((keys, np.frombuffer(packed, np.uint32, rows, _ROWS.size + 16 * rows), places))
        return True

    def _joined(self) -> tuple[Any, Any, Any]:
        import numpy as np

        if not self.parts:
            empty = np.empty(0, np.uint64)
            return empty, np.empty(0, np.uint32), empty
        keys, owners, places = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        return keys, owners, places

    def _streams_of(self, region: Region) -> list[int]:
        """Begin the streams of a region; return their numbers."""
        rarer = (len(region.phases) - 1).bit_length()
        plain = [self._stream(View.BYTES, region.start + at, region.end, rarer) for at in region.phases]
        casts = CASTS_OF.get(region.dtype, ())
        return plain + [self._stream(view, region.start, region.end, 0) for view in casts]

    def _stream(self, view: View, start: int, end: int, rarer_bits: int) -> int:
        """Begin a stream, of which one sample in 2**rarer_bits is kept; return its number.

        Where a tensor may begin at any byte there are eight streams: all of them have as many as one
        otherwise.
        """
        self.rarities.append(self.rarity_bits + rarer_bits)
        count = max(0, end - start) // source_element(view)
        self.streams.append(Stream(0, view, start, count * element_bytes(view)))
        return len(self.streams) - 1

    def _add(self, number: int, begin: int, raw: bytes) -> None:
        """Take the samples of a block that begins at `begin`; those of the overlap are the next one's."""
        import numpy as np

        stream = self.streams[number]
        skip = max(0, stream.start - begin)
        skip += (
            -(begin + skip - stream.start) % max(WORD, source_element(stream.view))
            if begin > stream.start
            else 0
        )
        usable = (len(raw) - skip) // source_element(stream.view) * source_element(stream.view)
        if usable <= 0:
            return
        data = apply(stream.view, memoryview(raw)[skip : skip + usable])
        places, keys = samples(data, self.rarities[number])
        first = (begin + skip - stream.start) // source_element(stream.view) * element_bytes(stream.view)
        limit = (begin + _BLOCK - stream.start) // source_element(stream.view) * element_bytes(stream.view)
        places = places + first
        if len(raw) > _BLOCK:
            inside = places < limit
            places, keys = places[inside], keys[inside]
        self.parts.append((keys, np.full(len(keys), number, np.uint32), places.astype(np.uint64)))

    def index(self) -> Index:
        """All of it, sorted by key; of samples that are many times the same only the first few."""
        import numpy as np

        keys, owners, places = self._joined()
        order = np.lexsort((places, owners, keys))
        keys = keys[order]
        rank = np.arange(len(keys)) - np.searchsorted(keys, keys)
        kept = order[rank < _MOST_PER_KEY]
        return Index(self.streams, keys[rank < _MOST_PER_KEY], owners[kept], places[kept])
