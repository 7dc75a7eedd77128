"""Passing a tree's terminals, and what it writes into pipes, on to our own, for as long as we stay."""

from __future__ import annotations

import errno
import os
import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from msgspec import Struct, field

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEAVE_ALTERNATE_SCREEN = b"\x1b[?1049l\x1b[?25h"
_PIECE = 1 << 16
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Relay(Struct):
    """The other sides of a tree's terminals, and of pipes with where to each leads: a descriptor of ours."""

    masters: list[int] = field(default_factory=list)
    outputs: list[tuple[int, int]] = field(default_factory=list)
    _readers: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Pass on what comes, each in a thread of its own: from here on no fork. Again is no harm."""
        if self._readers:
            return
        for pair in self.outputs:
            self._readers.append(threading.Thread(target=_pass_output, args=pair, daemon=True))
        for master in self.masters:
            self._readers.append(threading.Thread(target=_pass, args=(master, 1), daemon=True))
        for reader in self._readers:
            reader.start()
        if self.masters:
            threading.Thread(target=_pass, args=(0, self.masters[0]), daemon=True).start()

    def finish(self, limit_s: float) -> None:
        """The tree has ended: return once all that it wrote is passed on, or after so many seconds."""
        for reader in self._readers:
            reader.join(limit_s)

    def close(self) -> None:
        """Give the other sides back, of a tree that never came to be."""
        for fd in {*self.masters, *(source for source, _ in self.outputs)}:
            os.close(fd)
        self.masters.clear()
        self.outputs.clear()

    def resize(self) -> None:
        """Give the terminals the size of ours: the kernel tells their programs when it is another one."""
        import fcntl
        import termios

        if self.masters and os.isatty(0):
            size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8))
            for master in self.masters:
                fcntl.ioctl(master, termios.TIOCSWINSZ, size)

    @contextmanager
    def raw_terminal(self) -> Iterator[None]:
        """While in the block our terminal passes every key on and lends its size; then it is as before."""
        if not self.masters or not os.isatty(0):
            yield
            return
        import termios
        import tty

        before = termios.tcgetattr(0)
        tty.setraw(0, termios.TCSADRAIN)  # what was typed already is for the tree
        try:
            self.resize()
            yield
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
            os.write(1, _LEAVE_ALTERNATE_SCREEN)


def _pass_output(pipe: int, target: int) -> None:
    """Move all that comes; when the target takes no more, nobody reads the pipe either."""
    _pass(pipe, target)
    os.close(pipe)


def _pass(source: int, target: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread
    try:
        while data := os.read(source, _PIECE):
            _write(target, data)
    except OSError:
        pass  # the other side is gone: the tree has ended, or who read what it writes


def _write(target: int, data: bytes) -> None:
    """Write all of it, or what there is room for: a disk that is full now may have room later, and a program
    that does not care for its output goes on meanwhile."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(target, rest) :]
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            return
