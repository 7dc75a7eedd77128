"""Passing a tree's terminals, and what it writes into pipes, on to our own, for as long as we stay."""

from __future__ import annotations

import errno
import os
import signal
import struct
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.records import Struct, field

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEAVE_ALTERNATE_SCREEN = b"\x1b[?1049l\x1b[?25h"
_PIECE = 1 << 16

LAST_WORDS_S = 5.0
"""How long what a tree has written may take to be passed on when it has ended (seconds)."""

_LOOK_S = 0.2
"""How often it is looked whether a shell has brought us to the front (seconds)."""

_NOTICED_S = 0.05
"""How long a program may take to see the size that its terminal has for a moment (seconds)."""

_OUTPUT_MODES = 1
"""Where the modes of output are in what termios knows of a terminal."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Relay(Struct):
    """The other sides of a tree's terminals, and of pipes with where to each leads: a descriptor of ours.

    `repaints`: programs in the terminals have drawn on another screen, and are to draw again on ours.
    """

    masters: list[int] = field(default_factory=list)
    outputs: list[tuple[int, int]] = field(default_factory=list)
    repaints: bool = False
    _readers: list[threading.Thread] = field(default_factory=list)
    _is_raw: bool = False

    def start(self) -> None:
        """Pass on what comes, each in a thread of its own: from here on no fork. Again is no harm."""
        if self._readers:
            return
        for pair in self.outputs:
            self._readers.append(threading.Thread(target=_pass_output, args=pair, daemon=True))
        screen = self._screen()
        for master in self.masters:
            self._readers.append(threading.Thread(target=_pass, args=(master, screen), daemon=True))
        for reader in self._readers:
            reader.start()
        if self.masters:
            threading.Thread(target=_pass_keys, args=(self.masters[0],), daemon=True).start()

    def finish(self, limit_s: float = LAST_WORDS_S) -> None:
        """The tree has ended: return once all that it wrote is passed on, or after so many seconds."""
        end = time.monotonic() + limit_s
        for reader in self._readers:
            reader.join(max(0.0, end - time.monotonic()))

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
            if self.repaints:
                self.repaints = False
                self._resize_by_a_row(size)
            for master in self.masters:
                fcntl.ioctl(master, termios.TIOCSWINSZ, size)

    def _resize_by_a_row(self, size: bytes) -> None:
        """Give terminals that have this size another, so that programs see it change: they draw anew then."""
        import fcntl
        import termios

        rows, *others = struct.unpack("4H", size)
        for master in self.masters:
            if rows > 1 and fcntl.ioctl(master, termios.TIOCGWINSZ, bytes(8)) == size:
                fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", rows - 1, *others))
        time.sleep(_NOTICED_S)

    @contextmanager
    def raw_terminal(self) -> Iterator[None]:
        """While in the block our terminal passes every key on and lends its size; then it is as before.

        In the background, as after a shell's &, it is another's: it is left alone until it is ours.
        """
        if not self.masters or not os.isatty(0):
            yield
            return
        import termios

        before = termios.tcgetattr(0)
        over = threading.Event()
        taker = threading.Thread(target=self._take, args=(over,), daemon=True)
        if _is_in_front():
            self._take(over)
        else:
            taker.start()
        try:
            yield
        finally:
            over.set()
            if taker.ident is not None:
                taker.join()
            if self._is_raw:
                termios.tcsetattr(0, termios.TCSADRAIN, before)
                os.write(self._screen(), _LEAVE_ALTERNATE_SCREEN)

    def _take(self, over: threading.Event) -> None:
        """Make our terminal raw, once we are in front."""
        import termios
        import tty

        while not _is_in_front():
            if over.wait(_LOOK_S):
                return
        lines = termios.tcgetattr(0)[_OUTPUT_MODES]
        tty.setraw(0, termios.TCSADRAIN)  # what was typed already is for the tree
        self._is_raw = True
        if not os.isatty(1):  # it is whoever reads our output that writes there, as of a program without us
            modes = termios.tcgetattr(0)
            modes[_OUTPUT_MODES] = lines
            termios.tcsetattr(0, termios.TCSADRAIN, modes)
        self.resize()

    def _screen(self) -> int:
        """Where what the tree shows in its terminals is seen: our output; our terminal, where our output is
        something else for which the tree has a pipe."""
        if os.isatty(1) or not os.isatty(0) or 1 not in [target for _, target in self.outputs]:
            return 1
        try:
            return 2 if os.isatty(2) else os.open(os.ttyname(0), os.O_WRONLY | os.O_NOCTTY)
        except OSError:
            return 1  # it has no name here


def _pass_output(pipe: int, target: int) -> None:
    """Move all that comes; when the target takes no more, nobody reads the pipe either."""
    _pass(pipe, target)
    os.close(pipe)


def _pass_keys(master: int) -> None:
    """Move what is typed, once we are in front: who reads in the background is stopped."""
    while not _is_in_front():
        time.sleep(_LOOK_S)
    _pass(0, master)


def _is_in_front() -> bool:
    """Whether our input is for us, and may be changed; also where it is no terminal that controls us."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return True


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
