"""The GPUs of a host against those of an image, each altered in one point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crcli.criu.needs import OpenedFile
from crcli.errors import HostLacks, ImageDamaged
from crcli.findings import Finding, Severity
from crcli.gpu.facts import Gpu, GpuHost
from crcli.guard import gpus as guard_gpus
from crcli.guard.contents import Contents
from crcli.guard.gpus import GPUS, gpu_guard
from crcli.guard.here import Here
from crcli.guard.host import examine
from crcli.guard.names import BLOCKERS
from crcli.guard.needs import Asked, NeededFile, Needs
from crcli.image.manifest import Manifest
from crcli.memory.extents import PAGE, Extent, Source, SpaceKey, SpaceKind
from crcli.records import replace

GIB = 1 << 30
DRIVER = "580.159.04"


def gpu(number: int, **facts: Any) -> Gpu:
    """A GPU, known by its number."""
    usual = {"persistence": True, "free_bytes": 79 * GIB}
    return Gpu(f"GPU-{number}", "H100", number, number, 80 * GIB, "9.0", **(usual | facts))


def host(*gpus: Gpu, driver: str = DRIVER, api: int = 13000) -> GpuHost:
    """A host with these GPUs."""
    return GpuHost(driver, api, gpus)


def recorded(of: GpuHost, *used: dict[int, int]) -> dict[str, Any]:
    """The facts of an image whose processes used so many GiB of the GPUs with these numbers."""
    processes = [
        {"pid": pid, "used": {f"GPU-{number}": size * GIB for number, size in one.items()}}
        for pid, one in enumerate(used, 10)
    ]
    return {"host": of.as_json(), "processes": processes}


@pytest.fixture(autouse=True)
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of /dev, with all that NVIDIA's driver makes; any character device will do."""
    folder = tmp_path / "dev"
    folder.mkdir()
    for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(8))):
        (folder / name).symlink_to("/dev/null")
    monkeypatch.setattr(guard_gpus, "DEVICES", str(folder))
    return folder


def names(findings: list[Finding]) -> list[str]:
    """Their names; blockers that can be forced are in the guard's list, and each has a remedy."""
    for one in findings:
        assert one.message and one.remedy
        if one.severity == Severity.BLOCKER:
            assert one.name in BLOCKERS or one.name in ("gpu-map", "gpu-missing")
    return [one.name for one in findings]


ONE = host(gpu(0))
IMAGE = recorded(ONE, {0: 20})


@pytest.mark.parametrize("driver", ["570.86.15", "580.95.05"])
def test_a_gpu_that_was_not_in_use_may_be_another(driver: str) -> None:
    """The GPU in use is here: a driver that moves nothing is asked for no move, another is told of all."""
    old, here = host(gpu(0), gpu(1), driver=driver), host(gpu(0), gpu(2), driver=driver)
    findings, mapping = gpu_guard(recorded(old, {0: 20}), here)
    assert names(findings) == []
    moves = {"GPU-0": "GPU-0", "GPU-1": "GPU-2"}
    assert mapping == ({} if driver.startswith("570") else moves)
    findings, mapping = gpu_guard(recorded(old, {0: 20, 1: 1}), here)
    assert ("gpu-driver" in names(findings)) == driver.startswith("570")
    assert mapping == moves


def test_the_same_host_takes_its_own() -> None:
    """No finding, and no mapping: each GPU is its own."""
    assert gpu_guard(IMAGE, ONE) == ([], {})


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (host(gpu(0), driver="575.57.08"), ["gpu-driver"]),
        (host(gpu(0), api=12080), ["gpu-driver"]),
        (host(gpu(0), driver="610.57.04", api=13030), []),
        (host(gpu(0, free_bytes=19 * GIB)), ["gpu-memory"]),
        (host(gpu(0, free_bytes=-1)), []),
        (host(gpu(0, persistence=False)), ["gpu-persistence"]),
        (host(gpu(0, mig=True)), ["gpu-mig"]),
        (host(replace(gpu(0), minor=5)), []),
        (host(replace(gpu(0), minor=9)), ["gpu-device"]),
        (host(gpu(3)), ["gpu-moved"]),
        (host(gpu(3), driver="580.95.05"), ["gpu-moved"]),
        (host(), ["gpu-map"]),
        (host(replace(gpu(3), name="H200")), ["gpu-map"]),
    ],
)
def test_one_thing_is_otherwise(here: GpuHost, expected: list[str]) -> None:
    """What differs is told by the finding that is about it, and by no other."""
    found, _ = gpu_guard(IMAGE, here)
    assert names(found) == expected


