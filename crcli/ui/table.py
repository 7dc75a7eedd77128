"""Tables: drawn by rich on a terminal, aligned plain columns where the output goes to a file or a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from crcli.ui.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence


_GAP = "  "

_LAST_COLUMN = 30
"""So much room (characters) a long last column needs to be broken into lines of its own."""


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows of text below their headings; columns named in `right` are numbers."""
    safe = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    if sys.stdout.isatty():
        _show_rich(columns, safe, right)
    else:
        _show_plain(columns, safe, right)


def _show_plain(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    lines = [columns, *rows]
    widths = _widths(lines)
    for line in lines:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ]
        print(_GAP.join(cells).rstrip())


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """How wide each column is (characters)."""
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _show_rich(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = _widths([columns, *rows])
    if console.width - sum(widths[:-1]) - len(_GAP) * (len(widths) - 1) < min(widths[-1], _LAST_COLUMN):
        _show_plain(columns, rows, right)  # the terminal breaks each line once, not every cell
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, len(_GAP), 0, 0))
    for number, name in enumerate(columns, 1):
        justify: Literal["left", "right"] = "right" if name in right else "left"
        # Names, ids and times are copied from here: they stay whole, and what is said last takes the rest.
        table.add_column(name, justify=justify, overflow="fold", no_wrap=number < len(columns))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: nothing in it is taken for markup
    console.print(table)
