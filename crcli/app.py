"""The app: a table of commands, each imported when it is called.

`crcli --help` imports none of the commands: what it shows stands in the table.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from crcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS: dict[str, tuple[str, str]] = {
    "dump": ("crcli.cli.dump:dump", "Freeze a process tree, ship it to a store, and let it go."),
    "restore": ("crcli.cli.restore:restore", "Bring a process tree back from its image."),
    "run": ("crcli.cli.run:run", "Start a job that survives its machine, or bring it back."),
    "watch": (
        "crcli.cli.watch:watch",
        "Keep images of a running tree, and dump it when this node goes away.",
    ),
    "check": ("crcli.cli.check:check", "Say what a dump, or a restore here, would meet; touch nothing."),
    "ls": ("crcli.cli.ls:ls", "List the images in a store."),
    "show": ("crcli.cli.show:show", "Say what an image holds and where it came from."),
    "verify": ("crcli.cli.verify:verify", "Read an image back and check every byte of it."),
    "rm": ("crcli.cli.rm:rm", "Remove an image; `gc` frees its space."),
    "pin": ("crcli.cli.pin:pin", "Have an image stay, whatever is removed."),
    "unpin": ("crcli.cli.pin:unpin", "Let an image that was pinned be removed again."),
    "cp": ("crcli.cli.cp:cp", "Copy an image to another store."),
    "gc": ("crcli.cli.gc:gc", "Free what no image in the store refers to."),
    "lease": ("crcli.cli.lease:app", "Say who holds which name, or take one from the dead."),
    "weights": ("crcli.cli.weights:app", "Prepare files of weights, and put them into a store."),
    "cache": ("crcli.cli.cache:app", "Say what this host keeps of remote stores, or remove it."),
    "doctor": ("crcli.cli.doctor:doctor", "Say what this host is, what it lacks, and how to get it."),
    "plugins": ("crcli.cli.plugins:plugins", "List the plug-ins that are installed here."),
    "demo": ("crcli.cli.demo:demo", "Dump, kill and restore a small agent, to see that it works here."),
}

_PREFIXES = ("run",)
"""Commands that take another command, with options of its own."""

ClickUsageError: Any = typer.BadParameter.__mro__[1]  # typer brings its own click, or imports it: ask it


class LazyCommands(TyperGroup):
    """A group whose commands come from COMMANDS; only the one that is called is imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and build one command; None when there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, function = COMMANDS[cmd_name][0].partition(":")
        found = getattr(import_module(module), function)
        from crcli.cli.options import Command

        if isinstance(found, typer.Typer):  # a command with commands of its own
            for one in found.registered_commands:
                one.cls = Command
            group = typer.main.get_command(found)
            group.name = cmd_name
            return group
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        # What stands behind the first word of a command to run is that command's.
        settings = {"allow_interspersed_args": cmd_name not in _PREFIXES}
        app.command(cmd_name, cls=Command, context_settings=settings)(found)
        return typer.main.get_command(app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table into the help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the first argument names, or say which one may have been meant."""
        name = args[0]
        if name in COMMANDS or name.startswith("-"):
            return super().resolve_command(ctx, args)
        from difflib import get_close_matches

        near = get_close_matches(name, COMMANDS)
        raise UsageError(
            f"there is no command {name!r}",
            hint=f"did you mean `crcli {near[0]}`?" if near else "`crcli --help` lists the commands",
        )


def _show_version(wanted: bool) -> None:
    if wanted:
        from crcli import __version__

        print(f"crcli {__version__}")
        raise typer.Exit


def _app(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", callback=_show_version, is_eager=True
    ),
) -> None:
    """Freeze a running process tree, ship it to a store, and bring it back, here or elsewhere."""


def build_app() -> Any:
    """Return the whole command line as one command."""
    app = typer.Typer(
        cls=LazyCommands,
        add_completion=False,
        rich_markup_mode=None,
        no_args_is_help=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_app)
    return typer.main.get_command(app)


def run(arguments: Sequence[str], as_json: bool) -> int:
    """Run a command line; return its exit code. Raises what the command raises."""
    try:
        app = build_app()
        with app.make_context("crcli", list(arguments)) as context:
            result = app.invoke(context)
        return result if isinstance(result, int) else 0
    except typer.Exit as done:
        return done.exit_code
    except (typer.Abort, ClickUsageError) as error:
        from crcli.ui import errors

        show = errors.show_interrupt if isinstance(error, typer.Abort) else errors.show_usage
        return show(error, as_json)
