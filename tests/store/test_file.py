"""What only a directory store promises: modes, durability's leftovers, and the kernel's refusals in words."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crcli.config import StoreChoice
from crcli.errors import NotFound, ObjectExists, StoreError
from crcli.guard.doctor import places
from crcli.store import file as file_module
from crcli.store import open_store
from crcli.store.file import FileStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    """A store in a directory that does not exist yet."""
    return FileStore(str(tmp_path / "deep" / "store"))


def everything_below(folder: str) -> list[str]:
    """Every file and directory in `folder`, temporary ones too."""
    return [os.path.join(where, name) for where, dirs, files in os.walk(folder) for name in (*dirs, *files)]


def test_reading_does_not_create(store: FileStore) -> None:
    """Reading a store that is not there says so, with a hint, and creates nothing."""
    for attempt in (
        store.warm,
        lambda: store.get("key"),
        lambda: store.stat("key"),
        lambda: list(store.list()),
    ):
        with pytest.raises(NotFound, match="no store at") as caught:
            attempt()
        assert "--store" in caught.value.hint
    store.delete("key")
    assert store.sweep(time.time()) == 0
    assert not os.path.lexists(store.root)


def test_a_path_that_leads_through_a_file(tmp_path: Path) -> None:
    """That is no store which the first dump would create, for reading or for writing."""
    (tmp_path / "file").touch()
    store = FileStore(str(tmp_path / "file" / "store"))
    for attempt in (store.warm, lambda: store.warm(for_writing=True), lambda: store.get("key")):
        with pytest.raises(StoreError, match="Not a directory") as caught:
            attempt()
        assert caught.value.exit_code == 30 and "is a file" in caught.value.hint


def test_modes(store: FileStore) -> None:
    """Images hold the memory of processes: nobody but the owner can read them, whatever the umask says."""
    before = os.umask(0)
    try:
        store.put("dir/key", b"secret")
        with store.writer("big") as writer:
            writer.write(bytes(20 * MIB))
            writer.commit()
    finally:
        os.umask(before)
    for path in everything_below(store.root):
        expected = 0o700 if os.path.isdir(path) else 0o600
        assert stat.S_IMODE(os.stat(path).st_mode) == expected, path
    assert stat.S_IMODE(os.stat(store.root).st_mode) == 0o700


def test_nothing_temporary_stays(store: FileStore) -> None:
    """Puts, replaced, refused and aborted ones, leave no temporary file behind."""
    store.put("key", b"1")
    store.put("key", b"2")
    with pytest.raises(ObjectExists):
        store.put("key", b"3", if_absent=True)
    with store.writer("key") as writer:
        writer.write(b"4")
    with store.writer("key", if_absent=True) as writer, pytest.raises(ObjectExists):
        writer.commit()
    assert os.listdir(os.path.join(store.root, ".tmp")) == []


def test_sweep_spares_the_living(store: FileStore) -> None:
    """However old its file looks, a writer that still lives is not swept."""
    with store.writer("key") as writer:
        writer.write(b"slow")
        (temporary,) = everything_below(os.path.join(store.root, ".tmp"))
        os.utime(temporary, (0, 0))
        assert store.sweep(time.time() - 10) == 0
        writer.commit()
    assert store.get("key") == b"slow"


def test_five_thousand_objects(store: FileStore) -> None:
    """A listing of 5000 objects is complete and in order."""
    names = [f"packs/{number % 256:02x}/{number:05d}" for number in range(5000)]
    store.put("packs/first", b"")
    for number in range(256):
        os.makedirs(os.path.join(store.root, f"packs/{number:02x}"), exist_ok=True)
    for name in names:
        with open(os.path.join(store.root, name), "wb"):
            pass
    listed = [info.key for info in store.list("packs/")]
    assert listed == sorted([*names, "packs/first"])


SEGMENT = st.text(alphabet="ab-.+0_", min_size=1, max_size=3).filter(lambda text: text[0] != ".")


@settings(max_examples=60, deadline=None)
@given(paths=st.sets(st.lists(SEGMENT, min_size=1, max_size=3).map("/".join), max_size=12), prefix=st.data())
def test_any_listing(
    tmp_path_factory: pytest.TempPathFactory, paths: set[str], prefix: st.DataObject
) -> None:
    """For any keys and any prefix the listing is what sorting and filtering the keys gives."""
    keys = sorted(key for key in paths if not any(other.startswith(key + "/") for other in paths))
    store = FileStore(str(tmp_path_factory.mktemp("store")))
    for key in keys:
        os.makedirs(os.path.dirname(os.path.join(store.root, key)), exist_ok=True)
        with open(os.path.join(store.root, key), "wb"):
            pass
    start = prefix.draw(st.sampled_from(keys or [""])) if keys else ""
    start = start[: prefix.draw(st.integers(0, len(start)))]
    assert [info.key for info in store.list(start)] == [key for key in keys if key.startswith(start)]


def test_strangers_are_left_out(store: FileStore) -> None:
    """Files that cannot be objects of ours do not show in listings, and are not touched."""
    store.put("key", b"")
    for name in ("with space", ".hidden", "key~"):
        with open(os.path.join(store.root, name), "wb"):
            pass
    assert [info.key for info in store.list()] == ["key"]


def test_deleted_while_listing(store: FileStore) -> None:
    """Objects that vanish while a listing goes on are left out of it."""
    for key in ("a", "b/c", "d"):
        store.put(key, b"")
    listing = store.list()
    assert next(listing).key == "a"
    store.delete("b/c")
    store.delete("d")
    assert list(listing) == []


def test_a_key_below_an_object(store: FileStore) -> None:
    """A key below an existing object cannot be written, and the error says why."""
    store.put("a", b"")
    with pytest.raises(StoreError, match=r"a/b|a") as caught:
        store.put("a/b", b"")
    assert "file, not a directory" in caught.value.hint


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    """Naming a file as the store is refused by reads and writes, with a hint."""
    path = tmp_path / "file"
    path.write_bytes(b"precious")
    store = FileStore(str(path))
    for attempt in (lambda: store.put("key", b""), store.warm, lambda: store.warm(for_writing=True)):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert "file, not a directory" in caught.value.hint
    assert path.read_bytes() == b"precious"


def limit_file_size() -> None:
    """Make the kernel refuse to let any file grow beyond 1 MiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))


