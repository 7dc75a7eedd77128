"""What a dump asks a store before it freezes: enough to find pages again, little whatever else is there."""

from __future__ import annotations

import random
import struct
import threading
import time
from collections import Counter
from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from crcli.errors import ImageDamaged, NotFound, StoreError
from crcli.image import index, lookup, manifest, merging, newest, packs
from crcli.image.container import ContainerKind, pack_container, unpack_container
from crcli.image.copy import copy
from crcli.image.gc import Collecting, collect_garbage, may_miss
from crcli.image.index import KnownPagesOf, load_known
from crcli.image.names import (
    ImageRef,
    IndexRef,
    image_at,
    index_key,
    manifest_key,
    merged_key,
    new_image_id,
    pack_key,
    pages_key,
)
from crcli.image.packs import FIRST_PACK_BYTES, ChunkReader, PackWriter
from crcli.image.peek import ManifestPeek
from crcli.image.remove import remove
from crcli.image.session import Session
from crcli.image.tables import NO_PACK, MixedGroups, write_mixed
from crcli.memory.blocks import DIGEST, GROUP_PAGES, Run
from crcli.memory.chunking import CHUNK_PAGES
from crcli.memory.classify import Classified, Classifier
from crcli.memory.extents import PAGE, ZERO_PAGE, Source, SpaceKey, SpaceKind
from crcli.pipeline.knowing import Knowing
from crcli.store.file import FileStore
from crcli.store.s3.uploads import PART_SIZE
from tests.support.images import forge, make_image, pages
from tests.support.stores import WatchedStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from crcli.image.index import Expect, KnownChunks


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """An empty store."""
    return FileStore(str(tmp_path / "store"))


def is_known(known: KnownChunks, memory: Sequence[bytes]) -> list[bool]:
    """For each page whether it is known."""
    return [found is not None for found in known.find_pages([blake3(page).digest() for page in memory])]


def asked(store: FileStore, name: str, wanted: int) -> Counter[str]:
    """What is asked of a store for one dump, by kind."""
    calls: Counter[str] = Counter()

    @contextmanager
    def around(call: str) -> Iterator[None]:
        calls[call.split()[0]] += 1
        yield

    watched: Any = WatchedStore(store, around)
    load_known(watched, name, wanted=wanted, is_same=lambda head: True)
    return calls


def generations(store: FileStore, name: str, count: int) -> tuple[list[ImageRef], list[bytes]]:
    """So many images of a process that changes one of its 20 pages between two; and what it has at last."""
    memory = pages(1, 20)
    made = []
    for number in range(count):
        memory[number % 20] = pages(100 + number, 1)[0]
        made.append(make_image(store, name, memory))
    return made, memory


def test_other_images_cost_nothing(store: FileStore) -> None:
    """With twenty more images of other names in the store, the same is asked of it."""
    generations(store, "agent", 3)
    before = asked(store, "agent", 20)
    for number in range(20):
        make_image(store, f"other-{number}", pages(1000 + number, 20))
    assert asked(store, "agent", 20) == before
    assert sum(before.values()) < 20


@pytest.mark.parametrize(("had", "is_read"), [(19, False), (18, True)], ids=["hardly grown", "grown"])
def test_other_images_matter_where_a_tree_has_grown(store: FileStore, had: int, is_read: bool) -> None:
    """Fewer pages are known than it has, where some are zero: its own image says how many it had."""
    ref = make_image(store, "agent", pages(1, 5))
    forge(store, ref, {"counts": {"total": had * PAGE}})
    before = asked(store, "agent", 20)
    make_image(store, "other", pages(2, 20))
    assert (asked(store, "agent", 20) != before) == is_read


def test_everything_of_the_last_image_is_known(store: FileStore) -> None:
    """Whatever dump brought it in: pages of long ago, too, also when the images of then are removed."""
    made, memory = generations(store, "agent", 12)
    for ref in made[:-1]:
        remove(store, ref)
    assert all(is_known(load_known(store, "agent", wanted=20, is_same=lambda head: True), memory))


