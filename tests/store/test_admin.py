"""Images read back, listed, copied and removed, garbage collected, on every store; then killed and raced."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from blake3 import blake3

from crcli.errors import CrcliError, ImageDamaged, NotFound, ObjectExists, StoreError
from crcli.image import copy as copying
from crcli.image import owner
from crcli.image import session as announcing
from crcli.image.catalog import Entry, list_entries
from crcli.image.container import ContainerKind, pack_container
from crcli.image.copy import copy
from crcli.image.gc import Collecting, collect_garbage
from crcli.image.index import KnownChunks, KnownPagesOf, load_known
from crcli.image.manifest import list_images, load
from crcli.image.names import (
    COLLECTIONS,
    IMAGES,
    INDEXES,
    PACKS,
    SESSIONS,
    WEIGHTS,
    ImageRef,
    index_key,
    manifest_key,
    new_image_id,
)
from crcli.image.packs import PackWriter
from crcli.image.remove import remove
from crcli.image.retention import retire
from crcli.image.session import Session
from crcli.image.verify import verify
from crcli.image.weights import PushedFile, list_pushed, push, remove_pushed
from crcli.memory.extents import PAGE
from crcli.pipeline.facts import is_of
from crcli.store import Store
from crcli.store.file import FileStore, FileWriter
from tests.support.images import add_memory, make_image, pages
from tests.support.stores import Actor, Around, WatchedStore, killed_at

if TYPE_CHECKING:
    from crcli.process.evidence import Evidence

HOURS_AGO = 2 * 3600.0


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of small stores are made in it."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="crcli-test-", dir=parent) as path:
        yield Path(path)


@pytest.fixture
def directory(folder: Path) -> FileStore:
    """An empty directory store."""
    found = FileStore(str(folder / "store"))
    found.warm(for_writing=True)
    return found


def keys(store: Store, prefix: str = "") -> set[str]:
    """The keys of what a store holds."""
    return {info.key for info in store.list(prefix)}


def path_of(store: FileStore, key: str) -> Path:
    """The file of an object."""
    return Path(store.root) / key


def only_pack(store: FileStore) -> Path:
    """The file of the one pack of a store."""
    (key,) = keys(store, PACKS)
    return path_of(store, key)


def flip(path: Path, offset: int) -> None:
    """Change one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(data)


def age(store: FileStore, seconds: float = HOURS_AGO) -> None:
    """Make all that is in a store as old as that."""
    then = time.time() - seconds
    for key in keys(store):
        os.utime(path_of(store, key), (then, then))


def assert_whole(*stores: Store) -> None:
    """Assert that every image in these stores can be read back."""
    for store in stores:
        for ref, _ in list_images(store):
            assert verify(store, ref).damage == [], f"{ref} in {store.url}"


# --- on every store ----------------------------------------------------------------------------------------


def test_images_live_and_go(store: Store, tmp_path: Path) -> None:
    """Images that share packs are listed, verified, copied, removed, and what they leave is collected."""
    first = make_image(store, "agent", pages(1, 6))
    second = make_image(store, "agent", pages(1, 6) + pages(2, 2))
    assert [entry.ref for entry in list_entries(store)] == [first, second]
    report = verify(store, ImageRef("agent"))
    assert (report.image, report.damage, report.memory_bytes) == (str(second), [], 8 * PAGE)

    other = FileStore(str(tmp_path / "other"))
    assert copy(store, second, other).packs_copied == 2
    assert_whole(other)

    assert remove(store, first) == first
    assert collect_garbage(store, grace_s=0).packs_removed == 0
    assert_whole(store)
    assert remove(store, ImageRef("agent")) == second
    report_of_all = collect_garbage(store, grace_s=0)
    assert (report_of_all.images, report_of_all.packs_removed, report_of_all.packs_kept) == (0, 2, 0)
    assert keys(store) == set()

    assert copy(other, second, store).packs_copied == 2
    assert copy(other, second, store).was_there
    assert_whole(store)


def test_collection_uses_the_clock_of_the_store(store: Store) -> None:
    """A pack that is younger than the grace period stays, whatever this host's clock says."""
    remove(store, make_image(store, "agent", pages(1, 2)))
    assert collect_garbage(store, grace_s=600).packs_removed == 0
    assert collect_garbage(store, grace_s=0).packs_removed == 1


# --- verify ------------------------------------------------------------------------------------------------


def test_verify_names_what_a_flipped_byte_belongs_to(directory: FileStore) -> None:
    """A changed byte in a pack is found, with the pack, the chunk, and the process whose memory it was."""
    ref = make_image(directory, "agent", pages(1, 3))
    flip(only_pack(directory), 8 + PAGE + 100)
    (damage,) = verify(directory, ref).damage
    assert damage.name == "chunk-damaged"
    assert damage.evidence["used_by"] == ["memory of process 4711"]


