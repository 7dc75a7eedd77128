"""The guard: what an image needs compared with a host, each altered in one point."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crcli.criu.needs import InetSocket, LockedFile, OpenedFile, Rights
from crcli.errors import GuardRefused
from crcli.findings import Finding, Severity
from crcli.guard import contents as contents_of
from crcli.guard import cpu, places
from crcli.guard.contents import Contents
from crcli.guard.here import Here
from crcli.guard.host import CHECKS, examine, forced_paths, guard
from crcli.guard.names import BLOCKERS
from crcli.guard.needs import Asked, NeededFile, Needs
from crcli.image.manifest import Manifest, Weights
from crcli.memory.extents import Extent, Source, SpaceKey, SpaceKind
from crcli.pipeline.pids import namespace_for
from crcli.pipeline.stages import PidNamespace
from crcli.process.here import await_pids, pid_limit
from crcli.records import replace
from tests.support.programs import spawn_python, then_wait

ROOT = Path(__file__).parents[2]

HOST = {"kernel": os.uname().release, "machine": os.uname().machine, "hostname": os.uname().nodename}


def needs(host: dict[str, Any] | None = None, **parts: Any) -> Needs:
    """The needs of an image from this host; `host` replaces facts about it, `meta` others."""
    meta = {"host": {**HOST, **(host or {})}, **parts.pop("meta", {})}
    manifest = Manifest("agent", "20260131T235959123-0a1b2c", [], [], parts.pop("spaces", {}), [], [], meta)
    return Needs(manifest, **{"numbers": frozenset(), **parts})


@pytest.fixture
def here(tmp_path: Path) -> Here:
    """This host, with notes of its own about its files."""
    return Here(Contents(str(tmp_path / "state")))


def only(findings: list[Finding]) -> Finding:
    """The one finding that there is."""
    (finding,) = findings
    return finding


def blocked_by(needs: Needs, here: Here) -> set[str]:
    """The names of the blockers, after asserting that the guard refuses exactly when there are some."""
    found = {finding.name for finding in examine(needs, here) if finding.severity == Severity.BLOCKER}
    if found:
        with pytest.raises(GuardRefused):
            guard(needs, here)
    else:
        guard(needs, here)
    return found


def test_an_image_of_this_host_fits_it(here: Here) -> None:
    """The facts of this host, as a dump writes them, meet no finding at all."""
    from crcli.pipeline.facts import describe_host

    assert examine(needs(describe_host("1.0")), here) == []


def test_an_image_without_facts_is_not_refused(here: Here) -> None:
    """What an older image does not say cannot be held against it."""
    assert examine(Needs(Manifest("agent", "x", [], [], {}, [], [], {})), here) == []


@pytest.mark.parametrize(
    ("fact", "name"),
    [
        ({"machine": "riscv64"}, "architecture"),
        ({"page_size": 65536}, "page-size"),
        ({"cpu_flags": ["avx1024", "nx"]}, "cpu-features"),
        ({"kernel": "99.1.0-generic"}, "kernel"),
        ({"kernel": "2.6.32"}, "kernel"),
        ({"kernel": "plan9"}, "kernel"),
    ],
)
def test_claims_about_the_machine(here: Here, fact: dict[str, Any], name: str) -> None:
    """An image that claims another machine than this is refused, by the finding that says so."""
    assert blocked_by(needs(fact), here) == {name}


def test_the_missing_cpu_features_are_named(here: Here) -> None:
    """All that programs can use, and nothing that only the kernel uses."""
    here.cpu_flags = {"sse2", "avx"}
    here.machine = "x86_64"
    flags = ["avx", "avx2", "amx_tile", "sha_ni", "nx", "pti", "hypervisor", "cpuid", "arch_capabilities"]
    found = only(examine(needs({"cpu_flags": flags, "machine": "x86_64"}), here))
    assert found.evidence["missing"] == ["amx_tile", "avx2", "sha_ni"]
    assert found.severity == Severity.BLOCKER and "amx_tile, avx2, sha_ni" in found.message


def test_the_words_of_criu_count_as_well(here: Here) -> None:
    """What CRIU's own image of the CPU claims is compared too, whatever the manifest says."""
    here.machine = "x86_64"
    here.cpu_words = {9: 0, 10: 0b1111}
    words = (0,) * 9 + (1 << 5 | 1 << 10, 0b1)
    found = only(examine(needs({"machine": "x86_64"}, cpu_words=words), here))
    assert found.evidence["missing"] == ["avx2"]  # not bit 10, which only the kernel uses