def test_without_the_list_the_images_of_the_name_are_read(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that do not say what they consist of, of earlier versions, are as good while they are few."""
    real = manifest.Manifest.encode

    def encode(one: manifest.Manifest) -> bytes:
        one.meta.pop("indexes", None)
        return real(one)

    monkeypatch.setattr(manifest.Manifest, "encode", encode)
    _, memory = generations(store, "agent", 5)
    assert all(is_known(load_known(store, "agent", wanted=20), memory))


def test_a_new_name_knows_of_others(store: FileStore) -> None:
    """The first dump under a name looks at the newest images of other names."""
    _, memory = generations(store, "agent", 2)
    assert all(is_known(load_known(store, "copy", wanted=20), memory))


def test_a_name_that_several_trees_share_serves_each(store: FileStore) -> None:
    """Each finds what its own last image consists of, though others were dumped under the name since."""
    first = pages(1, 20)
    make_image(store, "agents", first)
    for number in range(index.LINEAGES - 2):
        make_image(store, "agents", pages(10 + number, 20))
    assert all(is_known(load_known(store, "agents", wanted=20, is_same=lambda head: False), first))


def test_of_many_images_the_newest_are_found(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a listing takes more than one request, the names of the last minutes are asked for."""
    monkeypatch.setattr(newest, "_LISTED_AT_ONCE", 2)
    made, memory = generations(store, "agent", 6)
    (found, *_) = newest.newest_in(store, "images/agent/", 1, image_at)
    assert found.key == manifest_key("agent", made[-1].id)
    assert manifest.resolve(store, ImageRef("agent")) == made[-1]
    assert all(is_known(load_known(store, "agent", wanted=20), memory))


def test_what_somebody_puts_beside_the_newest_image_is_none(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is called as an image, and a little more, is not all that there is of today."""
    monkeypatch.setattr(newest, "_LISTED_AT_ONCE", 2)
    (*_, last), _ = generations(store, "agent", 2)
    monkeypatch.setattr(newest.time, "strftime", lambda *_: "20991231T0000")
    store.put("images/agent/20991231T000000000-000000.old", b"no image")
    assert manifest.resolve(store, ImageRef("agent")) == last


@pytest.mark.parametrize("claim", ["none", [], [7], ["../../x"], {"a": 1}])
def test_what_an_image_claims_is_not_trusted(
    store: FileStore, claim: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that is none costs chances to reuse, and nothing else."""
    real = manifest.Manifest.encode

    def encode(one: manifest.Manifest) -> bytes:
        one.meta["indexes"] = claim
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "read_head", lambda *_: {})
            return real(one)

    monkeypatch.setattr(manifest.Manifest, "encode", encode)
    generations(store, "agent", 2)
    load_known(store, "agent", wanted=20, is_same=lambda head: True)


@pytest.fixture
def few_are_tabled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indexes have tables of few pages."""
    monkeypatch.setattr(lookup, "WORTH_A_TABLE", 4)


@pytest.mark.usefixtures("few_are_tabled")
@pytest.mark.parametrize("tables", [0, 1, 3])
def test_pages_are_found_by_tables_that_were_stored(
    store: FileStore, tables: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of indexes without one, and of more than are looked into: each in its own chunk."""
    monkeypatch.setattr(index, "_MOST_TABLES", tables)
    memory: list[bytes] = []
    for seed, count in enumerate((5, 70, 1, 6, 20), 1):
        memory += pages(seed, count)
        make_image(store, "agent", memory)
    known = load_known(store, "agent")
    found = known.find_pages([blake3(page).digest() for page in [*memory, *pages(9, 3)]])
    assert found[len(memory) :] == [None] * 3
    reader = {}
    for page, at in zip(memory, found, strict=False):
        assert at is not None
        chunk, first, _ = known.chunk_of(at)
        pack, record = known.chunk(chunk)
        if chunk not in reader:
            ((_, raw),) = ChunkReader(store, [pack], [record._replace(pack=0)]).read([0])
            reader[chunk] = bytes(raw)
        assert reader[chunk][(at - first) * PAGE : (at - first + 1) * PAGE] == page


@pytest.mark.usefixtures("few_are_tabled")
@pytest.mark.parametrize("table", [b"", bytes(12), b"\1\0\0\0" * 8], ids=["empty", "no power of 2", "full"])
def test_a_table_in_which_no_search_ends_is_not_read(store: FileStore, table: bytes) -> None:
    """The index is left out, as any other that is damaged."""
    (made,), memory = generations(store, "agent", 1)
    key = index_key(made.id)
    sections = unpack_container(store.get(key), ContainerKind.INDEX, key)
    assert len(sections["PTAB"]) == 4 * 32
    store.put(key, pack_container(ContainerKind.INDEX, sections | {"PTAB": table}))
    assert not any(is_known(load_known(store, "agent", wanted=20), memory))


@pytest.mark.usefixtures("few_are_tabled")
def test_a_table_that_lies_only_costs_chances(store: FileStore) -> None:
    """What it leads to is compared in full."""
    (made,), memory = generations(store, "agent", 1)
    key = index_key(made.id)
    sections = unpack_container(store.get(key), ContainerKind.INDEX, key)
    lies = struct.pack("<32I", *range(1, 32), 0)
    store.put(key, pack_container(ContainerKind.INDEX, sections | {"PTAB": lies}))
    known = load_known(store, "agent", wanted=20)
    digests = [blake3(page).digest() for page in memory]
    assert all(
        at is None or at == digests.index(one)
        for at, one in zip(known.find_pages(digests), digests, strict=True)
    )
    assert not any(is_known(known, pages(7, 20)))


def test_an_index_that_does_not_fit_its_page_digests_is_left_out(store: FileStore) -> None:
    """It costs chances to reuse, and no dump."""
    (made, _), memory = generations(store, "agent", 2)
    key, digests = index_key(made.id), store.get(pages_key(made.id))[:-DIGEST]
    sections = unpack_container(store.get(key), ContainerKind.INDEX, key)
    sections["PGHS"] = blake3(digests).digest()
    store.put(pages_key(made.id), digests)
    store.put(key, pack_container(ContainerKind.INDEX, sections))
    assert sum(is_known(load_known(store, "agent", wanted=20), memory)) == 1


@pytest.mark.parametrize("lacks", ["PACK", "CHNK", "PGHS", "the packs"])
def test_an_index_without_what_it_needs_is_left_out(store: FileStore, lacks: str) -> None:
    """A section, or the packs that its chunks are in."""
    (made,), memory = generations(store, "agent", 1)
    key = index_key(made.id)
    sections = unpack_container(store.get(key), ContainerKind.INDEX, key)
    if lacks == "the packs":
        sections["PACK"] = b""
    else:
        del sections[lacks]
    store.put(key, pack_container(ContainerKind.INDEX, sections))
    assert not any(is_known(load_known(store, "agent", wanted=20), memory))


def test_an_index_of_a_chunk_that_no_extent_can_name_all_of_is_left_out(store: FileStore) -> None:
    """Others may write larger ones than we do: a page far behind in one was taken for one of the next."""
    (made,), memory = generations(store, "agent", 1)
    key, more = index_key(made.id), 1 << 16
    sections = unpack_container(store.get(key), ContainerKind.INDEX, key)
    chunks = bytearray(sections["CHNK"])
    struct.pack_into("<I", chunks, 4, (1 + more) * PAGE)
    digests = store.get(pages_key(made.id)) + bytes(more * DIGEST)
    sections |= {"CHNK": bytes(chunks), "PGHS": blake3(digests).digest()}
    store.put(pages_key(made.id), digests)
    store.put(key, pack_container(ContainerKind.INDEX, sections))
    assert not any(is_known(load_known(store, "agent", wanted=20), memory))


# --- groups of pages that several chunks have --------------------------------------------------------------


class CountingKnown(KnownPagesOf):
    """What is known, and how many single pages were asked for."""

    asked = 0

    def find(self, digests: Sequence[bytes]) -> list[int]:
        """Look up pages, and count them."""
        self.asked += len(digests)
        return super().find(digests)


def taken(store: FileStore, memory: Sequence[bytes]) -> tuple[Classified, int]:
    """Put an image of this memory into the store, as one process's from page 0 on, and see that it can be
    had again.

    Returns what was made of it, and how many single pages were looked for.
    """
    store.warm(for_writing=True)
    known = load_known(store, "agent", wanted=len(memory), is_same=lambda head: True)
    image_id = new_image_id(known.newest_image)
    writer = PackWriter(store, image_id, known)
    try:
        pages_of = CountingKnown(known, writer.adopt)
        space = SpaceKey(SpaceKind.PROCESS, 1)
        classifier = Classifier(pages_of, writer)
        found = classifier.classify(bytearray(b"".join(memory)), [Run(space, 0, len(memory), True, 0)])
        classifier.finish()
        spaces = dict(found.extents)
        meta = dict[str, Any](writer.indexes(spaces[space]))
        made = manifest.Manifest("agent", image_id, writer.packs, writer.chunks, spaces, [], [], meta)
        writer.seal()
        manifest.publish(store, made)
    finally:
        writer.close()
    reader = ChunkReader(store, writer.packs, writer.chunks)
    for extent in (extent for _, extents in found.extents for extent in extents):
        raw = bytes(extent.pages * PAGE)
        if extent.source == Source.CHUNK:
            ((_, chunk),) = reader.read([extent.chunk])
            raw = bytes(chunk)[extent.offset * PAGE : (extent.offset + extent.pages) * PAGE]
        assert raw == b"".join(memory[extent.start : extent.end])
    return found, pages_of.asked


@pytest.mark.parametrize("few", [0, lookup.FEW_DIGESTS], ids=["many digests", "few"])
def test_a_group_of_which_pages_changed_is_found_whole_the_next_time(
    store: FileStore, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its pages came from earlier dumps, from this one, or are zero; and only the new are stored."""
    monkeypatch.setattr(lookup, "FEW_DIGESTS", few)
    memory = [*pages(1, 3 * GROUP_PAGES), *[ZERO_PAGE] * 5, *pages(2, GROUP_PAGES - 5)]
    taken(store, memory)
    for generation in range(4):
        memory[generation], memory[2 * GROUP_PAGES + 2 * generation] = pages(10 + generation, 2)
        found, asked_for = taken(store, memory)
        assert found.counts.new == 2 * PAGE
        assert asked_for == 2 * GROUP_PAGES  # of the two groups that changed
    found, asked_for = taken(store, memory)
    assert (found.counts.new, asked_for) == (0, 0)


def test_a_group_whose_chunks_are_not_known_is_looked_for_page_by_page(store: FileStore) -> None:
    """An index that is gone takes no page with it but its own."""
    memory = pages(1, GROUP_PAGES)
    taken(store, memory)
    (first,) = (info for info in store.list("indexes/") if info.key.endswith(".index"))
    memory[3] = pages(2, 1)[0]
    taken(store, memory)
    store.delete(first.key)
    found, asked_for = taken(store, memory)
    assert (found.counts.new, found.counts.reused, asked_for) == (15 * PAGE, PAGE, GROUP_PAGES)


def test_of_what_was_noted_twice_the_later_counts(store: FileStore) -> None:
    """Of one group two dumps noted of which chunks it consists, and the first dump brought in more, so that
    its index is read first: it names a chunk of which nobody knows any more."""
    memory = pages(1, 3 * GROUP_PAGES)
    taken(store, memory)
    memory[0] = pages(2, 1)[0]
    taken(store, memory)
    second = max(info.key for info in store.list("indexes/") if info.key.endswith(".index"))
    memory[1], memory[GROUP_PAGES : GROUP_PAGES + 8] = pages(3, 1)[0], pages(4, 8)
    taken(store, memory)
    store.delete(second)
    found, asked_for = taken(store, memory)
    assert (found.counts.new, asked_for) == (PAGE, GROUP_PAGES)
    found, asked_for = taken(store, memory)
    assert (found.counts.new, asked_for) == (0, 0)


# --- what many dumps brought in ----------------------------------------------------------------------------


def grown(store: FileStore, dumps: int) -> tuple[list[bytes], list[tuple[Classified, int]]]:
    """Images of a process of 64 groups that changes one page between two, each time in another group; what it
    has at last, and what became of each."""
    memory = pages(1, 64 * GROUP_PAGES)
    made = [taken(store, memory)]
    for number in range(1, dumps):
        memory[number * GROUP_PAGES % len(memory) + number % 5] = pages(100 + number, 1)[0]
        made.append(taken(store, memory))
    return memory, made


def newest_head(store: FileStore) -> dict[str, Any]:
    """The JSON head of the newest image."""
    info = max(store.list("images/agent/"), key=lambda info: info.key)
    return ManifestPeek(store, info.key, info.size).head


def test_after_many_dumps_few_indexes_tell_of_all(store: FileStore) -> None:
    """Each dump still stores what changed, and looks for the pages of the group that did, no others."""
    memory, made = grown(store, 70)
    for found, asked_for in made[1:]:
        assert (found.counts.new, asked_for) == (PAGE, GROUP_PAGES)
    head = newest_head(store)
    assert len(head["indexes"]) + len(head["merged"]) <= merging.MOST_SEPARATE + 2
    assert sum(asked(store, "agent", len(memory)).values()) < 5 * merging.MOST_SEPARATE
    assert all(is_known(load_known(store, "agent", wanted=0, is_same=lambda head: True), memory))


def test_what_was_merged_is_found_as_it_was(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole groups in chunks of earlier dumps, mixed ones, single pages, and with a table to find them by."""
    monkeypatch.setattr(lookup, "WORTH_A_TABLE", 4)
    memory = pages(1, 8 * GROUP_PAGES)
    taken(store, memory)
    for number in range(merging.MOST_SEPARATE):
        memory += pages(10 + number, GROUP_PAGES + number)
        memory[number * GROUP_PAGES + 3] = pages(50 + number, 1)[0]
        memory[number * GROUP_PAGES + 5] = ZERO_PAGE
        taken(store, memory)
    (merged_id,) = newest_head(store)["merged"]
    assert "PTAB" in unpack_container(store.get(merged_key(merged_id)), ContainerKind.INDEX, "merged")
    found, asked_for = taken(store, memory)
    assert (found.counts.new, asked_for) == (0, len(memory) % GROUP_PAGES)


def test_a_merged_index_is_believed_of_packs_that_an_image_refers_to(store: FileStore) -> None:
    """It outlives some of the packs that it tells of: these are passed over, and the rest is known."""
    memory, _ = grown(store, merging.MOST_SEPARATE + 1)
    first = memory[:]
    for number in range(1, 4):  # nothing is left of what three dumps brought in
        memory[number * GROUP_PAGES + number % 5] = pages(200 + number, 1)[0]
    taken(store, memory)
    images = sorted(info.key for info in store.list("images/agent/"))
    for key in images[:-1]:
        store.delete(key)
    assert collect_garbage(store, grace_s=0).packs_removed == 3
    known = load_known(store, "agent", wanted=0, is_same=lambda head: True)
    assert all(is_known(known, memory))
    assert is_known(known, first).count(False) == 3
    assert known.vouched_by == images[-1:]
    assert taken(store, memory)[0].counts.new == 0


def test_chunks_of_which_hardly_a_page_is_left_are_given_up(store: FileStore) -> None:
    """These pages are stored once more, so that an image does not come to need ever more than it maps."""
    memory = pages(1, 64 * GROUP_PAGES)
    taken(store, memory)
    for number in range(60):
        memory[-28:] = pages(100 + number, 30)  # of what the dump before brought in two pages are left
        taken(store, memory)
    info = max(store.list("images/agent/"), key=lambda info: info.key)
    image = manifest.Manifest.decode(store.get(info.key), info.key)
    in_vain = sum(chunk.raw for chunk in image.chunks) // PAGE - len(memory)
    assert in_vain < 28 * 3 * merging.MOST_SEPARATE  # of the 28 * 60 pages that are in use no more


def test_an_image_does_not_come_to_need_many_times_what_it_maps(store: FileStore) -> None:
    """Also where pages change here and there, so that of each chunk of long ago some are in use for long: a
    restore fetches all of it, and a collection keeps it."""
    choice = random.Random(1)
    memory = pages(1, 64 * GROUP_PAGES)
    taken(store, memory)
    for number in range(150):
        for page in pages(100 + number, 20):
            memory[choice.randrange(len(memory))] = page
        taken(store, memory)
    info = max(store.list("images/agent/"), key=lambda info: info.key)
    image = manifest.Manifest.decode(store.get(info.key), info.key)
    assert sum(chunk.raw for chunk in image.chunks) // PAGE < 2.5 * len(memory)


def test_merged_indexes_that_no_image_names_are_removed(store: FileStore) -> None:
    """By a collection, which leaves alone those that one names."""
    memory, _ = grown(store, 4 * merging.MOST_SEPARATE)
    there = {info.key for info in store.list("indexes/") if info.key.endswith(".merged")}
    for key in sorted(info.key for info in store.list("images/agent/"))[:-1]:
        store.delete(key)
    named = set(map(merged_key, newest_head(store)["merged"]))
    collect_garbage(store, grace_s=0)
    left = {info.key for info in store.list("indexes/") if info.key.endswith(".merged")}
    assert named < there
    assert left == named
    assert all(is_known(load_known(store, "agent", wanted=0, is_same=lambda head: True), memory))


def test_who_believed_an_image_that_is_gone_is_told_of_a_collection(store: FileStore) -> None:
    """One that is at work may have removed packs that nobody but this image referred to, and one that was may
    have done so already."""
    taken(store, pages(1, GROUP_PAGES))
    (image,) = (info.key for info in store.list("images/agent/"))
    packs = [bytes.fromhex(info.key.rpartition("/")[2]) for info in store.list("packs/")]
    with Collecting(store):
        assert not may_miss(store, [image], packs, time.time)
        store.delete(image)
        assert may_miss(store, [image], packs, time.time)
    assert not may_miss(store, [image], packs, time.time)
    collect_garbage(store, grace_s=0)
    assert may_miss(store, [image], packs, time.time)


def test_an_image_by_which_packs_are_believed_must_be_there_when_the_dump_is_announced(
    store: FileStore,
) -> None:
    """A collection that is at work by then may have found it gone, and did not see the dump."""
    grown(store, merging.MOST_SEPARATE + 1)
    knowing = Knowing(
        store,
        lambda expect: load_known(store, "agent", wanted=0, is_same=lambda head: True, expect=expect),
    )
    knowing.start()
    knowing.join()
    newest = max(info.key for info in store.list("images/agent/"))
    store.delete(newest)
    with Session(store, "dump"):
        known = knowing.finish()
    assert newest not in known.vouched_by
    assert known.newest_image < newest.rpartition("/")[2]


def test_a_chunk_of_which_two_indexes_tell_has_one_number(store: FileStore) -> None:
    """Its own and one that was merged, where older images are asked too; and it is merged once."""
    grown(store, 2 * merging.MOST_SEPARATE)
    known = load_known(store, "agent", wanted=None)
    places = Counter((pack, chunk.offset) for pack, chunk in map(known.chunk, range(len(known))))
    assert max(places.values()) > 1
    writer = PackWriter(store, new_image_id(), known)
    try:
        for number in range(len(known)):
            writer.adopt(number)
        assert len(set(writer.chunks)) == len(writer.chunks) == len(places)
        adopted = {known: writer.adopt(known) for known in range(len(known))}
        refs = set(map(known.index_of, adopted))
        merged = merging.merge(known, list(refs), adopted, writer.chunks, writer.packs, Counter())
        sections = unpack_container(merged, ContainerKind.INDEX, "merged")
        assert len(sections["CHNK"]) == 56 * len(places)
    finally:
        writer.close()


def test_a_copy_takes_along_what_tells_of_its_image(store: FileStore, tmp_path: Path) -> None:
    """Also what an earlier dump merged; and what is merged where the dump stored no memory."""
    memory, _ = grown(store, merging.MOST_SEPARATE + 2)
    head = newest_head(store)
    assert head["id"] not in head["merged"]
    target = FileStore(tmp_path / "other")
    copy(store, ImageRef("agent", head["id"]), target)
    there = {info.key for info in target.list("indexes/")}
    assert set(map(merged_key, head["merged"])) <= there
    told = is_known(load_known(target, "agent", wanted=0, is_same=lambda head: True), memory)
    assert told.count(True) >= merging.MOST_SEPARATE - 1
    (merging_id,) = head["merged"]
    store.delete(pages_key(merging_id))
    again = FileStore(tmp_path / "again")
    copy(store, ImageRef("agent", merging_id), again)
    assert merged_key(merging_id) in {info.key for info in again.list("indexes/")}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([100, 1, 1, 1, 1, 1, 1], 0),  # few enough
        ([100, 1, 1, 1, 1, 1, 1, 1], 7),
        ([100, 8, 1, 1, 1, 1, 1, 1, 1], 7),  # what was merged waits
        ([100, 7, 1, 1, 1, 1, 1, 1, 1], 8),  # until as much has come
        ([128, 64, 32, 16, 8, 4, 2, 1], 4),  # at least half
    ],
)
def test_the_smallest_indexes_are_merged(sizes: list[int], expected: int) -> None:
    """So many that few are left, and as long as one is not larger than all before it."""
    refs = {IndexRef(str(number)): size for number, size in enumerate(sizes)}
    chosen = merging.choose(refs, {})
    assert sorted(refs[ref] for ref in chosen) == sorted(sizes)[:expected]