WRITE_TOO_MUCH = """
import os, sys
from crcli.errors import StoreError
from crcli.store import open_store
store = open_store(sys.argv[1])
store.put("small", b"fits")
try:
    with store.writer("large") as writer:
        for _ in range(64):
            writer.write(bytes(1 << 20))
        writer.commit()
except StoreError as error:
    print(error, "|", error.hint)
print(sorted(info.key for info in store.list()), os.listdir(store.root + "/.tmp"))
"""


def test_file_size_limit(tmp_path: Path) -> None:
    """A file that may not grow is an error with a hint; the store stays as it was, without leftovers."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE_TOO_MUCH, f"{tmp_path}/store"],
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large" in done.stdout
    assert "ulimit -f" in done.stdout
    assert done.stdout.endswith("['small'] []\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "crcli-test", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize(
    ("mode", "uid", "is_open"),
    [(0o700, 0, False), (0o755, 0, False), (0o775, 0, True), (0o1777, 0, True), (0o700, 4321, True)],
)
def test_doctor_says_who_may_write_images(tmp_path: Path, mode: int, uid: int, is_open: bool) -> None:
    """Whoever can put an image into the store decides what a restore runs, as the user who restores it."""
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(mode)
    os.chown(folder, uid, 0)
    (found, *_) = places.examine(StoreChoice(f"file://{folder}", None, "--store"))
    assert ("others" in found.message) == is_open
    assert ("restore" in found.remedy) == is_open


def test_full_disk(small_disk: Path) -> None:
    """A full disk is an error with a hint; what did not fit is gone, and its space is free again."""
    store = FileStore(str(small_disk))
    store.put("small", b"fits")
    with pytest.raises(StoreError, match="No space left") as caught, store.writer("large") as writer:
        for _ in range(8):
            writer.write(bytes(MIB))
    assert "crcli gc" in caught.value.hint
    assert caught.value.exit_code == 30
    assert [info.key for info in store.list()] == ["small"]
    store.put("medium", bytes(2 * MIB))


def test_read_only_disk(small_disk: Path) -> None:
    """A store on a read-only file system can be read; writing says what is the matter."""
    store = FileStore(str(small_disk))
    store.put("key", b"value")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert store.get("key") == b"value"
    for attempt in (lambda: store.put("other", b""), lambda: store.warm(for_writing=True)):
        with pytest.raises(StoreError) as caught:
            attempt()
        assert "read-only" in caught.value.hint


def knows_no_files_without_a_name(path: str, *_: int) -> int:
    """What open(2) says there to O_TMPFILE."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)