def test_a_job_started_for_a_baseline_fits_what_has_the_baseline(here: Here) -> None:
    """What the dump's CPU had beyond it is a note; what of the baseline is missing is refused, by name."""
    here.machine = "x86_64"
    here.cpu_flags = {"sse2", "avx2"}
    here.cpu_words = {9: 1 << 5}  # avx2
    host = {"cpu_flags": ["sse2", "avx2", "avx512f"], "machine": "x86_64"}
    words = (0,) * 9 + (1 << 5 | 1 << 16,)  # avx2, avx512f
    job = {"job": {"cpu_baseline": ["sse2", "avx2"]}}
    found = only(examine(needs(host, meta=job, cpu_words=words), here))
    assert (found.name, found.severity, found.evidence["missing"]) == (
        "cpu-baseline",
        Severity.NOTE,
        ["avx512f"],
    )
    here.cpu_flags, here.cpu_words = {"sse2"}, {9: 0}
    assert blocked_by(needs(host, meta=job, cpu_words=words), here) == {"cpu-features"}
    refused = [one for one in examine(needs(host, meta=job), here) if one.name == "cpu-features"]
    assert only(refused).evidence["missing"] == ["avx2"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="CPUID is x86's")
def test_the_cpu_is_asked_as_criu_asks_it() -> None:
    """The words that the CPUID instruction gives hold what the kernel says of the CPU."""
    words, flags = cpu.words_here(), cpu.flags_here()
    everything = tuple(words.get(number, 0) for number in range(19))
    assert cpu.missing_words(everything, words) == set()
    named = cpu.missing_words(everything, dict.fromkeys(words, 0))
    assert {"fpu", "sse2", "cmov"} <= named
    assert flags & {"avx", "avx2", "bmi1", "bmi2", "aes", "fma", "popcnt"} <= named


def test_a_kernel_that_is_a_little_older_is_a_change(here: Here) -> None:
    """Neighbouring kernels restore each other's images; only a newer one of the dump is worth a word."""
    here.kernel = "6.1.0-18-amd64"
    assert only(examine(needs({"kernel": "6.18.1"}), here)).name == "kernel-older"
    assert only(examine(needs({"kernel": "7.0.0"}), here)).severity == Severity.CHANGE
    assert examine(needs({"kernel": "5.15.0-100-generic"}), here) == []
    assert examine(needs({"kernel": "6.1.99"}), here) == []


def test_a_newer_criu_a_clock_and_a_name(here: Here) -> None:
    """What is other here and forbids nothing is said: CRIU's version, the clock, the host's name."""
    here.criu_version = "4.1.1"
    here.now = 1000.0
    found = examine(needs({"criu": "4.2", "hostname": "elsewhere"}, meta={"created": 2000.0}), here)
    assert {(one.name, one.severity.value) for one in found} == {
        ("criu-older", "change"),
        ("clock-backwards", "change"),
        ("host-name", "note"),
    }
    here.criu_version = "4.3"
    assert examine(needs({"criu": "4.2"}, meta={"created": 999.0}), here) == []


def test_memory_that_is_not_there(here: Here) -> None:
    """A tree that does not fit is refused."""
    here.spare_memory = 1 << 20
    spaces = {SpaceKey(SpaceKind.PROCESS, 1): [Extent(0, 257, Source.CHUNK, 0, 0)]}
    assert blocked_by(needs(spaces=spaces), here) == {"memory"}


# --- files -------------------------------------------------------------------------------------------------


