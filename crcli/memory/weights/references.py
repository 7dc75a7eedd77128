"""References: what stands in an image for memory that is found in files of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from crcli.memory.weights.views import View, source_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable


class Piece(NamedTuple):
    """`length` bytes of memory, which are what `view` makes of a file's bytes from `offset` on."""

    file: int
    view: View
    offset: int
    length: int

    @property
    def end(self) -> int:
        """Where its bytes end in the file."""
        return self.offset + source_bytes(self.view, self.length)


class Reference(NamedTuple):
    """Whole pages (`raw` bytes) that these pieces make, one after another; `digest` is their BLAKE3."""

    pieces: tuple[Piece, ...]
    raw: int
    digest: bytes


def found_bytes(references: Iterable[Reference]) -> dict[int, tuple[int, int]]:
    """For each file by its number: bytes of memory that are left out, and bytes of the file that they come
    from.

    Bytes of the file count once, however often they stand in memory.
    """
    memory: dict[int, int] = {}
    spans: dict[int, list[tuple[int, int]]] = {}
    for reference in references:
        for piece in reference.pieces:
            memory[piece.file] = memory.get(piece.file, 0) + piece.length
            spans.setdefault(piece.file, []).append((piece.offset, piece.end))
    return {file: (memory[file], _covered(sorted(spans[file]))) for file in sorted(memory)}


def _covered(spans: list[tuple[int, int]]) -> int:
    total = at = 0
    for begin, end in spans:
        total += max(0, end - max(begin, at))
        at = max(at, end)
    return total
