"""`crcli dump` and `crcli restore` as they are typed most, read without typer.

To import typer, and to have it learn what a restore can be asked, takes a quarter of the time in which a
small tree is back. Whatever is not of this form, mistakes and `--help` among it, is left to typer.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_DIGITS = 10
"""More than any pid has; Python refuses to make a number of thousands."""

_STORE = {"--store", "--endpoint-url"}


class _Words(NamedTuple):
    """A command line taken apart: the one word that is no option, the flags, and the options with values."""

    subject: str
    flags: set[str]
    values: dict[str, str]


def quick(arguments: Sequence[str]) -> Callable[[], int] | None:
    """What runs a command line; None where it is of another command or has other options, or something is
    wrong with it as far as typer could tell."""
    match arguments:
        case ["dump", *words]:
            return _dump(words)
        case ["restore", *words]:
            return _restore(words)
    return None


def _dump(arguments: Sequence[str]) -> Callable[[], int] | None:
    flags = {"--leave-running", "--leave-stopped", "--no-trial", "--json"}
    words = _taken_apart(arguments, flags, {"--name", *_STORE})
    if words is None or not (words.subject.isascii() and words.subject.isdecimal()):
        return None
    if len(words.subject) > _DIGITS:
        return None
    if {"--leave-running", "--leave-stopped"} <= words.flags:
        return None
    from crcli.cli import dumping

    options = dumping.options_of(
        int(words.subject),
        words.values.get("--store"),
        words.values.get("--endpoint-url"),
        leave_running="--leave-running" in words.flags,
        leave_stopped="--leave-stopped" in words.flags,
        name=words.values.get("--name", ""),
        trial="--no-trial" not in words.flags,
    )
    return partial(dumping.take, [options.pid], options, as_json="--json" in words.flags)


def _restore(arguments: Sequence[str]) -> Callable[[], int] | None:
    words = _taken_apart(arguments, {"--lazy", "--eager", "--wait", "--json"}, _STORE)
    if words is None or {"--lazy", "--eager"} <= words.flags:
        return None
    from crcli.cli import restoring

    options = restoring.options_of(
        words.subject,
        words.values.get("--store"),
        words.values.get("--endpoint-url"),
        lazy="--lazy" in words.flags,
    )
    return partial(
        restoring.bring_back, options, wait="--wait" in words.flags, as_json="--json" in words.flags
    )


def _taken_apart(arguments: Sequence[str], flags: set[str], values: set[str]) -> _Words | None:
    """The words of a command line that has these options and one word besides; None for any other."""
    found = _Words("", set(), {})
    subjects: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in flags:
            found.flags.add(word)
        elif word in values:
            found.values[word] = next(words, "-")
        else:
            subjects.append(word)
    if len(subjects) != 1 or any(
        not text or text.startswith("-") for text in (*subjects, *found.values.values())
    ):
        return None
    return found._replace(subject=subjects[0])
