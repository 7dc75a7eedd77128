"""Many parts of a process's memory, copied with few calls."""

from __future__ import annotations

import errno
from bisect import bisect_right
from itertools import accumulate
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Part: TypeAlias = tuple[int, int, int]
"""One part: two addresses or offsets, and its size (bytes)."""

_MOST_PARTS = 1024
"""So many parts the kernel takes at once."""


def copy_parts(
    parts: Sequence[Part], call: Callable[[Sequence[Part]], int], otherwise: Callable[[Part], None]
) -> None:
    """Have `call` copy the parts, which returns how many bytes it did: up to the first part that it cannot.

    That is done `otherwise`; so are all where the call is not allowed. Raises ProcessLookupError when the
    call does.
    """
    while parts:
        some = parts[:_MOST_PARTS]
        try:
            done = call(some)
        except ProcessLookupError:
            raise
        except OSError as error:
            if error.errno != errno.EFAULT:
                for part in parts:
                    otherwise(part)
                return
            done = 0
        whole = bisect_right([*accumulate(size for _, _, size in some)], done)
        if whole < len(some):
            otherwise(some[whole])
            whole += 1
        parts = parts[whole:]
