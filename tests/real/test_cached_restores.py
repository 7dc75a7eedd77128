"""What this host keeps of a remote store: a restore without the store, and never against its word."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from crcli.memory.userfault import is_available
from crcli.store.open import open_store
from tests.support.crcli import Crcli, counted, counter, crcli_in, wait_until
from tests.support.programs import Program, spawn_python
from tests.support.s3servers import S3Server, start_moto

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="needs root")

MEMORY_KIB = 24 << 10


@dataclass
class RemoteCrcli(Crcli):
    """The command with a store in a bucket."""

    server: S3Server | None = None

    @property
    def store(self) -> str:
        """The URL of the store."""
        assert self.server is not None
        return self.server.url("agents")

    @property
    def environment(self) -> dict[str, str]:
        """What the command finds in its environment."""
        assert self.server is not None
        return super().environment | self.server.env

    @property
    def packs(self) -> list[Path]:
        """The packs in the cache."""
        return sorted(self.folder.glob("cache/objects/packs~*"))

    def kept(self) -> dict[str, Any]:
        """What `crcli cache ls` says."""
        return self.run("cache", "ls", "--json").json


@pytest.fixture
def server() -> Iterator[S3Server]:
    """A bucket of its own."""
    with start_moto() as running:
        yield running


@pytest.fixture
def remote(tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[RemoteCrcli]:
    """The command, with a store in that bucket, and an empty cache."""
    monkeypatch.delenv("CRCLI_CACHE_SIZE", raising=False)
    command = RemoteCrcli(tmp_path, server=server)
    yield command
    command.clean_up()


def assert_goes_on(program: Program) -> None:
    """The counter goes on, and the checksum of its memory is what it was."""
    before = counted(program)[-1]
    wait_until(lambda: counted(program)[-1] > before + 10, "the counter stands still")


def test_a_restore_on_the_same_host_needs_no_store(remote: RemoteCrcli, server: S3Server) -> None:
    """A tree dumped to S3 is restored from the cache with the server gone, its memory as it was; a name alone
    is refused then, and the hint names the image that is here."""
    with spawn_python(counter(kilobytes=MEMORY_KIB)) as program:
        image = remote.dump(program.pid, "--name", "agent")["image"]
        (kept,) = remote.kept()["images"]
        assert (kept["image"], kept["whole"], kept["store"]) == (image, True, remote.store)
        server.process.kill()
        server.process.wait()
        error = remote.restore("agent", code=30)["error"]
        assert image in error["hint"]
        remote.restore(image)
        assert_goes_on(program)


def test_a_restore_fills_the_cache_for_the_next(remote: RemoteCrcli, server: S3Server) -> None:
    """What a host without a cache fetched once it has: `cache clear` empties it, a restore fills it again."""
    with spawn_python(counter(kilobytes=MEMORY_KIB)) as program:
        image = remote.dump(program.pid, "--name", "agent")["image"]
        assert remote.run("cache", "clear", "--json").json["bytes"] > MEMORY_KIB << 10
        assert remote.kept()["images"] == []
        remote.restore(image)
        assert_goes_on(program)
        remote.clean_up()
        assert [one["whole"] for one in remote.kept()["images"]] == [True]
        server.process.kill()
        server.process.wait()
        remote.restore(image)
        assert_goes_on(program)


def test_a_damaged_cache_is_seen_through(remote: RemoteCrcli, server: S3Server) -> None:
    """Bytes that went bad in the cache are fetched from the store; without it the restore fails with 30, with
    nothing left running."""
    with spawn_python(counter(kilobytes=MEMORY_KIB)) as program:
        image = remote.dump(program.pid, "--name", "agent")["image"]
        for pack in remote.packs:
            whole = bytearray(pack.read_bytes())
            whole[len(whole) // 2] ^= 0xFF
            pack.write_bytes(whole)
        remote.restore(image)
        assert_goes_on(program)
        remote.clean_up()
        remote.run("cache", "clear")
        remote.restore(image)
        remote.clean_up()
        for pack in remote.packs:
            pack.write_bytes(bytes(pack.stat().st_size))
        server.process.kill()
        server.process.wait()
        lines = len(program.output)
        remote.restore(image, code=30)
        assert len(program.output) == lines


def test_a_removed_image_is_not_restored(remote: RemoteCrcli) -> None:
    """An image that somebody removed from the store is gone, whatever the cache still holds of it."""
    with spawn_python(counter(kilobytes=MEMORY_KIB)) as program:
        image = remote.dump(program.pid, "--name", "agent")["image"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in remote.environment.items():
            patch.setenv(name, value)
        store = open_store(remote.store)
        store.delete(f"images/{image.replace('@', '/')}")
        store.close()
    assert remote.restore(image, code=31)["error"]["code"] == "not-found"


def test_an_image_that_is_removed_here_leaves_the_cache(remote: RemoteCrcli, server: S3Server) -> None:
    """After `crcli rm` on this host not even a store that is gone brings the image back."""
    with spawn_python(counter(kilobytes=MEMORY_KIB)) as program:
        image = remote.dump(program.pid, "--name", "agent")["image"]
    remote.run("rm", image, "--store", remote.store)
    assert remote.kept()["images"] == []
    server.process.kill()
    server.process.wait()
    remote.restore(image, code=30)


def test_nothing_is_kept_where_nothing_is_to_be(remote: RemoteCrcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a size of 0, or a directory as store, no file of the cache is written."""
    monkeypatch.setenv("CRCLI_CACHE_SIZE", "0")
    with spawn_python(counter()) as program:
        remote.dump(program.pid, "--leave-running")
        monkeypatch.delenv("CRCLI_CACHE_SIZE")
        with crcli_in(remote.folder) as local:
            local.dump(program.pid, "--leave-running")
        assert not (remote.folder / "cache" / "objects").exists()


def test_a_cache_without_room_changes_nothing(remote: RemoteCrcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dump whose pages do not fit into the cache is whole in the store, and its restore takes both."""
    monkeypatch.setenv("CRCLI_CACHE_SIZE", "6MiB")
    with spawn_python(counter(kilobytes=MEMORY_KIB)) as program:
        image = remote.dump(program.pid)["image"]
        report = remote.kept()
        assert 0 < report["bytes"] <= 7 << 20
        remote.restore(image)
        assert_goes_on(program)


@pytest.mark.skipif(not is_available(), reason="needs userfaultfd")
def test_a_lazy_restore_reads_the_cache_too(remote: RemoteCrcli, server: S3Server) -> None:
    """A lazy restore needs no store where all is here; what it fetches behind the tree is kept."""
    with spawn_python(counter(kilobytes=MEMORY_KIB)) as program:
        image = remote.dump(program.pid, "--name", "agent")["image"]
        remote.run("cache", "clear")
        remote.restore(image, "--lazy")
        assert_goes_on(program)
        wait_until(lambda: [one["whole"] for one in remote.kept()["images"]] == [True], "it keeps nothing")
        remote.clean_up()
        server.process.kill()
        server.process.wait()
        remote.restore(image, "--lazy")
        assert_goes_on(program)
