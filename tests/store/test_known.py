"""What a dump asks a store before it freezes: enough to find pages again, little whatever else is there."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from blake3 import blake3

from crcli.image import index, manifest
from crcli.image.index import load_known
from crcli.image.names import manifest_key
from crcli.image.remove import remove
from crcli.store.file import FileStore
from tests.support.images import make_image, pages
from tests.support.stores import WatchedStore

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from crcli.image.index import KnownChunks
    from crcli.image.names import ImageRef


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
    monkeypatch.setattr(index, "_LISTED_AT_ONCE", 2)
    made, memory = generations(store, "agent", 6)
    newest = index._newest(store, "images/agent/", 1)
    assert newest[0].key == manifest_key("agent", made[-1].id)
    assert all(is_known(load_known(store, "agent", wanted=20), memory))


@pytest.mark.parametrize("claim", ["none", [], [7], ["../../x"], {"a": 1}])
def test_what_an_image_claims_is_not_trusted(
    store: FileStore, claim: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that is none costs chances to reuse, and nothing else."""
    real = manifest.Manifest.encode

    def encode(one: manifest.Manifest) -> bytes:
        one.meta["indexes"] = claim
        return real(one)

    monkeypatch.setattr(manifest.Manifest, "encode", encode)
    generations(store, "agent", 2)
    load_known(store, "agent", wanted=20, is_same=lambda head: True)
