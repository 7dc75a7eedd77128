"""The cache of a host: what it holds, what it lets go, and that nobody suffers from what is wrong with it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crcli.main import main
from crcli.store import cache as cache_module
from crcli.store.cache import Cache
from tests.support.crcli import wait_until

KIB = 1 << 10
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Where the cache of a test is."""
    return str(tmp_path / "cache")


def kept(folder: str, work: Callable[[Cache], object], **options: Any) -> None:
    """Have a process's cache do some work, and end: what is kept is in the files then."""
    one = Cache(folder, **options)
    work(one)
    one.close()


def long_unused(folder: str, *names: str) -> None:
    """Make these the files that were used longest ago, the first before all."""
    for age, name in enumerate(reversed(names), start=1):
        os.utime(os.path.join(folder, name), times=(time.time() - 1000 * age,) * 2)


@pytest.fixture
def reader(folder: str) -> Iterator[Cache]:
    """Another process's look into it."""
    one = Cache(folder)
    yield one
    one.close()


def test_pieces_are_given_back(folder: str, reader: Cache) -> None:
    """A piece that was added is read again at its place, whole or in part, by whoever comes later."""
    data = os.urandom(3 * MIB)
    kept(folder, lambda cache: cache.add("pack", 5 * MIB + 17, data))
    assert reader.read("pack", 5 * MIB + 17, len(data)) == data
    assert reader.read("pack", 6 * MIB, 1000) == data[MIB - 17 :][:1000]
    assert reader.holds("pack", 5 * MIB + 17, len(data))


def test_holes_are_not_given_out(folder: str, reader: Cache) -> None:
    """Between, before and after what was added there is nothing, nor in an object that nobody added to."""

    def work(cache: Cache) -> None:
        cache.add("pack", 1 * MIB, b"a" * MIB)
        cache.add("pack", 4 * MIB, b"b" * MIB)

    kept(folder, work)
    for offset, length in ((0, 10), (MIB - 64 * KIB, 128 * KIB), (3 * MIB, 10), (MIB, 4 * MIB)):
        assert reader.read("pack", offset, length) is None, (offset, length)
        assert not reader.holds("pack", offset, length)
    assert reader.read("pack", 5 * MIB - 10, 20) is None, "it ends before"
    assert reader.read("other", 0, 1) is None


def test_a_whole_object_is_as_it_was_put_or_not_there(folder: str, reader: Cache) -> None:
    """What is kept whole has a seal: cut short, altered or empty, it is gone, not wrong."""
    kept(folder, lambda cache: [cache.put(name, b"some table") for name in ("a", "b", "c", "d")])
    path = Path(folder)
    assert reader.get("a") == b"some table"
    (path / "b").write_bytes((path / "b").read_bytes()[:-1])
    (path / "c").write_bytes(b"X" + (path / "c").read_bytes()[1:])
    (path / "d").write_bytes(b"")
    assert [reader.get(name) for name in ("b", "c", "d", "never")] == [None] * 4
    assert sorted(os.listdir(folder)) == ["a"], "what is damaged is not kept"


def test_an_object_written_in_parts_appears_at_its_commit(folder: str, reader: Cache) -> None:
    """A whole object that is being written is not there; given up, it never is, and leaves nothing behind."""
    writing = Cache(folder)
    one, other = writing.writer("one"), writing.writer("other")
    for writer in (one, other):
        writer.write(b"first, ")
        writer.write(b"second")
    assert reader.get("one") is None
    one.commit()
    other.abort()
    writing.close()
    assert reader.get("one") == b"first, second"
    assert os.listdir(folder) == ["one"]


def test_what_was_used_longest_ago_goes_first(folder: str) -> None:
    """Beyond its bound the cache lets go of what was used longest ago; reading is use."""
    limit = 8 * MIB
    for name in ("one", "two", "three"):
        kept(folder, lambda cache, name=name: cache.add(name, 0, os.urandom(2 * MIB)), limit=limit)
    long_unused(folder, "one", "two", "three")
    kept(folder, lambda cache: cache.read("one", 0, MIB), limit=limit)
    kept(folder, lambda cache: cache.add("four", 0, os.urandom(3 * MIB)), limit=limit)
    assert sorted(os.listdir(folder)) == ["four", "one", "three"]
    assert Cache(folder, limit).contents().bytes <= limit


def test_what_is_in_use_stays(folder: str) -> None:
    """A cache that is too small for what is added now keeps the first part of it, and does not lose that."""
    limit = 4 * MIB

    def work(cache: Cache) -> None:
        for number in range(8):
            cache.add(f"pack{number}", 0, os.urandom(MIB))

    kept(folder, work, limit=limit)
    assert sorted(os.listdir(folder)) == ["pack0", "pack1", "pack2", "pack3"]


