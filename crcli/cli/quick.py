"""`crcli restore` as it is typed most, read without typer.

To import typer, and to have it learn what a restore can be asked, takes a quarter of the time in which a
small tree is back. Whatever is not of this form, mistakes and `--help` among it, is left to typer.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_FLAGS = {"--lazy", "--eager", "--wait", "--json"}
_VALUES = {"--store", "--endpoint-url"}


def quick_restore(arguments: Sequence[str]) -> Callable[[], int] | None:
    """What runs a restore with these arguments; None where there are others, or something is wrong with them
    as far as typer could tell."""
    images: list[str] = []
    flags: set[str] = set()
    values: dict[str, str] = {}
    words = iter(arguments)
    for word in words:
        if word in _FLAGS:
            flags.add(word)
        elif word in _VALUES:
            values[word] = next(words, "-")
        else:
            images.append(word)
    if len(images) != 1 or {"--lazy", "--eager"} <= flags:
        return None
    if any(not text or text.startswith("-") for text in (*images, *values.values())):
        return None
    from crcli.cli import restoring

    options = restoring.options_of(
        images[0], values.get("--store"), values.get("--endpoint-url"), lazy="--lazy" in flags
    )
    return partial(restoring.bring_back, options, wait="--wait" in flags, as_json="--json" in flags)