def test_a_gpu_that_was_asked_for_may_be_the_wrong_one() -> None:
    """Another chip is refused by name, also when the user chose it."""
    here = host(gpu(0), replace(gpu(1), name="A100", compute="8.0"))
    found, mapping = gpu_guard(IMAGE, here, [("0", "1")])
    assert mapping == {"GPU-0": "GPU-1"} and names(found) == ["gpu-chip", "gpu-moved"]
    assert "A100" in found[0].message


def test_a_driver_without_maps_moves_nothing() -> None:
    """Before 580 memory goes back only where it was."""
    old = host(gpu(0), driver="575.57.08", api=12090)
    assert names(gpu_guard(recorded(old, {0: 1}), old)[0]) == []
    found, _ = gpu_guard(recorded(old, {0: 1}), replace(old, gpus=(gpu(1),)))
    assert names(found) == ["gpu-driver", "gpu-moved"] and "580" in found[0].remedy


def test_memory_is_counted_for_all_processes_together() -> None:
    """Two processes on one GPU need the room of both."""
    image = recorded(ONE, {0: 40}, {0: 40})
    (full,) = gpu_guard(image, ONE)[0]
    assert full.name == "gpu-memory" and full.evidence["needed"] == 80 * GIB


def test_a_swap_is_no_mapping_that_is_told_by_itself() -> None:
    """Two GPUs that are here stay themselves; only what was asked for is swapped."""
    two = host(gpu(0), gpu(1))
    image = recorded(two, {0: 1, 1: 1})
    assert gpu_guard(image, two) == ([], {})
    found, mapping = gpu_guard(image, two, [("0", "1"), ("1", "0")])
    assert mapping == {"GPU-0": "GPU-1", "GPU-1": "GPU-0"} and names(found) == ["gpu-moved"]
    assert found[0].evidence["map"] == mapping


def test_a_missing_device_is_named(devices: Path) -> None:
    """Without nvidia-uvm there is no CUDA; a plain file in its place is none either."""
    (devices / "nvidia-uvm").unlink()
    (missing,) = gpu_guard(IMAGE, ONE)[0]
    assert missing.evidence == {"devices": [f"{devices}/nvidia-uvm"]} and "nvidia-modprobe" in missing.remedy
    (devices / "nvidia-uvm").touch()
    assert names(gpu_guard(IMAGE, ONE)[0]) == ["gpu-device"]


# --- as the guard asks it ----------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path) -> Here:
    """This host, with a GPU that is not there."""
    found = Here(Contents(str(tmp_path / "state")))
    found.gpus = ONE
    return found


def needs(image: dict[str, Any] | None, **parts: Any) -> Needs:
    """What an image with these facts about GPUs needs."""
    meta = {"gpu": image} if image else {}
    manifest = Manifest("agent", "20260131T235959123-0a1b2c", [], [], parts.pop("spaces", {}), [], [], meta)
    return Needs(manifest, **{"numbers": frozenset(), **parts})


def of_gpus(needs: Needs, here: Here) -> list[Finding]:
    """What the checks of GPUs find."""
    return [finding for check in GPUS for finding in check(needs, here)]


def test_an_image_without_gpus_asks_nobody(here: Here) -> None:
    """CUDA is not started for it."""
    del here.gpus
    assert of_gpus(needs(None), here) == []


def test_a_map_for_an_image_without_gpus_is_said_to_be_for_nothing(here: Here) -> None:
    """Nothing stops for it, as scripts give it for every image, and CUDA is not started; but it is said."""
    del here.gpus
    (found,) = of_gpus(needs(None, asked=Asked(gpu_map=(("0", "1"),))), here)
    assert (found.name, found.severity) == ("gpu-map-unused", Severity.NOTE)