def test_the_number_of_files_is_bounded(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small they are, there are not more files than can be looked through in a moment."""
    monkeypatch.setattr(cache_module, "MOST_FILES", 10)
    kept(folder, lambda cache: [cache.put(f"old{number}", b"x") for number in range(9)])
    long_unused(folder, *sorted(os.listdir(folder)))
    for number in range(5):
        kept(folder, lambda cache, number=number: cache.put(f"new{number}", b"x"))
    names = os.listdir(folder)
    assert len(names) <= 10
    assert {f"new{number}" for number in range(5)} <= set(names)


def test_the_disk_is_never_filled(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its bound, the cache leaves a reserve of the disk free: what is old goes, then it stops."""
    kept(folder, lambda cache: cache.add("old", 0, os.urandom(MIB)))
    long_unused(folder, "old")
    monkeypatch.setattr(cache_module, "_spare", lambda folder: 0)
    kept(folder, lambda cache: cache.add("new", 0, os.urandom(MIB)), limit=1 << 40)
    assert os.listdir(folder) == []


def test_a_full_or_failing_disk_is_no_error(
    folder: str, reader: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When writing fails, what was there before is still given out, and nobody hears of it."""
    kept(folder, lambda cache: cache.add("pack", 0, b"a" * MIB))

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    one = Cache(folder)
    one.add("pack", 4 * MIB, b"b" * 9 * MIB)
    one.put("table", b"x")
    one.close()
    assert reader.read("pack", 0, MIB) == b"a" * MIB
    assert reader.read("pack", 4 * MIB, MIB) is None
    assert reader.get("table") is None


def test_a_disk_that_cannot_be_read_is_no_error(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that the disk does not give back is not there."""
    kept(folder, lambda cache: cache.add("pack", 0, b"a" * MIB))

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    assert Cache(folder).read("pack", 0, MIB) is None


def test_a_thread_that_cannot_be_had_is_no_error(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restore goes on where its process may have no more of them; nothing is kept of it."""

    def no_more(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_more)
    one = Cache(folder)
    one.add("pack", 0, b"a" * cache_module.AT_ONCE_BYTES)
    one.go_on()
    one.close()
    assert not Cache(folder).holds("pack", 0, 1)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_may_enter_is_not_used(tmp_path: Path, mode: int) -> None:
    """Memory of processes is not written where others can read it, nor taken from where they can write."""
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o700)
    kept(str(folder), lambda cache: cache.put("table", b"x"))
    folder.chmod(mode)
    one = Cache(str(folder))
    one.put("other", b"x")
    one.close()
    assert os.listdir(folder) == ["table"]
    assert Cache(str(folder)).get("table") is None
    assert "must be ours alone" in one.contents().trouble


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to give a folder away")
def test_the_folder_of_somebody_else_is_not_used(folder: str) -> None:
    """Nor is what somebody else could have put there."""
    kept(folder, lambda cache: cache.put("table", b"x"))
    os.chown(folder, 65534, 65534)
    assert Cache(folder).get("table") is None


def test_a_link_in_place_of_the_folder_or_a_file_is_not_followed(tmp_path: Path, folder: str) -> None:
    """Nothing is read or written through a symbolic link."""
    kept(folder, lambda cache: cache.put("table", b"x"))
    os.symlink(folder, tmp_path / "link")
    assert Cache(str(tmp_path / "link")).get("table") is None
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    os.symlink(victim, os.path.join(folder, "pack"))
    kept(folder, lambda cache: cache.add("pack", 0, b"a" * 100))
    assert victim.read_bytes() == b"precious"


def test_a_named_pipe_in_place_of_a_file_is_not_waited_for(folder: str) -> None:
    """What has the name of an object and is no file is no object."""
    kept(folder, lambda cache: cache.put("table", b"x"))
    os.unlink(os.path.join(folder, "table"))
    for name in ("table", "pack"):
        os.mkfifo(os.path.join(folder, name))
    cache = Cache(folder)
    assert cache.get("table") is None
    assert cache.read("pack", 0, 100) is None
    kept(folder, lambda cache: cache.add("pack", 0, b"a" * 100))
    cache.close()


def test_files_and_folder_are_for_us_only(folder: str) -> None:
    """What the cache makes is closed to everybody else from its first moment, whatever the umask."""
    before = os.umask(0)
    try:
        kept(folder, lambda cache: [cache.add("pack", 0, b"a"), cache.put("table", b"x")])
    finally:
        os.umask(before)
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert {os.stat(os.path.join(folder, name)).st_mode & 0o777 for name in os.listdir(folder)} == {0o600}


def test_what_is_removed_under_a_reader_is_read_on(folder: str) -> None:
    """A file that another process lets go is there until who has it open has ended."""
    data = os.urandom(MIB)
    kept(folder, lambda cache: cache.add("pack", 0, data))
    reading = Cache(folder)
    assert reading.holds("pack", 0, MIB)
    Cache(folder).clear()
    assert reading.read("pack", 0, MIB) == data
    assert Cache(folder).read("pack", 0, MIB) is None


def test_a_folder_that_is_removed_meanwhile_is_no_error(folder: str) -> None:
    """Somebody may remove everything at any time; the next process begins anew."""
    one = Cache(folder)
    one.add("pack", 0, b"a" * 9 * MIB)
    one.close()
    two = Cache(folder)
    assert two.holds("pack", 0, MIB)
    Cache(folder).clear()
    os.rmdir(folder)
    two.add("other", 0, b"b" * 9 * MIB)
    two.put("table", b"x")
    two.close()
    kept(folder, lambda cache: cache.put("table", b"y"))
    assert Cache(folder).get("table") == b"y"


def test_more_than_may_wait_is_not_kept(folder: str, reader: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is slower than the store holds nobody up, and takes no memory: what comes is let go."""
    monkeypatch.setattr(cache_module, "WAITING_BYTES", 2 * MIB)
    one = Cache(folder)
    for number in range(4):
        one.add("pack", number * MIB, b"a" * MIB)
    one.close()
    assert [reader.holds("pack", number * MIB, MIB) for number in range(4)] == [True, True, False, False]


def test_what_is_dropped_does_not_come_back(folder: str, reader: Cache) -> None:
    """Dropping an object also takes back what still waited to be written."""
    one = Cache(folder)
    one.put("table", b"x")
    one.drop("table")
    one.close()
    assert reader.get("table") is None


def test_what_cannot_be_removed_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk that has become read-only, `crcli cache clear` ends with 40: the memory is still there."""
    kept(f"{tmp_path}/objects", lambda cache: [cache.put("table", b"x")])

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setenv("CRCLI_CACHE_DIR", str(tmp_path))
    assert main(["cache", "clear"]) == 40
    assert "cannot be removed" in capsys.readouterr().err


def test_clear_tells_what_there_was(folder: str) -> None:
    """Clearing removes every file, and tells how many, and how much of the disk they took."""
    kept(folder, lambda cache: [cache.add("pack", 8 * MIB, b"a" * MIB), cache.put("table", b"x")])
    removed = Cache(folder).clear()
    assert set(removed.files) == {"pack", "table"}
    assert MIB <= removed.bytes < 2 * MIB, "holes take no disk"
    assert os.listdir(folder) == []
    assert Cache(folder).clear().files == {}


WRITER = """
import os, sys
from crcli.store.cache import Cache
folder, seed = sys.argv[1], int(sys.argv[2])
tables = [(f"pack{number}".encode() * 1000)[:1000] for number in range(9)]
for turn in range(12):
    one = Cache(folder, 12 << 20)
    for number in range(6):
        name = f"pack{(seed + turn + number) % 9}"
        data = (name.encode() * (1 << 18))[: 1 << 20]
        if (found := one.read(name, 0, len(data))) not in (None, data):
            sys.exit(f"{name} is wrong")
        one.add(name, 0, data)
        one.put(f"table{number}", data[:1000])
        if one.get(f"table{(number + 1) % 6}") not in (None, *tables):
            sys.exit("a table is wrong")
        if turn % 4 == 3:
            one.drop(name)
    one.close()
"""


def test_processes_share_it_without_harm(folder: str) -> None:
    """Two processes that fill, read, drop and make room at once never read what nobody wrote."""
    processes = [
        subprocess.Popen([sys.executable, "-c", WRITER, folder, str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in (0, 3)
    ]
    for process in processes:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert Cache(folder).contents().bytes <= 16 * MIB


def test_what_is_put_off_waits(folder: str, reader: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who needs the processors has nothing written, up to a bound; afterwards all of it is."""
    monkeypatch.setattr(cache_module, "PUT_OFF_BYTES", 12 * MIB)
    one = Cache(folder)
    one.put_off()
    for number in range(19):
        one.add("pack", number * MIB, b"a" * MIB)
    assert one._writer is None and not reader.holds("pack", 0, MIB)
    one.go_on()
    wait_until(lambda: all(reader.holds("pack", number * MIB, MIB) for number in range(19)), "not written")
    one.put_off()
    for number in range(20, 45):
        one.add("pack", number * MIB, b"a" * MIB)
    wait_until(lambda: reader.holds("pack", 20 * MIB, MIB), "much waits, and is not written")
    one.close()


def test_what_is_in_memory_is_mapped(folder: str) -> None:
    """A piece that was just kept is given out without reading; one that is not here is not."""
    kept(folder, lambda cache: cache.add("pack", 5, b"a" * 2 * MIB))
    one = Cache(folder)
    assert one.mapped("pack", 5 + MIB, MIB) == b"a" * MIB
    assert one.mapped("pack", 5 + MIB, 2 * MIB) is None
    assert one.mapped("other", 0, MIB) is None
