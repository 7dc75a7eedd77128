"""Dumps of one name, removals, copies and a collection at once, in many orders: what was published is whole.

The dumps do on the store what `pipeline/dump.py` does, call by call: they read what it has before they are
announced, rely on merged indexes, and look at the end whether that was right.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from crcli.errors import CrcliError, StoreError
from crcli.image import copy as copying
from crcli.image.copy import copy
from crcli.image.gc import collect_garbage, may_miss
from crcli.image.index import KnownPagesOf, load_known
from crcli.image.manifest import Manifest, list_images, load, publish
from crcli.image.names import ImageRef, new_image_id
from crcli.image.packs import ChunkReader, PackWriter
from crcli.image.remove import remove
from crcli.image.session import Session
from crcli.image.verify import verify
from crcli.memory.classify import Classifier, Run
from crcli.memory.extents import PAGE, Source, SpaceKey, SpaceKind
from crcli.pipeline.knowing import Knowing
from crcli.store.file import FileStore
from tests.support.images import pages
from tests.support.stores import Actor, WatchedStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tests.support.stores import Around

ROUNDS = int(os.environ.get("CRCLI_ORDERS", "100"))
"""How many orders are tried."""

SPACE = SpaceKey(SpaceKind.PROCESS, 1)
GENERATIONS, GROUPS, LEFT = 12, 6, 2


@dataclass
class Scene:
    """A store with the newest images of one name, which name merged indexes; a copy of it as it was; and the
    memory of every image that anybody has published."""

    store: FileStore
    saved: Path
    memories: dict[str, list[bytes]] = field(default_factory=dict)

    @classmethod
    def made(cls, folder: Path) -> Scene:
        """Its images are hours old."""
        scene = cls(FileStore(str(folder / "store")), folder / "saved")
        scene.store.warm(for_writing=True)
        memory = pages(1, GROUPS * 16)
        for number in range(GENERATIONS):
            memory[number * 16 % len(memory) + number] = pages(100 + number, 1)[0]
            scene.dump(scene.store, memory)
        for ref, _ in list_images(scene.store)[:-LEFT]:
            remove(scene.store, ref)
        then = time.time() - 7200
        for info in scene.store.list():
            os.utime(Path(scene.store.root) / info.key, (then, then))
        shutil.copytree(scene.store.root, scene.saved)
        return scene

    def put_back(self) -> None:
        """Have the store be as it was."""
        shutil.rmtree(self.store.root)
        shutil.copytree(self.saved, self.store.root)

    def dump(self, store: Any, memory: Sequence[bytes]) -> ImageRef:
        """See the module. Raises as a dump does."""
        knowing = Knowing(
            store,
            lambda expect: load_known(store, "agent", wanted=0, is_same=lambda head: True, expect=expect),
        )
        knowing.start()
        image_id = new_image_id()
        with Session(store, image_id) as session:
            known = knowing.finish()
            if image_id <= known.newest_image:
                image_id = new_image_id(known.newest_image)
            writer = PackWriter(store, image_id)
            try:
                writer.learn(known, image_id)
                run = Run(SPACE, 0, len(memory), True, 0)
                classifier = Classifier(KnownPagesOf(known, writer.adopt), writer)
                found = classifier.classify(bytearray(b"".join(memory)), [run])
                classifier.finish()
                spaces = dict(found.extents)
                writer.end()
                meta: dict[str, Any] = writer.indexes(spaces[SPACE])
                manifest = Manifest("agent", image_id, writer.packs, writer.chunks, spaces, [], [], meta)
                writer.seal()
                self.memories[image_id] = list(memory)
                publish(store, manifest)
                is_doubtful = bool(known.vouched_by) and may_miss(
                    store, known.vouched_by, writer.packs, session.store_time
                )
                if session.lapsed or is_doubtful:
                    remove(store, ImageRef("agent", image_id))
                    raise StoreError("what it relied on may be gone")
            finally:
                writer.close()
        return ImageRef("agent", image_id)

    def see_all_whole(self) -> None:
        """Every image is whole, and gives the memory of which it was taken."""
        for ref, _ in list_images(self.store):
            assert verify(self.store, ref).damage == [], ref
            manifest = load(self.store, ref)
            reader = ChunkReader(self.store, manifest.packs, manifest.chunks)
            memory = b"".join(self.memories[ref.id])
            for extent in manifest.spaces[SPACE]:
                assert extent.source == Source.CHUNK
                ((_, raw),) = reader.read([extent.chunk])
                begin = extent.offset * PAGE
                expected = memory[extent.start * PAGE : extent.end * PAGE]
                assert bytes(raw)[begin : begin + len(expected)] == expected


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    """In memory, where there is such a folder: it is put back often."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="crcli-test-", dir=parent) as folder:
        yield Scene.made(Path(folder))