def test_an_index_that_tells_of_more_in_vain_is_merged() -> None:
    """However large it is: what is left out makes it half as large at least."""
    refs = {IndexRef(str(number)): size for number, size in enumerate([1, 1, 1, 1, 1, 1, 100, 200])}
    large, larger = IndexRef("6"), IndexRef("7")
    assert not {large, larger} & set(merging.choose(refs, {large: 100, larger: 200}))
    assert larger not in merging.choose(refs, {large: 101})
    assert large in merging.choose(refs, {large: 101})
    assert {large, larger} < set(merging.choose(refs, {large: 101, larger: 201}))


def test_the_keys_of_all_known_groups(store: FileStore) -> None:
    """Those of groups that lie in one chunk, and of those that consist of several."""
    memory = pages(1, 3 * GROUP_PAGES)
    groups = [memory[at : at + GROUP_PAGES] for at in range(0, len(memory), GROUP_PAGES)]
    taken(store, memory)
    memory[GROUP_PAGES] = pages(2, 1)[0]
    taken(store, memory)
    groups.append(memory[GROUP_PAGES : 2 * GROUP_PAGES])
    keys = load_known(store, "agent").group_keys()
    expected = {blake3(b"".join(group)).digest()[:8] for group in groups}
    assert (len(keys), {keys[at : at + 8] for at in range(0, len(keys), 8)}) == (8 * 4, expected)


