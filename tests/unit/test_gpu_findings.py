"""What is said of a tree's GPU side from /proc alone: no CUDA, no GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from crcli.gpu import preflight
from crcli.gpu.facts import CudaProcess, CudaState, GpuHost
from crcli.gpu.managed import WIPED_ON_FORK, Piece, _told_apart, pieces
from crcli.gpu.preflight import candidates
from crcli.process import memory_room
from crcli.process.evidence import Evidence
from crcli.process.gather import gather
from crcli.process.maps import parse_maps, parse_smaps
from crcli.process.memory_room import Room, too_tight
from crcli.process.tree import refuse_bad_target, scan_tree
from tests.support.programs import spawn_python, then_wait


def look(pid: int) -> Evidence:
    """Return the evidence about the tree of a pid, as a dump gathers it."""
    return gather(scan_tree(refuse_bad_target(pid)))


def maps_driver_library(folder: Path) -> str:
    """Return code that maps a file called as CUDA's driver library is."""
    library = folder / "libcuda.so.580.95.05"
    library.write_bytes(bytes(4096))
    return f"""
import mmap
with open({str(library)!r}, "rb") as file:
    library = mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ)
"""


def test_who_has_the_driver_library_may_use_cuda(tmp_path: Path) -> None:
    """Of a tree of two, the process that has libcuda mapped is a candidate, and its parent is not."""
    code = f"import os, time\nif os.fork():\n    time.sleep(600)\n{maps_driver_library(tmp_path)}"
    with spawn_python(then_wait(code)) as program:
        evidence = look(program.pid)
        assert len(evidence.tree) == 2
        assert candidates(evidence) == [one.pid for one in evidence.tree if one.pid != program.pid]


def test_a_plain_program_is_no_candidate() -> None:
    """Without the library and without a device of NVIDIA's nobody is asked about CUDA."""
    with spawn_python(then_wait()) as program:
        assert candidates(look(program.pid)) == []


