"""Digests looked up: of many that were read, the row in which one stands.

They are told apart by their first bytes, and then compared in full: nothing is found that is not the same.
Who writes many down writes a table beside them, so that who reads them can look them up at once.
"""

from __future__ import annotations

from array import array
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

from crcli.errors import ImageDamaged
from crcli.memory.blocks import DIGEST, KEY

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from crcli.store.base import Buffer

FEW_DIGESTS = 1 << 19
"""Up to so many (those of 2 GiB of pages) are looked up without numpy, whose import takes 0.1 s."""

WORTH_A_TABLE = 1 << 14
"""Fewer digests are sorted when they were read, in a few ms."""

TABLE_LIMIT = 4 << 20
"""A table of more digests than this (those of 16 GiB) would take too much memory, of who makes it too."""


_FARTHEST = 256
"""An entry stands at most so many behind where it should; one for which there is no room there is left out.
Only a page that was stored again and again comes to that: each search for a place for it would pass all of
its others (20000 of them took 23 s)."""

_LONGEST = 1024
"""A stored table with so many entries in use one after another is none of ours: searches would take long."""


class Digests(Protocol):
    """Digests that can be looked up. Called from several threads."""

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """For each digest the row in which it stands, or None."""
        ...


def sort_digests(joined: bytes) -> Digests:
    """Digests that follow one another, made ready to be looked up."""
    return (_FewDigests if len(joined) <= FEW_DIGESTS * DIGEST else _ManyDigests)(joined)


def keys_of(joined: bytes) -> bytes:
    """The first KEY bytes of each digest."""
    return memoryview(joined).cast("Q")[:: DIGEST // KEY].tobytes()


class TableMaker:
    """A table by which digests are found that are written down: see FORMAT.md. It is made as they come, while
    other threads have something else to do than to wait for Python's lock."""

    def __init__(self) -> None:
        self._expected = 0
        self._keys = array("I")
        self._table = array("I")

    def expect(self, count: int) -> None:
        """So many digests may come, or fewer."""
        self._expected = count

    def add(self, joined: bytes) -> None:
        """Take note of the next digests."""
        if len(self._keys) > TABLE_LIMIT:
            return
        begin = len(self._keys)
        self._keys.frombytes(memoryview(joined).cast("I")[:: DIGEST // 4].tobytes())
        if len(self._keys) > TABLE_LIMIT:
            self._table = array("I")
        elif self._has_room():
            _fill(self._table, self._keys, begin)
        elif not self._table and WORTH_A_TABLE <= len(self._keys) <= self._expected:
            self._table = _empty_table(min(self._expected, TABLE_LIMIT))
            _fill(self._table, self._keys, 0)

    def _has_room(self) -> bool:
        return len(self._keys) * 4 <= len(self._table) * 3

    def table(self) -> Buffer:
        """The table of all; empty where they are too few, or too many."""
        if not WORTH_A_TABLE <= len(self._keys) <= TABLE_LIMIT:
            return b""
        if not self._has_room() or len(self._keys) * 4 < len(self._table):
            self._table = _empty_table(len(self._keys))
            _fill(self._table, self._keys, 0)
        return memoryview(self._table).cast("B")


def _empty_table(count: int) -> array[int]:
    return array("I", bytes(4 << (count * 3 // 2).bit_length()))


def _fill(table: array[int], keys: array[int], begin: int) -> None:
    """Enter the rows from `begin` on, where there is room for them."""
    last = len(table) - 1
    for row, key in enumerate(keys[begin:], begin + 1):
        slot = key & last
        end = slot + _FARTHEST
        while table[slot & last] and slot < end:
            slot += 1
        if slot < end:
            table[slot & last] = row


def read_table(data: bytes, name: str) -> memoryview:
    """A table that was stored; raise ImageDamaged when it is none in which a search soon comes to an end."""
    if len(data) < 4 or len(data) & (len(data) - 1):
        raise ImageDamaged(f"{name}: the table of page digests is none")
    table = memoryview(data).cast("I")
    if not all(0 in table[at : at + _LONGEST] for at in range(0, len(table), _LONGEST)):
        raise ImageDamaged(f"{name}: the table of page digests has too few free entries")
    return table


class TabledDigests:
    """Digests with a table that was stored: nothing is made ready.

    Most of those that are looked for stand in the rows one after another, as most of a tree's memory does
    that was changed here and there: the next row is tried first.
    """

    def __init__(self, joined: bytes, table: memoryview) -> None:
        self._joined = joined
        self._table = table

    def __len__(self) -> int:
        return len(self._joined) // DIGEST

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """See Digests."""
        table, last, is_at = self._table, len(self._table) - 1, self._joined.startswith
        found: list[int | None] = []
        add, expected = found.append, len(self._joined)
        keys = memoryview(b"".join(digests)).cast("I")[:: DIGEST // 4]
        for digest, key in zip(digests, keys, strict=True):  # tens of thousands: little is called here
            if is_at(digest, expected):
                add(expected // DIGEST)
            else:
                slot = key & last
                while (row := table[slot]) and not is_at(digest, (row - 1) * DIGEST):
                    slot = slot + 1 & last
                add(row - 1 if row else None)
                expected = (row - 1) * DIGEST if row else expected
            expected += DIGEST
        return found


class SeveralDigests:
    """Digests in several places, which are asked in turn; the rows of one follow those of the one before."""

    def __init__(self, parts: Sequence[Digests], sizes: Iterable[int]) -> None:
        self._parts = list(zip(parts, accumulate(sizes, initial=0), strict=False))

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """See Digests."""
        rows: list[int | None] = [None] * len(digests)
        open_ = list(range(len(digests)))
        for part, first in self._parts:
            found = part.find([digests[at] for at in open_])
            for at, row in zip(open_, found, strict=True):
                if row is not None:
                    rows[at] = first + row
            open_ = [at for at, row in zip(open_, found, strict=True) if row is None]
        return rows


class _FewDigests:
    """Digests in a dictionary: 100 bytes for each, which is less trouble than to import numpy."""

    def __init__(self, joined: bytes) -> None:
        self._joined = joined
        keys = _numbers(joined)
        self._rows = dict(
            zip(reversed(keys), range(len(keys) - 1, -1, -1), strict=True)
        )  # the first one wins

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """See Digests."""
        is_at = self._joined.startswith
        rows = map(self._rows.get, _numbers(b"".join(digests)))
        return [
            row if row is not None and is_at(digest, row * DIGEST) else None
            for row, digest in zip(rows, digests, strict=True)
        ]


def _numbers(joined: bytes) -> list[int]:
    """The first KEY bytes of each digest, as a number."""
    return memoryview(joined).cast("Q")[:: DIGEST // KEY].tolist()


class _ManyDigests:
    """Digests in an array, sorted by their first bytes: 12 bytes more for each."""

    def __init__(self, joined: bytes) -> None:
        import numpy as np

        self._np: Any = np
        self._rows: Any = np.frombuffer(joined, dtype="<u8").reshape(-1, DIGEST // KEY)
        order = np.argsort(self._rows[:, 0], kind="stable")
        self._order: Any = order.astype(np.uint32)
        self._keys: Any = self._rows[order, 0]

    def find(self, digests: Sequence[bytes]) -> list[int | None]:
        """See Digests."""
        if not digests:
            return []
        np = self._np
        asked = np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, DIGEST // KEY)
        at = np.searchsorted(self._keys, asked[:, 0])
        at[at == len(self._keys)] = 0
        rows = self._order[at]
        same = (self._rows[rows] == asked).all(axis=1)
        return [row if here else None for row, here in zip(rows.tolist(), same.tolist(), strict=True)]
