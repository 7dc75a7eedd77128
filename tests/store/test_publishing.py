"""The last step of a dump: whatever fails, the error says what became of the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crcli.errors import CrcliError, DumpFailed, StoreError, StoreUnreachable
from crcli.image import session as announcing
from crcli.image.gc import Collecting
from crcli.image.manifest import Manifest, load
from crcli.image.names import manifest_key, new_image_id
from crcli.image.session import Session
from crcli.pipeline.publishing import publish_whole
from crcli.records import replace
from crcli.store.base import is_there
from crcli.store.file import FileStore
from tests.support.images import make_image, pages
from tests.support.stores import WatchedStore


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """An empty store."""
    return FileStore(str(tmp_path / "store"))


@pytest.fixture
def later(store: FileStore) -> tuple[Manifest, str]:
    """What a dump is about to publish, and the manifest of the earlier image that it relies on."""
    earlier = make_image(store, "agent", pages(1, 4))
    manifest = load(store, earlier)
    return replace(manifest, id=new_image_id(earlier.id)), manifest_key("agent", earlier.id)


def failing(store: FileStore, *calls: str, first: bool = True) -> Any:
    """The store, which answers no calls that begin so; what was asked is done, unless it fails `first`."""

    @contextmanager
    def around(call: str) -> Iterator[None]:
        fails = call.startswith(calls)
        if fails and first:
            raise StoreUnreachable("no answer")
        yield
        if fails:
            raise StoreUnreachable("no answer")

    return WatchedStore(store, around)


def published(
    store: FileStore, later: tuple[Manifest, str], through: Any = None, before: Callable[[], object] = int
) -> tuple[CrcliError | None, bool]:
    """What publishing ends with, and whether the image is there then; `before` is done right before it."""
    manifest, vouching = later
    error: CrcliError | None = None
    with Session(store, manifest.id) as session:
        before()
        try:
            publish_whole(through or store, manifest, manifest.encode(), session, [vouching])
        except CrcliError as raised:
            error = raised
    return error, is_there(store, manifest_key(manifest.name, manifest.id))


def test_an_image_is_published(store: FileStore, later: tuple[Manifest, str]) -> None:
    """Its manifest is written, and nobody has anything against it."""
    assert published(store, later) == (None, True)


def test_one_whose_earlier_image_went_while_garbage_is_collected(
    store: FileStore, later: tuple[Manifest, str]
) -> None:
    """It is taken back; the store has answered all the time, and that is not what is said."""
    with Collecting(store):
        error, is_published = published(store, later, before=lambda: store.delete(later[1]))
    assert isinstance(error, DumpFailed) and error.exit_code == 11 and not is_published
    assert "an earlier image" in error.message and "answer" not in error.message
    assert "run the dump again" in error.hint


def test_one_whose_dump_may_have_been_taken_for_dead(
    store: FileStore, later: tuple[Manifest, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken back."""
    monkeypatch.setattr(announcing, "LAPSED_AFTER_S", -1.0)
    error, is_published = published(store, later)
    assert isinstance(error, StoreError) and "announce" in error.message and not is_published


def test_one_that_cannot_be_taken_back(store: FileStore, later: tuple[Manifest, str]) -> None:
    """Then it is named, as one not to rely on."""
    with Collecting(store):
        error, is_published = published(
            store, later, failing(store, "delete images/"), lambda: store.delete(later[1])
        )
    assert error is not None and is_published
    assert f"agent@{later[0].id}" in error.message and "could not be taken back" in error.message
    assert f"do not rely on agent@{later[0].id}" in error.hint


def test_one_that_somebody_else_has_taken_back(store: FileStore, later: tuple[Manifest, str]) -> None:
    """There is nothing left to be done, and what is said is what was wrong with it."""
    manifest, vouching = later

    @contextmanager
    def around(call: str) -> Iterator[None]:
        if call.startswith("stat images/"):
            store.delete(manifest_key(manifest.name, manifest.id))
        yield

    through: Any = WatchedStore(store, around)
    with Collecting(store):
        error, is_published = published(store, later, through, lambda: store.delete(vouching))
    assert isinstance(error, DumpFailed) and "taken back" not in error.message and not is_published


@pytest.mark.parametrize("question", ["missing", "list collections/"])
def test_a_store_that_answers_no_question_then(
    store: FileStore, later: tuple[Manifest, str], question: str
) -> None:
    """The image stands, nobody knows how whole, and the error says so: it is no success, and not nothing."""
    error, is_published = published(
        store, later, failing(store, question), lambda: store.delete(later[1]) if question != "missing" else 0
    )
    assert error is not None and error.exit_code == 30 and is_published
    assert f"agent@{later[0].id} was published" in error.message and "no answer" in error.message
    assert f"crcli verify agent@{later[0].id}" in error.hint


def test_a_manifest_of_which_no_answer_comes(store: FileStore, later: tuple[Manifest, str]) -> None:
    """It may be there, or not."""
    error, is_published = published(store, later, failing(store, "put images/", first=False))
    assert error is not None and error.exit_code == 30 and is_published
    assert f"agent@{later[0].id} may have come to be" in error.hint and "crcli ls" in error.hint


def test_one_that_is_gone_by_itself_harms_nothing(store: FileStore, later: tuple[Manifest, str]) -> None:
    """An earlier image may be removed as long as no garbage is collected."""
    error, is_published = published(store, later, before=lambda: store.delete(later[1]))
    assert error is None and is_published
