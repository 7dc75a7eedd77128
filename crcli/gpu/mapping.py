"""Which GPU takes the place of which: what `--gpu-map` says, and what can be told without it.

CUDA's driver moves a process to GPUs of the same chip with at least as much memory. The mapping that it is
given must hold every GPU that it saw when the process was checkpointed, not only those that were in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from crcli.gpu.facts import Gpu, GpuHost


class MappingRefused(Exception):
    """No mapping can be told, or the one that was asked for cannot be. `remedy` says what to do."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def choose_mapping(
    recorded: GpuHost, used: Iterable[str], here: GpuHost, asked: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """Return which GPU here (its UUID) takes the place of which recorded one; empty: each is its own.

    `used` are the UUIDs of the recorded GPUs that hold memory of the image, `asked` what the user gave, by
    UUID or index. What was not asked for is told where that is unambiguous: a GPU that is here stays itself;
    else, with the same number of GPUs that are all alike, one by one in the order of their indexes. Raises
    MappingRefused.
    """
    wanted = _asked_for(recorded, here, asked)
    mapping = dict(wanted)
    left = [gpu for gpu in here.gpus if gpu.uuid not in wanted.values()]
    for gpu in recorded.gpus:
        if gpu.uuid not in mapping and any(gpu.uuid == one.uuid for one in left):
            mapping[gpu.uuid] = gpu.uuid
    left = [gpu for gpu in left if gpu.uuid not in mapping.values()]
    homeless = [gpu for gpu in recorded.gpus if gpu.uuid not in mapping]
    needed = [gpu for gpu in homeless if gpu.uuid in set(used)]
    if needed and not _fit_in_order(homeless, left):
        raise MappingRefused(_why_ambiguous(needed, left), _say_it(needed, left))
    mapping |= {old.uuid: new.uuid for old, new in zip(homeless, left, strict=False) if fits(old, new)}
    return {} if all(old == new for old, new in mapping.items()) else mapping


def fits(old: Gpu, new: Gpu) -> bool:
    """Whether what lay on `old` can go on on `new`: the same chip, and at least as much memory."""
    is_alike = (old.name, old.compute) == (new.name, new.compute)
    return is_alike and new.memory_bytes >= old.memory_bytes and not new.mig


def _fit_in_order(old: Sequence[Gpu], new: Sequence[Gpu]) -> bool:
    """Whether there is no choice that matters: as many here as there were, all alike."""
    return len(old) == len(new) and all(fits(one, other) for one in old for other in new)


def _asked_for(recorded: GpuHost, here: GpuHost, asked: Sequence[tuple[str, str]]) -> dict[str, str]:
    """What the user gave, as UUIDs."""
    mapping: dict[str, str] = {}
    for old_text, new_text in asked:
        old, new = _named(recorded, old_text), _named(here, new_text)
        if old is None or new is None:
            where, text, host = (
                ("the image", old_text, recorded) if old is None else ("this host", new_text, here)
            )
            raise MappingRefused(f"{where} has no GPU {text}", f"it has {_list(host.gpus)}")
        if old.uuid in mapping or new.uuid in mapping.values():
            raise MappingRefused(
                f"--gpu-map {old_text}={new_text}: one of its GPUs was given before",
                "each GPU of the image goes to one here, and none here takes two",
            )
        mapping[old.uuid] = new.uuid
    return mapping


def _named(host: GpuHost, text: str) -> Gpu | None:
    """The GPU with this index or UUID (with or without "GPU-", in either case)."""
    if text.isascii() and text.isdecimal():
        return next((gpu for gpu in host.gpus if gpu.index == int(text)), None)
    return next((gpu for gpu in host.gpus if _bare(gpu.uuid) == _bare(text)), None)


def _bare(uuid: str) -> str:
    return uuid.lower().removeprefix("gpu-")


def _why_ambiguous(needed: Sequence[Gpu], left: Sequence[Gpu]) -> str:
    old = needed[0]
    if not left:
        return f"the image needs GPU {old.index} ({old.name}), and no GPU here is left for it"
    if not any(fits(old, new) for new in left):
        return f"no GPU here can take the place of {describe(old)}: there is {_list(left)}"
    return f"it cannot be told which GPU here is to take the place of {describe(old)}"


def _say_it(needed: Sequence[Gpu], left: Sequence[Gpu]) -> str:
    """The options to give, spelled out where GPUs here could take them."""
    pairs = []
    free = list(left)
    for old in needed:
        new = next((gpu for gpu in free if fits(old, gpu)), None)
        if new is None:
            return "restore on a host with GPUs of the same kind, as many as the image uses"
        free.remove(new)
        pairs.append(f"--gpu-map {old.index}={new.index}")
    return f"say it, for example {' '.join(pairs)}; here are {_list(left)}"


def describe(gpu: Gpu) -> str:
    """A GPU in a sentence."""
    return f"GPU {gpu.index} ({gpu.name}, {gpu.memory_bytes / (1 << 30):.0f} GiB)"


def _list(gpus: Iterable[Gpu]) -> str:
    return ", ".join(f"{describe(gpu)} {gpu.uuid}" for gpu in gpus) or "none"


def in_force(mapping: Mapping[str, str], used: Iterable[str]) -> dict[str, str]:
    """Where the GPUs in use went, for a report; those that stay are left out."""
    return {old: mapping[old] for old in used if mapping.get(old, old) != old}
