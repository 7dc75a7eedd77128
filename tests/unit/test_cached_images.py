"""Images behind a cache: read from it where it has them, never on its word alone."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from crcli.config import CacheChoice, choose_cache
from crcli.errors import ImageDamaged, NotFound, StoreError, StoreUnreachable, UsageError
from crcli.image import manifest as manifests
from crcli.image.cached import KINDS, describe_cache, load_near, open_cache
from crcli.image.copy import copy
from crcli.image.index import load_known
from crcli.image.manifest import Manifest, load, publish
from crcli.image.names import ImageRef, index_key, pack_key, pages_key, parse_image
from crcli.image.packs import ChunkReader
from crcli.image.remove import remove
from crcli.image.verify import verify
from crcli.main import main
from crcli.memory.extents import Source
from crcli.records import replace
from crcli.store.base import Store
from crcli.store.cache import Cache
from crcli.store.caching import CachingStore
from crcli.store.file import FileStore
from tests.support.images import make_image, pages
from tests.support.stores import WatchedStore

PLACE = "s3://bucket/prefix https://endpoint"


class Remote:
    """A store somewhere else, whose requests are counted, and which may stop answering, or answer badly."""

    def __init__(self, folder: Path) -> None:
        self.files = FileStore(str(folder / "store"))
        self.files.warm(for_writing=True)
        self.cache_folder = folder / "cache"
        self.asked: Counter[str] = Counter()
        self.refusal: StoreError | None = None

    @contextmanager
    def _around(self, what: str) -> Iterator[None]:
        self.asked[what.partition("/")[0]] += 1
        if self.refusal is not None:
            raise self.refusal
        yield

    def go_away(self) -> None:
        """Give no answer from now on."""
        self.refusal = StoreUnreachable("no connection to the store", hint="Check the network.")

    @contextmanager
    def here(self, place: str = PLACE, **options: Any) -> Iterator[CachingStore]:
        """The store as a process on this host opens it."""
        origin: Any = WatchedStore(self.files, self._around)  # type: ignore[arg-type]
        cache = Cache(str(self.cache_folder), **options)
        store = CachingStore(origin, lambda: origin, cache, KINDS, place)
        try:
            yield store
        finally:
            store.close()

    def make(self, name: str = "agent", seed: int = 1, count: int = 40) -> ImageRef:
        """Dump an image from this host."""
        with self.here() as store:
            return make_image(store, name, pages(seed, count))

    def kept(self, kind: str) -> list[Path]:
        """The files of the cache of some kind."""
        return [path for path in self.cache_folder.iterdir() if re.search(rf"(^|~){kind}~", path.name)]


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    """A remote store that is empty, and an empty cache."""
    return Remote(tmp_path)


def memory_of(store: Store, manifest: Manifest) -> list[bytes]:
    """All pages of an image, in order."""
    reader = ChunkReader(store, manifest.packs, manifest.chunks)
    found = {
        n: bytes(raw) for group in reader.plan(range(len(manifest.chunks))) for n, raw in reader.read(group)
    }
    (extents,) = manifest.spaces.values()
    assert all(extent.source == Source.CHUNK for extent in extents)
    return [found[extent.chunk] for extent in extents]


def restore(store: CachingStore, ref: ImageRef) -> list[bytes]:
    """What a restore would read: the manifest, then all memory."""
    return memory_of(store, load_near(store, ref))


def damage(path: Path, at: int = 100) -> None:
    """Change a byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_dump_leaves_its_image_in_the_cache(remote: Remote) -> None:
    """What was dumped here is restored here with one question to the store: whether it still exists."""
    ref = remote.make()
    remote.asked.clear()
    with remote.here() as store:
        assert restore(store, ref) == pages(1, 40)
    assert remote.asked == {"get images": 1}


def test_a_restore_leaves_its_image_in_the_cache(remote: Remote) -> None:
    """What was fetched once is not fetched again."""
    ref = make_image(remote.files, "agent", pages(1, 40))  # on another host
    for _ in range(2):
        with remote.here() as store:
            assert restore(store, ref) == pages(1, 40)
    assert remote.asked["get_range packs"] == 1


def test_without_its_store_an_image_is_restored_by_its_id(remote: Remote) -> None:
    """No answer from the store: an image of which all is here is restored, the tables of old ones as well."""
    ref = remote.make()
    again = remote.make(seed=1, count=60)  # which refers to the pack of the first
    remote.go_away()
    for one, count in ((ref, 40), (again, 60)):
        with remote.here() as store:
            assert restore(store, one) == pages(1, count)