def test_room(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a directory can take is told before it is there, and nothing is made; so is what stands in the
    way."""
    store = FileStore(str(small_disk / "not" / "there"))
    room = store.room()
    assert room is not None and 3 * MIB <= room <= 4 * MIB
    assert not list(small_disk.iterdir())
    (small_disk / "other").write_bytes(bytes(2 * MIB))
    assert store.room() == room - 2 * MIB
    with pytest.raises(StoreError, match="Not a directory"):
        FileStore(str(small_disk / "other" / "store")).room()
    with monkeypatch.context() as patch:
        patch.setattr(file_module.os, "open", knows_no_files_without_a_name)
        assert store.room() == room - 2 * MIB
        patch.setattr(file_module.os, "access", lambda *_: False)  # as of somebody who is not root
        with pytest.raises(StoreError, match="Permission denied"):
            store.room()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="Read-only"):
        store.room()


@pytest.mark.parametrize("user", [0, 65534], ids=["root", "another"])
def test_room_that_is_kept_for_root(user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is room for root, as on a disk of ext4 that is full for everybody else, and for nobody but root."""
    said = os.statvfs_result((4096, 4096, 1000, 50, 0, 100, 100, 100, 0, 255))
    monkeypatch.setattr(file_module.os, "statvfs", lambda _: said)
    monkeypatch.setattr(file_module.os, "geteuid", lambda: user)
    assert FileStore(str(tmp_path)).room() == (0 if user else 50 * 4096)


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_foreign_store(tmp_path: Path) -> None:
    """Somebody who may not enter the store is told to be somebody who may."""
    tmp_path.chmod(0o755)
    store = FileStore(str(tmp_path / "store"))
    store.put("key", b"value")
    os.seteuid(65534)
    try:
        for attempt in (lambda: store.get("key"), lambda: store.put("key", b""), store.warm):
            with pytest.raises(StoreError, match="Permission denied") as caught:
                attempt()
            assert "Run as a user" in caught.value.hint
    finally:
        os.seteuid(0)


def flock_of_nfs(fd: int, how: int) -> None:
    """There a lock is one of a range of bytes: who wants it alone must be allowed to write."""
    if how & fcntl.LOCK_EX and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    _flock(fd, how)


def no_flock(fd: int, how: int) -> None:
    """A file system, or a server, that knows no locks."""
    raise OSError(errno.ENOLCK, "No locks available")


_flock = fcntl.flock


@pytest.mark.parametrize("flock", [flock_of_nfs, no_flock])
def test_sweep_where_locks_are_others(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, flock: Callable[[int, int], None]
) -> None:
    """On NFS, and where there are no locks at all, what a killed writer left goes; what is fresh stays."""
    monkeypatch.setattr(file_module.fcntl, "flock", flock)
    left, fresh = store.writer("killed"), store.writer("alive")
    os.utime(left._temporary, (0, 0))
    if flock is flock_of_nfs:
        assert store.sweep(time.time() - 10) == 0, "its writer still lives"
    os.close(left._descriptor)  # as when it is killed
    assert store.sweep(time.time() - 10) == 1
    left._descriptor = -1
    fresh.write(b"?")
    fresh.commit()
    assert store.get("alive") == b"?"


def test_an_object_that_is_replaced_while_it_is_opened(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease is written again every few seconds: on NFS who opens it then may get one that is no more."""
    store.put("lease", b"renewed")
    open_, times = os.open, iter([True])

    def stale(path: str, *arguments: int, **how: int) -> int:
        if path.endswith("lease") and next(times, False):
            raise OSError(errno.ESTALE, "Stale file handle", path)
        return open_(path, *arguments, **how)

    monkeypatch.setattr(file_module.os, "open", stale)
    assert store.get("lease") == b"renewed"
    times = iter([True] * 2)
    with pytest.raises(StoreError, match="Stale"):
        store.get("lease")


def test_where_folders_cannot_be_synced(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """On SMB shares, and folders of a virtual machine's host, fsync(2) of a folder is no valid request."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(file_module.os, "fsync", fsync)
    store.put("a/b/c", b"1")
    store.put("a/b/d", b"2", if_absent=True)
    store.delete("a/b/c")
    assert [info.key for info in store.list()] == ["a/b/d"]


@pytest.mark.parametrize("if_absent", [True, False])
def test_an_answer_that_a_server_has_lost(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, if_absent: bool
) -> None:
    """NFS asks again whether a name may be given that it has given: it is there, and ours."""
    link, rename = os.link, os.rename

    def link_twice(*names: str) -> None:
        link(*names)
        link(*names)

    def rename_twice(*names: str) -> None:
        rename(*names)
        rename(*names)

    monkeypatch.setattr(file_module.os, "link", link_twice)
    monkeypatch.setattr(file_module.os, "rename", rename_twice)
    store.put("claim", b"mine", if_absent=if_absent)
    assert store.get("claim") == b"mine"
    with pytest.raises(ObjectExists):
        store.put("claim", b"other", if_absent=True)
    with store.writer("claim", if_absent=True) as writer, pytest.raises(ObjectExists):
        writer.commit()
    assert (store.get("claim"), os.listdir(os.path.join(store.root, ".tmp"))) == (b"mine", [])


def test_without_hard_links(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no hard links, one of many conditional puts still wins, and one only."""

    def no_links(*_: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(file_module.os, "link", no_links)
    start = threading.Barrier(6)
    won: list[int] = []

    def contend(number: int) -> None:
        start.wait()
        try:
            store.put("claim", b"%d" % number, if_absent=True)
            won.append(number)
        except ObjectExists:
            pass

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.get("claim") == b"%d" % won[0]
    assert os.listdir(os.path.join(store.root, ".tmp")) == []


def test_processes_share_a_store(store: FileStore) -> None:
    """Of conditional puts by several processes at once exactly one succeeds."""
    script = (
        "import sys, time\nfrom crcli.store import open_store\nfrom crcli.errors import ObjectExists\n"
        "store = open_store(sys.argv[1])\nprint(flush=True)\nsys.stdin.readline()\n"
        "try:\n    store.put('claim', sys.argv[2].encode(), if_absent=True)\n    print('won')\n"
        "except ObjectExists:\n    print('lost')\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, store.url, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    outcomes = [process.communicate("go\n")[0].strip() for process in processes]
    assert sorted(outcomes) == ["lost", "lost", "won"]
    assert store.get("claim") == b"%d" % outcomes.index("won")


def test_paths_and_urls_lead_to_the_same_store(tmp_path: Path) -> None:
    """A plain absolute path is a directory store, with or without file://, spaces and all."""
    folder = tmp_path / "my store%20"
    open_store(str(folder)).put("key", b"value")
    url = open_store(str(folder)).url
    assert url == f"file://{tmp_path}/my%20store%2520"
    assert open_store(url).get("key") == b"value"


def test_what_is_in_memory_is_mapped(tmp_path: Path) -> None:
    """An object that was just written is given out without reading, and what is not there is left to read."""
    store = FileStore(str(tmp_path))
    data = os.urandom(2 * MIB)
    store.put("packs/1", data)
    assert store.mapped("packs/1", 8, MIB) == store.get_range("packs/1", 8, MIB) == data[8 : 8 + MIB]
    assert store.mapped("packs/1", MIB, 2 * MIB) is None
    assert store.mapped("packs/2", 0, MIB) is None