def opened(path: Path, **fields: Any) -> NeededFile:
    """A file as it stands, as something that a tree has mapped; `fields` replace what the image says."""
    status = path.stat()
    digest = fields.pop("digest", None)
    record = OpenedFile(str(path), status.st_size, status.st_mode, "")
    with path.open("rb") as file:
        digest = contents_of.hash_of(file.fileno()) if digest is None else digest
    return NeededFile(replace(record, **fields), digest)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with something in it."""
    path = tmp_path / "data"
    path.write_bytes(b"0123456789" * 1000)
    return path


def test_a_link_that_is_open_itself(here: Here, tmp_path: Path) -> None:
    """It need not lead anywhere, and is not what it leads to."""
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    then = NeededFile(OpenedFile(str(link), 7, link.lstat().st_mode, ""), "")
    assert examine(needs(files=(then,)), here) == []
    (tmp_path / "nowhere").write_text("content")
    assert examine(needs(files=(then,)), here) == []
    link.unlink()
    assert blocked_by(needs(files=(then,)), here) == {"file-missing"}
    link.write_text("content")
    assert blocked_by(needs(files=(then,)), here) == {"file-mode"}


def test_a_file_that_is_as_it_was(here: Here, file: Path) -> None:
    """The same content meets no finding, whatever its times and owner; twice, as the second look is noted."""
    file_needs = needs(files=(opened(file),))
    os.utime(file, (1, 1))
    assert examine(file_needs, here) == []
    assert examine(file_needs, here) == []


def test_a_file_of_the_same_size_with_another_content(here: Here, file: Path) -> None:
    """One byte is enough, also right after the file was compared and found the same."""
    file_needs = needs(files=(opened(file),))
    assert blocked_by(file_needs, here) == set()
    with file.open("r+b") as changed:
        changed.write(b"X")
    assert blocked_by(file_needs, here) == {"file-changed"}


def test_a_file_without_a_hash_is_taken_by_its_size(here: Here, file: Path) -> None:
    """What the dump did not hash is said to be unverified, and only its size can give it away."""
    assert examine(needs(files=(opened(file, digest=""),)), here) == []  # an older image: nothing to say
    meta = {"opened": []}
    unknown = only(examine(needs(files=(opened(file, digest=""),), meta=meta), here))
    assert (unknown.name, unknown.severity) == ("file-unverified", Severity.NOTE)
    assert blocked_by(needs(files=(opened(file, digest="", size=5),)), here) == {"file-changed"}


def test_a_file_that_has_grown(here: Here, file: Path) -> None:
    """Accepted where it is only read and begins as it did; not where it is mapped or written anywhere."""
    then = opened(file, mapped=False)
    with file.open("ab") as log:
        log.write(b"more")
    assert only(examine(needs(files=(then,)), here)).name == "file-grown"
    for refused in ({"mapped": True}, {"writes": True}):
        other = replace(then, opened=replace(then.opened, **refused))
        assert blocked_by(needs(files=(other,)), here) == {"file-changed"}
    with file.open("r+b") as log:
        log.write(b"rotated")
    assert blocked_by(needs(files=(then,)), here) == {"file-changed"}
    file.write_bytes(b"")
    assert blocked_by(needs(files=(then,)), here) == {"file-changed"}
    log_file = replace(then, opened=replace(then.opened, appends=True), digest="")
    assert examine(needs(files=(log_file,)), here) == []


def test_a_file_that_is_missing_or_of_another_kind(here: Here, file: Path, tmp_path: Path) -> None:
    """Missing files and folders, other permissions, a folder in a file's place."""
    then = opened(file)
    file.chmod(0o600)
    assert "chmod" in only(examine(needs(files=(then,)), here)).remedy
    assert blocked_by(needs(files=(then,)), here) == {"file-mode"}
    file.unlink()
    assert blocked_by(needs(files=(then,)), here) == {"file-missing"}
    file.mkdir()
    assert blocked_by(needs(files=(then,)), here) == {"file-mode"}
    folder = NeededFile(OpenedFile(str(tmp_path / "work"), None, 0o40755, ""))
    assert "make the folder" in only(examine(needs(files=(folder,)), here)).remedy


