"""What commands ask of a store that holds many images of others: no more than of one that does not."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from crcli.image import newest
from crcli.image.catalog import list_entries
from crcli.image.claims import all_claims
from crcli.image.copy import copy
from crcli.image.gc import collect_garbage
from crcli.image.lease import Lease
from crcli.image.manifest import load, resolve
from crcli.image.names import ImageRef, index_key, manifest_key, pack_key
from crcli.image.remove import remove
from crcli.image.retention import retire
from crcli.store.file import FileStore
from tests.support.images import make_image, pages
from tests.support.stores import WatchedStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OTHERS = 20


class Asked:
    """A store, and all that it was asked."""

    def __init__(self, store: FileStore) -> None:
        self.calls: list[str] = []
        self.store: Any = WatchedStore(store, self._around)

    def calls_of(self, kind: str) -> list[str]:
        """Those of one kind: what they were about."""
        return sorted(call.removeprefix(f"{kind} ") for call in self.calls if call.startswith(f"{kind} "))

    @contextmanager
    def _around(self, call: str) -> Iterator[None]:
        self.calls.append(call)
        yield


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """A store with images of many other names."""
    store = FileStore(str(tmp_path / "store"))
    for number in range(OTHERS):
        make_image(store, f"agent-{number}", pages(number, 2))
    return store


@pytest.fixture
def asked(store: FileStore) -> Asked:
    """The same store, watched."""
    return Asked(store)


def test_one_name_is_listed(store: FileStore, asked: Asked) -> None:
    """Neither `ls NAME` nor `--keep` looks at images of other names, also where one begins like it."""
    mine = [make_image(store, "agent", pages(100 + number, 2)) for number in range(2)]
    assert [entry.ref for entry in list_entries(asked.store, "agent")] == mine
    assert retire(asked.store, "agent", {"identity": "a job"}, 1) == []
    assert set(asked.calls_of("list")) == {"images/agent/", "pins/agent/"}
    assert set(asked.calls_of("get_range")) == {manifest_key("agent", ref.id) for ref in mine}


def test_who_holds_the_names_that_are_shown(store: FileStore, asked: Asked) -> None:
    """Every name that was ever claimed keeps a lease: of others none is read."""
    for number in range(3):
        Lease.claim(store, f"ended-{number}", "a test").release()
    Lease.claim(store, "agent-3", "a test")
    (claim,) = all_claims(asked.store, {"agent-3", "agent-4"})
    assert claim.name == "agent-3"
    assert all(key.startswith("leases/agent-3/") for key in asked.calls_of("get"))


def test_the_newest_of_many_is_found_by_its_time(
    store: FileStore, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that of a host whose clock is ahead, and whatever others have put beside them."""
    monkeypatch.setattr(newest, "_LISTED_AT_ONCE", 2)
    made = [make_image(store, "agent", pages(100 + number, 2)) for number in range(4)]
    assert resolve(asked.store, ImageRef("agent")) == made[-1]
    ahead = ImageRef("agent", "29991231T235959123-abcdef")
    store.put(manifest_key(ahead.name, ahead.id), store.get(manifest_key("agent", made[0].id)))
    store.put("images/agent/zzz", b"not ours")
    assert resolve(asked.store, ImageRef("agent")) == ahead
    remove(store, ahead)
    assert resolve(asked.store, ImageRef("agent")) == made[-1]


def test_a_collection_reads_the_indexes_of_removed_images(store: FileStore, asked: Asked) -> None:
    """Those of images tell of packs that these refer to, so that they need not be read to be kept."""
    gone = [make_image(store, "agent", pages(100 + number, 2)) for number in range(2)]
    for ref in gone:
        remove(store, ref)
    report = collect_garbage(asked.store, grace_s=0)
    assert (report.images, report.packs_removed, report.indexes_removed) == (OTHERS, 2, 2)
    read = [key for key in asked.calls_of("get") if key.startswith("indexes/")]
    assert read == sorted(index_key(ref.id) for ref in gone)


def test_a_copy_asks_for_the_packs_of_its_image(store: FileStore, asked: Asked, tmp_path: Path) -> None:
    """It does not list all that the other store holds."""
    source = FileStore(str(tmp_path / "source"))
    ref = make_image(source, "agent", pages(100, 2))
    assert copy(source, ref, asked.store).packs_copied == 1
    asked.calls.clear()
    remove(store, ref)
    assert copy(source, ref, asked.store).packs_copied == 0
    assert "packs/" not in asked.calls_of("list")
    assert [key for key in asked.calls_of("stat") if key.startswith("packs/")] == [
        pack_key(pack) for pack in load(source, ref).packs
    ]
