"""The guard of a restore: what does not fit is refused before anything is started or written."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from crcli.criu.images import ImageFile
from crcli.criu.messages import cpuinfo_entry, file_entry
from crcli.guard.contents import Contents
from crcli.image.manifest import load
from crcli.image.names import ImageRef, parse_image
from crcli.image.packs import ChunkReader
from crcli.pipeline import check as check_story
from crcli.store.file import FileStore
from tests.support.crcli import COMMAND_LIMIT_SECONDS, ROOT, Crcli, assert_goes_on, counter, wait_until
from tests.support.images import forge
from tests.support.programs import Program, spawn_python, then_wait


@contextmanager
def dumped(crcli: Crcli, code: str, *options: str) -> Iterator[tuple[Program, str]]:
    """A program that does this and counts, dumped; with its image."""
    with spawn_python(textwrap.dedent(code) + "\n" + counter()) as program:
        yield program, crcli.dump(program.pid, *options)["image"]


def store_of(crcli: Crcli) -> FileStore:
    """The store of a test."""
    return FileStore(crcli.store.removeprefix("file://"))


def ref_of(image: str) -> ImageRef:
    """An image's name and id."""
    return parse_image(image)[1]


def skeleton(crcli: Crcli, image: str, name: str) -> bytes:
    """One of CRIU's images in an image."""
    manifest = load(store_of(crcli), ref_of(image))
    (file,) = (file for file in manifest.skeleton if file.name == name)
    return ChunkReader(store_of(crcli), manifest.packs, manifest.chunks).blob(file.chunks)


def meta_of(crcli: Crcli, image: str) -> dict[str, Any]:
    """The facts in an image's manifest."""
    return load(store_of(crcli), ref_of(image)).meta


def refused(crcli: Crcli, image: str, *options: str) -> dict[str, dict[str, Any]]:
    """The blockers, by name, with which a restore is refused; `check` says the same, nothing was started."""
    before = sorted(os.listdir("/proc/self/task")), len(os.listdir(crcli.folder))
    error = crcli.restore(image, *options, code=20)["error"]
    assert (error["code"], error["state"]) == ("guard-refused", "untouched")
    assert not list(crcli.folder.glob("logs/*restore*")), "CRIU was started"
    assert before == (sorted(os.listdir("/proc/self/task")), len(os.listdir(crcli.folder)))
    if not options:
        said = checked(crcli, image, code=20)
        assert [one["name"] for one in said] == [one["name"] for one in error["findings"]]
    return {one["name"]: one for one in error["findings"] if one["severity"] == "blocker"}


def checked(crcli: Crcli, image: str, code: int = 0) -> list[dict[str, Any]]:
    """The findings of `crcli check IMAGE`."""
    found: list[dict[str, Any]] = crcli.run("check", image, "--store", crcli.store, "--json", code=code).json[
        "findings"
    ]
    return found


def mapping(path: Path) -> str:
    """The code of a program that maps a file."""
    return f"""
import mmap
file = open({str(path)!r}, "rb")
mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
file.close()
"""


@pytest.fixture
def data(crcli: Crcli) -> Path:
    """A data file for a program to use."""
    path = crcli.folder / "data"
    path.write_bytes(b"0123456789" * 2000)
    return path


@pytest.mark.parametrize("how", ["inotify", "fanotify"])
def test_what_the_tree_watches_must_be_here(crcli: Crcli, how: str) -> None:
    """A watched folder that is missing is found before CRIU starts; made again, it is watched again."""
    folder = crcli.folder / "watched"
    folder.mkdir()
    code = f"""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        if {how == "inotify"}:
            assert libc.inotify_add_watch(libc.inotify_init(), os.fsencode({str(folder)!r}), 0x100) >= 0
        else:
            fd = libc.fanotify_init(0, 0)
            mark = ctypes.c_uint64(0x8 | 0x8000000)
            assert libc.fanotify_mark(fd, 1, mark, -100, os.fsencode({str(folder)!r})) == 0
        """
    with dumped(crcli, code) as (program, image):
        folder.rmdir()
        blocker = refused(crcli, image)["file-missing"]
        assert blocker["evidence"] == {"path": str(folder)}
        assert "watches" in blocker["message"]
        folder.mkdir()
        crcli.restore(image)
        assert_goes_on(program)