def test_verify_lists_every_damaged_chunk(directory: FileStore) -> None:
    """Damage in one chunk does not hide damage in the next one."""
    ref = make_image(directory, "agent", pages(1, 4))
    for page in (0, 2):
        flip(only_pack(directory), 8 + page * PAGE)
    assert [damage.name for damage in verify(directory, ref).damage] == ["chunk-damaged"] * 2


def test_verify_reports_a_truncated_pack(directory: FileStore) -> None:
    """A pack that ends early is one damage that says how many chunks it takes along."""
    ref = make_image(directory, "agent", pages(1, 4))
    os.truncate(only_pack(directory), 8 + 2 * PAGE)
    (damage,) = verify(directory, ref).damage
    assert damage.name == "pack-short"
    assert damage.evidence["chunks"] == 3


def test_verify_reports_a_missing_pack(directory: FileStore) -> None:
    """A pack that is gone is one damage."""
    ref = make_image(directory, "agent", pages(1, 4))
    only_pack(directory).unlink()
    (damage,) = verify(directory, ref).damage
    assert damage.name == "pack-missing"
    assert set(damage.evidence["used_by"]) == {
        "/var/log/agent.log",
        "CRIU's core-4711.img",
        "memory of process 4711",
    }


def test_verify_refuses_an_altered_manifest(directory: FileStore) -> None:
    """A manifest whose seal does not match is no image."""
    ref = make_image(directory, "agent", pages(1, 1))
    flip(path_of(directory, manifest_key(ref.name, ref.id)), 200)
    with pytest.raises(ImageDamaged):
        verify(directory, ref)


# --- ls ----------------------------------------------------------------------------------------------------


def test_listing_shows_damaged_images_too(directory: FileStore) -> None:
    """An image whose manifest cannot be read is listed with what is wrong, and hides no other."""
    whole = make_image(directory, "whole", pages(1, 1))
    broken = make_image(directory, "broken", pages(2, 1))
    path_of(directory, manifest_key(broken.name, broken.id)).write_bytes(b"nonsense")
    entries = {entry.ref: entry for entry in list_entries(directory)}
    assert entries[whole].damage == ""
    assert entries[whole].command == "agent --serve"
    assert "cut short" in entries[broken].damage


ODD_HEADS = (
    b"[" * 100_000,
    b"[]",
    b"7",
    b'{"created": null}',
    b'{"created": 1, "counts": []}',
    b'{"created": 1, "counts": {"total": "much"}}',
    b'{"created": 1, "counts": {"total": 1e999}}',
    b'{"created": 1, "host": "node-1"}',
    b'{"created": 1, "tree": [1]}',
    b'{"created": 1, "tree": {"pid": 1}}',
    b'{"created": 1, "tree": [{"argv": 5}]}',
    b'{"created": 1, "tree": [{"argv": [5]}]}',
)


def test_one_odd_image_hides_no_other(directory: FileStore) -> None:
    """A manifest whose head is none, whoever wrote it, is listed as damaged; nobody is kept from listing the
    others, or from clearing old ones away."""
    whole = make_image(directory, "agent", pages(1, 2))
    for number, head in enumerate(ODD_HEADS):
        key = manifest_key("agent", f"20260101T0000000{number:02d}-abcdef")
        directory.put(key, pack_container(ContainerKind.MANIFEST, {"META": head, "PACK": b""}))
    *odd, last = list_entries(directory)
    assert len(odd) == len(ODD_HEADS) and all(entry.damage for entry in odd)
    assert (last.ref, last.damage) == (whole, "")
    assert retire(directory, "agent", {"identity": "none"}, 1) == []


@pytest.mark.parametrize("head", [b'{"tree": 5}', b'{"tree": [5]}', b'{"tree": {"pid": 1}}'])
def test_an_odd_image_hinders_no_dump(directory: FileStore, head: bytes) -> None:
    """Whoever takes the newest image of a name for his tree's own reads in its head which tree it was of."""
    memory = pages(1, 2)
    make_image(directory, "agent", memory)
    key = manifest_key("agent", new_image_id())
    directory.put(key, pack_container(ContainerKind.MANIFEST, {"META": head, "PACK": b""}))
    evidence = cast("Evidence", SimpleNamespace(root=SimpleNamespace(nspid=(1,), argv=("agent",))))
    known = load_known(directory, "agent", wanted=2, is_same=partial(is_of, evidence))
    assert known.find_pages([blake3(page).digest() for page in memory]) == [0, 1]


def test_what_is_copied_is_the_image_that_was_asked_for(directory: FileStore, folder: Path) -> None:
    """A manifest that lies under another one's key is none."""
    one, other = (make_image(directory, "agent", pages(seed, 2)) for seed in (1, 2))
    directory.put(manifest_key("agent", other.id), directory.get(manifest_key("agent", one.id)))
    target = FileStore(str(folder / "target"))
    with pytest.raises(ImageDamaged, match="says that it is"):
        copy(directory, other, target)
    assert not os.path.exists(target.root)


