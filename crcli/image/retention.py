"""Of a job's images the newest are kept, and older ones removed: `--keep`. `gc` frees their space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crcli.errors import ImagePinned, NotFound
from crcli.image.catalog import list_entries
from crcli.image.pins import pinned_ids
from crcli.image.remove import remove

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from crcli.image.catalog import Entry
    from crcli.image.names import ImageRef
    from crcli.store.base import Store

_OF_A_JOB = ("identity", "watched")
"""What the images of one job say alike, wherever it has run; see FORMAT.md, `job`."""


def retire(store: Store, name: str, job: Mapping[str, Any], keep: int) -> list[ImageRef]:
    """Remove this job's images of that name but for the `keep` newest; return which they were.

    Images of other jobs and pinned ones stay, and do not count; so do those whose job cannot be read.
    """
    doomed = superfluous(list_entries(store, name), job, keep, pinned_ids(store, name))
    removed = []
    for entry in doomed:
        try:
            removed.append(remove(store, entry.ref))
        except (NotFound, ImagePinned):
            continue  # since it was listed
    return removed


def superfluous(
    images: Sequence[Entry], job: Mapping[str, Any], keep: int, pinned: Collection[str]
) -> list[Entry]:
    """Those of `images`, the oldest first, that may go."""
    ours = [one for one in images if one.ref.id not in pinned and is_of_job(one.meta.get("job"), job)]
    return ours[: max(0, len(ours) - keep)]


def is_of_job(noted: object, job: Mapping[str, Any]) -> bool:
    """Whether what an image notes of its job means this one; no job at all is nobody's."""
    if not isinstance(noted, dict) or not any(name in noted for name in _OF_A_JOB):
        return False
    return all(noted.get(name) == job.get(name) for name in _OF_A_JOB)
