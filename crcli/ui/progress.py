"""Progress on stderr: one changing line on a terminal, plain lines elsewhere, nothing under --json.

The line is drawn by hand and not by rich: importing that takes as long as a whole freeze, and may fall into
one.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from crcli.findings import Severity
from crcli.pipeline.stages import Silent
from crcli.ui.text import printable, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.findings import Finding
    from crcli.pipeline.stages import Progress

QUIET_S = 1.0
"""What takes no longer than this (seconds) shows no progress."""

_REFRESH_S, _LASTS_S, _AGAIN_S = 0.2, 2.0, 30.0
"""How soon a line is drawn again; how soon a log says what lasts (a second more than every restore looks on
for), and says it again (seconds)."""

_ERASE = "\r\x1b[K"


@contextmanager
def showing(as_json: bool) -> Iterator[Progress]:
    """Give a Progress that suits stderr, and put the terminal in order afterwards."""
    if as_json:
        yield Silent()
    elif sys.stderr.isatty():
        line = StatusLine()
        try:
            yield line
        finally:
            line.close()
    else:
        lines = PlainLines()
        try:
            yield lines
        finally:
            lines.close()


def remark(text: str) -> None:
    """Leave a line for what is to be known while something is waited for; a progress line gives way to it."""
    _write(f"{_ERASE if sys.stderr.isatty() else ''}{printable(f'crcli: {text}')}\n")


class PlainLines:
    """Progress for a log: a line for each finding that changes something, and for phases of slow work, with
    how far they are as long as they last."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._phase = ""
        self._amount = (0, 0)
        self._over = threading.Event()
        self._writer: threading.Thread | None = None

    def phase(self, name: str) -> None:
        """Say what is being done, once it has become worth saying."""
        self._phase, self._amount = name, (0, 0)
        if self._writer is None:  # not before: a restore forks its pager while there are no threads
            self._writer = threading.Thread(target=self._work, name="progress", daemon=True)
            with suppress(RuntimeError):  # where no thread is to be had, phases are said as they begin
                self._writer.start()
        if time.monotonic() - self._begun > QUIET_S:
            self._say()

    def amount(self, done: int, total: int) -> None:
        """Note how far the phase is."""
        self._amount = (done, total)

    def close(self) -> None:
        """Say nothing more."""
        self._over.set()
        if self._writer is not None and self._writer.is_alive():
            self._writer.join()

    def _work(self) -> None:
        wait = _LASTS_S
        while not self._over.wait(wait):
            wait = _AGAIN_S
            self._say()

    def _say(self) -> None:
        _write(f"crcli: {self._phase} ({time.monotonic() - self._begun:.1f} s){_amount(*self._amount)}\n")

    def finding(self, finding: Finding) -> None:
        """Say what will not be as it was."""
        if finding.severity != Severity.NOTE:
            _write(_sentence(finding) + "\n")


class StatusLine:
    """Progress for a terminal: the phase, the time, the amount, on one line that vanishes at the end."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._phase = ""
        self._amount = (0, 0)
        self._drawn = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._painter = threading.Thread(target=self._paint, name="progress", daemon=True)
        self._painter.start()

    def phase(self, name: str) -> None:
        """Show another phase."""
        self._phase, self._amount = name, (0, 0)

    def amount(self, done: int, total: int) -> None:
        """Show how far the phase is."""
        self._amount = (done, total)

    def finding(self, finding: Finding) -> None:
        """Leave a line above for what will not be as it was."""
        if finding.severity != Severity.NOTE:
            with self._lock:
                self._clear()
                _write(_sentence(finding) + "\n")

    def close(self) -> None:
        """Stop, and leave the line empty."""
        self._over.set()
        self._painter.join()
        self._clear()

    def _paint(self) -> None:
        wait = QUIET_S
        while not self._over.wait(wait):
            wait = _REFRESH_S
            with self._lock:
                self._drawn = True
                _write(f"{_ERASE}{self._text()}")

    def _text(self) -> str:
        return f"{self._phase}  {time.monotonic() - self._begun:.0f} s{_amount(*self._amount)}"

    def _clear(self) -> None:
        if self._drawn:
            self._drawn = False
            _write(_ERASE)


def _amount(done: int, total: int) -> str:
    text = f"  {size(done)}" if done else ""
    return f"{text} of {size(total)} ({min(100, done * 100 // total)} %)" if done and total else text


def _sentence(finding: Finding) -> str:
    action = f" [crcli {finding.action}]" if finding.action else ""
    return printable(f"{finding.severity.value}: {finding.message}{action}")


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        pass  # a terminal that went away must not end what is being done
