"""Bytes read out of the memory of a process that stands still."""

from __future__ import annotations

import errno
import mmap
import os
from functools import cache
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.memory.buffers import address_of
from crcli.memory.scattered import copy_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.memory.scattered import Part


@cache
def may_read_all() -> bool:
    """Whether `/proc/PID/mem` has what a program itself may not read. A host can forbid that (Linux 6.12 and
    newer, `proc_mem.force_override`); whoever then needs such pages has to get them another way."""
    with (
        mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0) as page,
        memoryview(page) as view,
        address_of(view) as address,
    ):
        try:
            _read_forced(os.getpid(), memoryview(bytearray(mmap.PAGESIZE)), address)
        except OSError:
            return False
    return True


def read_scattered(pid: int, into: memoryview, parts: Sequence[Part]) -> None:
    """Read parts of a process's memory: where in `into` each goes, where it is, how large it is (bytes).

    Hundreds take one call. What the program itself may not read, and all where the host allows no such call,
    comes out of its `/proc/PID/mem`. OSError where it cannot be read; ProcessLookupError when it has ended.
    """
    with address_of(into) as address:
        copy_parts(
            parts,
            lambda some: kernel.read_scattered(pid, address, some),
            lambda part: _read_forced(pid, into[part[0] : part[0] + part[2]], part[1]),
        )


def _read_forced(pid: int, into: memoryview, at: int) -> None:
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while into:
            done = os.preadv(memory, [into], at)
            if not done:  # the kernel says no more of it
                raise ProcessLookupError(errno.ESRCH, "the process ended whose memory was to be read")
            into = into[done:]
            at += done
    finally:
        os.close(memory)