def test_an_image_fits_its_own_host(crcli: Crcli) -> None:
    """No finding on the host of the dump, and what a guard elsewhere compares is recorded."""
    with dumped(crcli, "") as (program, image):
        assert checked(crcli, image) == []
        meta = meta_of(crcli, image)
        version = crcli.run("doctor", "--json", "--store", crcli.store).json["checks"]
        assert {"version": meta["host"]["criu"]}.items() <= {
            key: value for one in version if one["name"] == "criu" for key, value in one["evidence"].items()
        }.items()
        by_path = {record["path"]: record for record in meta["opened"]}
        assert meta["cgroups"] and meta["plugins"] == []
        assert all(
            record["hash"] or record["build_id"] or record["unhashed"]
            for record in by_path.values()
            if record["mode"] & 0o170000 == 0o100000
        )
        report = crcli.restore(image)
        assert report["findings"] == []
        assert_goes_on(program)


def test_check_fetches_no_memory(crcli: Crcli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest, and what of CRIU's own images says something: not the program's 8 MiB."""
    fetched = []
    with dumped(crcli, "block = __import__('os').urandom(8 << 20)") as (_, image):

        class Counting(FileStore):
            def get(self, key: str) -> Any:
                data = super().get(key)
                fetched.append(len(data))
                return data

            def get_range(self, key: str, start: int, length: int) -> Any:
                data = super().get_range(key, start, length)
                fetched.append(len(data))
                return data

        monkeypatch.setattr(
            check_story, "open_store", lambda url, endpoint_url: Counting(url.removeprefix("file://"))
        )
        assert not check_story.check_image(image, crcli.store).is_refused
        assert fetched and sum(fetched) < 1 << 20


def test_folders_come_back_as_they_were(crcli: Crcli, tmp_path: Path) -> None:
    """A file that travels brings the folders above it: whose they are, and who may look into them. Made as
    root makes folders they would show everybody what was private, and their owner could not write there."""
    private = tmp_path / "private"
    shared = private / "shared"
    shared.mkdir(parents=True)
    private.chmod(0o700)
    shared.chmod(0o2775)
    os.chown(private, 4321, 8765)
    os.chown(shared, 0, 8765)
    code = f"""
        file = open({str(shared / "log")!r}, "w")
        file.write("a line")
        file.flush()
        """
    with dumped(crcli, code) as (program, image):
        shutil.rmtree(private)
        crcli.restore(image)
        assert_goes_on(program)
        assert (shared / "log").read_text() == "a line"
        found = [(oct(one.st_mode), one.st_uid, one.st_gid) for one in map(os.stat, (private, shared))]
        assert found == [("0o40700", 4321, 8765), ("0o42775", 0, 8765)]


def test_a_mapped_file_that_is_missing(crcli: Crcli, data: Path) -> None:
    """Refused with its path; put back, the program goes on."""
    with dumped(crcli, mapping(data)) as (program, image):
        data.rename(data.with_suffix(".away"))
        assert refused(crcli, image)["file-missing"]["evidence"]["path"] == str(data)
        data.with_suffix(".away").rename(data)
        crcli.restore(image)
        assert_goes_on(program)


def test_a_mapped_file_of_the_same_size_with_other_content(crcli: Crcli, data: Path) -> None:
    """CRIU would not see it. Forced by its name the program goes on; another name forces nothing."""
    with dumped(crcli, mapping(data)) as (program, image):
        data.write_bytes(data.read_bytes().replace(b"0", b"X"))
        assert set(refused(crcli, image)) == {"file-changed"}
        assert set(refused(crcli, image, "--force-guard", "file-missing")) == {"file-changed"}
        report = crcli.restore(image, "--force-guard", "file-changed")
        (finding,) = report["findings"]
        assert (finding["name"], finding["severity"]) == ("file-changed", "change")
        assert "--force-guard file-changed" in finding["action"]
        assert_goes_on(program)


def test_a_forced_file_may_have_another_size_and_mode(crcli: Crcli, data: Path) -> None:
    """CRIU itself would refuse it: what was forced is taken out of CRIU's hands."""
    with dumped(crcli, f"file = open({str(data)!r}, 'rb')") as (program, image):
        data.write_bytes(b"short")
        data.chmod(0o640)
        assert set(refused(crcli, image)) == {"file-changed", "file-mode"} or set(refused(crcli, image)) == {
            "file-mode"
        }
        crcli.restore(image, "--force-guard", "file-changed", "--force-guard", "file-mode")
        assert_goes_on(program)


def test_a_file_that_is_only_read(crcli: Crcli, data: Path) -> None:
    """It may grow, as logs do; it may not have become another one meanwhile, larger or not."""
    with dumped(crcli, f"file = open({str(data)!r}, 'rb')") as (program, image):
        with data.open("ab") as log:
            log.write(b"a line\n")
        assert [one["name"] for one in crcli.restore(image)["findings"]] == ["file-grown"]
        assert_goes_on(program)
        crcli.clean_up()
        data.write_bytes(b"rotated" * 9000)
        assert set(refused(crcli, image)) == {"file-changed"}


def test_a_library_of_another_version(crcli: Crcli) -> None:
    """A library is told by its build-id: replaced by another of the same size it is refused."""
    source = next(
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libm.so" in line
    )
    library = crcli.folder / "libcopy.so"
    shutil.copy(source, library)
    build_id = Contents("/nowhere").build_id(str(library))
    if not build_id:
        pytest.skip("libm has no build-id here")
    with dumped(crcli, f"import ctypes; library = ctypes.CDLL({str(library)!r})") as (program, image):
        whole = library.read_bytes()
        updated = library.with_suffix(".new")
        updated.write_bytes(whole.replace(bytes.fromhex(build_id), b"\xab" * (len(build_id) // 2)))
        shutil.copymode(library, updated)
        updated.rename(library)
        assert set(refused(crcli, image)) == {"library-changed"}
        library.unlink()
        library.write_bytes(whole)
        shutil.copymode(source, library)
        crcli.restore(image)
        assert_goes_on(program)


def test_a_working_folder_that_is_missing(crcli: Crcli) -> None:
    """Refused, with what to do; made again, the program goes on."""
    work = crcli.folder / "work"
    work.mkdir()
    with dumped(crcli, f"import os; os.chdir({str(work)!r})") as (program, image):
        work.rmdir()
        assert "make the folder" in refused(crcli, image)["file-missing"]["remedy"]
        work.mkdir()
        crcli.restore(image)
        assert_goes_on(program)


def test_a_carried_file_that_was_changed(crcli: Crcli) -> None:
    """`check` says it before the restore does, without fetching the file; the options still put it right."""
    log = crcli.folder / "log"
    code = f"file = open({str(log)!r}, 'w'); file.write('then'); file.flush()"
    with dumped(crcli, code) as (program, image):
        log.write_text("now!")
        assert "--files" in refused(crcli, image)["file-changed"]["remedy"]
        report = crcli.restore(image, "--force-guard", "file-changed")
        assert log.read_text() == "now!" and report["findings"][0]["severity"] == "change"
        assert_goes_on(program)
        crcli.clean_up()
        crcli.restore(image, "--files", "image")
        assert log.read_text() == "then"


LISTENER = """
    import socket
    server = socket.create_server(("127.0.0.1", 0))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("127.0.0.1", 0))
    print(f"tcp={server.getsockname()[1]}", flush=True)
    print(f"udp={datagrams.getsockname()[1]}", flush=True)
"""


def test_ports_that_are_taken(crcli: Crcli) -> None:
    """CRIU would let two listen on one port. Free again, the program gets both back."""
    with dumped(crcli, LISTENER) as (program, image):
        ports = {name: int(program.value_of(name)) for name in ("tcp", "udp")}
        with socket.create_server(("", ports["tcp"])):
            found = refused(crcli, image)["port-taken"]
            assert found["evidence"]["address"] == f"127.0.0.1:{ports['tcp']}"
            assert f"({os.getpid()})" in found["message"]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", ports["udp"]))
            assert refused(crcli, image)["port-taken"]["evidence"]["protocol"] == "udp"
        crcli.restore(image)
        assert_goes_on(program)


def test_a_second_copy_beside_the_first(crcli: Crcli) -> None:
    """A tree that still runs has its port, its sockets' names and its connections: its copy is refused."""
    name = f"crcli-test-{os.getpid()}"
    code = f"""
        import socket
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        abstract = socket.socket(socket.AF_UNIX); abstract.bind("\\0{name}"); abstract.listen()
        named = socket.socket(socket.AF_UNIX); named.bind({str(crcli.folder / "socket")!r}); named.listen()
    """
    with dumped(crcli, code, "--leave-running") as (program, image):
        blockers = refused(crcli, image)
        assert set(blockers) == {"port-taken", "socket-name-taken", "connection-taken"}
        assert all(str(program.pid) in one["message"] for one in blockers.values())
        assert "--tcp close" in blockers["connection-taken"]["remedy"]
        assert "connection-taken" not in refused(crcli, image, "--tcp", "close")
        assert_goes_on(program)
        program.process.kill()
        program.process.wait()
        crcli.restore(image)
        size = len(program.output)
        wait_until(lambda: len(program.output) > size, "the copy stands still")


@pytest.mark.parametrize(
    ("claim", "name"),
    [
        ({"host": {"machine": "aarch64"}}, "architecture"),
        ({"host": {"cpu_flags": ["avx1024_quantum", "sse2"]}}, "cpu-features"),
        ({"host": {"kernel": "99.0.0"}}, "kernel"),
        ({"host": {"page_size": 16384}}, "page-size"),
    ],
)
def test_an_image_that_claims_another_machine(crcli: Crcli, claim: dict[str, Any], name: str) -> None:
    """Rewritten with whole seals, it is refused all the same, before CRIU starts."""
    with dumped(crcli, "") as (_, image):
        forged = str(forge(store_of(crcli), ref_of(image), claim))
        assert set(refused(crcli, forged)) == {name}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="CRIU describes x86 only")
def test_an_image_whose_criu_claims_another_cpu(crcli: Crcli) -> None:
    """CRIU's own record counts: the missing feature is named, and forced by name the tree is restored."""
    with dumped(crcli, "") as (program, image):
        images = ImageFile.parse(skeleton(crcli, image, "cpuinfo.img"), cpuinfo_entry)
        images.entries[0].x86_entry[0].capability[6] |= 1 << 16 | 1 << 11  # of one maker long ago
        forged = str(forge(store_of(crcli), ref_of(image), {}, {"cpuinfo.img": images.encode()}))
        missing = refused(crcli, forged)["cpu-features"]["evidence"]["missing"]
        assert set(missing) <= {"fma4", "xop"} and missing
        report = crcli.restore(forged, "--force-guard", "cpu-features")
        assert [one["severity"] for one in report["findings"]] == ["change"]
        assert_goes_on(program)


def test_an_image_that_claims_other_files(crcli: Crcli, data: Path) -> None:
    """Another hash, build-id, size or path, in the manifest or in CRIU's own record: each is refused."""
    with dumped(crcli, mapping(data)) as (_, image):
        records = meta_of(crcli, image)["opened"]
        library = next(record["path"] for record in records if record["build_id"])
        for path, claim, name in (
            (str(data), {"hash": "00" * 32}, "file-changed"),
            (str(data), {"size": 7}, "file-changed"),
            (str(data), {"path": "/nowhere/at/all"}, "file-missing"),
            (library, {"build_id": "ab" * 20}, "library-changed"),
        ):
            opened = [{**one, **claim} if one["path"] == path else one for one in records]
            forged = str(forge(store_of(crcli), ref_of(image), {"opened": opened}))
            assert set(refused(crcli, forged)) == {name}, claim
        files = ImageFile.parse(skeleton(crcli, image, "files.img"), file_entry)
        for entry in files.entries:
            if entry.reg.name == library:
                entry.reg.build_id[0] ^= 1
        forged = str(forge(store_of(crcli), ref_of(image), {}, {"files.img": files.encode()}))
        assert set(refused(crcli, forged)) == {"library-changed"}


def test_what_does_not_matter_is_said_and_restored(crcli: Crcli) -> None:
    """A newer CRIU and kernel, another host's name, a clock that went back, a plug-in that is not here."""
    major = int(os.uname().release.partition(".")[0])
    claims = {
        "host": {"criu": "99.0", "kernel": f"{major + 1}.0", "hostname": "elsewhere"},
        "created": 4e9,
        "plugins": [{"name": "quiesce", "package": "crcli-quiesce", "version": "1.2"}],
    }
    with dumped(crcli, "") as (program, image):
        forged = str(forge(store_of(crcli), ref_of(image), claims))
        names = {"criu-older", "kernel-older", "host-name", "clock-backwards", "plugin-missing"}
        assert {one["name"] for one in checked(crcli, forged)} == names
        assert {one["name"] for one in crcli.restore(forged)["findings"]} == names
        assert_goes_on(program)


def test_capabilities_that_cannot_be_given_back(crcli: Crcli) -> None:
    """Where the bounding set lacks what the tree holds, CRIU would fail half-way."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not here")
    with dumped(crcli, "") as (program, image):
        command = [sys.executable, "-m", "crcli", "restore", image, "--store", crcli.store, "--json"]
        done = subprocess.run(
            ["setpriv", "--bounding-set", "-sys_boot", *command],
            cwd=ROOT,
            env=crcli.environment,
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_SECONDS,
        )
        error = json.loads(done.stdout)["error"]
        assert (done.returncode, error["state"]) == (20, "untouched")
        assert error["findings"][0]["evidence"]["lacking"] == ["CAP_SYS_BOOT"]
        crcli.restore(image)
        assert_goes_on(program)


def test_a_name_that_forces_nothing(crcli: Crcli) -> None:
    """An unknown name is a wrong usage, and the answer lists the known ones."""
    for name in ("all", "host-name", "file-changed,file-missing"):
        done = crcli.run("restore", "agent", "--store", crcli.store, "--json", "--force-guard", name, code=2)
        assert "library-changed" in done.json["error"]["hint"]


def test_hashes_are_taken_once(crcli: Crcli, data: Path) -> None:
    """The second dump of a program on unchanged files reads its data from the notes of the first."""
    os.utime(data, (1, 1))
    while not Contents(f"{crcli.folder}/state").has_digest(str(data)):
        with spawn_python(mapping(data) + then_wait()) as program:
            image = crcli.dump(program.pid)["image"]
    (record,) = (one for one in meta_of(crcli, image)["opened"] if one["path"] == str(data))
    assert record["hash"] == Contents(f"{crcli.folder}/state").digest(str(data))
    assert record["unhashed"] == ""


def test_files_that_change_while_they_are_dumped_are_not_hashed(crcli: Crcli, data: Path) -> None:
    """A file that the tree writes itself is recorded as such, and compared by nothing but its size."""
    code = f"""
        import mmap
        file = open({str(data)!r}, "r+b")
        mapped = mmap.mmap(file.fileno(), 0)
    """
    with dumped(crcli, code) as (program, image):
        (record,) = (one for one in meta_of(crcli, image)["opened"] if one["path"] == str(data))
        assert (record["hash"], record["unhashed"]) == ("", "written")
        crcli.restore(image)
        assert_goes_on(program)
