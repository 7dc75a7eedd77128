"""From what `--notice` says to the sources that watch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from crcli.errors import CrcliError, UsageError
from crcli.notice.base import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crcli.notice.base import Source, SourceKind, Surroundings
    from crcli.plugins import Hooks

AUTO, NONE = "auto", "none"


def known_kinds(hooks: Hooks | None = None) -> list[SourceKind]:
    """Every kind of source, ours first, then those of the plug-ins that are installed here."""
    from crcli.plugins import load_hooks

    kinds: list[SourceKind] = []

    def register(kind: SourceKind) -> None:
        names = {AUTO, NONE}.union(*(one.names for one in kinds))
        if twice := names.intersection(kind.names):
            raise ValueError(f"there is a notice source {', '.join(sorted(twice))} already")
        kinds.append(kind)

    (load_hooks() if hooks is None else hooks).call("notice_sources", register=register)
    return kinds


def choose(specs: Sequence[str], surroundings: Surroundings, hooks: Hooks | None = None) -> list[Source]:
    """Make the sources that the specs name, each once.

    `auto`, which no specs at all mean too, stands for those that apply here; one that cannot be made is
    reported then. A spec that makes no sense raises UsageError.
    """
    named = list(dict.fromkeys(specs)) or [AUTO]
    if NONE in named:
        if named != [NONE]:
            raise UsageError("--notice none goes with no other notice")
        return []
    kinds = known_kinds(hooks)
    by_name = {name: kind for kind in kinds for name in kind.names}
    heads = {spec.partition(":")[0] for spec in named}
    sources: list[Source] = []
    for spec in named:
        name, _, argument = spec.partition(":")
        if spec == AUTO:
            for kind in kinds:
                if kind.names[0] not in heads:
                    sources += _if_it_applies(kind, surroundings)
        elif name in by_name:
            sources += _make(by_name[name], name, argument, surroundings)
        else:
            raise UsageError(
                f"there is no notice source {name!r}",
                hint=f"there are {', '.join([AUTO, *by_name, NONE])}; `crcli plugins` says what each sees",
            )
    return sources


def _if_it_applies(kind: SourceKind, surroundings: Surroundings) -> Sequence[Source]:
    """The sources of a kind if it applies here; nothing that goes wrong here ends a job."""
    try:
        return kind.make(kind.names[0], "", surroundings) if kind.applies(surroundings) else ()
    except Exception as error:
        what = f"cannot be used: {error}"
        surroundings.report(note("notice-failed", kind.names[0], what, "goes on without it"))
        return ()


def _make(kind: SourceKind, name: str, argument: str, surroundings: Surroundings) -> Sequence[Source]:
    if argument and not kind.form:
        raise UsageError(f"the notice source {name} takes no argument, {argument!r}")
    try:
        return kind.make(name, argument, surroundings)
    except CrcliError:
        raise
    except Exception as error:  # of a plug-in's
        raise UsageError(f"the notice source {name} cannot be used: {error}") from error
