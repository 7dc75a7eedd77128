"""Progress on stderr: lines where it is no terminal, nothing for programs that asked for JSON."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.pipeline.stages import Silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.pipeline.stages import Progress


@contextmanager
def showing(as_json: bool) -> Iterator[Progress]:
    """Give a Progress that suits stderr, and put the terminal in order afterwards."""
    yield Silent()
