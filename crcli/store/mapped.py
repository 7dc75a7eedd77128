"""Pieces of files as they lie in the page cache: to read them so costs no copy, and no memory of ours."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crcli.store.base import Buffer

LEAST_BYTES = 1 << 20
"""What is smaller is read: a mapping takes a descriptor, and many small ones are no quicker."""


def mapped(fd: int, offset: int, length: int) -> Buffer | None:
    """A piece of a file, where it is worth it and all of it is in memory; else None.

    Nothing of it is waited for, and no disk fails under who looks at it soon: he would get a signal instead
    of an error. The file must be one that nobody changes or cuts short; who unlinks it does no harm.
    """
    if length < LEAST_BYTES:
        return None
    from crcli import kernel  # ctypes: only who reads much needs it
    from crcli.memory.buffers import address_of

    begin = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        size = offset + length - begin
        pages = memoryview(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ, offset=begin))
        with address_of(pages) as address:
            is_here = kernel.is_in_memory(address, size)
    except (OSError, ValueError):  # ValueError: the file ends before
        return None
    return pages[offset - begin :] if is_here else None