def test_the_command_of_a_job_is_the_jobs() -> None:
    """Not that of the init of ours below which it ran."""
    tree = [{"argv": ["python3", "-I", "init.py"]}, {"argv": ["sleep", "9"]}]
    ref = ImageRef("job", "20260101T000000000-000000")
    assert Entry(ref, 0.0, {"tree": tree, "job": {"argv": ["sleep", "9"]}}).command == "sleep 9"
    for job in ({"watched": [1, 2]}, {"argv": "x"}, 7):
        assert Entry(ref, 0.0, {"tree": tree, "job": job}).command == "python3 -I init.py"


@pytest.mark.parametrize(
    "table",
    [
        b"cut short",
        pack_container(ContainerKind.WEIGHTS, {"META": b"[" * 100_000, "PACK": b"", "CHNK": b""}),
        pack_container(ContainerKind.WEIGHTS, {"META": b'{"size": 1e999}', "PACK": b"", "CHNK": b""}),
        pack_container(ContainerKind.WEIGHTS, {}),
    ],
    ids=["cut short", "a head without bottom", "a size without end", "empty"],
)
def test_weights_that_cannot_be_read_can_be_removed(directory: FileStore, folder: Path, table: bytes) -> None:
    """They are listed with the others, and removing them, as `gc` says, takes no more than their name."""
    (folder / "model").write_bytes(b"weights")
    whole = push(directory, str(folder / "model"))
    digest = "ab" * 32
    directory.put(f"{WEIGHTS}{digest}", table)
    listed = {file["blake3"]: file for file in list_pushed(directory)}
    assert listed[whole.digest] == {"name": "model", "bytes": 7, "blake3": whole.digest, "damage": ""}
    assert listed[digest]["damage"]
    if not table.endswith(b"short") and b"PACK" in table:
        assert PushedFile(directory, digest).chunks == []
    else:
        with pytest.raises(ImageDamaged):
            PushedFile(directory, digest)
    assert remove_pushed(directory, digest)["blake3"] == digest
    assert [file["blake3"] for file in list_pushed(directory)] == [whole.digest]


def test_what_others_put_beside_images_is_none(directory: FileStore) -> None:
    """The newest image is one; a dump goes on from it; only a collection, which cannot know, does nothing."""
    first = make_image(directory, "agent", pages(1, 4))
    for key in ("images/agent/README", f"images/agent/old/{first.id}", "images/notes"):
        directory.put(key, b"not ours")
    assert load(directory, ImageRef("agent")).id == first.id
    second = make_image(directory, "agent", pages(1, 4))
    assert [ref for ref, _ in list_images(directory)] == [first, second]
    assert load_known(directory, "agent").newest_image == second.id
    with pytest.raises(ImageDamaged) as refused:
        collect_garbage(directory, grace_s=0)
    assert "it is no image" in refused.value.hint


def test_listing_reads_little_of_a_large_manifest(directory: FileStore) -> None:
    """What a listing reads does not grow with an image's memory map."""
    make_image(directory, "agent", pages(1, 3000))
    read = 0

    class Counting(WatchedStore):
        def get_range(self, key: str, offset: int, length: int) -> bytes:
            nonlocal read
            read += length
            return directory.get_range(key, offset, length)

    from contextlib import nullcontext

    (entry,) = list_entries(Counting(directory, lambda _: nullcontext()))
    assert entry.memory_bytes == 3000 * PAGE
    assert read <= 64 << 10 < next(iter(directory.list(IMAGES))).size


# --- rm ----------------------------------------------------------------------------------------------------


def test_removing_needs_no_readable_manifest(directory: FileStore) -> None:
    """An image that is damaged can be removed."""
    ref = make_image(directory, "agent", pages(1, 1))
    path_of(directory, manifest_key(ref.name, ref.id)).write_bytes(b"nonsense")
    assert remove(directory, ref) == ref
    assert list_images(directory) == []


def test_removing_what_is_not_there(directory: FileStore) -> None:
    """Removing an unknown image says so."""
    with pytest.raises(NotFound):
        remove(directory, ImageRef("agent"))
    with pytest.raises(NotFound):
        remove(directory, ImageRef("agent", "20260101T000000000-abcdef"))


# --- cp ----------------------------------------------------------------------------------------------------


def test_nothing_damaged_is_copied(directory: FileStore, folder: Path) -> None:
    """A chunk that is not what its hash says ends the copy, and the copy does not exist."""
    ref = make_image(directory, "agent", pages(1, 3))
    flip(only_pack(directory), 8 + PAGE)
    other = FileStore(str(folder / "other"))
    with pytest.raises(ImageDamaged, match="not what its hash says"):
        copy(directory, ref, other)
    assert list_images(other) == []


