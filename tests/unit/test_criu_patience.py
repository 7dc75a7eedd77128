"""How long CRIU is waited for: its limit runs only while it does nothing and we hold nothing up."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest

from crcli.criu.rpc import CriuDied, CriuProcess, CriuTimeout, rpc
from crcli.memory.extents import PAGE
from crcli.memory.intake import Intake, receive_exactly
from crcli.pipeline.interrupts import interruptible
from crcli.pipeline.receiver import Receiver

LIMIT_S = 0.5
_ADD_PRESENT = 6 | 4 << 16
_OWNER = 7 << 8 | 1


class Slow:
    """An intake that takes nothing until it may."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.taken = threading.Event()

    def begin_space(self, *_: object) -> None:
        """Nothing is to be done."""

    def has_parent(self, *_: object) -> bool:
        """There was no round before."""
        return False

    def receive(self, channel: socket.socket, space: object, start: int, pages: int, lazy: bool) -> None:
        """Take the pages, as soon as that may be."""
        self.may.wait(60)
        receive_exactly(channel, memoryview(bytearray(pages * PAGE)))
        self.taken.set()


def header(command: int, pages: int, address: int) -> bytes:
    """What CRIU sends before pages."""
    return struct.pack("<I4xQQQ", command, pages, address, _OWNER)


@contextmanager
def receiving(intake: Slow) -> Iterator[tuple[Receiver, socket.socket]]:
    """A receiver that has been told of a space, and CRIU's end of its channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    receiver = Receiver(ours, cast(Intake, intake))
    receiver.start()
    with ours, theirs:
        theirs.sendall(header(5, 0, 0))
        theirs.recv(1)
        yield receiver, theirs
        intake.may.set()
        receiver.end()


def answered_after(seconds: float, idle_since: Callable[[], float]) -> Any:
    """What a request gives that CRIU answers so late."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    answer = rpc.criu_resp(type=rpc.DUMP, success=True).SerializeToString()
    timer = threading.Timer(seconds, theirs.send, [answer])
    timer.start()
    with ours, theirs:
        try:
            return CriuProcess(ours, None).request(
                rpc.DUMP, rpc.criu_opts(images_dir_fd=-1), lambda *_: True, LIMIT_S, idle_since
            )
        finally:
            timer.cancel()
            timer.join()


def test_the_limit_does_not_run_while_we_take_nothing() -> None:
    """CRIU waits for a store that is slow, and is not to blame."""
    intake = Slow()
    with receiving(intake) as (receiver, criu):
        criu.sendall(header(_ADD_PRESENT, 1, 0x10000) + bytes(PAGE))
        assert answered_after(4 * LIMIT_S, receiver.idle_since).success


def test_the_limit_begins_anew_with_each_page() -> None:
    """As long as pages come CRIU is seen to work."""
    intake = Slow()
    intake.may.set()
    with receiving(intake) as (receiver, criu):

        def send() -> None:
            for number in range(30):
                criu.sendall(header(_ADD_PRESENT, 1, 0x10000 + number * PAGE) + bytes(PAGE))
                time.sleep(LIMIT_S / 10)

        sender = threading.Thread(target=send)
        sender.start()
        assert answered_after(3 * LIMIT_S, receiver.idle_since).success
        sender.join()


def test_a_wait_that_is_cut_short_is_no_end() -> None:
    """CRIU is killed while its last pages are waited for: the thread is known to take them still, and it has
    ended before what it writes into is closed."""
    intake = Slow()
    with receiving(intake) as (receiver, criu):
        criu.sendall(header(_ADD_PRESENT, 1, 0x10000) + bytes(PAGE))
        killed = CriuDied("killed")
        with interruptible() as interrupts, pytest.raises(CriuDied):
            threading.Timer(0.1, interrupts.abort, [killed]).start()
            receiver.join()
        assert receiver.is_alive()
        intake.may.set()
        receiver.end()
        assert intake.taken.is_set() and not receiver.is_alive()


def test_a_criu_that_does_nothing_is_given_up() -> None:
    """Once all that it sent is taken in, the limit runs."""
    intake = Slow()
    intake.may.set()
    with receiving(intake) as (receiver, criu):
        criu.sendall(header(_ADD_PRESENT, 1, 0x10000) + bytes(PAGE))
        assert intake.taken.wait(10)
        with pytest.raises(CriuTimeout):
            answered_after(60.0, receiver.idle_since)


def test_while_criu_works_on_something_else_can_be_done() -> None:
    """Once it has our answer, and only where that was to go on."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for script in ("pre-dump", "post-dump"):
        notice = rpc.criu_notify(script=script, pid=1)
        theirs.send(rpc.criu_resp(type=rpc.NOTIFY, success=True, notify=notice).SerializeToString())
    theirs.send(rpc.criu_resp(type=rpc.DUMP, success=True).SerializeToString())
    heard: list[tuple[str, int]] = []

    def on_answered(script: str) -> None:
        said = [rpc.criu_req.FromString(theirs.recv(1 << 16)) for _ in range(1 if heard else 2)]
        heard.append((script, said[-1].notify_success))

    with ours, theirs:
        CriuProcess(ours, None).request(
            rpc.DUMP,
            rpc.criu_opts(images_dir_fd=-1),
            lambda script, _: script == "pre-dump",
            on_answered=on_answered,
        )
    assert heard == [("pre-dump", True)]
