"""GPU devices that a process has from a fork, taken from it: it has no use for them, and CRIU can take none.

CUDA does not outlive a fork: in the child its driver refuses every call. But what it had open and mapped is
the child's too, as each worker's of PyTorch's DataLoader that was forked by a training job. The driver's
checkpoint takes the devices of the process that uses them, and no other's (NVIDIA/cuda-checkpoint 28). That a
worker does without them is nothing new: NVIDIA's own training frameworks close them there (Megatron-LM 3684).

In their place the child gets what keeps their numbers and addresses: an epoll that waits for nothing; a copy
of what it could read, as pinned memory with examples in it; for the GPU's own registers memory that may not
be touched, as the driver itself leaves where it had its mappings. The child is stopped for that, a tenth of a
second or less, and its first thread makes the calls. Whoever does it must not be killed in the middle, so it
is the hand.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from crcli import kernel
from crcli.criu.puppet import Ending, seized
from crcli.process.identity import ProcessId, read_proc, read_stat
from crcli.process.maps import areas

if TYPE_CHECKING:
    from collections.abc import Collection

    from crcli.criu.puppet import Puppet
    from crcli.process.maps import Area

DEVICE_PREFIX = "/dev/nvidia"
"""How the device files of NVIDIA's kernel driver begin: nvidia0, nvidiactl, nvidia-uvm, nvidia-caps/…"""

_STOP_S = 2.0
"""How long a thread may take to come to stand (seconds)."""

_OWN_MEMORY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_PROTECTIONS = ((b"r", mmap.PROT_READ), (b"w", mmap.PROT_WRITE), (b"x", mmap.PROT_EXEC))
_NO_FD = (1 << 64) - 1
_MOVE_THERE = 1 | 2
"""MREMAP_MAYMOVE, MREMAP_FIXED."""

_PIECE = 256 << 10
_ZEROS = bytes(_PIECE)


def open_devices(pid: int) -> list[int]:
    """The descriptors of a process that are NVIDIA's devices. Raises OSError when it is gone."""
    found = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith(DEVICE_PREFIX):
                found.append(int(name))
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


def mapped_devices(pid: int) -> list[Area]:
    """Where a process has NVIDIA's devices mapped. Raises OSError when it is gone."""
    prefix = DEVICE_PREFIX.encode()
    return [area for area in areas(pid, holding=prefix) if area.name.startswith(prefix)]


def holds_devices(pid: int) -> bool:
    """Whether a process has one of NVIDIA's devices open or mapped now; False when it is gone."""
    try:
        return bool(open_devices(pid) or mapped_devices(pid))
    except OSError:
        return False


def forked_from(pid: int, users: Collection[int]) -> int:
    """The nearest of those above a process that is one of `users`, those who use CUDA, if it was forked from
    that one and goes on as the same program with devices that were opened there; else 0. Changes nothing.

    That some of its devices are open there no more is no reason to think that it opened them by itself: the
    driver has a descriptor for each of its mappings, and closes it with the mapping.
    """
    try:
        child = read_stat(pid)
        above = read_stat(child.ppid)
        while above.pid not in users:
            above = read_stat(above.ppid)
        if not any(child.layout) or child.layout != above.layout:  # another program
            return 0
        ours, theirs = open_devices(pid), set(open_devices(above.pid))
        is_heir = not ours or any(
            fd in theirs and kernel.is_same_open_file(pid, fd, above.pid, fd) for fd in ours
        )
    except OSError:
        return 0
    return above.pid if is_heir else 0


def take_devices(process: ProcessId) -> None:
    """Take them from a process that was forked from one which uses CUDA. It may be too busy, or end."""
    pid = process.pid
    try:
        with ExitStack() as held:
            tids = sorted(map(int, os.listdir(f"/proc/{pid}/task")))
            puppets = [held.enter_context(seized(pid, tid, _STOP_S)) for tid in tids]
            puppet = puppets[0]
            if not process.alive():
                return
            machine = puppet.machine
            kept = puppet.call(machine.nr_epoll_create1, os.O_CLOEXEC)
            for fd in open_devices(pid):
                puppet.call(machine.nr_dup3, kept, fd, _close_on_exec(pid, fd))
            for area in mapped_devices(pid):
                _replace(area, puppet)
            puppet.call(machine.nr_close, kept)
            puppet.stand_as_if_signalled()
            for one in puppets:
                one.make_again()
    except (OSError, Ending):
        pass


def _replace(area: Area, puppet: Puppet) -> None:
    """Put memory of the process's own in the place of a mapping, with the same in it; where nobody can read
    that, or may, memory that cannot be touched."""
    machine, (start, end) = puppet.machine, area.bounds
    allowed = sum(bit for letter, bit in _PROTECTIONS if letter in area.permissions)
    if not allowed & mmap.PROT_READ or not _can_read(puppet.memory, start):
        allowed = 0
    own = puppet.call(machine.nr_mmap, 0, end - start, allowed, _OWN_MEMORY, _NO_FD, 0)
    if allowed:
        _copy(puppet.memory, start, end, own)
    puppet.call(machine.nr_mremap, own, end - start, end - start, _MOVE_THERE, start)


def _can_read(memory: int, address: int) -> bool:
    try:
        return bool(os.pread(memory, 1, address))
    except OSError:  # registers of a device
        return False


def _copy(memory: int, start: int, end: int, to: int) -> None:
    """Copy within a process what is not zero; the target may be read-only."""
    for at in range(start, end, _PIECE):
        piece = os.pread(memory, min(_PIECE, end - at), at)
        if piece != _ZEROS[: len(piece)]:
            os.pwrite(memory, piece, to + at - start)


def _close_on_exec(pid: int, fd: int) -> int:
    """O_CLOEXEC if a descriptor has it."""
    for line in read_proc(f"/proc/{pid}/fdinfo/{fd}").splitlines():
        if line.startswith(b"flags:"):
            return int(line.split()[1], 8) & os.O_CLOEXEC
    return 0
