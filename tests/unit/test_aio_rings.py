"""What is under way of libaio's is waited for: with a ring of this process's own."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from crcli.process import aio

SETUP, DESTROY, SUBMIT = (0, 1, 2) if os.uname().machine == "aarch64" else (206, 207, 209)
POLL, READABLE = 5, 1

libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def begun(*pipes: int) -> Iterator[None]:
    """Within the block it is waited for with a ring, each by itself, that these pipes can be read."""
    context = ctypes.c_ulong()
    if libc.syscall(SETUP, 8, ctypes.byref(context)):
        pytest.skip("this kernel has no aio")
    try:
        for pipe in pipes:
            request = struct.pack("=QIIHhIQQqQII", 0, 0, 0, POLL, 0, pipe, READABLE, 0, 0, 0, 0, 0)
            buffer = ctypes.create_string_buffer(request, len(request))
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
            if libc.syscall(SUBMIT, context, 1, pointers) != 1:
                pytest.skip("this kernel polls nothing with aio")
        yield
    finally:
        libc.syscall(DESTROY, context)


def test_what_ends_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request ends after the other while it is waited; then nothing does, and that is all."""
    pipes = [os.pipe() for _ in range(3)]
    left = list(pipes)
    sleep = aio.time.sleep

    def end_one(seconds: float) -> None:
        if left:
            os.write(left.pop()[1], b"x")
        sleep(seconds)

    with begun(*(reader for reader, _ in pipes)):
        rings = aio.Rings([os.getpid()])
        monkeypatch.setattr(aio.time, "sleep", end_one)
        assert rings.settle(60.0) and not left
        assert not rings.have_moved()
    for ends in pipes:
        for end in ends:
            os.close(end)


def test_what_ends_later_is_seen() -> None:
    """A request that takes longer than any disk may ends after that: this is told."""
    reader, writer = os.pipe()
    with begun(reader):
        rings = aio.Rings([os.getpid()])
        assert rings.settle(60.0) and not rings.have_moved()
        os.write(writer, b"x")
        assert rings.have_moved()
    os.close(reader), os.close(writer)


def test_it_is_not_waited_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not come to an end is said after the time that was given."""
    pipes = [os.pipe() for _ in range(8)]
    left = list(pipes)
    sleep = aio.time.sleep

    def end_one(seconds: float) -> None:
        os.write(left.pop()[1], b"x")
        sleep(seconds)

    with begun(*(reader for reader, _ in pipes)):
        rings = aio.Rings([os.getpid()])
        monkeypatch.setattr(aio.time, "sleep", end_one)
        assert not rings.settle(0.0)
    for ends in pipes:
        for end in ends:
            os.close(end)


def test_a_process_without_a_ring_is_not_waited_for() -> None:
    """Nor one that is gone."""
    rings = aio.Rings([os.getpid(), 1 << 22])
    assert rings.settle(0.0) and not rings.have_moved()
