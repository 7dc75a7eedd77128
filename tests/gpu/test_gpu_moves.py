"""Whether this host can take an image with GPU memory: what check, show and a refused restore say of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.crcli import assert_goes_on
from tests.support.gpu_simulator import GpuCrcli, SimulatedHost, gpu
from tests.support.programs import Program, spawn_python, then_wait

MIB = 1 << 20


@pytest.fixture
def image(sim: SimulatedHost, crcli: GpuCrcli) -> tuple[str, Program]:
    """An image of a program with 4 MiB on the first of two GPUs."""
    with sim.start_program("--megabytes", "4") as program:
        return crcli.dump(program.pid)["image"], program


def check(crcli: GpuCrcli, image: str, code: int = 0) -> dict[str, dict[str, Any]]:
    """Return what `crcli check IMAGE` finds about GPUs, by name."""
    report = crcli.run("check", image, "--store", crcli.store, "--json", code=code).json
    return {one["name"]: one for one in report["findings"] if one["name"].startswith("gpu")}


def refused(crcli: GpuCrcli, image: str, *options: str) -> dict[str, dict[str, Any]]:
    """Return why a restore was refused, by name, after asserting that check says the same."""
    error = crcli.restore(image, *options, code=20)["error"]
    assert error["hint"]
    return {one["name"]: one for one in error["findings"] if one["name"].startswith("gpu")}


def test_the_same_host_takes_it(sim: SimulatedHost, crcli: GpuCrcli, image: tuple[str, Program]) -> None:
    """Nothing stands in the way but a word about persistence mode; the tree goes on."""
    name, program = image
    assert set(check(crcli, name)) == {"gpu-persistence"}
    crcli.restore(name)
    assert_goes_on(program)


def test_show_says_what_lay_on_which_gpu(
    sim: SimulatedHost, crcli: GpuCrcli, image: tuple[str, Program]
) -> None:
    """The GPUs, their driver, and each process's memory there; for people and for programs."""
    facts = crcli.run("show", image[0], "--store", crcli.store, "--json").json["gpu"]
    assert [one["uuid"] for one in facts["host"]["gpus"]] == [gpu(1).uuid, gpu(2).uuid]
    (process,) = facts["processes"]
    assert process["used"].keys() == {gpu(1).uuid} and process["used"][gpu(1).uuid] > 4 * MIB
    said = crcli.run("show", image[0], "--store", crcli.store).out
    assert "2 × Simulated H100, driver 580.95.05" in said
    assert any(gpu(1).uuid in line and "MiB" in line for line in said.splitlines())


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ({"driver": "575.57.08", "api": 12090}, {"gpu-driver"}),
        ({"gpus": (gpu(1, mig=True), gpu(2))}, {"gpu-mig"}),
        ({"gpus": (gpu(1, memory_bytes=2 * MIB), gpu(2))}, {"gpu-memory"}),
        ({"gpus": (gpu(3, name="Simulated A100"),)}, {"gpu-map"}),
        ({"gpus": (gpu(3), gpu(4), gpu(5))}, {"gpu-map"}),
        ({"gpus": ()}, {"gpu-missing"}),
        ({"driver": "550.54.15", "api": 12040}, {"gpu-missing"}),
    ],
    ids=[
        "older driver",
        "mig",
        "too small",
        "other chip",
        "ambiguous",
        "no gpu",
        "no checkpoint",
    ],
)
def test_another_host_is_refused(
    host: dict[str, Any],
    expected: set[str],
    sim: SimulatedHost,
    crcli: GpuCrcli,
    image: tuple[str, Program],
) -> None:
    """What differs is named before anything is started, by check as by restore."""
    gpus = host.pop("gpus", (gpu(1), gpu(2)))
    sim.configure(*gpus, **host)
    blocking = {name for name, one in check(crcli, image[0], 20).items() if one["severity"] == "blocker"}
    assert blocking == expected
    calls = len(sim.calls("restore"))
    found = refused(crcli, image[0])
    assert {name for name, one in found.items() if one["severity"] == "blocker"} == expected
    assert all(one["remedy"] for one in found.values()) and len(sim.calls("restore")) == calls


def test_a_full_gpu_is_refused_until_there_is_room(
    sim: SimulatedHost, crcli: GpuCrcli, image: tuple[str, Program]
) -> None:
    """A restore that runs out of GPU memory could not be tried again: so it is looked at first."""
    name, program = image
    with sim.start_program("--megabytes", "60"):
        found = refused(crcli, name)
        assert "free" in found["gpu-memory"]["message"] and "--gpu-map" in found["gpu-memory"]["remedy"]
    crcli.restore(name)
    assert_goes_on(program)


def test_other_minor_numbers_do_not_matter(
    sim: SimulatedHost, crcli: GpuCrcli, image: tuple[str, Program]
) -> None:
    """The same GPUs behind other device files are the same."""
    name, program = image
    sim.configure(gpu(1, minor=5), gpu(2, minor=7))
    assert set(check(crcli, name)) == {"gpu-persistence"}
    crcli.restore(name)
    assert_goes_on(program)


def test_a_move_is_said(sim: SimulatedHost, crcli: GpuCrcli, image: tuple[str, Program]) -> None:
    """Where it is unambiguous the mapping is told by itself, and what a program will not be told as well."""
    name, program = image
    sim.configure(gpu(7), gpu(8))
    found = check(crcli, name)
    assert found["gpu-moved"]["evidence"]["map"] == {gpu(1).uuid: gpu(7).uuid}
    report = crcli.restore(name)
    assert "gpu-moved" in {one["name"] for one in report["findings"]}
    assert_goes_on(program)


def test_a_refusal_can_be_forced_by_its_name(
    sim: SimulatedHost, crcli: GpuCrcli, image: tuple[str, Program]
) -> None:
    """--force-guard goes on in spite of one finding, at the user's own risk."""
    name, program = image
    sim.configure(gpu(1), gpu(2), driver="575.57.08", api=12090)
    assert "gpu-driver" in refused(crcli, name)
    crcli.restore(name, "--force-guard", "gpu-driver")
    assert_goes_on(program)


def test_an_image_without_gpus_starts_no_cuda(sim: SimulatedHost, crcli: GpuCrcli) -> None:
    """Whoever has no GPU memory in the image pays nothing for those who have."""
    with spawn_python(then_wait()) as program:
        name = crcli.dump(program.pid)["image"]
        check(crcli, name)
        crcli.restore(name)
    assert sim.calls("init") == []