def test_a_missing_mount_is_named(here: Here, tmp_path: Path) -> None:
    """A file that is missing because its file system is: the remedy names the mount."""
    point = tmp_path / "disk"
    lost = NeededFile(OpenedFile(f"{point}/file", 1, 0o100644, ""))
    mount = {"point": str(point), "fstype": "ext4", "source": "/dev/vdb"}
    missing, unmounted = examine(needs(files=(lost,), meta={"mounts": [mount]}), here)
    assert missing.name == "file-missing" and f"mount {point}" in missing.remedy
    assert unmounted.name == "mount-missing" and "/dev/vdb" in unmounted.remedy


def test_a_cgroup_that_is_gone_is_made_again(here: Here) -> None:
    """CRIU makes the folders of cgroups in which a tree works: that they are gone is nothing to refuse."""
    lost = NeededFile(OpenedFile("/mounted/cgroup/agent", None, 0o40755, ""))
    here.cgroup_mounts = ["/mounted/cgroup"]
    assert examine(needs(files=(lost,)), here) == []
    here.cgroup_mounts = ["/mounted"[:5]]
    assert blocked_by(needs(files=(lost,)), here) == {"file-missing"}


def library() -> Path:
    """A shared library with a build-id."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split()[-1]
        if ".so" in path and Contents("/nowhere").build_id(path):
            return Path(path)
    pytest.skip("no library here has a build-id")


def test_a_library_is_known_by_its_build_id(here: Here, tmp_path: Path) -> None:
    """The same build-id and size pass whatever the hash; another build-id, or none, is refused."""
    copy = tmp_path / "lib.so"
    copy.write_bytes(library().read_bytes())
    build_id = here.contents.build_id(str(copy))
    assert len(build_id) >= 16
    assert examine(needs(files=(opened(copy, build_id=build_id, digest=""),)), here) == []
    assert blocked_by(needs(files=(opened(copy, build_id="ab" * 20),)), here) == {"library-changed"}
    then = opened(copy, build_id=build_id)
    copy.write_bytes(copy.read_bytes().replace(bytes.fromhex(build_id), bytes(len(build_id) // 2)))
    assert blocked_by(needs(files=(then,)), here) == {"library-changed"}


def test_two_records_of_a_file_must_both_hold(here: Here, file: Path) -> None:
    """Where the manifest and CRIU's image disagree, one of them is not true."""
    from crcli.guard.needs import _files

    status = file.stat()
    criu = OpenedFile(str(file), status.st_size, status.st_mode, "")
    record = {"path": str(file), "size": status.st_size, "mode": status.st_mode, "build_id": "", "hash": ""}
    assert len(list(_files([criu], [record]))) == 1
    for claim in ({"size": 3}, {"build_id": "ab" * 20}, {"mode": 0o100777}, {"path": "/nowhere/else"}):
        both = tuple(_files([criu], [{**record, **claim}]))
        assert len(both) == 2
        assert len(blocked_by(needs(files=both), here)) == 1


# --- notes about files -------------------------------------------------------------------------------------


def settle(path: Path) -> None:
    """Wait until a change of the file is old enough to be told from a later one."""
    while time.time_ns() - path.stat().st_ctime_ns <= contents_of._SETTLED_NS:
        time.sleep(0.05)


