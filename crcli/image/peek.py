"""A manifest of which little is read: its JSON head and its packs, which stand at its beginning."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from crcli.image.container import ContainerKind, peek_section
from crcli.image.head import parse_head
from crcli.image.names import is_id
from crcli.image.tables import read_packs

if TYPE_CHECKING:
    from crcli.store.base import Store


class ManifestPeek:
    """See the module: hashes of these two parts are checked, and not the seal of the whole, which grows with
    the memory that it maps."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        """Read the head of the manifest at `key`, of `size` bytes. Raises ImageDamaged, NotFound."""
        self._key = key
        self._size = size
        self._read = cache(lambda offset, length: bytes(store.get_range(key, offset, length)))
        self.head: dict[str, Any] = parse_head(self._section("META"), key)
        """Not checked: whoever asks takes what he knows."""

    def packs(self) -> list[bytes]:
        """The packs that the image refers to. Raises ImageDamaged, NotFound."""
        return read_packs(self._section("PACK"), self._key)

    def _section(self, tag: str) -> bytes:
        return peek_section(self._read, self._size, tag, ContainerKind.MANIFEST, self._key)


def ids_in(found: object) -> list[str]:
    """The ids of images in what a head has for a list of them; what else is there is passed over."""
    return [one for one in found if isinstance(one, str) and is_id(one)] if isinstance(found, list) else []
