"""What every store promises (crcli/store/base.py), tried on each of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crcli.errors import NotFound, ObjectExists, StoreError
from crcli.store import open_store

if TYPE_CHECKING:
    from crcli.store import Store
    from tests.store.conftest import Place

MIB = 1 << 20
on_one_store = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def keys(store: Store, prefix: str = "") -> list[str]:
    """The keys that a listing gives."""
    return [info.key for info in store.list(prefix)]


def test_what_is_put_is_got(store: Store) -> None:
    """An object holds exactly the bytes that were put, whatever kind of buffer they came in."""
    store.put("plain", b"some bytes")
    store.put("array", bytearray(b"more bytes"))
    store.put("view", memoryview(b"<many bytes>")[1:-1])
    store.put("empty", b"")
    assert [store.get(key) for key in ("plain", "array", "view", "empty")] == [
        b"some bytes",
        b"more bytes",
        b"many bytes",
        b"",
    ]


def test_put_replaces(store: Store) -> None:
    """A second put under the same key replaces the object."""
    store.put("key", b"first, and longer")
    store.put("key", b"second")
    assert store.get("key") == b"second"


def test_every_character_of_a_key(store: Store) -> None:
    """Keys may use every character that the contract allows, in nested names."""
    key = "A-Z/a_z@0.9/x+y/-/_/@/+/deep/er"
    store.put(key, b"x")
    assert keys(store) == [key]
    assert store.get(key) == b"x"


BAD_KEYS = ("", "/a", "a/", "a//b", "../a", "a/../b", ".tmp/a", "a b", "a\n", "ä", "a/.b")


def test_bad_keys_are_bugs(store: Store) -> None:
    """A key that some store could not hold, or that would leave it, is refused before anything happens."""
    for attempt in (store.get, store.stat, store.delete, store.writer, lambda k: store.put(k, b"")):
        for key in BAD_KEYS:
            with pytest.raises(ValueError, match="not a key"):
                attempt(key)
    with pytest.raises(ValueError, match="not the beginning"):
        list(store.list("../"))


def test_absent_objects(store: Store) -> None:
    """Reading what is not there raises NotFound (exit 31), naming the key; deleting it is no error."""
    store.put("a/b", b"x")
    for attempt in (store.get, store.stat, lambda key: store.get_range(key, 0, 1)):
        for key in ("nothing", "a", "a/b/c"):
            with pytest.raises(NotFound, match=key) as caught:
                attempt(key)
            assert caught.value.exit_code == 31
    store.delete("nothing")
    store.delete("a/b/c")
    assert store.get("a/b") == b"x"


def test_stat(store: Store) -> None:
    """stat tells key, size and when the object was written."""
    store.put("dir/key", b"12345")
    info = store.stat("dir/key")
    assert (info.key, info.size) == ("dir/key", 5)
    assert abs(info.modified - time.time()) < 60


def test_delete(store: Store) -> None:
    """A deleted object is gone from reads and listings; its neighbours stay."""
    store.put("dir/one", b"1")
    store.put("dir/two", b"2")
    store.delete("dir/one")
    assert keys(store) == ["dir/two"]
    with pytest.raises(NotFound):
        store.get("dir/one")


def test_listing_is_in_key_order(store: Store) -> None:
    """Listings are sorted by key as bytes, where '-' and '.' come before '/', and '0' after it."""
    expected = ["a+b", "a-b/c", "a.b", "a/b", "a/c-d/e", "a/c/d", "a0", "ab", "b"]
    for key in reversed(expected):
        store.put(key, key.encode())
    assert keys(store) == expected
    assert [info.size for info in store.list()] == [len(key) for key in expected]


def test_listing_by_prefix(store: Store) -> None:
    """A prefix is the beginning of keys, whether or not it ends at a slash."""
    for key in ("packs/aa", "packs/ab", "packs-old/aa", "images/x/1", "images/xy/2"):
        store.put(key, b"")
    assert keys(store, "packs/") == ["packs/aa", "packs/ab"]
    assert keys(store, "packs/a") == ["packs/aa", "packs/ab"]
    assert keys(store, "packs") == ["packs-old/aa", "packs/aa", "packs/ab"]
    assert keys(store, "images/x") == ["images/x/1", "images/xy/2"]
    assert keys(store, "nothing/here") == []


def test_listing_behind_a_key(store: Store) -> None:
    """A listing goes on behind a key, which need not be there."""
    listed = ["a/b", "a/c-d/e", "a/c/d", "a/c0", "a/d"]
    for key in (*listed, "b/c"):
        store.put(key, b"")
    for number, after in enumerate(listed, 1):
        assert [info.key for info in store.list("a/", after)] == listed[number:]
    assert [info.key for info in store.list("a/", "a/c")] == listed[1:]
    assert [info.key for info in store.list("a/c", "a/c/")] == listed[2:4]
    assert [info.key for info in store.list("a/", "a")] == listed
    assert list(store.list("a/", "a/d/e")) == []
    assert [info.key for info in store.list("", "a/d")] == ["b/c"]


def test_empty_store_lists_nothing(store: Store) -> None:
    """A store that is ready for writing and empty lists nothing."""
    assert keys(store) == []


def test_ranges(store: Store) -> None:
    """A range is exactly the bytes asked for; one that reaches beyond the end is an error."""
    store.put("key", b"0123456789")
    assert store.get_range("key", 0, 10) == b"0123456789"
    assert store.get_range("key", 9, 1) == b"9"
    assert store.get_range("key", 3, 0) == b""
    for offset, length in ((0, 11), (9, 2), (10, 1), (100, 5)):
        with pytest.raises(StoreError):
            store.get_range("key", offset, length)


@on_one_store
@given(data=st.binary(min_size=1, max_size=5000), cut=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_any_range(store: Store, data: bytes, cut: tuple[float, float]) -> None:
    """Every range of every object reads as the same slice of what was written."""
    start, end = sorted(int(part * len(data)) for part in cut)
    store.put("ranges", data)
    assert store.get_range("ranges", start, end - start) == data[start:end]


@on_one_store
@given(pieces=st.lists(st.binary(max_size=3000), max_size=100))
def test_any_pieces(store: Store, pieces: list[bytes]) -> None:
    """A writer's object is its pieces one after another, however they are cut."""
    with store.writer("pieces") as writer:
        for piece in pieces:
            writer.write(piece)
        writer.commit()
    assert store.get("pieces") == b"".join(pieces)


