"""Places found by value: the same words are picked in a file and in memory, whatever lies between the two.

A word of 8 bytes is a sample when the product of its value and a large odd number is small: one word in 256,
the same ones wherever they stand, and of any distribution of values, zero apart. A sample's key is made of
the word and its neighbour. An index holds the keys of a file, sorted, with the place of each.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

from crcli.memory.weights.layout import WORD, regions
from crcli.memory.weights.views import CASTS_OF, View, apply, element_bytes, source_element

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from crcli.memory.weights.files import WeightsFile
    from crcli.memory.weights.layout import Region

RARITY_BITS = 8
"""One word in 2**8 is a sample: one in 2 KiB."""

_LARGE_BYTES = 8 << 30
"""Of larger files only each second, fourth, … sample is kept: an index has 4 million at most (80 MB)."""

_BLOCK = 1 << 20
_MOST_PER_BLOCK = 4 * (_BLOCK // WORD >> RARITY_BITS)
_MOST_PER_KEY = 4
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


def index_of(
    file: WeightsFile, *, casts: bool = True, amount: Callable[[int], None] = lambda done: None
) -> tuple[Index, bytes]:
    """Read a file; return its samples, and the BLAKE3 of all of its bytes.

    A few threads take samples while this one hashes. `amount` is told now and then how many bytes are done;
    what it raises ends the work.
    """
    found = _Sampling(file.size)
    blocks = _Shared(
        (found, file, begin, region.end, streams)
        for region, streams in [(region, found.streams_of(region, casts)) for region in regions(file)]
        for begin in range(region.start, region.end, _BLOCK)
    )
    digest = blake3()
    threads = ThreadPoolExecutor(_THREADS, "samples")
    workers = [threads.submit(_take_samples, blocks) for _ in range(_THREADS)]
    try:
        for at in range(0, file.size, _BLOCK):
            digest.update(file.read(at, min(_BLOCK, file.size - at)))
            amount(at)
        while not wait(workers, _LOOK_S).done:
            amount(file.size)
        for worker in workers:
            worker.result()
    finally:
        blocks.end()
        threads.shutdown(wait=True)
    return found.index(), digest.digest()


_THREADS = 2
_LOOK_S = 0.1
_OVERLAP = 4 * WORD
"""Bytes of the next block that a block is read with: no sample or neighbour is lost at the border."""

_Task = tuple["_Sampling", "WeightsFile", int, int, "list[int]"]


class _Shared:
    """Tasks that several threads take from one iterator."""

    def __init__(self, tasks: Iterator[_Task]) -> None:
        self._tasks = tasks
        self._lock = threading.Lock()

    def next(self) -> _Task | None:
        """The next one; None when there are no more."""
        with self._lock:
            return next(self._tasks, None)

    def end(self) -> None:
        """Let there be no more."""
        with self._lock:
            self._tasks = iter(())


def _take_samples(blocks: _Shared) -> None:
    while (task := blocks.next()) is not None:
        found, file, begin, end, streams = task
        if raw := file.read(begin, min(_BLOCK + _OVERLAP, end - begin)):  # else it was cut short meanwhile
            for stream in streams:
                found.add(stream, begin, raw)


class _Sampling:
    """The samples of a file as they are gathered."""

    def __init__(self, size: int) -> None:
        self.rarity_bits = RARITY_BITS + max(0, (size - 1) // _LARGE_BYTES).bit_length()
        self.rarities: list[int] = []
        self.streams: list[Stream] = []
        self.parts: list[tuple[Any, Any, Any]] = []
        """Keys, owners and places, block by block, in any order."""

    def streams_of(self, region: Region, casts: bool) -> list[int]:
        """Begin the streams of a region; return their numbers."""
        rarer = (len(region.phases) - 1).bit_length()
        plain = [self._stream(View.BYTES, region.start + at, region.end, rarer) for at in region.phases]
        views = CASTS_OF.get(region.dtype, ()) if casts else ()
        return plain + [self._stream(view, region.start, region.end, 0) for view in views]

    def _stream(self, view: View, start: int, end: int, rarer_bits: int) -> int:
        """Begin a stream, of which one sample in 2**rarer_bits is kept; return its number.

        Where a tensor may begin at any byte there are eight streams: all of them have as many as one
        otherwise.
        """
        self.rarities.append(self.rarity_bits + rarer_bits)
        count = max(0, end - start) // source_element(view)
        self.streams.append(Stream(0, view, start, count * element_bytes(view)))
        return len(self.streams) - 1

    def add(self, number: int, begin: int, raw: bytes) -> None:
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

        if not self.parts:
            empty = np.empty(0, np.uint64)
            return Index(self.streams, empty, np.empty(0, np.uint32), empty)
        keys, owners, places = (np.concatenate(column) for column in zip(*self.parts, strict=True))
        order = np.lexsort((places, owners, keys))
        keys = keys[order]
        rank = np.arange(len(keys)) - np.searchsorted(keys, keys)
        kept = order[rank < _MOST_PER_KEY]
        return Index(self.streams, keys[rank < _MOST_PER_KEY], owners[kept], places[kept])
