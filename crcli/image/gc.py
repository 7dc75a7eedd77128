"""Garbage collection: what no image refers to goes, and nothing that a dump in progress may need.

What can go wrong is that a dump learns from an index that the store has a chunk, and refers to it while the
chunk's pack is being removed. The order of steps rules that out:

1. `gc` announces itself. Whoever copies packs into this store looks for that first, and waits.
2. It notes the packs that manifests refer to. Packs that are not among them and are older than a grace
   period are *doomed*; a manifest that cannot be read ends it all, because nothing may be guessed.
3. If a dump is in progress, doomed packs stay for this time: it may have seen them. One whose own manifest
   was read in step 2 refers to nothing else any more: its session may have been left behind by a slow store.
4. The indexes that tell of doomed packs are removed. A dump that begins after this is not told of them. No
   index can appear that tells of them: only a dump in progress in step 3 could have written it.
5. Sessions again: a dump that began before step 4 was finished announced itself before it read an index, or
   saw that one which it had read was still there, so it is seen now, and doomed packs stay for this time.
6. Manifests again: a dump that ended between 2 and 5 has published by now; what it refers to is spared.
7. The rest is removed.

Merged indexes stay although they tell of doomed packs, as long as an image names them: without them the next
dump would store anew what they tell of. A dump believes what they tell of a pack only where a manifest
refers to that pack too, and sees, once it is announced, that this manifest is still there. It sees that again
once it has published; or else that no collection is at work, and then that all packs are there (see
`may_miss`). In the one case step 6 found that manifest, or step 5 the dump; in the other those that were at
work meanwhile have removed what they had to remove, and the next finds the dump's own manifest.

Killed at any point it leaves a store in which every image is whole, and can be run again.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from crcli.errors import ImageDamaged, NotFound, StoreError
from crcli.image.container import ContainerKind, unpack_container
from crcli.image.names import (
    COLLECTIONS,
    IMAGES,
    INDEXES,
    PACKS,
    SESSIONS,
    WEIGHTS,
    image_at,
    is_in_an_index,
    is_pack,
    is_weights,
    is_written_in_parts,
    merged_key,
    pack_key,
)
from crcli.image.peek import ManifestPeek, ids_in
from crcli.image.session import Announcement, announced
from crcli.image.tables import read_chunks, read_packs
from crcli.records import Struct, asdict, field
from crcli.store.leaving import asking

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from crcli.store.base import ObjectInfo, Store

GRACE_S = 3600.0
"""A pack younger than this (seconds, by the store's clock) is never removed."""

_SWEEP_S = 3600.0
"""Temporary files and unfinished uploads are left alone for at least this long (seconds)."""

_THREADS = 8


class GcReport(Struct):
    """What a collection did, or (dry run) would do; sizes in bytes.

    `deferred` names the work in progress because of which no pack was removed this time.
    """

    store: str
    dry_run: bool = False
    images: int = 0
    packs_kept: int = 0
    bytes_kept: int = 0
    packs_removed: int = 0
    bytes_removed: int = 0
    indexes_removed: int = 0
    sessions_removed: int = 0
    leftovers_removed: int = 0
    """Temporary files and unfinished uploads."""
    deferred: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    total_ms: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """The object that `crcli gc --json` prints."""
        return asdict(self)


class Collecting(Announcement):
    """Announces a collection from entry to exit."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, f"{COLLECTIONS}{os.urandom(8).hex()}")


def collect_garbage(store: Store, *, dry_run: bool = False, grace_s: float = GRACE_S) -> GcReport:
    """Remove what no image refers to; return what was removed.

    Raises ImageDamaged when a manifest cannot be read, StoreError when another collection is at work.
    """
    began = time.monotonic()
    next(store.list(COLLECTIONS), None)  # a store that is not there is not to come into being
    report = GcReport(store.url, dry_run)
    if dry_run:
        _Collection(store, report, grace_s, lambda: None).look(time.time())
    else:
        with Collecting(store) as ours:
            now = ours.store_time()
            others, dead = announced(store, COLLECTIONS, now)
            if set(others) - {ours.key}:
                raise StoreError(
                    f"another collection is at work in {store.url}", hint="let it finish, then try again"
                )
            _Collection(store, report, grace_s, lambda: _check(ours)).run(now)
            _remove_all(store, dead, lambda: None)
    report.total_ms = round((time.monotonic() - began) * 1000, 2)
    return report


def may_miss(
    store: Store, manifests: Sequence[str], packs: Iterable[bytes], now: Callable[[], float]
) -> bool:
    """Whether one of these manifests is gone, and a collection that may not have read it is at work, or has
    removed one of `packs`, which a manifest that was published since needs. `now` asks for the time by the
    store's clock."""
    if not store.missing(manifests):
        return False
    # In this order: what ends between the two has removed what it had to.
    return bool(announced(store, COLLECTIONS, now())[0] or store.missing(map(pack_key, packs)))


def _check(ours: Collecting) -> None:
    """Raise StoreError when others may have taken us for dead: nothing more may be removed then."""
    if ours.lapsed:
        raise StoreError("the store did not answer for too long", hint="run `crcli gc` again")


def _remove_all(store: Store, keys: Iterable[str], check: Callable[[], None]) -> None:
    def remove(key: str) -> None:
        check()
        store.delete(key)

    with asking(_THREADS, "gc", store) as threads:
        for _ in threads.map(remove, keys):
            pass


class _Collection:
    """One collection under way; `check` is called before anything is removed."""

    def __init__(self, store: Store, report: GcReport, grace_s: float, check: Callable[[], None]) -> None:
        self._store = store
        self._report = report
        self._grace_s = grace_s
        self._check = check
        self._manifests: set[str] = set()
        self._ids: set[str] = set()
        self._referenced: set[str] = set()
        self._merged: set[str] = set()
        self._packs: dict[str, ObjectInfo] = {}
        self._doomed: set[str] = set()

    def run(self, now: float) -> None:
        """Do it all. `now` is the time by the store's clock."""
        self.look(now)
        if self._doomed and not self._report.deferred:
            self._hide_doomed()
            self._look_for_sessions(now)
            if not self._report.deferred:
                self._read_manifests()
                self._doomed -= self._referenced
                self._remove(self._doomed)
        if self._report.deferred:
            self._doomed.clear()
        self._count()
        self._sweep(now)

    def look(self, now: float) -> None:
        """Steps 2 and 3: find out what is doomed, and whether anybody may have seen it."""
        self._read_manifests()
        self._report.images = sum(key.startswith(IMAGES) for key in self._manifests)
        self._packs = {info.key: info for info in self._store.list(PACKS) if is_pack(info.key)}
        self._doomed = {
            key
            for key, info in self._packs.items()
            if key not in self._referenced and now - info.modified >= self._grace_s
        }
        self._look_for_sessions(now)
        self._count()

    def _read_manifests(self) -> None:
        """Note what the manifests, and files of weights, that were not read yet refer to."""
        listed = list(self._store.list(IMAGES))
        listed += (info for info in self._store.list(WEIGHTS) if is_weights(info.key))
        new = [info for info in listed if info.key not in self._manifests]
        with asking(_THREADS, "gc", self._store) as threads:
            for info, (packs, merged) in zip(new, threads.map(self._needs_of, new), strict=True):
                self._manifests.add(info.key)
                self._referenced.update(map(pack_key, packs))
                self._merged.update(map(merged_key, merged))
                if packs:
                    self._ids.add(info.key.rpartition("/")[2])

    def _needs_of(self, info: ObjectInfo) -> tuple[list[bytes], list[str]]:
        """The packs that a manifest refers to, and the ids of the merged indexes that it names."""
        manifest = info.key
        try:
            if manifest.startswith(WEIGHTS):
                sections = unpack_container(self._store.get(manifest), ContainerKind.WEIGHTS, manifest)
                return read_packs(sections["PACK"], manifest), []
            peek = ManifestPeek(self._store, manifest, info.size)
            return peek.packs(), ids_in(peek.head.get("merged"))
        except NotFound:
            return [], []  # removed since it was listed
        except (ImageDamaged, KeyError) as error:
            is_image = image_at(manifest) is not None
            raise ImageDamaged(
                f"nothing was removed, because what {manifest} refers to is not known: {error}",
                hint="use a newer crcli if it is of one; else remove "
                + ("that image with `crcli rm`" if is_image else "that object: it is no image"),
            ) from error

    def _look_for_sessions(self, now: float) -> None:
        alive, dead = announced(self._store, SESSIONS, now)
        self._dead_sessions = dead
        published = {key.rpartition("/")[2] for key in self._manifests}
        names = (key.removeprefix(SESSIONS) for key in alive)
        self._report.deferred = [name for name in names if name not in published]

    def _hide_doomed(self) -> None:
        """Step 4: remove the indexes by which a dump would learn of doomed packs."""
        listed = [info.key for info in self._store.list(INDEXES) if self._may_tell(info.key)]
        with asking(_THREADS, "gc", self._store) as threads:
            telling = [
                key for key, tells in zip(listed, threads.map(self._tells, listed), strict=True) if tells
            ]
        self._remove(telling)
        self._remove(key.removesuffix(".index") + ".pages" for key in telling)
        self._report.indexes_removed = len(telling)

    def _may_tell(self, key: str) -> bool:
        """Whether this is an index, and of no image: those of images tell of packs that these refer to."""
        image_id, _, kind = key.removeprefix(INDEXES).partition(".")
        return is_in_an_index(key) and kind == "index" and image_id not in self._ids

    def _tells(self, index: str) -> bool:
        """Whether a dump could learn of a doomed pack from this index."""
        try:
            sections = unpack_container(self._store.get(index), ContainerKind.INDEX, index)
            packs = read_packs(sections["PACK"], index)
            chunks = read_chunks(sections["CHNK"], len(packs), index)
        except NotFound:
            return False
        except (ImageDamaged, KeyError):
            return True  # nobody can learn anything from it
        return any(pack_key(packs[number]) in self._doomed for number in {chunk.pack for chunk in chunks})

    def _remove(self, keys: Iterable[str]) -> None:
        _remove_all(self._store, keys, self._check)

    def _count(self) -> None:
        sizes = {key: info.size for key, info in self._packs.items()}
        self._report.packs_removed = len(self._doomed)
        self._report.bytes_removed = sum(sizes[key] for key in self._doomed)
        self._report.packs_kept = len(sizes) - len(self._doomed)
        self._report.bytes_kept = sum(sizes.values()) - self._report.bytes_removed

    def _sweep(self, now: float) -> None:
        """Remove what killed commands left behind."""
        self._remove(self._dead_sessions)
        self._report.sessions_removed = len(self._dead_sessions)
        if not self._report.deferred:
            self._remove(self._needless(now))
        try:
            self._report.leftovers_removed = self._store.sweep(
                now - max(self._grace_s, _SWEEP_S), is_written_in_parts
            )
        except StoreError as error:
            self._report.notes.append(f"unfinished uploads could not be looked for: {error.message}")

    def _needless(self, now: float) -> list[str]:
        """What is of no use beside the indexes: page digests whose index is not there, of a dump or a
        collection that was killed; and merged indexes that no image names. Those that one names tell of packs
        that it refers to: whoever reads them asks for no others, so that what they tell of doomed packs harms
        nobody."""
        listed = {info.key: info for info in self._store.list(INDEXES) if is_in_an_index(info.key)}
        return [
            key
            for key, info in listed.items()
            if now - info.modified >= self._grace_s
            and (
                (key.endswith(".pages") and key.removesuffix(".pages") + ".index" not in listed)
                or (key.endswith(".merged") and key not in self._merged)
            )
        ]