def test_mixed_groups_are_written_and_read() -> None:
    """Parts belong to groups in their order; tables that do not fit together are damage."""
    groups = [
        (b"a" * 32, [(1, 8, 0, 15), (NO_PACK, 0, 0, 1)]),
        (b"b" * 32, [(0, 1 << 40, 3, 16)]),
    ]
    table, rows = write_mixed(groups)
    read = MixedGroups(table, rows, 2, "an index")
    assert [list(read.parts(number)) for number in range(len(read))] == [parts for _, parts in groups]
    assert read.digests == b"a" * 32 + b"b" * 32
    assert read.pages() == [GROUP_PAGES, GROUP_PAGES]
    for damaged in (
        (table, rows, 1),
        (table[:-1], rows, 2),
        (table, rows[:-16], 2),
        (table[36:], rows, 2),
    ):
        with pytest.raises(ImageDamaged):
            MixedGroups(*damaged, "an index")


# --- read before the dump is announced ---------------------------------------------------------------------


def test_what_is_read_before_the_announcement_counts_if_it_still_stands(store: FileStore) -> None:
    """An index that a collection took away meanwhile is not believed; one that is there is not read again."""
    made, memory = generations(store, "agent", 2)
    reads = []

    def read(expect: Expect | None) -> KnownChunks:
        reads.append(load_known(store, "agent", expect=expect))
        return reads[-1]

    knowing = Knowing(store, read)
    knowing.start()
    assert all(is_known(knowing.finish(), memory))
    assert len(reads) == 1
    knowing = Knowing(store, read)
    knowing.start()
    knowing.join()
    store.delete(index_key(made[1].id))
    assert sum(is_known(knowing.finish(), memory)) == 19  # the one that changed since the first is not known
    assert len(reads) == 3


