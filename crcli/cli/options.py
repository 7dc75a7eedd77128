"""Options that several commands share."""

from __future__ import annotations

import os
from math import isfinite
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from crcli.app import ClickUsageError
from crcli.errors import UsageError
from crcli.pipeline.interrupts import LONGEST_S

_NOT_SET = "is it a variable that is not set? What is left out has its default"
_DIGITS = 10
"""More than any pid has; Python makes no number of thousands."""

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Where images live: file:///path or s3://bucket/prefix. "
        "Default: $CRCLI_STORE, the configuration file, then file:///var/lib/crcli/store.",
        show_default=False,
    ),
]

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url", metavar="URL", help="The S3 server to use; a folder needs none.", show_default=False
    ),
]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATH",
        help="A file or folder to take along; may be repeated.",
        show_default=False,
    ),
]

WeightsMapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--weights-map",
        metavar="OLD=NEW",
        help="Where a file or folder of weights is here; may be repeated.",
        show_default=False,
    ),
]

GpuMapOption = Annotated[
    list[str] | None,
    typer.Option(
        "--gpu-map",
        metavar="OLD=NEW",
        help="Which GPU here (index or UUID) takes the place of which of the image; may be repeated.",
        show_default=False,
    ),
]

ImageArgument = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE",
        help="NAME (the newest of that name), NAME@ID, or a full URL.",
        show_default=False,
    ),
]


class Command(TyperCommand):
    """A command that takes no empty word, and no option as the value of another: either comes of a variable
    that is not set, and does not mean the default.

    The words of a command to run are its own.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise UsageError for what comes of no value, and have every mistake name its command."""
        try:
            rest: list[str] = super().parse_args(ctx, args)
        except ClickUsageError as error:
            error.ctx = error.ctx or ctx
            raise
        options = {name for param in self.params if self._is_option(param) for name in param.opts}
        for param in self.params:
            value = ctx.params.get(param.name)
            values = value if isinstance(value, list | tuple) else (value,)
            if "" in values and self._was_typed(ctx, param):
                raise UsageError(
                    f"{param.opts[0] if self._is_option(param) else param.human_readable_name} is empty",
                    hint=_NOT_SET,
                )
            if self._is_option(param) and (taken := options.intersection(map(str, values))):
                raise UsageError(f"{param.opts[0]} has no value: {taken.pop()} follows it", hint=_NOT_SET)
        return rest

    def _was_typed(self, ctx: Any, param: Any) -> bool:
        is_ours = self._is_option(param) or ctx.allow_interspersed_args
        return is_ours and bool(ctx.get_parameter_source(param.name).name == "COMMANDLINE")

    @staticmethod
    def _is_option(param: Any) -> bool:
        return bool(param.param_type_name == "option")


class Commands(TyperGroup):
    """A command with commands of its own, whose help has the first sentence of each, not the half of it."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write them into the help."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, " ".join((command.help or "").partition("\n\n")[0].split()))
                    for name, command in self.commands.items()
                ]
            )


def parse_pid(text: str) -> int:
    """The number of a process, with blanks around it maybe; raise UsageError for all other words."""
    words = text.split()
    if not words:
        raise UsageError(
            "PID is empty", hint="does the file, or the command, that is to tell it say nothing?"
        )
    are_numbers = all(word.isascii() and word.isdecimal() and len(word) <= _DIGITS for word in words)
    if are_numbers and len(words) == 1:
        return int(text)
    raise UsageError(
        f"{text[:40]!r} is not the number of a process",
        hint="the shell splits several, where there are no quotes around $(…)"
        if are_numbers
        else "`pgrep -f` finds it by a part of the command line",
    )


def parse_seconds(text: str) -> float:
    """A time, at most as long as anything is waited for; `nan` and `inf` are none."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not (isfinite(seconds) and seconds >= 0):
        raise typer.BadParameter(f"it takes a number of seconds, such as 30 or 0.5, not {text!r}")
    return min(seconds, LONGEST_S)


def parse_count(text: str) -> int:
    """A whole number, 0 or more."""
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise typer.BadParameter(f"it takes a whole number, 0 or more, not {str(text)[:40]!r}")
    return count


def parse_paths(paths: list[str] | None) -> tuple[str, ...]:
    """The paths as they are meant from here."""
    return tuple(map(os.path.abspath, paths or ()))


def parse_pairs(texts: list[str] | None, option: str) -> tuple[tuple[str, str], ...]:
    """Split each `OLD=NEW` at its first `=`; raise UsageError when one is not of that form."""
    pairs = []
    for text in texts or ():
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise UsageError(f"{option} takes OLD=NEW, not {text!r}")
        pairs.append((old, new))
    return tuple(pairs)