def test_without_cuda_there_is_no_going_on(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, with its remedy, and it cannot be forced."""

    def lacks(self: Here) -> GpuHost:
        raise HostLacks("cuda-python cannot be imported", hint="install it")

    monkeypatch.setattr(Here, "gpus", property(lacks))
    del here.__dict__["gpus"]
    (missing,) = of_gpus(needs(IMAGE, asked=Asked(forced=("gpu-missing",))), here)
    assert (missing.name, missing.remedy) == ("gpu-missing", "install it")


def test_the_libraries_in_memory_go_with_their_driver(here: Here) -> None:
    """The kernel driver serves libraries of its own version; one of a compat package may be another."""
    here.gpus = host(gpu(0), driver="580.200.01")
    mapped = NeededFile(OpenedFile(f"/usr/lib/libcuda.so.{DRIVER}", 1, None, ""))
    assert names(of_gpus(needs(IMAGE, files=(mapped,)), here)) == ["gpu-driver-other"]
    compat = NeededFile(OpenedFile("/usr/local/cuda/compat/libcuda.so.590.10", 1, None, ""))
    assert names(of_gpus(needs(IMAGE, files=(compat,)), here)) == []
    here.gpus = ONE
    assert names(of_gpus(needs(IMAGE, files=(mapped,)), here)) == []


def test_what_is_asked_for_is_heeded(here: Here) -> None:
    """--gpu-map and --force-guard come in through `Asked`."""
    here.gpus = host(gpu(1), gpu(2))
    assert names(of_gpus(needs(IMAGE), here)) == ["gpu-map"]
    asked = Asked(gpu_map=(("0", "2"),))
    assert names(of_gpus(needs(IMAGE, asked=asked), here)) == ["gpu-moved"]
    here.gpus = host(gpu(0, free_bytes=0))
    forced = Asked(forced=("gpu-memory",))
    (full,) = [one for one in examine(needs(IMAGE, asked=forced), here) if one.name.startswith("gpu")]
    assert (full.name, full.severity) == ("gpu-memory", Severity.CHANGE)


def test_zeros_of_gpus_may_need_room_on_their_way(here: Here) -> None:
    """Zeros take no memory in a tree; those that go to a GPU may, as far as they are GPU memory."""
    key = SpaceKey(SpaceKind.PROCESS, 10)
    gib = GIB // PAGE
    spaces = {key: [Extent(0, gib, Source.CHUNK, 0, 0), Extent(gib, 30 * gib, Source.ZERO, 0, 0)]}
    image = needs(IMAGE, spaces=spaces)
    here.spare_memory = 21 * GIB
    assert names(of_gpus(image, here)) == []
    here.spare_memory = 21 * GIB - 1
    (tight,) = of_gpus(image, here)
    assert (tight.name, tight.evidence["needed"]) == ("gpu-host-memory", 21 * GIB)
    here.spare_memory = GIB - 1
    assert names(of_gpus(image, here)) == []  # `memory` has said it


@pytest.mark.parametrize(
    "gpu_facts",
    [
        {"host": {"gpus": [{}]}, "processes": []},
        {"host": {"gpus": [{**gpu(0).as_json(), "memory_bytes": "much"}]}, "processes": []},
        {"host": None, "processes": []},
        {"host": {}, "processes": [{"pid": 10}]},
        {"host": {}, "processes": [{"pid": 10, "used": {"GPU-0": -1}}]},
        {"host": {}, "processes": [{"pid": 11, "used": {}}]},
        {"host": {}},
        ["gpu"],
    ],
)
def test_facts_that_are_none_are_damage(here: Here, gpu_facts: Any) -> None:
    """What does not follow FORMAT.md is told as damage, before anybody relies on it."""
    image = needs(gpu_facts)
    image.meta["members"] = [{"pid": 10}]
    with pytest.raises(ImageDamaged, match="what the image says of its GPUs"):
        of_gpus(image, here)