def test_packs_are_looked_for_once_and_after_the_announcement(store: FileStore) -> None:
    """In the same breath as the index. One that is gone takes what its index tells with it, as ever."""
    made, memory = generations(store, "agent", 2)
    (gone,) = set(manifest.load(store, made[1]).packs) - set(manifest.load(store, made[0]).packs)
    asked_for: list[set[str]] = []

    class Asked(WatchedStore):
        def missing(self, keys: Iterable[str]) -> set[str]:
            asked_for.append(set(keys))
            return store.missing(asked_for[-1])

    watched: Any = Asked(store, lambda _: nullcontext())
    knowing = Knowing(watched, lambda expect: load_known(watched, "agent", expect=expect))
    knowing.start()
    knowing.join()
    assert not asked_for
    assert all(is_known(knowing.finish(), memory))
    assert [pack_key(gone) in keys and index_key(made[1].id) in keys for keys in asked_for] == [True]
    asked_for.clear()
    knowing = Knowing(watched, lambda expect: load_known(watched, "agent", expect=expect))
    knowing.announced()
    knowing.start()
    assert all(is_known(knowing.finish(), memory))  # looked for before it was read, and then not again
    assert [pack_key(gone) in keys and index_key(made[1].id) in keys for keys in asked_for] == [True, False]
    assert not asked_for[1]
    knowing = Knowing(store, lambda expect: load_known(store, "agent", expect=expect))
    knowing.start()
    knowing.join()
    store.delete(pack_key(gone))
    assert sum(is_known(knowing.finish(), memory)) == 19
    knowing = Knowing(store, lambda expect: load_known(store, "agent", expect=expect))
    knowing.announced()
    knowing.start()
    assert sum(is_known(knowing.finish(), memory)) == 19