@pytest.mark.parametrize("size", [8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 21 * MIB + 12345])
def test_large_objects(store: Store, size: int) -> None:
    """Objects larger than a part arrive whole, and can be read in ranges across the parts' borders."""
    data = os.urandom(MIB) * (size // MIB + 1)
    step = 3 * MIB + 17
    with store.writer("large") as writer:
        for offset in range(0, size, step):
            writer.write(memoryview(data)[offset : min(size, offset + step)])
        writer.commit()
    assert store.stat("large").size == size
    assert store.get("large") == data[:size]
    assert store.get_range("large", size - 5 * MIB, 4 * MIB) == data[size - 5 * MIB : size - MIB]


def test_a_buffer_may_be_used_again(store: Store) -> None:
    """What was handed to a writer is written as it was then, whatever becomes of the caller's buffer."""
    pieces = [os.urandom(MIB // 4) for _ in range(40)]
    buffer = bytearray(MIB // 4)
    with store.writer("reused") as writer:
        for piece in pieces:
            buffer[:] = piece
            writer.write(memoryview(buffer))
        writer.commit()
    assert store.get("reused") == b"".join(pieces)


def test_large_put(store: Store) -> None:
    """put takes objects of any size, conditional ones too."""
    data = os.urandom(MIB) * 17
    store.put("large", data, if_absent=True)
    assert store.get("large") == data
    with pytest.raises(ObjectExists):
        store.put("large", data[1:], if_absent=True)
    assert store.get("large") == data


def test_nothing_is_visible_before_commit(store: Store) -> None:
    """Until commit returns, neither reads nor listings know of the object; without commit they never do."""
    for size in (10, 9 * MIB):
        with store.writer("object") as writer:
            writer.write(bytes(size))
            assert keys(store) == []
            with pytest.raises(NotFound):
                store.get("object")
    assert keys(store) == []


def test_an_exception_aborts(store: Store, place: Place) -> None:
    """Leaving a writer's block by an exception changes nothing; after close nothing is left over."""
    store.put("object", b"old")
    failing = open_store(place.url)
    with pytest.raises(RuntimeError), failing.writer("object") as writer:
        writer.write(bytes(20 * MIB))
        raise RuntimeError
    failing.close()
    assert store.get("object") == b"old"
    assert store.sweep(time.time()) == 0


def test_if_absent(store: Store) -> None:
    """A conditional put creates an object, and refuses to replace one, whatever wrote it."""
    store.put("taken", b"first", if_absent=True)
    with pytest.raises(ObjectExists, match="taken"):
        store.put("taken", b"second", if_absent=True)
    with pytest.raises(ObjectExists, match="taken"):
        store.put("taken", b"first", if_absent=True)
    assert store.get("taken") == b"first"
    store.delete("taken")
    store.put("taken", b"third", if_absent=True)
    assert store.get("taken") == b"third"


@pytest.mark.parametrize("size", [100, 9 * MIB])
def test_conditional_writers(store: Store, size: int) -> None:
    """A conditional writer finds out at commit that its key was taken meanwhile, and changes nothing."""
    with store.writer("key", if_absent=True) as writer:
        writer.write(bytes(size))
        store.put("key", b"quicker")
        with pytest.raises(ObjectExists):
            writer.commit()
    assert store.get("key") == b"quicker"
    with store.writer("other", if_absent=True) as writer:
        writer.write(bytes(size))
        writer.commit()
    assert store.stat("other").size == size


def test_one_of_many_conditional_puts_wins(store: Store, place: Place) -> None:
    """Of conditional puts at the same time exactly one succeeds, and the object is the winner's."""
    if place.leg in ("moto-ignores", "moto-refuses"):
        pytest.skip("without conditional writes in the store nobody can promise this")
    contenders = 8
    for round_ in range(5):
        start = threading.Barrier(contenders)

        def contend(number: int, key: str = f"claim-{round_}", start: threading.Barrier = start) -> bool:
            start.wait()
            try:
                store.put(key, b"%d" % number, if_absent=True)
            except ObjectExists:
                return False
            return True

        with ThreadPoolExecutor(contenders) as threads:
            won = list(threads.map(contend, range(contenders)))
        assert won.count(True) == 1
        assert store.get(f"claim-{round_}") == b"%d" % won.index(True)


def test_many_threads(store: Store) -> None:
    """A store serves several threads at once, writers among them."""

    def work(number: int) -> bool:
        data = bytes([number]) * (100_000 + number)
        with store.writer(f"threads/{number}") as writer:
            writer.write(data[:1000])
            writer.write(data[1000:])
            writer.commit()
        return (
            store.get(f"threads/{number}") == data and store.get_range(f"threads/{number}", 7, 9) == data[:9]
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(32)))
    assert len(keys(store, "threads/")) == 32


KILLED_WRITER = """
import sys, time
from crcli.store import open_store
writer = open_store(sys.argv[1]).writer("victim")
for _ in range(12):  # more than may be in flight: some parts have arrived
    writer.write(bytes(8 << 20))
print("written", flush=True)
time.sleep(60)
"""


def test_a_killed_writer_leaves_nothing_visible(store: Store, place: Place) -> None:
    """After SIGKILL in the middle of an object nothing of it is seen, and sweep removes what is left."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED_WRITER, place.url], stdout=subprocess.PIPE, env=os.environ | place.env
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert keys(store) == []
    time.sleep(1)  # until the server has done what was on its way; and some round times up to seconds
    if not place.leg.startswith("moto"):  # moto says of every upload that it began in 2010
        assert store.sweep(time.time() - 3600) == 0, "what is fresh may still be somebody's work"
    assert store.sweep(time.time()) == 1
    assert store.sweep(time.time()) == 0
    store.put("victim", b"x")


def test_a_store_is_found_by_its_url(store: Store) -> None:
    """`url` leads back to the same store."""
    store.put("key", b"value")
    again = open_store(store.url)
    assert again.url == store.url
    assert again.get("key") == b"value"
    again.close()


def test_warm(place: Place) -> None:
    """After warm a store is known to answer; warming writes no object."""
    with_writing = open_store(place.url)
    with_writing.warm(for_writing=True)
    assert keys(with_writing) == []
    with_writing.close()
    reading = open_store(place.url)
    reading.warm()
    reading.close()


def test_close_twice(place: Place) -> None:
    """A store can be closed unused, and closed again."""
    store = open_store(place.url)
    store.close()
    store.close()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40])
def test_what_is_missing_is_told(store: Store, count: int) -> None:
    """Of some keys, few or many, exactly those without an object are missing, whatever lies beside them."""
    for number in range(count):
        store.put(f"packs/{number % 3}/{number}", b"?")
    store.put("packs/beside", b"?")
    there = {f"packs/{number % 3}/{number}" for number in range(count)}
    gone = {"packs/gone", "packs/1/gone"} if count % 2 else set()
    assert store.missing(there | gone) == gone
    assert store.missing(iter(there)) == set()