@pytest.mark.parametrize(
    ("minors", "name", "is_part"),
    [
        ("config 1\nmonitor 2\ngpu0/gi1/access 12\n", "nvidia-cap2", False),
        ("config 1\nmonitor 2\ngpu0/gi1/access 12\n", "nvidia-cap12", True),
        ("gpu0/gi1/access 1\nconfig 7\n", "nvidia-cap1", True),
        (None, "nvidia-cap1", False),
        (None, "nvidia-cap3", True),
    ],
)
def test_the_right_to_watch_gpus_is_no_part_of_one(
    minors: str | None, name: str, is_part: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every host has two devices for who divides GPUs; NVML keeps one open. Others are parts (MIG)."""
    if minors is not None:
        (tmp_path / "minors").write_text(minors)
    monkeypatch.setattr(preflight, "MIG_MINORS", str(tmp_path / "minors"))
    with spawn_python(then_wait()) as program:
        process = CudaProcess(program.pid, 0, program.pid, CudaState.RUNNING)
        scene = preflight.Scene(look(program.pid), GpuHost("580.95.05", 13000, ()), [process])
        vars(scene)["holders"] = {program.pid: [SimpleNamespace(path=f"/dev/nvidia-caps/{name}")]}
        assert [one.name for one in preflight.mig(scene)] == (["gpu-mig"] if is_part else [])


PYTORCH = b"""\
200400000-202400000 rw-s 00000000 00:05 18625                            /dev/nvidiactl
206400000-206600000 rw-s 00000000 00:05 18625                            /dev/nvidiactl
206600000-206800000 rw-s 206600000 00:05 41200                           /dev/nvidia-uvm
206e00000-300200000 ---p 00000000 00:00 0|
10000000000-10104000000 ---p 00000000 00:00 0|
""".replace(b"|", b" ")
"""Of the memory map of an ordinary PyTorch process: one pool of semaphores, no managed memory."""

MANAGED = b"7ea03a000000-7ea03a200000 rw-s 7ea03a000000 00:05 41200    /dev/nvidia-uvm\n"
POOL_ON_HIGH = b"""\
7ea03a000000-7ea03a200000 rw-s 7ea03a000000 00:05 41200    /dev/nvidia-uvm
Size:               2048 kB
VmFlags: rd wr sh mr mw me ms de mm wf
7ea03a200000-7ea03a400000 rw-s 7ea03a200000 00:05 41200    /dev/nvidia-uvm
VmFlags: rd wr sh mr mw me ms dc de mm
"""


def test_semaphores_of_cuda_are_not_taken_for_managed_memory() -> None:
    """What CUDA maps of /dev/nvidia-uvm in its own window is told from what cudaMallocManaged maps."""
    assert [piece.is_reserved for piece in pieces(parse_maps(PYTORCH + MANAGED))] == [True, False]


def test_a_pool_outside_the_window_is_known_by_its_flag() -> None:
    """Newer drivers have their pools emptied on fork, and managed memory left out."""
    (pool,) = pieces(parse_smaps(POOL_ON_HIGH, WIPED_ON_FORK))
    (other,) = pieces(parse_smaps(POOL_ON_HIGH, b"dc"))
    assert pool.end == other.start


@pytest.mark.parametrize(
    ("sizes", "managed"),
    [([], 0), ([2], 0), ([2] * 16, 0), ([2] * 17, 34), ([4], 4), ([2, 100], 102), ([1], 1)],
)
def test_a_few_pieces_as_large_as_pools_may_be_pools(sizes: list[int], managed: int) -> None:
    """A driver that keeps its pools elsewhere has its programs dumped all the same."""
    suspects = {Piece(number << 40, (number << 40) + (size << 20)) for number, size in enumerate(sizes, 1)}
    assert _told_apart(suspects) == managed << 20


def test_other_devices_and_offsets_are_no_managed_memory() -> None:
    """NVIDIA's driver maps the device at the offset that is the address, or not at all."""
    odd = MANAGED.replace(b"s 7ea03a000000", b"s 00000000") + MANAGED.replace(b"-uvm", b"-uvm-tools")
    assert list(pieces(parse_maps(odd))) == []


def test_room_is_that_of_the_tightest_cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all want together must fit each cgroup above them, its file cache counted as free."""
    monkeypatch.setattr(memory_room, "CGROUPS", str(tmp_path))
    job = tmp_path / "job"
    for folder, limit in ((job, "1000"), (job / "a", "max"), (job / "b", "300")):
        folder.mkdir()
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("500\n")
        (folder / "memory.stat").write_text("anon 400\ninactive_file 100\n")
    assert too_tight({"0::/job/a\n": 600}) is None
    assert too_tight({"0::/job/a\n": 601}) == (Room(str(job), 600), 601)
    assert too_tight({"0::/job/a\n": 600, "0::/job/b\n": 1}) == (Room(str(job), 600), 601)
    assert too_tight({"0::/job/b\n": 1}) == (Room(str(job / "b"), 0), 1)
    assert Room(str(job), 0).label == "the cgroup /job"


def test_what_is_spare_is_what_the_tightest_of_our_cgroups_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the cgroup above ours counts as well as the host's own memory."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    path = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), None)
    if path is None:
        pytest.skip("no cgroup of version 2 here")
    monkeypatch.setattr(memory_room, "CGROUPS", str(tmp_path))
    assert memory_room.spare_memory() == pytest.approx(memory_room.available(), rel=0.1)
    (tmp_path / "memory.max").write_text(f"{3 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{1 << 20}\n")
    (tmp_path / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
    assert memory_room.spare_memory() == 2 << 20


def test_room_on_the_host_is_what_can_be_had_without_swapping() -> None:
    """More than that is refused in the host's name."""
    found = too_tight({"0::/\n": 1 << 60})
    assert found is not None and found[0].label == "this host" and 0 < found[0].free < 1 << 50
    assert too_tight({}) is None
