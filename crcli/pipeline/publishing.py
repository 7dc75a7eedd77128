"""The last step of a dump's image: its manifest is written, then it is seen that all it needs is still there.

Whatever fails here, the error says what became of the image: others see it from the manifest on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.errors import CrcliError, DumpFailed, NotFound, StoreError, StoreUnreachable, TreeState
from crcli.image.manifest import publish
from crcli.image.names import ImageRef
from crcli.image.remove import remove
from crcli.image.session import LAPSED_AFTER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.image.manifest import Manifest
    from crcli.image.session import Session
    from crcli.store.base import Store


def publish_whole(
    store: Store, manifest: Manifest, encoded: bytes, session: Session, vouched_by: Sequence[str]
) -> int:
    """Make the image exist, with all that it needs; return the size of its manifest, `encoded`.

    `session` announced the dump, and `vouched_by` are the manifests on whose word it believed what is there.
    Raises StoreError or DumpFailed: the image is not there, was taken back, or its name is in the message.
    """
    image = ImageRef(manifest.name, manifest.id)
    try:
        size = publish(store, manifest, encoded)
    except StoreUnreachable as error:
        hint = f"{image} may have come to be all the same: `crcli ls` says. {error.hint}"
        raise StoreUnreachable(error.message, hint=hint) from error
    try:
        doubt = _doubt(store, manifest, session, vouched_by)
    except StoreError as error:
        raise StoreError(
            f"{image} was published, but it could not be seen whether the store still has all that it needs: "
            f"{error.message}",
            hint=f"`crcli verify {image}` says whether it is whole. {error.hint}",
        ) from error
    if doubt is not None:
        _withdraw(store, image, doubt)
        raise doubt
    return size


def _doubt(
    store: Store, manifest: Manifest, session: Session, vouched_by: Sequence[str]
) -> CrcliError | None:
    """Why a collection may have removed what the image refers to: because it took us for dead, or because an
    image is gone by which we believed what is there. None where it has not."""
    if session.lapsed:
        return StoreError(
            f"the dump could not be announced again for {LAPSED_AFTER_S / 60:.0f} minutes (the store did not "
            "answer, or this host stood still), and others may have removed what the image needs",
            hint="run the dump again",
        )
    if not vouched_by:
        return None
    from crcli.image.gc import may_miss

    if may_miss(store, vouched_by, manifest.packs, session.store_time):
        return DumpFailed(
            "an earlier image, whose memory this one refers to, was removed meanwhile (`crcli rm`, --keep), "
            "and its space is being freed (`crcli gc`)",
            hint="nothing was lost; run the dump again: it then stores that memory itself",
            state=TreeState.RUNNING,
        )
    return None


def _withdraw(store: Store, image: ImageRef, doubt: CrcliError) -> None:
    """Take the image back; where that cannot be done, have the error say so."""
    try:
        remove(store, image)
    except NotFound:
        pass  # somebody else has
    except CrcliError as error:
        doubt.message += f"; {image} was published by then, and could not be taken back: {error.message}"
        doubt.hint = f"do not rely on {image} (`crcli verify`, `crcli rm`). {doubt.hint}"
