"""A file that appears: for any script, and for a hook that has no more than a shell."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from crcli.errors import UsageError
from crcli.notice.base import Notice, seconds
from crcli.notice.signals import LOOK_S

if TYPE_CHECKING:
    import threading

    from crcli.notice.base import Source, Surroundings, Tell

SAVED = ".saved"
_MOST_BYTES = 4096


class FileAppears:
    """Tells when a file is there, each time that it appears; one that is there already counts.

    Its first line may hold the seconds that are left, or any words, which are the reason then. Whoever
    waits for the job to be saved finds PATH.saved when it is (of several jobs that share a file, when the
    first is). Nothing removes the file but who made it: for as long as it is there, this node is one that
    goes away.
    """

    def __init__(self, name: str, path: str, surroundings: Surroundings, says: str = "") -> None:
        self.name = name
        self._path = path
        self._says = says or f"{path} is there"
        self._surroundings = surroundings

    def watch(self, tell: Tell, stopped: threading.Event) -> None:
        """Look a few times a second."""
        was_there = False
        while not stopped.is_set():
            text = self._read(stopped)
            if text is not None and not was_there:
                tell(self._notice(text))
            was_there = text is not None
            stopped.wait(LOOK_S)

    def _read(self, stopped: threading.Event) -> str | None:
        """The file's first line; None while there is no file."""
        line = self._first_line()
        if line == "":  # made a moment ago, maybe, and not written yet
            stopped.wait(LOOK_S)
            line = self._first_line()
        return line

    def _first_line(self) -> str | None:
        try:
            # Not blocking: what appears may be a FIFO that nobody writes to.
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError:
            return ""  # it is there
        try:
            return os.read(fd, _MOST_BYTES).decode("utf-8", "replace").partition("\n")[0].strip()
        except OSError:
            return ""
        finally:
            os.close(fd)

    def _notice(self, line: str) -> Notice:
        left_s = seconds(line)
        says = self._says if left_s is not None or not line else f"{self._says}: {line[:200]}"
        deadline = self._surroundings.deadline() if left_s is None else time.monotonic() + left_s
        return Notice(self.name, says, deadline=deadline, on_saved=self._saved)

    def _saved(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        os.close(os.open(self._path + SAVED, flags, 0o644))


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The source of `--notice file:/PATH`."""
    if not argument.startswith("/"):
        raise UsageError(f"--notice file: takes the full path of a file, not {argument!r}")
    if os.path.isdir(argument):  # it is there, and would be word to leave at once
        raise UsageError(f"--notice file:{argument} is a folder", hint="name a file that is to appear in it")
    return [FileAppears(name, argument, surroundings)]
