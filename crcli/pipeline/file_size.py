"""How large a file may be that we write, and CRIU (`ulimit -f`): a kernel's signal ends CRIU at that size.

CRIU's images and the memory of a tree lie in files while a dump or a restore is under way, if in memory.
"""

from __future__ import annotations

import resource
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.errors import HostLacks

if TYPE_CHECKING:
    from collections.abc import Iterator

_BESIDE = 128 << 20
"""What there must be room for beside a tree's memory (bytes): a pack, a part of an upload, CRIU's images."""

_WITHOUT = resource.RLIM_INFINITY


@contextmanager
def file_size_lifted() -> Iterator[None]:
    """Within the block files may be as large as we may let them be; afterwards as before.

    Processes of a tree have limits of their own, which CRIU gives back.
    """
    before = soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if soft != _WITHOUT:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (_WITHOUT, _WITHOUT))
        except (OSError, ValueError):  # without CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    try:
        yield
    finally:
        if soft != _WITHOUT:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def see_file_size(memory_bytes: int) -> None:
    """Raise HostLacks where no file may be written that is large enough for this much memory of a tree."""
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    needed = memory_bytes + _BESIDE
    if limit != _WITHOUT and limit < needed:
        raise HostLacks(
            f"crcli may write no file larger than {limit} bytes here (RLIMIT_FSIZE), and needs one of "
            f"{needed}",
            hint="start it with a larger hard limit: `ulimit -f unlimited`, LimitFSIZE= of systemd",
        )
