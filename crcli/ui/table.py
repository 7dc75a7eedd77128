"""Tables: drawn by rich on a terminal, aligned plain columns where the output goes to a file or a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

from crcli.ui.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Print rows of text below their headings; columns named in `right` are numbers."""
    safe = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    if sys.stdout.isatty():
        _show_rich(columns, safe, right)
    else:
        _show_plain(columns, safe, right)


def _show_plain(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    lines = [list(columns), *rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    for line in lines:
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(line, widths, columns, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _show_rich(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    # Names stand in the first column. They are copied from here, so they stay whole where there is room.
    is_whole = max((len(row[0]) for row in rows), default=0) <= console.width * 2 // 3
    for number, name in enumerate(columns):
        justify: Literal["left", "right"] = "right" if name in right else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=is_whole and number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: nothing in it is taken for markup
    console.print(table)