def test_notes_save_the_reading_and_never_lie(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settled file is read once; when it changes, even to the same size and time, it is read again."""
    settle(file)
    first = Contents(str(tmp_path / "state"))
    digest = first.digest(str(file))
    first.save()
    monkeypatch.setattr(contents_of, "open_quietly", lambda path: pytest.fail("read again"))
    again = Contents(str(tmp_path / "state"))
    assert again.has_digest(str(file)) and again.digest(str(file)) == digest
    monkeypatch.undo()
    before = file.stat()
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not Contents(str(tmp_path / "state")).has_digest(str(file))
    assert Contents(str(tmp_path / "state")).digest(str(file)) != digest


def test_a_file_that_was_just_changed_is_not_noted(tmp_path: Path, file: Path) -> None:
    """Within a tick of the clock a second change looks like the first."""
    contents = Contents(str(tmp_path / "state"))
    contents.digest(str(file))
    assert not contents.has_digest(str(file))
    contents.save()
    assert not (tmp_path / "state").exists()


def test_notes_that_cannot_be_read_or_written_are_no_error(tmp_path: Path, file: Path) -> None:
    """Rubbish in the notes, or a place where none can be kept, only costs the reading."""
    settle(file)
    digest = Contents("/proc/nowhere").digest(str(file))
    unwritable = Contents("/proc/nowhere")
    assert unwritable.digest(str(file)) == digest
    unwritable.save()
    state = tmp_path / "state"
    state.mkdir()
    (state / "file-contents").write_bytes(b"\xff\xfe=\n==\nrubbish\n" * 100)
    contents = Contents(str(state))
    assert contents.digest(str(file)) == digest
    contents.save()
    assert Contents(str(state)).has_digest(str(file))


def test_notes_are_bounded_and_keep_the_newest(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only so many files are remembered, the last ones; what another process noted meanwhile stays."""
    monkeypatch.setattr(contents_of, "KEPT_NOTES", 3)
    monkeypatch.setattr(contents_of, "_SETTLED_NS", -1)
    state = str(tmp_path / "state")
    mine, theirs = Contents(state), Contents(state)
    assert not mine.has_digest(str(file))
    paths = [tmp_path / f"file-{number}" for number in range(4)]
    for path in paths:
        path.write_text(path.name)
        theirs.digest(str(path))
    theirs.save()
    mine.digest(str(file))
    mine.save()
    known = Contents(state)
    assert [known.has_digest(str(path)) for path in (*paths, file)] == [False, False, True, True, True]


# --- places ------------------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[int]:
    """A TCP port of this host on which we listen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def listener(host: str, port: int, **fields: Any) -> InetSocket:
    """A TCP socket that waits for connections."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where: dict[str, Any] = {"family": family, "host": host, "port": port, "remote": ("", 0)}
    return InetSocket(**{"protocol": "tcp", "state": "listening", **where, **fields})


def test_weights_that_are_another_file_here(here: Here, tmp_path: Path) -> None:
    """Whoever sees a file of that name hears that it has another size."""
    path = tmp_path / "weights"
    file = Weights(str(path), 4, 0, "00" * 32)
    assert "neither here nor" in only(examine(needs(missing_weights=(file,)), here)).message
    path.write_bytes(b"12345")
    assert "another here (5 bytes, not 4)" in only(examine(needs(missing_weights=(file,)), here)).message


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_port_that_somebody_listens_on(here: Here, taken: int, host: str) -> None:
    """Refused by address or wildcard, IPv4 and IPv6, and the process that has it is named."""
    found = only(examine(needs(sockets=(listener(host, taken),)), here))
    assert found.name == "port-taken" and f"({os.getpid()})" in found.message
    assert "--port" in found.remedy


def test_ports_that_do_not_meet(here: Here, taken: int) -> None:
    """Another address, another protocol, an IPv6 socket that takes no IPv4, a namespace of its own."""
    for fine in (
        listener("127.0.0.2", taken),
        listener("127.0.0.1", taken, protocol="udp", state="bound"),
        listener("::", taken, only_v6=True),
    ):
        assert examine(needs(sockets=(fine,)), here) == []
    own = needs(sockets=(listener("127.0.0.1", taken),), own_namespaces=frozenset(("net",)))
    assert examine(own, here) == []


def test_what_is_left_of_a_connection_takes_no_port(here: Here) -> None:
    """A listener whose last connections are in TIME-WAIT can come back."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()
        client.close()
    assert examine(needs(sockets=(listener("127.0.0.1", port),)), here) == []


def test_a_udp_port_that_is_taken(here: Here) -> None:
    """UDP ports are somebody's too."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held:
        held.bind(("127.0.0.1", 0))
        wanted = listener("127.0.0.1", held.getsockname()[1], protocol="udp", state="bound")
        assert blocked_by(needs(sockets=(wanted,)), here) == {"port-taken"}
    assert examine(needs(sockets=(wanted,)), Here(here.contents)) == []


def test_an_address_that_is_not_ours(here: Here) -> None:
    """Refused for listeners; connections to outside are closed anyway, unless all are to be kept."""
    assert blocked_by(needs(sockets=(listener("192.0.2.1", 1234),)), here) == {"address-missing"}
    outside = listener("192.0.2.1", 1234, state="connected", remote=("192.0.2.9", 443))
    assert examine(needs(sockets=(outside,)), here) == []
    kept = needs(sockets=(outside,), asked=Asked(tcp="keep"))
    assert blocked_by(kept, here) == {"address-missing"}
    mirror = listener("192.0.2.9", 443, state="connected", remote=("192.0.2.1", 1234))
    assert blocked_by(needs(sockets=(outside, mirror)), here) == {"address-missing"}
    assert examine(needs(sockets=(outside, mirror), asked=Asked(tcp="close")), here) == []


def test_a_connection_that_exists_here(here: Here, taken: int) -> None:
    """A connection inside the tree that the tree still has, as after --leave-running."""
    with socket.create_connection(("127.0.0.1", taken)) as client:
        ours, theirs = client.getsockname(), client.getpeername()
        one = listener(*ours, state="connected", remote=theirs)
        other = listener(*theirs, state="connected", remote=ours)
        assert blocked_by(needs(sockets=(one, other)), here) == {"connection-taken"}
        assert examine(needs(sockets=(one, other), asked=Asked(tcp="close")), here) == []


def test_names_of_unix_sockets(here: Here, tmp_path: Path) -> None:
    """A living socket's path or abstract name is taken; what a dead one left behind is not."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract:
        named.bind(path)
        abstract.bind(f"\0{path}")
        for name in (path, f"@{path}"):
            found = only(examine(needs(unix_names=(name,)), here))
            assert found.name == "socket-name-taken" and f"({os.getpid()})" in found.message
    now = Here(here.contents)
    assert examine(needs(unix_names=(path, f"@{path}")), now) == []
    Path(path).unlink()
    Path(path).write_text("not a socket")
    assert blocked_by(needs(unix_names=(path,)), now) == {"socket-name-taken"}
    assert blocked_by(needs(unix_names=(f"{tmp_path}/gone/socket",)), now) == {"file-missing"}


@pytest.mark.parametrize("whole", [True, False], ids=["flock", "fcntl"])
def test_a_lock_that_somebody_has(
    whole: bool, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a blocker that names the holder, unless both share it, or their ranges do not meet."""
    monkeypatch.setattr(places, "_LOCK_PATIENCE_S", 0.0)
    path = tmp_path / "locked"
    path.write_text("x" * 100)

    def findings(exclusive: bool, start: int = 20) -> list[Finding]:
        lock = LockedFile(str(path), whole, exclusive, start, 10)
        return list(places.locks(needs(locks=(lock,)), here))

    take = "fcntl.flock(file, fcntl.LOCK_SH)" if whole else "fcntl.lockf(file, fcntl.LOCK_SH, 10, 20)"
    assert findings(exclusive=True) == []
    with spawn_python(then_wait(f"import fcntl; file = open({str(path)!r}, 'r+'); {take}")) as program:
        found = only(findings(exclusive=True))
        assert (found.name, found.severity) == ("lock-taken", Severity.BLOCKER)
        assert f"({program.pid})" in found.evidence["holder"]
        assert findings(exclusive=False) == []
        assert bool(findings(exclusive=True, start=40)) == whole
    path.unlink()
    assert findings(exclusive=True) == []


def test_pids_that_are_taken(here: Here) -> None:
    """A blocker only where the host's own numbers were asked for."""
    numbers = frozenset((os.getpid(),))
    host = needs(numbers=numbers, asked=Asked(pid_namespace="host"))
    assert blocked_by(host, here) == {"pid-taken"}
    assert only(examine(needs(numbers=numbers), here)).severity == Severity.NOTE
    assert examine(needs(numbers=numbers, asked=Asked(pid_namespace="new")), here) == []


def test_pids_beyond_the_last_one_here(here: Here) -> None:
    """They are as good as taken: CRIU is not to raise the host's limit."""
    limit = int(Path("/proc/sys/kernel/pid_max").read_text())
    numbers = frozenset((limit,))
    (found,) = examine(needs(numbers=numbers, asked=Asked(pid_namespace="host")), here)
    assert found.name == "pid-taken" and f"kernel.pid_max is {limit}" in found.message
    assert only(examine(needs(numbers=numbers), here)).severity == Severity.NOTE
    assert namespace_for(PidNamespace.AUTO, limit, {limit}) == PidNamespace.NEW


# --- rights ------------------------------------------------------------------------------------------------


def test_capabilities_that_cannot_be_given(here: Here) -> None:
    """What no bounding set here has is named; a user namespace of its own has its own."""
    here.capabilities = 0b1011
    rights = Rights(frozenset((0,)), frozenset((0,)), 1 << 2 | 1 << 21 | 1)
    found = only(examine(needs(rights=rights), here))
    assert found.evidence["lacking"] == ["CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN"]
    assert blocked_by(needs(rights=rights), here) == {"capabilities"}
    assert examine(needs(rights=rights, own_namespaces=frozenset(("user",))), here) == []


def test_users_cgroups_and_plugins_are_notes_and_changes(here: Here) -> None:
    """A stranger's number, another cgroup, a plug-in that is not here: said, and no reason to refuse."""
    here.plugins = {"journal": "1.0"}
    here.cgroups = ["0::/system.slice"]
    rights = Rights(frozenset((0, 54321)), frozenset((0, 54321)), 0)
    meta = {
        "cgroups": ["0::/agents/one"],
        "plugins": [{"name": name, "package": "p", "version": "1"} for name in ("journal", "quiesce")],
    }
    found = {one.name: one for one in examine(needs(rights=rights, meta=meta), here)}
    assert set(found) == {"users-unknown", "groups-unknown", "cgroups-other", "plugin-missing"}
    assert found["plugin-missing"].evidence["name"] == "quiesce"
    assert guard(needs(rights=rights, meta=meta), here)


def test_a_namespace_that_this_kernel_does_not_have(here: Here) -> None:
    """A tree with a kind of namespace of its own needs a kernel that has the kind."""
    assert examine(needs(own_namespaces=frozenset(("ipc", "time"))), here) == []
    assert blocked_by(needs(own_namespaces=frozenset(("dreams",))), here) == {"namespaces"}


# --- forcing -----------------------------------------------------------------------------------------------


def test_one_blocker_is_forced_by_name_and_no_other(here: Here, file: Path) -> None:
    """The forced one becomes a change that says so; one that was not named still refuses."""
    then = opened(file)
    file.write_bytes(b"another")
    both = needs({"page_size": 3}, files=(then,), asked=Asked(forced=("file-changed",)))
    assert blocked_by(both, here) == {"page-size"}
    findings = examine(needs(files=(then,), asked=Asked(forced=("file-changed",))), here)
    assert only(findings).severity == Severity.CHANGE
    assert "--force-guard file-changed" in only(findings).action
    assert forced_paths(findings) == [str(file)]


def test_every_blocker_can_be_forced() -> None:
    """The names in `names` are those of the blockers in the code, no more and no less."""
    import re

    source = "".join(path.read_text() for path in (ROOT / "crcli" / "guard").glob("*.py"))
    named = set(re.findall(r'blocker\(\s*"([a-z-]+)"', source))
    assert named == set(BLOCKERS) and list(BLOCKERS) == sorted(BLOCKERS)
    assert len(set(CHECKS)) == len(CHECKS)


def test_a_zombie_that_nobody_reaps_keeps_its_pid() -> None:
    """Its pid counts as taken, in the end; once its parent has looked, it is free."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert await_pids(frozenset({child}), insist=False) == [child]
    os.waitpid(child, 0)
    assert await_pids(frozenset({child}), insist=False) == []


def test_a_pid_is_free_once_its_zombie_was_reaped() -> None:
    """Who waits for the pid gets it as soon as the parent looks."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    reaper = threading.Timer(0.05, os.waitpid, (child, 0))
    reaper.start()
    assert await_pids(frozenset({child}), insist=True) == []
    reaper.join()


def test_pids_of_the_living_are_not_waited_for() -> None:
    """Ours is taken, and so it is said at once, beside one that is free."""
    free = next(number for number in range(2, pid_limit()) if not os.path.exists(f"/proc/{number}"))
    assert await_pids(frozenset({os.getpid(), free}), insist=True) == [os.getpid()]
