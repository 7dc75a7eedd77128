"""Options that several commands share."""

from __future__ import annotations

import os
from math import isfinite
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from crcli.errors import UsageError
from crcli.pipeline.interrupts import LONGEST_S

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

ImageArgument = Annotated[
    str,
    typer.Argument(
        metavar="IMAGE",
        help="NAME (the newest of that name), NAME@ID, or a full URL.",
        show_default=False,
    ),
]


class Command(TyperCommand):
    """A command that takes no empty word: it stands for a variable that is not set, and not for the default.

    The words of a command to run are its own.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raise UsageError for what is empty."""
        rest: list[str] = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name)
            values = value if isinstance(value, list | tuple) else (value,)
            if "" in values and self._was_typed(ctx, param):
                raise UsageError(
                    f"{param.opts[0] if self._is_option(param) else param.human_readable_name} is empty",
                    hint="is it a variable that is not set? What is left out has its default",
                )
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


def check_seconds(param: typer.CallbackParam, value: float | None) -> float | None:
    """The callback of options that take seconds: `nan` and `inf` are no times."""
    if value is None:
        return None
    if not isfinite(value):
        raise UsageError(f"{param.opts[0]} is a number of seconds, not {value}")
    return min(value, LONGEST_S)


def parse_paths(paths: list[str] | None, option: str) -> tuple[str, ...]:
    """The paths as they are meant from here; raise UsageError for an empty one (this folder)."""
    if paths and "" in paths:
        raise UsageError(f"{option} takes a path, not ''")
    return tuple(map(os.path.abspath, paths or ()))


def parse_pair(text: str, option: str) -> tuple[str, str]:
    """Split `OLD=NEW` at its first `=`; raise UsageError when it is not of that form."""
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise UsageError(f"{option} takes OLD=NEW, not {text!r}")
    return old, new
