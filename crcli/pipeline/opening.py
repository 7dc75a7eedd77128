"""An image that is being opened while there is other work: its manifest, and CRIU's own images.

A restore imports for 50 ms before it asks for its image, and a store answers that in as long again: so it
is asked first.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from crcli.image.cached import load_near, open_cached
from crcli.image.names import parse_image
from crcli.image.packs import ChunkReader
from crcli.records import Struct
from crcli.store.caching import CachingStore
from crcli.threads import Worker

if TYPE_CHECKING:
    from crcli.image.manifest import Manifest
    from crcli.pipeline.stages import RestoreOptions
    from crcli.store.base import Store


class Opened(Struct, frozen=True):
    """An image that is open: every byte of it has been checked. `skeleton` are CRIU's images, by name."""

    store: Store
    manifest: Manifest
    reader: ChunkReader
    skeleton: dict[str, bytes]


class Opening:
    """The image of a restore, being opened in a thread of its own from now on."""

    def __init__(self, options: RestoreOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._is_done = self._is_over = False
        self._store: Store | None = None
        self._opened: Opened | None = None
        self._failure: BaseException | None = None
        self._thread = Worker(self._work, name="opening")
        self._thread.start()

    def result(self) -> Opened:
        """The image, once it is open. Raises what opening it has raised."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        assert self._opened is not None
        return self._opened

    def close(self) -> None:
        """Close the store; one that still has to answer is given up, and not waited for."""
        with self._lock:
            self._is_over = True
            is_done = self._is_done
        if is_done:
            self._close()
        elif self._store is not None:
            self._store.give_up()

    def _work(self) -> None:
        try:
            self._opened = self._open()
        except BaseException as error:  # raised again by `result`
            self._failure = error
        with self._lock:
            self._is_done = True
            is_over = self._is_over
        if is_over:
            self._close()

    def _open(self) -> Opened:
        url, ref = parse_image(self._options.image)
        store = open_cached(url or self._options.store, endpoint_url=self._options.endpoint_url)
        self._store = store
        if isinstance(store, CachingStore) and not self._options.lazy:
            store.cache.put_off()  # until the tree runs
        manifest = load_near(store, ref)
        reader = ChunkReader(store, manifest.packs, manifest.chunks)
        wanted = {number for file in manifest.skeleton for number in file.chunks}
        blobs = {n: raw for group in reader.plan(wanted) for n, raw in reader.read(group)}
        skeleton = {file.name: b"".join(blobs[n] for n in file.chunks) for file in manifest.skeleton}
        return Opened(store, manifest, reader, skeleton)

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