def in_stages(actors: Mapping[str, Actor], choice: random.Random) -> None:
    """Cut the work of each into a few pieces, and have them done in some order, one at a time."""
    order = [name for name in actors for _ in range(choice.choice((1, 2, 3, 4)))]
    choice.shuffle(order)
    last = {name: at for at, name in enumerate(order)}
    for actor in actors.values():
        actor.start()
    for at, name in enumerate(order):
        if at < last[name]:
            go_on(actors[name], choice.randrange(1, 8))
        else:
            actors[name].finish(0.02)  # a copy may be waiting for a collection
    for name, actor in actors.items():
        assert actor.finish(), f"{name} stands still: {order}"


def go_on(actor: Actor, steps: int) -> None:
    """Let an actor go on for so many steps: calls of one kind, one after another, are one. It stops after the
    first of the last."""
    until = len(steps_of(actor.calls)) + steps
    while not actor.over and len(steps_of(actor.calls)) < until and actor.advance(1, 0.02):
        pass


def steps_of(calls: Sequence[str]) -> list[str]:
    """What an actor did, as `put sessions`, `delete packs`."""
    kinds = [call.partition("/")[0] for call in calls]
    return [kind for kind, before in pairwise([*kinds, ""]) if kind != before]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(ROUNDS))
def test_in_some_order(scene: Scene, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dumps, the removal of images, a copy back of one, and collections; not all of them each time."""
    monkeypatch.setattr(copying, "_LOOK_AGAIN_S", 0.002)
    scene.put_back()
    choice = random.Random(seed)
    source = FileStore(str(scene.saved))
    images = [ref for ref, _ in list_images(source)]
    doomed = images[choice.choice((0, 0, 0, 1)) :]
    memories = [changed(scene.memories[images[-1].id], choice) for _ in range(2)]

    def remove_images(store: Any) -> None:
        for ref in doomed:
            remove(store, ref)

    works: dict[str, Callable[[Any], object]] = {
        "dump": lambda store: scene.dump(store, memories[0]),
        "another dump": lambda store: scene.dump(store, memories[1]),
        "rm": remove_images,
        "cp": lambda store: copy(source, images[0], store),
        "gc": collect_garbage,
        "another gc": collect_garbage,
    }
    for name in choice.sample(["another dump", "cp", "another gc"], choice.choice((1, 2, 2, 3))):
        del works[name]
    actors = {name: Actor(partial(_on_store, scene.store, work)) for name, work in works.items()}
    in_stages(actors, choice)
    for actor in actors.values():
        assert actor.error is None or isinstance(actor.error, CrcliError), actor.error
    scene.see_all_whole()
    collect_garbage(scene.store, grace_s=0)
    scene.see_all_whole()


def changed(memory: Sequence[bytes], choice: random.Random) -> list[bytes]:
    """The same but for one page."""
    at = choice.randrange(len(memory))
    return [*memory[:at], *pages(choice.randrange(1 << 30), 1), *memory[at + 1 :]]


def _on_store(store: FileStore, work: Callable[[Any], object], around: Around) -> object:
    return work(WatchedStore(store, around))