def test_without_its_store_the_newest_is_not_guessed(remote: Remote) -> None:
    """What is the newest image of a name nobody here knows: that is refused; the hint names what is here."""
    remote.make()
    newest = remote.make(seed=2)
    remote.make("agent-2", seed=3)
    remote.go_away()
    with remote.here() as store, pytest.raises(StoreUnreachable) as refused:
        load_near(store, ImageRef("agent"))
    assert refused.value.exit_code == 30
    assert str(newest) in refused.value.hint
    parse_image(str(newest))
    with remote.here() as store, pytest.raises(StoreUnreachable) as refused:
        load_near(store, ImageRef("nobody"))
    assert refused.value.hint == "Check the network."


def test_an_image_of_which_a_part_is_missing_needs_its_store(remote: Remote) -> None:
    """Without the store, an image that is not all here is refused before anything is begun."""
    ref = make_image(remote.files, "agent", pages(1, 2000))
    with remote.here() as store:
        manifest = load_near(store, ref)
        reader = ChunkReader(store, manifest.packs, manifest.chunks)
        list(reader.read(reader.plan(range(len(manifest.chunks)), 1 << 20)[0]))
    remote.go_away()
    with remote.here() as store:
        with pytest.raises(StoreUnreachable):
            load_near(store, ref)
        with pytest.raises(StoreUnreachable) as refused:
            load_near(store, ImageRef("agent"))
        assert str(ref) not in refused.value.hint


def test_a_removed_image_is_not_restored(remote: Remote) -> None:
    """When the store answers it decides: what was removed elsewhere is gone, also without the store then."""
    ref = remote.make()
    remove(remote.files, ref)
    with remote.here() as store, pytest.raises(NotFound, match=str(ref)):
        load_near(store, ref)
    remote.go_away()
    with remote.here() as store, pytest.raises(StoreUnreachable):
        load_near(store, ref)


def test_an_image_that_is_removed_here_leaves_the_cache(remote: Remote) -> None:
    """What is removed through this host is not restored by it later, store or no store."""
    ref = remote.make()
    with remote.here() as store:
        remove(store, ref)
    remote.go_away()
    with remote.here() as store, pytest.raises(StoreUnreachable):
        load_near(store, ref)


def test_a_refusal_is_an_answer(remote: Remote) -> None:
    """Who may not read the store any more gets nothing from the cache either."""
    ref = remote.make()
    remote.refusal = StoreError("AccessDenied")
    with remote.here() as store, pytest.raises(StoreError, match="AccessDenied"):
        load_near(store, ref)


def test_another_store_is_another_matter(remote: Remote) -> None:
    """An image of the same name in another store is not taken for it."""
    ref = remote.make()
    remote.go_away()
    with remote.here(place="s3://other/prefix https://endpoint") as store, pytest.raises(StoreUnreachable):
        load_near(store, ref)


