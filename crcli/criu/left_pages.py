"""Pages that CRIU leaves in the tree that it dumps: crcli reads them there.

CRIU takes pages out of a frozen tree with one thread, by way of a pipe and a socket: the longest part of a
freeze. But of a dump that goes on from an earlier one it only names the pages that were not written to since,
by the kernel's soft-dirty bits. So it is told of an earlier dump, which never was, and the bits are cleared
as soon as the tree stands still: it names all private pages, but for those that the program itself may not
read, and sends none. A kernel that has no such bits (CONFIG_MEM_SOFT_DIRTY) calls no page dirty: there CRIU
is also told that it can go by them.

What it does not say then is which of them CRIU need not have to restore the process (`lazy`): that is worked
out from the images that it has written by the time that it waits for us, with the tree still frozen.
"""

from __future__ import annotations

import mmap
import os
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from crcli.criu import messages
from crcli.criu.images import ImageFile, single_magic
from crcli.criu.options import LOG_NAME
from crcli.memory.extents import PAGE
from crcli.memory.huge import Runs
from crcli.memory.pagemap import tracks_writes, zero_frame

if TYPE_CHECKING:
    from collections.abc import Iterable

    from crcli.criu.images import ImageFolder
    from crcli.criu.workspace import Workspace

_ANONYMOUS = mmap.MAP_ANONYMOUS | mmap.MAP_PRIVATE
_MAP_LOCKED, _MAP_HUGETLB = 0x2000, 0x40000
_VDSO, _VSYSCALL, _VVAR = 1 << 3, 1 << 2, 1 << 12
_SPECIAL = _VDSO | _VSYSCALL | _VVAR
"""VMA_AREA_ of what is the kernel's own."""

_SOFT_DIRTY = b"4"
_REFUSAL = b"Tracking memory is not available"
_FOLDER = "before"
_IMAGES_VERSION = 2
_FOREVER = 1 << 62
"""When the earlier dump was made, since the boot (microseconds): CRIU has processes that began later send
all."""

_NUMBERS = struct.Struct("<8xQixxxxQ????")
"""How what CRIU keeps of a kernel begins (struct kerndat_s of 3.16 to 4.2, behind its two magics): the device
of shared memory, the last capability, the frame of the page of zeros, whether writes are tracked, three
more."""

_TRACKED_AT = 32


def is_possible(pids: Iterable[int]) -> bool:
    """Whether it is on this host, for these processes: CRIU would crash where it may not clear the bits."""
    if os.uname().machine != "x86_64" or not zero_frame():
        return False
    try:
        _clear_bits(os.getpid())
        for pid in pids:
            os.close(os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def clear_bits(pids: Iterable[int]) -> None:
    """Have the kernel call no page of these processes dirty, which stand still. What cannot be cleared CRIU
    sends."""
    for pid in pids:
        with suppress(OSError):
            _clear_bits(pid)


def _clear_bits(pid: int) -> None:
    with open(f"/proc/{pid}/clear_refs", "wb", buffering=0) as file:
        file.write(_SOFT_DIRTY)


def answers_for(known: bytes) -> bytes | None:
    """What CRIU is to take for what it has found out about this kernel, which is `known` (empty: not known).
    Empty where it need be told nothing; None where it cannot be told so."""
    return b"" if tracks_writes() else as_tracking(known) or None


def as_tracking(answers: bytes) -> bytes:
    """What CRIU keeps of this kernel, but that it tracks writes; empty where it is not what we know."""
    if len(answers) < _NUMBERS.size:
        return b""
    _, last_capability, frame, *flags = _NUMBERS.unpack_from(answers)
    with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
        expected = int(file.read())
    are_flags = all(byte in (0, 1) for byte in answers[_TRACKED_AT : _NUMBERS.size])
    if (last_capability, frame, flags[0]) != (expected, zero_frame(), False) or not are_flags:
        return b""
    return answers[:_TRACKED_AT] + b"\x01" + answers[_TRACKED_AT + 1 :]


def make_parent(workspace: Workspace) -> str:
    """Write what CRIU looks for of an earlier dump; return where it is, seen from a folder beside it."""
    inventory = messages.inventory_entry(img_version=_IMAGES_VERSION, dump_uptime=_FOREVER)
    with workspace.folder(_FOLDER) as folder:
        folder.write("inventory.img", ImageFile(single_magic("INVENTORY"), [inventory]).encode())
    return f"../{_FOLDER}"


def was_refused(images: ImageFolder) -> bool:
    """Whether a CRIU that has failed was not told what it should have been: it has not frozen anything."""
    return LOG_NAME in images.names() and _REFUSAL in images.read(LOG_NAME)


def lazy_areas(images: ImageFolder, pid: int) -> Runs:
    """The pages of a process, by the pid that the tree itself sees, that CRIU would call lazy were they in
    memory: private anonymous ones, but for what is locked.

    As vma_entry_can_be_lazy has it (criu/include/vma.h of 4.2). is_stack (criu/mem.c) means to leave out the
    pages that the stack pointers point to, but compares the wrong bits of them.
    """
    mm = ImageFile.parse(images.read(f"mm-{pid}.img"), messages.mm_entry).entries[0]
    return Runs((vma.start // PAGE, (vma.end - vma.start) // PAGE) for vma in mm.vmas if _is_lazy(vma))


def _is_lazy(vma: Any) -> bool:
    is_anonymous = vma.flags & _ANONYMOUS == _ANONYMOUS
    return is_anonymous and not vma.flags & (_MAP_LOCKED | _MAP_HUGETLB) and not vma.status & _SPECIAL
