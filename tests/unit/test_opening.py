"""Images that are opened in a thread: what comes of it, and of those that nobody waits for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from crcli.errors import ImageDamaged, NotFound
from crcli.image.names import ImageRef
from crcli.pipeline import opening
from crcli.pipeline.opening import Opening
from crcli.pipeline.stages import RestoreOptions
from crcli.store.file import FileStore
from tests.support.crcli import wait_until
from tests.support.images import make_image, pages


class SlowStore(FileStore):
    """A store that gives no object before it is told to, and knows what was asked of it."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.answers = threading.Event()
        self.told: list[str] = []

    def get(self, key: str) -> bytes:
        """Wait, and read it."""
        self.told.append("get")
        assert self.answers.wait(20)
        return super().get(key)

    def give_up(self) -> None:
        """Note it."""
        self.told.append("give up")

    def close(self) -> None:
        """Note it."""
        self.told.append("close")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlowStore:
    """A store with an image in it, which every opening finds."""
    files = FileStore(str(tmp_path))
    files.warm(for_writing=True)
    make_image(files, "agent", pages(1, 40))
    slow = SlowStore(str(tmp_path))

    def open_slow(url: str, **_: Any) -> SlowStore:
        return slow

    monkeypatch.setattr(opening, "open_cached", open_slow)
    return slow


def opening_of(store: SlowStore, name: str = "agent") -> Opening:
    """An image of the store, being opened."""
    return Opening(RestoreOptions(str(ImageRef(name)), store.url))


def test_an_image_is_opened_with_all_that_criu_is_given(store: SlowStore) -> None:
    """Its manifest and CRIU's images are there, and the store is open until the image is closed."""
    store.answers.set()
    being_opened = opening_of(store)
    opened = being_opened.result()
    assert opened.manifest.name == "agent"
    assert {file.name: file.size for file in opened.manifest.skeleton} == {
        name: len(data) for name, data in opened.skeleton.items()
    }
    assert store.told == ["get"]
    being_opened.close()
    assert store.told == ["get", "close"]


def test_what_fails_is_raised_where_it_is_waited_for(store: SlowStore, tmp_path: Path) -> None:
    """An image that is not there, and one whose pack is damaged; the store is closed afterwards."""
    store.answers.set()
    with pytest.raises(NotFound):
        opening_of(store, "nobody").result()
    for pack in (path for path in (tmp_path / "packs").rglob("*") if path.is_file()):
        pack.write_bytes(bytes(byte ^ 1 for byte in pack.read_bytes()))
    damaged = opening_of(store)
    with pytest.raises(ImageDamaged):
        damaged.result()
    damaged.close()
    assert store.told[-1] == "close"


def test_a_store_that_does_not_answer_is_not_waited_for(store: SlowStore) -> None:
    """Who gives up goes at once; the thread closes the store when its answer comes."""
    being_opened = opening_of(store)
    wait_until(lambda: "get" in store.told, "nothing is asked for")
    being_opened.close()
    assert store.told == ["get", "give up"]
    store.answers.set()
    wait_until(lambda: store.told[-1] == "close", "the store stays open")