@pytest.mark.parametrize("how", ["altered", "zeros", "cut short", "empty"])
def test_a_damaged_pack_in_the_cache_is_fetched_again(remote: Remote, how: str) -> None:
    """A cache that gives out other bytes costs a request and no more; the bytes are the right ones."""
    ref = remote.make()
    (pack,) = remote.kept("packs")
    if how == "altered":
        damage(pack)
    else:
        size = {"zeros": 0, "cut short": pack.stat().st_size // 2, "empty": 0}[how]
        os.truncate(pack, size)
        if how == "zeros":
            pack.write_bytes(bytes(1 << 20))
    for _ in range(2):
        with remote.here() as store:
            assert restore(store, ref) == pages(1, 40)


def test_a_damaged_cache_is_not_a_damaged_image(remote: Remote) -> None:
    """Without the store to ask, a damaged cache is a store that cannot be reached (30), not an image (22)."""
    ref = remote.make()
    damage(remote.kept("packs")[0])
    remote.go_away()
    with remote.here() as store, pytest.raises(StoreUnreachable):
        restore(store, ref)


def test_a_damaged_store_is_a_damaged_image(remote: Remote) -> None:
    """What is bad in the store, and was cached as it is, is reported as it would be without a cache."""
    ref = make_image(remote.files, "agent", pages(1, 40))
    (pack,) = (path for path in Path(remote.files.root, "packs").glob("*/*"))
    damage(pack)
    for _ in range(2):
        with remote.here() as store, pytest.raises(ImageDamaged):
            restore(store, ref)


@pytest.mark.parametrize("kind", ["images", "indexes"])
def test_damaged_tables_in_the_cache_are_fetched_again(remote: Remote, kind: str) -> None:
    """Manifests and indexes in the cache are under a seal: one that was altered is as good as none."""
    ref = remote.make()
    for path in remote.kept(kind):
        damage(path)
    with remote.here() as store:
        assert restore(store, ref) == pages(1, 40)
        assert len(load_known(store, "agent")) == 41


def test_a_repeated_dump_fetches_no_index(remote: Remote) -> None:
    """What the store has is known from the cache; what lists it is asked of the store."""
    remote.make()
    remote.asked.clear()
    remote.make(seed=2)
    assert remote.asked["get indexes"] == remote.asked["get_range indexes"] == 0, remote.asked


def test_a_dump_that_is_given_up_leaves_nothing(remote: Remote) -> None:
    """A pack that never became an object is not kept."""
    from crcli.image.packs import PackWriter

    with remote.here() as store:
        writer = PackWriter(store, "20260101T000000000-000000")
        writer.add_blob(os.urandom(5 << 20))
        writer.close()
    assert list(remote.cache_folder.iterdir()) == []


def test_verify_and_cp_read_the_store_itself(remote: Remote, tmp_path: Path) -> None:
    """Whether the store is whole is asked of the store: commands that say so open it without a cache."""
    source = Path(__file__).parents[2] / "crcli"
    opening = ("open_cached(", "cached=True")
    users = [path.stem for path in source.rglob("*.py") if any(it in path.read_text() for it in opening)]
    assert sorted(users) == ["cached", "opening", "pager", "rm", "shared"]
    ref = remote.make()
    (pack,) = (path for path in Path(remote.files.root, "packs").glob("*/*"))
    damage(pack)
    assert verify(remote.files, ref).damage
    with pytest.raises(ImageDamaged):
        copy(remote.files, ref, FileStore(str(tmp_path / "other")))


def test_what_the_cache_holds_is_told(remote: Remote) -> None:
    """`cache ls` names the images, where they are from, and whether all of each is here."""
    ref = remote.make()
    other = remote.make("other", seed=2)
    with remote.here() as store:
        other_pack = load_near(store, other).packs[0].hex()
    next(path for path in remote.kept("packs") if path.name.endswith(other_pack)).unlink()
    report = describe_cache(Cache(str(remote.cache_folder)))
    assert [(one.image, one.whole) for one in report.images] == [(str(ref), True), (str(other), False)]
    assert {one.store for one in report.images} == {remote.files.url}
    assert report.images[0].memory_bytes == 40 * 4096
    assert report.packs == 1 and 0 < report.bytes < report.limit_bytes


def test_a_cache_that_cannot_be_used_changes_nothing(remote: Remote) -> None:
    """Where there can be no cache, dumps and restores work as without one."""
    remote.cache_folder.write_text("a file, not a folder")
    ref = remote.make()
    with remote.here() as store:
        assert restore(store, ref) == pages(1, 40)
    assert describe_cache(Cache(str(remote.cache_folder))).trouble


def test_dropped_while_it_is_read(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is cleared in the middle of a restore makes it fetch the rest."""
    ref = make_image(remote.files, "agent", pages(1, 3000))
    with remote.here() as store:
        assert restore(store, ref) == pages(1, 3000)
    with remote.here() as store:
        manifest = load_near(store, ref)
        reader = ChunkReader(store, manifest.packs, manifest.chunks)
        groups = reader.plan(range(len(manifest.chunks)), 1 << 20)
        assert len(groups) > 2
        for number, group in enumerate(groups):
            assert len(list(reader.read(group))) == len(group)
            if number == 0:
                Cache(str(remote.cache_folder)).clear()
                for pack in manifest.packs:
                    store.cache.drop(store.name_of(pack_key(pack)))
    assert remote.asked["get_range packs"] > len(groups)


def test_the_settings_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment wins over the file, the file over the default; 0 keeps nothing; nonsense is refused."""
    for name in ("CRCLI_CACHE_DIR", "CRCLI_CACHE_SIZE"):
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "config.yaml"
    monkeypatch.setenv("CRCLI_CONFIG", str(settings))
    settings.write_text("store: /somewhere\n")
    assert choose_cache() == CacheChoice("/var/cache/crcli/objects", None)
    settings.write_text("cache: {folder: /fast, size: 10GiB}\n")
    assert choose_cache() == CacheChoice("/fast/objects", 10 << 30)
    settings.write_text("cache:\n  size: 0\n")
    assert choose_cache().limit == 0 and open_cache() is None
    monkeypatch.setenv("CRCLI_CACHE_DIR", "/other")
    monkeypatch.setenv("CRCLI_CACHE_SIZE", "1.5 GB")
    assert choose_cache() == CacheChoice("/other/objects", 1_500_000_000)
    for wrong in ("cache: 10GiB", "cache: {room: 1}", "cache: {size: [1]}", "cache: {folder: 3}"):
        settings.write_text(wrong + "\n")
        with pytest.raises(UsageError, match="cache: "):
            choose_cache()
    settings.write_text("cache: {}\n")
    for wrong in ("-1", "many", "10 elephants", "1e9"):
        monkeypatch.setenv("CRCLI_CACHE_SIZE", wrong)
        with pytest.raises(UsageError, match="not a size"):
            choose_cache()


def test_the_commands(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`cache ls` and `cache clear`, for people and as one JSON object; what is not there is no error."""
    monkeypatch.setenv("CRCLI_CACHE_DIR", str(remote.cache_folder.parent))
    monkeypatch.delenv("CRCLI_CONFIG", raising=False)
    remote.cache_folder = remote.cache_folder.parent / "objects"

    def said(*arguments: str) -> str:
        assert main(["cache", *arguments]) == 0
        return capsys.readouterr().out

    assert re.search("0 packs, 0 B of at most .+iB$", said("ls"))
    ref = remote.make()
    lines = said("ls").splitlines()
    assert lines[1].split()[:2] == [str(ref), "160"] and "yes" in lines[1] and remote.files.url in lines[1]
    assert "1 pack," in lines[-1]
    found = json.loads(said("ls", "--json"))
    assert list(found) == ["folder", "limit_bytes", "bytes", "packs", "images", "trouble"]
    assert found["images"][0] == {
        "image": str(ref), "store": remote.files.url, "memory_bytes": 40 * 4096, "whole": True
    }  # fmt: skip
    removed = json.loads(said("clear", "--json"))
    assert removed == {"folder": found["folder"], "files": 4, "bytes": found["bytes"]}
    assert "removed 0 files" in said("clear")
    remote.cache_folder.chmod(0o755)
    assert "must be ours alone" in said("ls")


def test_a_store_that_is_reopened_has_its_cache(remote: Remote) -> None:
    """A process that dumps one tree after another keeps what each sends."""
    with remote.here() as store:
        one = make_image(store, "one", pages(1, 40))
        store.close()
        again = store.reopened()
        other = make_image(again, "other", pages(2, 40))
        again.close()
    remote.go_away()
    with remote.here() as store:
        assert restore(store, one) == pages(1, 40)
        assert restore(store, other) == pages(2, 40)


def test_a_pack_that_the_store_did_not_take_is_not_kept(remote: Remote) -> None:
    """A commit that fails leaves nothing in the cache either."""
    with remote.here() as store:
        writer = store.writer("packs/00/00000000000000000000000000000000")
        writer.write(b"some bytes")
        remote.go_away()
        with pytest.raises(StoreUnreachable):
            writer.commit()
        writer.abort()
    assert list(remote.cache_folder.iterdir()) == []


def test_an_odd_image_hides_no_other_in_the_cache(remote: Remote) -> None:
    """What the head of a manifest says need not make sense: `cache ls` shows the others."""
    ref, odd = remote.make(), remote.make("odd", seed=2)
    manifest = load(remote.files, odd)
    for number, counts in enumerate(([], {"total": "much"}, {"total": 1e999})):
        image_id = f"20260101T00000000{number}-abcdef"
        forged = replace(manifest, id=image_id, meta={**manifest.meta, "counts": counts})
        with patch.object(manifests, "read_head"):
            publish(remote.files, forged)
        with pytest.raises(ImageDamaged):
            forged.encode()
        with remote.here() as store, pytest.raises(ImageDamaged):
            load_near(store, ImageRef("odd", image_id))
    images = describe_cache(Cache(str(remote.cache_folder))).images
    assert [one.image for one in images] == [str(ref), str(odd)]


def test_what_another_store_says_of_a_dump_is_not_believed(tmp_path: Path) -> None:
    """An image was copied to somebody else's store, who has its index say what he likes: nobody compares what
    an index says with what there is. This host reads it there, and then has a dump in the first store."""
    ours, theirs = Remote(tmp_path / "ours"), Remote(tmp_path / "theirs")
    theirs.cache_folder = ours.cache_folder
    ref = make_image(ours.files, "agent", pages(1, 4))
    copy(ours.files, ref, theirs.files)
    for key in (index_key(ref.id), pages_key(ref.id)):
        theirs.files.put(key, b"what is wrong")
        with theirs.here("s3://theirs https://endpoint") as store:
            assert store.get(key) == b"what is wrong"
        for _ in range(2):
            with ours.here() as store:
                assert store.get(key) == ours.files.get(key)
    assert ours.asked["get indexes"] == 2, "it is kept here"