def test_a_directory_that_the_announcement_makes(tmp_path: Path) -> None:
    """A store that is not there yet, or only in part, is asked once more when it is."""
    store = FileStore(str(tmp_path / "new"))
    failures: list[StoreError] = [StoreError("failed: No such file or directory"), NotFound("no such store")]

    def read(expect: Expect | None) -> KnownChunks:
        if threading.current_thread() is not threading.main_thread() and failures:
            raise failures.pop()
        return load_known(store, "agent", expect=expect)

    while failures:
        knowing = Knowing(store, read)
        knowing.start()
        knowing.join()
        with Session(store, new_image_id()):
            assert knowing.finish().page_count == 0


def test_a_store_that_cannot_be_read(store: FileStore) -> None:
    """What is wrong with a store is told to whoever waits for what it has."""

    def fail(_: bool) -> KnownChunks:
        raise StoreError("no answer")

    knowing = Knowing(store, fail)
    knowing.start()
    with pytest.raises(StoreError, match="no answer"):
        knowing.finish()


def test_a_head_that_is_nested_too_deep_is_damage(store: FileStore) -> None:
    """No dump of that name ends because of it."""
    store.warm(for_writing=True)
    key = manifest_key("agent", new_image_id())
    data = pack_container(ContainerKind.MANIFEST, {"META": b"[" * 200_000})
    store.put(key, data)
    with pytest.raises(ImageDamaged):
        ManifestPeek(store, key, len(data))
    assert len(load_known(store, "agent")) == 0


