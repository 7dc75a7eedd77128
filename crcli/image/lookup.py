"""Digests looked up: of many that were read, the row in which one stands.

They are told apart by their first bytes, and then compared in full: nothing is found that is not the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from crcli.memory.classify import DIGEST

if TYPE_CHECKING:
    from collections.abc import Sequence

KEY = 8
"""The first bytes of a digest by which it is looked up."""

FEW_DIGESTS = 1 << 19
"""Up to so many (those of 2 GiB of pages) are looked up without numpy, whose import takes 0.1 s."""


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
