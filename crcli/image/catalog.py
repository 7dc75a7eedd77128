"""What a store holds, read cheaply: one small read per image, several at a time."""

from __future__ import annotations

import calendar
import time
from typing import TYPE_CHECKING, Any

from crcli.errors import ImageDamaged, NotFound
from crcli.image.container import ContainerKind, peek_section
from crcli.image.head import read_head
from crcli.image.manifest import list_images
from crcli.records import Struct, field
from crcli.store.leaving import asking

if TYPE_CHECKING:
    from crcli.image.names import ImageRef
    from crcli.store.base import ObjectInfo, Store

_READERS = 8


class Entry(Struct, frozen=True):
    """One image as a listing shows it. `created` is in seconds since the epoch, 0.0 when unknown."""

    ref: ImageRef
    created: float
    meta: dict[str, Any] = field(default_factory=dict)
    damage: str = ""
    """What is wrong with its manifest, as far as a glance tells."""

    @property
    def memory_bytes(self) -> int:
        """The memory of the tree."""
        return int(self.meta.get("counts", {}).get("total", 0))

    @property
    def new_bytes(self) -> int:
        """How much of that memory this image's dump brought into the store, before compression."""
        return int(self.meta.get("counts", {}).get("new", 0))

    @property
    def processes(self) -> int:
        """How many processes the tree had."""
        return len(self.meta.get("tree", ()))

    @property
    def host(self) -> str:
        """Where it was dumped."""
        return str(self.meta.get("host", {}).get("hostname", ""))

    @property
    def command(self) -> str:
        """The command line of the tree's root, or of a job of `crcli run`: above that is an init of ours."""
        job = self.meta.get("job")
        if isinstance(job, dict) and isinstance(argv := job.get("argv"), list):
            return " ".join(map(str, argv))
        tree = self.meta.get("tree") or [{}]
        return " ".join(tree[0].get("argv", ())) or str(tree[0].get("comm", ""))

    def as_json(self) -> dict[str, Any]:
        """The entry as `crcli ls --json` shows it."""
        return {
            "image": str(self.ref),
            "name": self.ref.name,
            "id": self.ref.id,
            "created": self.created,
            "processes": self.processes,
            "memory_bytes": self.memory_bytes,
            "new_bytes": self.new_bytes,
            "host": self.host,
            "command": self.command,
            "damage": self.damage,
        }


def list_entries(store: Store, name: str = "") -> list[Entry]:
    """Describe every image in the store (of that name), by name and then by time.

    An image whose manifest cannot be read is in the list too, with its damage.
    """
    with asking(_READERS, "ls", store) as readers:
        entries = readers.map(lambda found: _read(store, *found), list_images(store, name))
        return [entry for entry in entries if entry is not None]


def _read(store: Store, ref: ImageRef, info: ObjectInfo) -> Entry | None:
    def read(offset: int, length: int) -> bytes:
        return bytes(store.get_range(info.key, offset, length))

    created = _time_of(ref.id)
    try:
        section = peek_section(read, info.size, "META", ContainerKind.MANIFEST, str(ref))
        meta = read_head(section, str(ref))
    except NotFound:
        return None  # removed since it was listed
    except ImageDamaged as error:
        return Entry(ref, created, damage=str(error))
    return Entry(ref, float(meta.get("created", created)), meta)


def _time_of(image_id: str) -> float:
    """The time that an image id was made from."""
    try:
        return calendar.timegm(time.strptime(image_id[:15], "%Y%m%dT%H%M%S"))
    except ValueError:
        return 0.0
