"""Which GPU takes the place of which, and what CUDA's refusals mean in words."""

from __future__ import annotations

import pytest

from crcli.gpu.facts import Gpu, GpuHost
from crcli.gpu.mapping import MappingRefused, choose_mapping, in_force
from crcli.gpu.meaning import OTHERS, meaning_of
from crcli.records import replace

GIB = 1 << 30
DOCUMENTED = {
    "lock": ("INVALID_VALUE", "NOT_INITIALIZED", "ILLEGAL_STATE", "NOT_SUPPORTED", "NOT_READY"),
    "checkpoint": ("INVALID_VALUE", "NOT_INITIALIZED", "ILLEGAL_STATE", "NOT_SUPPORTED", "INVALID_CONTEXT"),
    "restore": ("INVALID_VALUE", "NOT_INITIALIZED", "ILLEGAL_STATE", "NOT_SUPPORTED", "INVALID_CONTEXT"),
    "unlock": ("INVALID_VALUE", "NOT_INITIALIZED", "ILLEGAL_STATE", "NOT_SUPPORTED"),
    "state": ("INVALID_VALUE", "NOT_INITIALIZED", "NOT_SUPPORTED"),
}
"""What CUDA's reference (13.4) lists for each call, and cuda-python repeats."""


def gpu(number: int, index: int = 0, name: str = "H100", memory: int = 80 * GIB) -> Gpu:
    """A GPU whose UUID ends in this number."""
    return Gpu(f"GPU-00000000-0000-0000-0000-{number:012d}", name, index, index, memory, "9.0")


def host(*gpus: Gpu) -> GpuHost:
    """A host with these GPUs, in the order of their indexes."""
    numbered = tuple(replace(one, index=index) for index, one in enumerate(gpus))
    return GpuHost("580.95.05", 13000, numbered)


def test_the_same_gpus_need_no_map() -> None:
    """Whatever their order is now, and whatever was added."""
    old = host(gpu(1), gpu(2))
    used = [gpu(1).uuid, gpu(2).uuid]
    assert choose_mapping(old, used, old, ()) == {}
    assert choose_mapping(old, used, host(gpu(3), gpu(2), gpu(1)), ()) == {}


def test_as_many_of_the_same_kind_follow_by_index() -> None:
    """All that the driver saw are mapped, also those that were not in use."""
    old, here = host(gpu(1), gpu(2)), host(gpu(7), gpu(8))
    assert choose_mapping(old, [gpu(2).uuid], here, ()) == {
        gpu(1).uuid: gpu(7).uuid,
        gpu(2).uuid: gpu(8).uuid,
    }


def test_those_that_are_here_stay_and_the_others_follow() -> None:
    """One GPU was exchanged: only it is mapped to another."""
    mapping = choose_mapping(host(gpu(1), gpu(2)), [gpu(2).uuid], host(gpu(9), gpu(1)), ())
    assert mapping == {gpu(1).uuid: gpu(1).uuid, gpu(2).uuid: gpu(9).uuid}
    assert in_force(mapping, [gpu(1).uuid, gpu(2).uuid]) == {gpu(2).uuid: gpu(9).uuid}


def test_what_is_asked_for_counts_and_the_rest_is_told() -> None:
    """By UUID in any case, with or without its prefix, or by index."""
    old, here = host(gpu(1), gpu(2)), host(gpu(7), gpu(8))
    asked = [("0", gpu(8).uuid.removeprefix("GPU-").upper())]
    mapping = choose_mapping(old, [gpu(1).uuid], here, asked)
    assert mapping == {gpu(1).uuid: gpu(8).uuid, gpu(2).uuid: gpu(7).uuid}


def test_a_used_gpu_of_many_goes_where_it_is_sent() -> None:
    """Eight there, one here: the one that was in use is mapped, the others have no place."""
    old = host(*(gpu(number) for number in range(1, 9)))
    mapping = choose_mapping(old, [gpu(3).uuid], host(gpu(20)), [("2", "0")])
    assert mapping == {gpu(3).uuid: gpu(20).uuid}


@pytest.mark.parametrize(
    ("here", "asked", "says"),
    [
        (host(gpu(7), gpu(8), gpu(9)), (), "--gpu-map 0=0"),
        (host(gpu(7, name="A100"), gpu(8, name="A100")), (), "a host with GPUs of the same kind"),
        (host(gpu(7, memory=40 * GIB), gpu(8)), (), "a host with GPUs of the same kind"),
        (host(), (), "a host with GPUs of the same kind"),
        (host(gpu(7), gpu(8)), (("0", "5"),), "it has GPU 0"),
        (host(gpu(7), gpu(8)), (("5", "0"),), "it has GPU 0"),
        (host(gpu(7), gpu(8)), (("0", "0"), ("1", "0")), "none here takes two"),
        (host(gpu(7), gpu(8)), (("0", "0"), (gpu(1).uuid, "1")), "each GPU of the image goes to one"),
    ],
)
def test_what_cannot_be_told_is_refused_with_a_remedy(
    here: GpuHost, asked: tuple[tuple[str, str], ...], says: str
) -> None:
    """Too many, too few, another chip, too little memory, what is not there, what was given twice."""
    old = host(gpu(1), gpu(2))
    with pytest.raises(MappingRefused) as told:
        choose_mapping(old, [gpu(1).uuid, gpu(2).uuid], here, asked)
    assert says in told.value.remedy


@pytest.mark.parametrize(
    ("call", "result"), [(call, one) for call, all_ in DOCUMENTED.items() for one in all_]
)
def test_every_documented_result_has_a_meaning_of_its_own(call: str, result: str) -> None:
    """And a remedy."""
    meaning = meaning_of(call, f"CUDA_ERROR_{result}")
    assert meaning != OTHERS
    assert meaning.text
    assert meaning.remedy


def test_a_result_that_nobody_knows_is_said_as_it_is() -> None:
    """It is not an error of ours that CUDA has a new one."""
    assert meaning_of("lock", "CUDA_ERROR_OF_TOMORROW") == OTHERS
