"""The newest of the objects in a folder whose names begin with ids: a store lists the oldest first."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from crcli.store.base import ObjectInfo, Store

_LISTED_AT_ONCE = 1000
"""So many objects a store tells of in one answer."""

_WINDOWS = (12, 11, 8, 6, 4, 0)
"""How much of the time must be reached by an id: ten minutes, an hour, a day, a month, a year, none of it."""


def newest_in(store: Store, folder: str, least: int, is_one: Callable[[str], object]) -> list[ObjectInfo]:
    """Objects below `folder`, the newest first: `least` of them at least, or all. `is_one` tells by its key
    which counts: what somebody else has put beside them does not.

    Where there are many, those are asked for that are of the last minutes, hours or days, or of another
    host's future.
    """
    listed = list(islice(store.list(folder), _LISTED_AT_ONCE))
    found = _those(is_one, listed)
    if len(listed) == _LISTED_AT_ONCE:
        stamp = time.strftime("%Y%m%dT%H%M", time.gmtime())
        for length in _WINDOWS:
            found = _those(is_one, store.list(folder, folder + stamp[:length]))
            if len(found) >= least:
                break
    return sorted(found, key=lambda info: info.key, reverse=True)


def _those(is_one: Callable[[str], object], listed: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    return [info for info in listed if is_one(info.key)]