def test_packs_of_a_name_lie_side_by_side(store: FileStore) -> None:
    """In a folder of their own, so that one listing tells of all of them, in whatever order they came."""
    store.warm(for_writing=True)
    packs_of: dict[str, set[str]] = {"agent": set(), "other": set()}
    for seed in range(6):
        name = ("agent", "other")[seed % 2]
        made = make_image(store, name, pages(seed, 2), file=name.encode())
        packs_of[name].update(map(pack_key, manifest.load(store, made).packs))
    assert [len(found) for found in packs_of.values()] == [3, 3]
    families = [{key[:17] for key in found} for found in packs_of.values()]
    assert [len(family) for family in families] == [1, 1] and families[0] != families[1]


def test_the_first_packs_of_a_dump_are_small(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has changed is on its way before all of it is known; a large dump makes few packs all the same.
    To S3 such a pack is one part."""
    monkeypatch.setattr(packs, "FIRST_PACK_BYTES", 3 * PAGE)
    monkeypatch.setattr(packs, "PACK_BYTES", 10 * PAGE)
    source = random.Random(1)
    with closing(PackWriter(store, image_id := new_image_id())) as writer:
        for _ in range(40):
            page = source.randbytes(PAGE)
            writer.add(writer.reserve(), [page], [blake3(page).digest()])
        writer.seal()
    sizes = [sum(chunk.raw for chunk in writer.chunks if chunk.pack == at) for at in writer.own_packs()]
    assert [size // PAGE for size in sizes] == [3] * packs.FIRST_PACKS + [10, 10, 8]
    assert store.stat(index_key(image_id)).size
    assert FIRST_PACK_BYTES + max(packs.BLOB_BYTES, CHUNK_PAGES * PAGE) <= PART_SIZE
