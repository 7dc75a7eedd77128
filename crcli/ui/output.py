"""This process's standard streams: there, whoever closed them, and never a reason for a command to fail.

What a command does is more than what it prints: a tree was dumped and killed though the disk that its report
was to go to is full. So an error of stdout is kept until the command has ended (`Output.ended_with`), and one
of stderr is nobody's.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

_ACTS = {
    *(
        ("dump",),
        ("restore",),
        ("run",),
        ("watch",),
        ("demo",),
        ("rm",),
        ("pin",),
        ("unpin",),
        ("cp",),
        ("gc",),
    ),
    *(("lease", "break"), ("weights", "index"), ("weights", "push"), ("weights", "rm"), ("cache", "clear")),
}
"""Commands whose exit code says what they did. What others do is to print."""


class Output(io.RawIOBase):
    """Stdout, of which whoever prints hears no errors."""

    def __init__(self) -> None:
        self._error: OSError | None = None
        self.has_spoken = False

    @classmethod
    def installed(cls) -> Output:
        """Open what is closed of the standard streams (it leads nowhere then), and become stdout.

        To be called before anything is opened: it could get the number of a stream that is closed, and be
        written into, or be taken for the terminal of a restored tree.
        """
        for number, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
            _see_open(number, mode)
        sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
        sys.stderr = sys.stderr or os.fdopen(2, "w", errors="backslashreplace", closefd=False)
        output = cls()
        encoding = sys.stdout.encoding if sys.stdout else None
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(output),
            encoding=encoding,
            errors="backslashreplace",  # as on stderr: names of files and commands are any bytes
            line_buffering=os.isatty(1),
        )
        return output

    def writable(self) -> bool:
        """It is for nothing else."""
        return True

    def fileno(self) -> int:
        """That of stdout."""
        return 1

    def isatty(self) -> bool:
        """Whether somebody looks at it."""
        return os.isatty(1)

    def write(self, data: Buffer) -> int:
        """Write some of `data`; all of it goes nowhere once that has failed."""
        self.has_spoken = True
        while self._error is None:
            try:
                return os.write(1, data)
            except BlockingIOError:  # whoever we share it with wants it so
                select.select([], [1], [])
            except OSError as error:
                self._error = error
        return memoryview(data).nbytes

    def ended_with(self, code: int, arguments: Sequence[str]) -> int:
        """The exit code of a command that ended with `code`, and whose output may be lost."""
        sys.stdout.flush()
        if self._error is None:
            return code
        has_gone = self._error.errno == errno.EPIPE
        if not has_gone:  # `crcli ls | head` is nothing to speak of
            _tell(f"crcli: the output could not be written: {self._error.strerror}\n")
        if code or not _ACTS.isdisjoint((tuple(arguments[:1]), tuple(arguments[:2]))):
            return code
        return 128 + signal.SIGPIPE if has_gone else 1


def has_answered() -> bool:
    """Whether something was printed on stdout, which a command does once under --json."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, Output) and raw.has_spoken


def _see_open(number: int, mode: int) -> None:
    try:
        os.fstat(number)
    except OSError:
        os.open(os.devnull, mode)  # it gets the lowest number that is free
        os.set_inheritable(number, True)


def _tell(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass
