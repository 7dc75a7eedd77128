"""Lets a program learn that crcli is about to dump it, and that it was restored.

    from crcli import notify

    notify.on_checkpoint(pool.close)    # a dump comes: it waits for this, up to 2 s
    notify.on_resume(pool.open)         # the dump is over, or failed, and the program just goes on
    notify.on_restore(pool.open)        # it was restored, maybe long after and on another machine

    while notify.wait_restored():       # or wait for it
        reconnect()

The program need not be started by crcli. This file needs nothing but Python 3.8 and its standard library, so
it can also be copied beside a program. Where the kernel or the platform lacks what it needs, nothing is ever
called.

Callbacks run in a thread of this module's, one after another in the order in which they were registered; what
one raises is printed, and the next one is called. In asyncio let them call
`loop.call_soon_threadsafe(event.set)`. A forked child starts without callbacks, and registers its own.

How it works: the program holds a memfd with a name of its own, the board. crcli finds it among the files of
the tree, writes there what happens, and a byte into the pipe whose number stands on the board. The board
travels in the image like all of the program's memory.

The board is 32 bytes, little-endian, and begins with `MAGIC`. The program writes, each a u32, 8: the version;
12: the descriptor of the pipe's writing end; 16: how many on_checkpoint callbacks there are; 20: the number
of the last checkpoint for which they have run. crcli writes 24: an event's number << 2 | what it is; and 28:
how often the program was restored.
"""

from __future__ import annotations

import os
import select
import struct
import sys
import threading
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["on_checkpoint", "on_restore", "on_resume", "wait_restored"]

NAME = "crcli-notify"
"""The memfd's name: /proc/PID/fd shows it as `/memfd:crcli-notify (deleted)`."""

MAGIC = b"crclinfy"
VERSION = 1
HEAD = struct.Struct("<8sIIIIII")
NUMBER = struct.Struct("<I")
EVENT = struct.Struct("<II")
AT_CALLBACKS, AT_DONE, AT_EVENT = 16, 20, 24
CHECKPOINT, RESUMED, RESTORED = 1, 2, 3

SILENCE_S = 10.0
"""A checkpoint of which nothing more is heard for so long (seconds) is over: whoever announced it is gone."""


def on_checkpoint(function: Callable[[], object]) -> None:
    """Have `function` called when a dump is about to freeze this process.

    The dump waits for it, but not for ever (`crcli dump --notify-wait`, 2 s): what takes longer goes on after
    the dump, or after the restore. on_resume or on_restore follows. A dump that is short of time
    (`--deadline`) tells nobody.
    """
    _register("checkpoint", function)


def on_resume(function: Callable[[], object]) -> None:
    """Have `function` called when the process goes on where it was, after on_checkpoint's were called.

    The dump left it running, or failed, or 10 s passed and it never came.
    """
    _register("resume", function)


def on_restore(function: Callable[[], object]) -> None:
    """Have `function` called after each restore of this process, as soon as it runs again."""
    _register("restore", function)


def wait_restored(timeout: float | None = None) -> bool:
    """Wait until this process was restored; True when it was, False when `timeout` seconds went by.

    A restore counts once for each thread that asks: one since the thread's last call that returned True
    (before that: since this module was first used) is reported at once. So `wait_restored(0)` just asks. It
    returns after the on_restore callbacks have.
    """
    if threading.current_thread() is _state.thread:
        raise RuntimeError("a callback of crcli.notify cannot wait for a restore")
    state = _state.started()
    with state.changed:
        seen = getattr(state.seen, "restores", 0)
        if not state.changed.wait_for(lambda: state.restores != seen, timeout):
            return False
        state.seen.restores = state.restores
        return True


def _register(kind: str, function: Callable[[], object]) -> None:
    if not callable(function):
        raise TypeError(f"{function!r} cannot be called")
    state = _state.started()
    with state.lock:
        state.callbacks[kind].append(function)
        if kind == "checkpoint" and state.board is not None:
            state.board.write(AT_CALLBACKS, len(state.callbacks[kind]))


class _Board:
    """The memfd and the pipe. Raises OSError, or AttributeError, where there can be none."""

    def __init__(self) -> None:
        self.memory = os.memfd_create(NAME)
        self.wake, writer = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(writer, False)
        os.pwrite(self.memory, HEAD.pack(MAGIC, VERSION, writer, 0, 0, 0, 0), 0)
        self._writer = writer

    def is_ours(self) -> bool:
        """Whether the descriptor still is the board: the program may have closed all that it did not know."""
        try:
            return os.pread(self.memory, len(MAGIC), 0) == MAGIC
        except OSError:
            return False

    def write(self, at: int, value: int) -> None:
        if self.is_ours():
            os.pwrite(self.memory, NUMBER.pack(value), at)

    def read(self) -> tuple[int, int]:
        """The last event, and how often the process was restored."""
        event, restores = EVENT.unpack(os.pread(self.memory, EVENT.size, AT_EVENT))
        return event, restores

    def wait(self, seconds: float | None) -> None:
        """Wait for word from crcli, or so long."""
        poll = select.poll()
        poll.register(self.wake, select.POLLIN)
        if poll.poll(None if seconds is None else max(0, int(seconds * 1000))) and self.is_ours():
            try:
                os.read(self.wake, 4096)
            except BlockingIOError:
                pass

    def close(self) -> None:
        for fd in (self.memory, self.wake, self._writer):
            try:
                os.close(fd)
            except OSError:
                pass


class _State:
    """What this process has registered, and the thread that listens for it."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition()
        self.seen = threading.local()
        self.callbacks: dict[str, list[Callable[[], object]]] = {
            "checkpoint": [],
            "resume": [],
            "restore": [],
        }
        self.restores = 0
        self.board: _Board | None = None
        self.thread: threading.Thread | None = None

    def started(self) -> _State:
        """Make the board and the thread, unless they are there, or cannot be."""
        with self.lock:
            if self.board is None or not self.board.is_ours():
                try:
                    self.board = _Board()
                except (OSError, AttributeError):
                    return self
                self.board.write(AT_CALLBACKS, len(self.callbacks["checkpoint"]))
                self.thread = threading.Thread(
                    target=self._listen, args=(self.board,), name=NAME, daemon=True
                )
                self.thread.start()
        return self

    def _listen(self, board: _Board) -> None:
        event = restores = 0
        silent_at: float | None = None  # when a checkpoint that was announced counts as over
        while True:
            board.wait(None if silent_at is None else silent_at - time.monotonic())
            if board is not self.board or not board.is_ours():
                return
            before, (event, now) = event, board.read()
            if now != restores:
                restores, silent_at = now, None
                self._restored()
            elif silent_at is not None and (event != before or time.monotonic() >= silent_at):
                silent_at = None
                self._call("resume")
            if event != before and event & 3 == CHECKPOINT:
                self._call("checkpoint")
                board.write(AT_DONE, event >> 2)
                silent_at = time.monotonic() + SILENCE_S

    def _restored(self) -> None:
        self._call("restore")
        with self.changed:
            self.restores += 1
            self.changed.notify_all()

    def _call(self, kind: str) -> None:
        with self.lock:
            functions = list(self.callbacks[kind])
        for function in functions:
            try:
                function()
            except Exception:
                _complain()


def _complain() -> None:
    import traceback  # 2 ms that only a callback which fails needs

    try:
        traceback.print_exc(file=sys.stderr)
    except (OSError, ValueError, AttributeError):
        pass  # there is no stderr any more


def _forget() -> None:
    """In a forked child: the board is its parent's."""
    global _state
    if _state.board is not None:
        _state.board.close()
    _state = _State()


_state = _State()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
