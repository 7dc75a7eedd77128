"""Managed memory (UVM) of a process, told from its memory map.

Every process that uses CUDA has /dev/nvidia-uvm open, and most have it mapped: so that alone says nothing.
NVIDIA's kernel driver (kernel-open/nvidia-uvm/uvm.c) lets the device be mapped for two things only, both
shared and at an offset that is the address itself: managed memory, and CUDA's own pools of semaphores. The
pools that were seen (driver 580.159.04, with PyTorch, CuPy and the driver API alone) are of 2 MiB each, in
the window that CUDA reserves for itself from 0x200000000 on, while managed memory lies where ordinary
mappings do. Some drivers are said to mark the pools to be wiped on fork (`wf` in smaps). What has neither
sign is taken for managed memory; a few pieces as large as a pool are not, in case a driver puts those
elsewhere: to refuse every program would be worse than to miss a small one. Of that the driver named says at
the checkpoint that it is not supported; the process then runs on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from crcli.process.maps import areas, flagged_areas
from crcli.process.tree import PID_GONE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

    from crcli.process.maps import Area

_DEVICE = b"/dev/nvidia-uvm"
_WINDOW_END = 1 << 40
"""Above every address that CUDA reserves for its own mappings, below every address of mmap's choosing."""

WIPED_ON_FORK = b"wf"
"""A flag of an area (madvise(2), MADV_WIPEONFORK)."""

_POOL_BYTES, _MOST_POOLS = 2 << 20, 16


class Piece(NamedTuple):
    """One mapping of the device: from `start` to `end`."""

    start: int
    end: int

    @property
    def is_reserved(self) -> bool:
        """Whether it lies in the window that CUDA keeps for itself."""
        return self.end <= _WINDOW_END


def managed_bytes(pid: int) -> int:
    """Return how much address space a process has as managed memory; 0 also when it is gone.

    The detailed map, which the kernel walks all page tables for, is read only where there is a suspicion.
    """
    try:
        suspects = {piece for piece in pieces(areas(pid, holding=_DEVICE)) if not piece.is_reserved}
        if suspects:
            suspects -= set(pieces(flagged_areas(pid, WIPED_ON_FORK)))
    except PID_GONE:
        return 0
    return _told_apart(suspects)


def _told_apart(suspects: Collection[Piece]) -> int:
    """How much of this is managed memory: nothing, as long as all of it may be pools of semaphores."""
    sizes = [piece.end - piece.start for piece in suspects]
    may_be_pools = len(sizes) <= _MOST_POOLS and all(size == _POOL_BYTES for size in sizes)
    return 0 if may_be_pools else sum(sizes)


def pieces(listed: Iterable[Area]) -> Iterator[Piece]:
    """Return those of these areas that are the device's, and that its driver has made."""
    for area in listed:
        if area.name == _DEVICE and int(area.offset, 16) == area.start:
            yield Piece(*area.bounds)