def test_copying_an_image_with_a_missing_pack(directory: FileStore, folder: Path) -> None:
    """An image that is not whole cannot be copied."""
    ref = make_image(directory, "agent", pages(1, 3))
    only_pack(directory).unlink()
    with pytest.raises(ImageDamaged, match="missing"):
        copy(directory, ref, FileStore(str(folder / "other")))


def test_a_copy_that_is_there_already_says_how_long_it_took(directory: FileStore) -> None:
    """Also of an image with weights, which may have been pushed since and are looked for."""
    golden = FileStore(str(Path(__file__).parents[1] / "unit/golden/v2"))
    (ref, _), *_ = list_images(golden)
    reports = [copy(golden, ref, directory) for _ in range(2)]
    assert [report.was_there for report in reports] == [False, True]
    assert all(report.total_ms > 0 for report in reports)


def test_a_copy_that_was_suspended_leaves_no_weights_behind(
    directory: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collection may have removed packs that it took for there: neither the image nor a file of weights,
    which nobody would copy again, may refer to them."""
    golden = FileStore(str(Path(__file__).parents[1] / "unit/golden/v2"))
    (ref, _), *_ = list_images(golden)
    real, jump = announcing.clock, 0.0
    monkeypatch.setattr(announcing, "clock", lambda: real() + jump)

    def put(key: str, *arguments: object, **options: object) -> None:
        nonlocal jump
        jump += announcing.STALE_AFTER_S * key.startswith(WEIGHTS)
        FileStore.put(directory, key, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(directory, "put", put)
    with pytest.raises(StoreError, match="too long"):
        copy(golden, ref, directory)
    assert keys(directory, WEIGHTS) == keys(directory, IMAGES) == set()


def test_copies_share_packs_as_their_originals_do(directory: FileStore, folder: Path) -> None:
    """The second of two images that share a pack takes only its own pack along."""
    first = make_image(directory, "agent", pages(1, 6))
    second = make_image(directory, "agent", pages(1, 6) + pages(2, 1))
    other = FileStore(str(folder / "other"))
    copy(directory, first, other)
    assert copy(directory, second, other).packs_copied == 1
    assert_whole(other)


def test_a_copy_teaches_later_dumps(directory: FileStore, folder: Path) -> None:
    """A dump into the store of a copy finds the copy's pages there."""
    other = FileStore(str(folder / "other"))
    copy(directory, make_image(directory, "agent", pages(1, 6)), other)
    make_image(other, "agent", pages(1, 6))
    assert len(keys(other, PACKS)) == 1


def test_a_truncated_pack_is_copied_again(directory: FileStore, folder: Path) -> None:
    """A pack of the wrong size in the other store is replaced: the copy is whole."""
    ref = make_image(directory, "agent", pages(1, 6))
    other = FileStore(str(folder / "other"))
    copy(directory, ref, other)
    remove(other, ref)
    os.truncate(only_pack(other), 100)
    assert copy(directory, ref, other).packs_copied == 1
    assert_whole(other)


def test_another_image_of_the_same_name_is_not_replaced(directory: FileStore, folder: Path) -> None:
    """What stands in the other store under the image's name and id stays as it is."""
    ref = make_image(directory, "agent", pages(1, 1))
    other = FileStore(str(folder / "other"))
    other.put(manifest_key(ref.name, ref.id), b"something else")
    with pytest.raises(ObjectExists):
        copy(directory, ref, other)


def test_large_packs_are_read_in_pieces(
    directory: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces end where chunks do, also with other images' chunks between, and packs arrive unchanged."""
    make_image(directory, "agent", pages(1, 40))
    ref = make_image(directory, "agent", pages(1, 40)[7:9] + pages(1, 40)[30:31])
    monkeypatch.setattr(copying, "_PIECE", 3 * PAGE)
    other = FileStore(str(folder / "other"))
    copy(directory, ref, other)
    assert_whole(other)
    for key in keys(other, PACKS):
        assert path_of(other, key).read_bytes() == path_of(directory, key).read_bytes()


def test_two_copies_at_once(directory: FileStore, folder: Path) -> None:
    """Two copies of one image into one store, one a call behind the other, both succeed."""
    ref = make_image(directory, "agent", pages(1, 6))
    other = FileStore(str(folder / "other"))

    def work(around: Around) -> object:
        return copy(directory, ref, WatchedStore(other, around))

    actors = [Actor(work), Actor(work)]
    for actor in actors:
        actor.start()
    while not all(actor.over for actor in actors):
        for actor in actors:
            actor.advance(1)
    assert [actor.error for actor in actors] == [None, None]
    assert_whole(other)
    assert keys(other, SESSIONS) == set()


# --- gc ----------------------------------------------------------------------------------------------------


def test_a_dry_run_removes_nothing(directory: FileStore) -> None:
    """A dry run says what would go, and leaves every object as it is."""
    remove(directory, make_image(directory, "agent", pages(1, 2)))
    before = keys(directory)
    report = collect_garbage(directory, dry_run=True, grace_s=0)
    assert (report.packs_removed, keys(directory)) == (1, before)


def test_an_unreadable_manifest_stops_the_collection(directory: FileStore) -> None:
    """What a damaged image refers to is not guessed: nothing at all is removed."""
    remove(directory, make_image(directory, "old", pages(1, 2)))
    broken = make_image(directory, "broken", pages(2, 2))
    flip(path_of(directory, manifest_key(broken.name, broken.id)), 100)  # where the packs are said to stand
    before = keys(directory)
    with pytest.raises(ImageDamaged, match="nothing was removed"):
        collect_garbage(directory, grace_s=0)
    assert keys(directory) == before


def test_a_dump_in_progress_defers_the_collection(directory: FileStore) -> None:
    """While a session is alive, packs stay, and the report names it."""
    remove(directory, make_image(directory, "old", pages(1, 2)))
    with Session(directory, "20260101T000000000-abcdef"):
        report = collect_garbage(directory, grace_s=0)
    assert (report.deferred, report.packs_removed) == (["20260101T000000000-abcdef"], 0)
    assert collect_garbage(directory, grace_s=0).packs_removed == 1


def test_a_dump_that_has_ended_its_session_leaves_it_to_others(directory: FileStore) -> None:
    """It is over once; who announces himself by that name afterwards is somebody else."""
    with Session(directory, "20260101T000000000-abcdef") as session:
        session.end()
        assert not list(directory.list(SESSIONS))
        key = foreign_session(directory, 0)
    assert [info.key for info in directory.list(SESSIONS)] == [key]


def foreign_session(store: FileStore, seconds_old: float, name: str = "20260101T000000000-abcdef") -> str:
    """Put a session of another host into the store, last renewed that long ago; return its key."""
    key = f"{SESSIONS}{name}"
    store.put(key, json.dumps({"boot": "elsewhere", "pids": "", "pid": 1, "start_time": 1}).encode())
    then = time.time() - seconds_old
    os.utime(path_of(store, key), (then, then))
    return key


def test_sessions_of_other_hosts_count_until_they_are_stale(directory: FileStore) -> None:
    """A session that was not renewed for a quarter of an hour is dead; a younger one is not."""
    remove(directory, make_image(directory, "old", pages(1, 2)))
    foreign_session(directory, 14 * 60)
    assert collect_garbage(directory, grace_s=0).deferred
    foreign_session(directory, 16 * 60)
    report = collect_garbage(directory, grace_s=0)
    assert (report.sessions_removed, report.packs_removed, keys(directory)) == (1, 1, set())


def test_a_session_of_this_host_outlives_a_clock_that_is_set(
    directory: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual machine that goes on from a snapshot has its wall clock set by hours within a dump. What that
    has stored stays, until it was silent for a quarter of an hour by the time that has really passed."""
    remove(directory, make_image(directory, "old", pages(1, 2)))
    with Session(directory, "20260101T000000000-abcdef") as session:
        age(directory)
        assert collect_garbage(directory).deferred
        assert len(keys(directory, PACKS)) == 1
        age(directory)
        real = announcing.clock
        monkeypatch.setattr(announcing, "clock", lambda: real() + 16 * 60)
        assert announcing.announced(directory, SESSIONS, time.time()) == ([], [session.key])


def test_the_session_of_a_dump_whose_image_is_there_defers_nothing(directory: FileStore) -> None:
    """A slow store may not have removed it when the dump ended. It stays until it is stale: its owner may
    still look for it."""
    key = foreign_session(directory, 1, make_image(directory, "new", pages(2, 1)).id)
    remove(directory, make_image(directory, "old", pages(1, 2)))
    report = collect_garbage(directory, grace_s=0)
    assert (report.deferred, report.packs_removed) == ([], 1)
    assert keys(directory, SESSIONS) == {key}
    assert_whole(directory)


def test_a_session_whose_process_was_killed_is_dead_at_once(directory: FileStore) -> None:
    """Nobody waits a quarter of an hour for a dump of this host that is not there any more."""
    remove(directory, make_image(directory, "old", pages(1, 2)))
    assert killed_at(3, lambda around: make_image(WatchedStore(directory, around), "new", pages(2, 1)))
    assert len(keys(directory, SESSIONS)) == 1
    report = collect_garbage(directory, grace_s=0)
    assert (report.sessions_removed, report.packs_removed) == (1, 1)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[]", b"\xff", b"{}"])
def test_an_announcement_that_nobody_can_read_counts_until_it_is_stale(
    directory: FileStore, text: bytes
) -> None:
    """Whoever wrote it: a collection waits for its end, and does its work then."""
    remove(directory, make_image(directory, "old", pages(1, 2)))
    key = foreign_session(directory, 0)
    directory.put(key, text)
    assert collect_garbage(directory, grace_s=0).deferred
    then = time.time() - HOURS_AGO
    os.utime(path_of(directory, key), (then, then))
    assert collect_garbage(directory, grace_s=0).packs_removed == 1


def test_one_collection_at_a_time(directory: FileStore) -> None:
    """A second collection is refused while one is at work."""
    make_image(directory, "agent", pages(1, 1))
    with Collecting(directory), pytest.raises(StoreError, match="another collection"):
        collect_garbage(directory)
    collect_garbage(directory)
    assert keys(directory, COLLECTIONS) == set()


def test_a_collection_that_was_suspended_removes_nothing_more(
    directory: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who could not renew its announcement for long stops: others may not be waiting for it any more."""
    remove(directory, make_image(directory, "old", pages(1, 2)))
    real = announcing.clock
    jumps: Iterator[float] = itertools.chain([0.0] * 4, itertools.repeat(announcing.STALE_AFTER_S))
    monkeypatch.setattr(announcing, "clock", lambda: real() + next(jumps))
    with pytest.raises(StoreError, match="too long"):
        collect_garbage(directory, grace_s=0)
    assert len(keys(directory, PACKS)) == 1


@pytest.mark.parametrize("has_lapsed", [True, False], ids=["taken for dead", "an image was removed"])
def test_a_file_of_weights_is_whole_or_not_there(
    directory: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch, has_lapsed: bool
) -> None:
    """Until its table stands in the store a collection may have removed what it refers to: because the push
    stood still for so long that it was taken for dead, or because an image is gone on which it relied."""
    (folder / "model").write_bytes(b"weights")
    for number in range(12):  # so many that the newest names merged indexes
        make_image(directory, "weights", [*pages(1, 2 + number)], b"weights")

    @contextmanager
    def meanwhile(call: str) -> Iterator[None]:
        yield
        if call.startswith(f"put {WEIGHTS}") and has_lapsed:
            monkeypatch.setattr(announcing, "clock", lambda: owner.clock() + HOURS_AGO)
        elif call.startswith(f"put {WEIGHTS}"):
            directory.put(f"{COLLECTIONS}{'0' * 16}", b"{}")
            for ref, _ in list_images(directory):
                remove(directory, ref)

    watched = cast("Store", WatchedStore(directory, meanwhile))
    with pytest.raises(StoreError, match="collection"):
        push(watched, str(folder / "model"))
    assert keys(directory, WEIGHTS) == set()


def test_leftovers_of_killed_writers_are_swept(directory: FileStore) -> None:
    """Old temporary files, and page digests without an index, go."""
    ref = make_image(directory, "agent", pages(1, 2))
    path_of(directory, f"{INDEXES}{ref.id}.index").unlink()
    leftover = Path(directory.root) / ".tmp" / f"4711-{'d' * 16}"
    leftover.write_bytes(b"?")
    os.utime(leftover, (1, 1))
    age(directory)
    assert collect_garbage(directory).leftovers_removed == 1
    assert not leftover.exists()
    assert keys(directory, INDEXES) == set()
    assert_whole(directory)


def test_a_host_whose_clock_is_ahead_removes_nothing_that_is_in_use(
    directory: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How old something is, is for the store's clock to say: packs, sessions, and what is being written where
    no lock tells (uploads to S3, and files on NFS)."""
    make_image(directory, "agent", pages(1, 2))
    writer = directory.writer("packs/00/" + "0" * 32)
    assert isinstance(writer, FileWriter)
    fcntl.flock(writer._descriptor, fcntl.LOCK_UN)
    remove(directory, list_images(directory)[0][0])
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86400)
    report = collect_garbage(directory)
    assert (report.packs_removed, report.sessions_removed, report.leftovers_removed) == (0, 0, 0)
    writer.commit()


# --- killed at every call ----------------------------------------------------------------------------------


def killed_everywhere(
    prepare: Callable[[], None], work: Callable[[Around], object], check: Callable[[], None]
) -> int:
    """Kill `work` before its first call, its second, and so on; `check` after each. Return how many."""
    for number in itertools.count():
        prepare()
        if not killed_at(number, work):
            return number
        check()
    raise AssertionError


def template(directory: FileStore, make: Callable[[], None]) -> Callable[[], None]:
    """Make a store once; return what puts it back as it was then."""
    make()
    saved = directory.root + ".saved"
    shutil.copytree(directory.root, saved)

    def restore() -> None:
        shutil.rmtree(directory.root)
        shutil.copytree(saved, directory.root)

    return restore


def old_and_kept(store: FileStore) -> None:
    """Two images that share a pack, one of which was removed; all of it is hours old."""
    old = make_image(store, "old", pages(1, 4) + pages(2, 2))
    make_image(store, "kept", pages(1, 4) + pages(3, 2))
    lonely = make_image(store, "lonely", pages(4, 3))
    remove(store, old)
    remove(store, lonely)
    age(store)


def test_a_collection_killed_anywhere_can_be_run_again(directory: FileStore) -> None:
    """After each kill every image is whole, and the next collection ends as an undisturbed one does."""
    prepare = template(directory, lambda: old_and_kept(directory))
    prepare()
    collect_garbage(directory)
    expected = keys(directory)

    def check() -> None:
        assert_whole(directory)
        collect_garbage(directory)
        assert keys(directory) == expected
        assert_whole(directory)

    assert killed_everywhere(
        prepare, lambda around: collect_garbage(WatchedStore(directory, around)), check
    ) > 15  # fmt: skip


def test_a_copy_killed_anywhere_can_be_run_again(directory: FileStore, folder: Path) -> None:
    """After each kill the copy exists whole or not at all; run again it is there, and gc finds no litter."""
    make_image(directory, "agent", pages(1, 4))
    ref = make_image(directory, "agent", pages(1, 4) + pages(2, 2))
    other = FileStore(str(folder / "other"))
    prepare = template(other, lambda: other.warm(for_writing=True))

    def check() -> None:
        assert_whole(other)
        copy(directory, ref, other)
        assert_whole(other)
        assert collect_garbage(other, grace_s=0).packs_removed == 0
        assert [found for found, _ in list_images(other)] == [ref]

    work = lambda around: copy(directory, ref, WatchedStore(other, around))  # noqa: E731
    assert killed_everywhere(prepare, work, check) > 10


def test_a_removal_killed_anywhere(directory: FileStore) -> None:
    """An image that is being removed exists whole or not at all."""
    prepare = template(directory, lambda: old_and_kept(directory))
    work = lambda around: remove(WatchedStore(directory, around), ImageRef("kept"))  # noqa: E731
    assert killed_everywhere(prepare, work, lambda: assert_whole(directory)) == 4


def test_a_dump_killed_anywhere_leaves_what_gc_can_clear(directory: FileStore) -> None:
    """Whatever a killed dump left, images are whole, and a collection leaves only what they need."""
    prepare = template(directory, lambda: old_and_kept(directory))
    prepare()
    collect_garbage(directory)
    expected = keys(directory, PACKS)

    def check() -> None:
        names = {ref.name for ref, _ in list_images(directory)}
        collect_garbage(directory, grace_s=0)
        assert_whole(directory)
        if "new" not in names:
            assert keys(directory, PACKS) == expected
            assert keys(directory, SESSIONS) == set()

    memory = pages(1, 4) + pages(2, 2) + pages(5, 2)
    work = lambda around: make_image(WatchedStore(directory, around), "new", memory)  # noqa: E731
    assert killed_everywhere(prepare, work, check) > 10


# --- raced -------------------------------------------------------------------------------------------------


def count_calls(work: Callable[[Around], object]) -> int:
    """How many calls some work makes when nobody disturbs it."""
    actor = Actor(work)
    actor.start()
    assert actor.finish()
    assert actor.error is None
    return len(actor.calls)


def interleavings(first: int, second: int) -> Iterator[tuple[int, int]]:
    """How far each gets before the other goes on: every pair for the few calls that matter to both."""
    yield from itertools.product(range(first + 1), range(second + 1))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("who_begins", ["dump", "gc"])
def test_a_dump_and_a_collection_in_every_order(directory: FileStore, who_begins: str) -> None:
    """Wherever the one overtakes the other, what was published is whole; a dump that cannot be says so."""
    prepare = template(directory, lambda: old_and_kept(directory))
    memory = pages(1, 4) + pages(2, 2) + pages(4, 3) + pages(5, 1)
    works: dict[str, Callable[[Around], object]] = {
        "dump": lambda around: make_image(WatchedStore(directory, around), "new", memory),
        "gc": lambda around: collect_garbage(WatchedStore(directory, around)),
    }
    order = [who_begins, *(name for name in works if name != who_begins)]
    calls = []
    for name in order:
        prepare()
        calls.append(count_calls(works[name]))
    outcomes: dict[str, int] = {"reused": 0, "removed": 0, "deferred": 0, "dump failed": 0}
    for stops in interleavings(*calls):
        prepare()
        actors = {name: Actor(works[name]) for name in order}
        for name, stop in zip(order, stops, strict=True):
            actors[name].start()
            assert actors[name].advance(stop)
        for name in order:
            assert actors[name].finish(), f"{name} stands still after {stops}"
        dump, collection = actors["dump"], actors["gc"]
        assert collection.error is None, stops
        assert dump.error is None or isinstance(dump.error, CrcliError), (stops, dump.error)
        assert_whole(directory)
        assert ("new" in {ref.name for ref, _ in list_images(directory)}) == (dump.error is None)
        outcomes["dump failed"] += dump.error is not None
        outcomes["removed"] += collection.result.packs_removed > 0
        outcomes["deferred"] += bool(collection.result.deferred)
        if dump.error is None:
            outcomes["reused"] += len(load(directory, dump.result).packs) > 2
    assert min(outcomes[name] for name in ("reused", "removed", "deferred")) > 0, outcomes
    assert outcomes["dump failed"] == 0, outcomes


@pytest.mark.timeout(300)
def test_a_copy_and_a_collection_in_every_order(
    directory: FileStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that counts on packs which an earlier, killed copy left never loses them to a collection."""
    monkeypatch.setattr(copying, "_LOOK_AGAIN_S", 0.002)
    ref = make_image(directory, "agent", pages(1, 4))
    other = FileStore(str(folder / "other"))

    def half_a_copy() -> None:
        copy(directory, ref, other)
        remove(other, ref)
        age(other)

    prepare = template(other, half_a_copy)
    works: list[Callable[[Around], object]] = [
        lambda around: copy(directory, ref, WatchedStore(other, around)),
        lambda around: collect_garbage(WatchedStore(other, around)),
    ]
    calls = []
    for work in works:
        prepare()
        calls.append(count_calls(work))
    removed = 0
    for stops in interleavings(*calls):
        prepare()
        copier, collector = actors = [Actor(work) for work in works]
        for actor, stop in zip(actors, stops, strict=True):
            actor.start()
            actor.advance(stop, 0.05)
        copier.finish(0.02)  # it may be waiting for the collection
        assert collector.finish()
        assert copier.finish()
        assert [actor.error for actor in actors] == [None, None], stops
        assert_whole(other)
        assert len(list_images(other)) == 1
        removed += collector.result.packs_removed > 0
    assert removed > 0


def advance_until(actor: Actor, call: str) -> None:
    """Let an actor go on until it has made a call that begins like this, or is done."""
    while not actor.over and not any(made.startswith(call) for made in actor.calls):
        assert actor.advance(1)


def test_a_dump_that_fails_late_does_not_mislead_the_next_one(directory: FileStore) -> None:
    """A slow dump tells of its old packs and then fails; the next dump counts on them while gc is at work."""
    make_image(directory, "kept", pages(1, 2))
    slow_id = "20260101T000000000-abcdef"
    with Session(directory, slow_id):
        writer = PackWriter(directory, slow_id)
        add_memory(writer, KnownPagesOf(KnownChunks(), writer.adopt), pages(2, 3))
        writer.seal()
        writer.close()
        age(directory)
        index = directory.get(index_key(slow_id))
        directory.delete(index_key(slow_id))  # it is about to write it
        collector = Actor(lambda around: collect_garbage(WatchedStore(directory, around)))
        collector.start()
        advance_until(collector, f"list {INDEXES}")
        directory.put(index_key(slow_id), index)
    advance_until(collector, f"list {SESSIONS}")
    dump = Actor(lambda around: make_image(WatchedStore(directory, around), "next", pages(2, 3)))
    dump.start()
    advance_until(dump, f"stat {PACKS}")
    assert collector.finish()
    assert dump.finish()
    assert (collector.error, dump.error) == (None, None)
    assert_whole(directory)


# --- in a place that is not crcli's alone ------------------------------------------------------------------

STRANGERS = (
    "packs/textures/grass.png",
    "packs/ab/readme.txt",
    "packs/README",
    "sessions/2026/alice.json",
    "sessions/bob",
    "collections/stamps",
    "weights/llama.gguf",
    "indexes/books.pages",
    "indexes/books.index",
    "indexes/books.merged",
)


def test_a_collection_leaves_alone_what_is_not_of_crcli(directory: FileStore) -> None:
    """A store may be a whole bucket or folder, in which others have folders called `packs` or `sessions`:
    whatever in them is not named as crcli names it stays, and keeps no collection from its work."""
    make_image(directory, "agent", pages(1, 4))
    remove(directory, make_image(directory, "old", pages(2, 2)))
    for key in STRANGERS:
        directory.put(key, b"not ours")
    foreign = Path(directory.root) / ".tmp" / "draft.odt"
    foreign.write_bytes(b"not ours")
    os.utime(foreign, (1, 1))
    age(directory)
    report = collect_garbage(directory, grace_s=0)
    assert keys(directory).issuperset(STRANGERS)
    assert foreign.exists()
    assert (report.packs_removed, report.packs_kept, report.deferred) == (1, 1, [])
    assert (report.sessions_removed, report.leftovers_removed) == (0, 0)
    assert_whole(directory)
