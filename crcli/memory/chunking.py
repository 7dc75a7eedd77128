"""New pages made into chunks.

A chunk is made of groups that are new from end to end, or of single pages. Those of a block that do not fill
one share it with what is left of other blocks: of a tree that changed here and there, each block has a few.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

from crcli.memory.blocks import GROUP_PAGES, ranges
from crcli.memory.extents import PAGE
from crcli.memory.places import place_in
from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from crcli.memory.weights.references import Reference
    from crcli.store.base import Buffer

CHUNK_PAGES = 64
"""Pages in one chunk at most (256 KiB): large enough to compress well and to fetch in one read."""

_TWIN_LIMIT = 1 << 18
"""New pages of this dump that are remembered for finding their twins (about 50 MB when full)."""


class ChunkSink(Protocol):
    """Takes new chunks on their way to the store. Called from several threads."""

    def reserve(self) -> int:
        """Give a number in the chunk table to a chunk that is about to be added."""
        ...

    def add(
        self,
        number: int,
        pieces: Sequence[Buffer],
        page_digests: Sequence[bytes],
        group_digests: Sequence[bytes],
        *,
        hurry: bool,
    ) -> None:
        """Store the chunk `number`, made of `pieces`; done with them on return.

        It begins with as many whole groups as there are `group_digests`. `hurry` says that the source is
        being held back, so that speed matters more than size.
        """
        ...

    def note_mixed(self, groups: Iterable[tuple[bytes, Sequence[int]]]) -> None:
        """Note groups whose pages have these places, so that a later dump finds each by its digest."""
        ...

    def refer(self, reference: Reference) -> int:
        """Give a reference into files of weights its number in the table of those."""
        ...


class _Shared(Struct):
    """A chunk of what is left of several blocks."""

    number: int
    memory: bytearray = field(default_factory=lambda: bytearray(CHUNK_PAGES * PAGE))
    page_digests: list[bytes] = field(default_factory=list)
    group_digests: list[bytes] = field(default_factory=list)
    awaited: int = 0
    """So many of its pages are not in `memory` yet."""

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another page."""
        return len(self.page_digests) == CHUNK_PAGES


class Part(NamedTuple):
    """New pages of a block (by their place in it), which are these groups or in none, and where they go: from
    page `at` of the chunk `number` on. They are all of it where it is not `shared`."""

    number: int
    at: int
    pages: list[int]
    groups: list[int]
    shared: _Shared | None = None


class Chunker:
    """Finds twins among new pages, and makes chunks of the others. Safe to call from several threads.

    `finish` stores the last chunks.
    """

    def __init__(self, sink: ChunkSink) -> None:
        self._sink = sink
        self._twins: dict[bytes, int] = {}
        self._open: dict[bool, _Shared] = {}
        """The chunks that have room, for pages of whole groups and for others."""
        self._lock = threading.Lock()

    def may_want(self, digest: bytes) -> bool:
        """Whether a page with this digest may have to be `put`: no twin of it is known."""
        return digest not in self._twins

    def claim(self, unknown: dict[int, bytes], groups: dict[int, bytes], places: list[int]) -> list[Part]:
        """Place new pages of a block, of which these are the digests, and those of groups in which nothing is
        known: where their twins are, or in new chunks, where they must be `put` then."""
        with self._lock:
            fresh = {digest: page for page, digest in unknown.items() if digest not in self._twins}
            parts = list(self._cut(set(fresh.values()), unknown, groups))
            for part in parts:
                for place, page in enumerate(part.pages, place_in(part.number, part.at)):
                    places[page] = fresh[unknown[page]] = place
            if len(fresh) < len(unknown):
                for page, digest in unknown.items():
                    places[page] = fresh[digest] if digest in fresh else self._twins[digest]
            if len(self._twins) < _TWIN_LIMIT:
                self._twins.update(fresh)
        return parts

    def _cut(
        self, fresh: set[int], digests: Mapping[int, bytes], groups: Mapping[int, bytes]
    ) -> Iterator[Part]:
        """Divide pages among chunks; the groups that are whole among them stay so."""
        whole = [head for head in groups if fresh.issuperset(range(head, head + GROUP_PAGES))]
        of_whole = [page for head in whole for page in range(head, head + GROUP_PAGES)]
        for pages, heads in ((of_whole, whole), (sorted(fresh.difference(of_whole)), [])):
            end = len(pages) - len(pages) % CHUNK_PAGES
            for at in range(0, end, CHUNK_PAGES):
                own = heads[at // GROUP_PAGES : (at + CHUNK_PAGES) // GROUP_PAGES]
                yield Part(self._sink.reserve(), 0, pages[at : at + CHUNK_PAGES], own)
            yield from self._share(pages[end:], heads[end // GROUP_PAGES :], digests, groups)

    def _share(
        self, pages: list[int], heads: list[int], digests: Mapping[int, bytes], groups: Mapping[int, bytes]
    ) -> Iterator[Part]:
        """Divide what is left of a block among chunks that blocks share."""
        are_whole = bool(heads)
        while pages:
            if (shared := self._open.get(are_whole)) is None:
                shared = self._open[are_whole] = _Shared(self._sink.reserve())
            at = len(shared.page_digests)
            some, pages = pages[: CHUNK_PAGES - at], pages[CHUNK_PAGES - at :]
            own, heads = heads[: len(some) // GROUP_PAGES], heads[len(some) // GROUP_PAGES :]
            shared.page_digests += (digests[page] for page in some)
            shared.group_digests += (groups[head] for head in own)
            shared.awaited += len(some)
            if shared.is_full:
                del self._open[are_whole]
            yield Part(shared.number, at, some, own, shared)

    def put(
        self,
        part: Part,
        memory: memoryview,
        digests: Mapping[int, bytes],
        groups: Mapping[int, bytes],
        *,
        hurry: bool,
    ) -> None:
        """Bring pages of a block to where they go; store the chunk if they are the last that it waits for."""
        pieces = [memory[begin * PAGE : end * PAGE] for begin, end in ranges(part.pages)]
        if (shared := part.shared) is None:
            page_digests = [digests[page] for page in part.pages]
            group_digests = [groups[head] for head in part.groups]
            self._sink.add(part.number, pieces, page_digests, group_digests, hurry=hurry)
            return
        end = part.at * PAGE
        for piece in pieces:
            begin, end = end, end + len(piece)
            shared.memory[begin:end] = piece
        with self._lock:
            shared.awaited -= len(part.pages)
            is_whole = shared.is_full and not shared.awaited
        if is_whole:
            self._store(shared, hurry=hurry)

    def finish(self) -> None:
        """Store the chunks that still have room. No other thread claims or puts meanwhile."""
        while self._open:
            self._store(self._open.popitem()[1], hurry=False)

    def _store(self, shared: _Shared, *, hurry: bool) -> None:
        memory = memoryview(shared.memory)[: len(shared.page_digests) * PAGE]
        self._sink.add(shared.number, [memory], shared.page_digests, shared.group_digests, hurry=hurry)
