"""The hooks: what a plug-in may implement, when each is called, and what it is given.

A plug-in is a module (or an object) that an installed package names in the entry-point group `crcli.plugins`:

    [project.entry-points."crcli.plugins"]
    journal = "crcli_journal"

It marks functions named as below with `crcli.plugins.hookimpl`; each takes as many of the arguments as it
needs, by name. What is promised:

- every `crcli_dump_before_freeze` is followed by exactly one `crcli_dump_finished` or `crcli_dump_failed`,
  every `crcli_restore_before` by one `crcli_restore_finished` or `crcli_restore_failed`;
- the two `before` hooks may refuse by raising a `crcli.errors.CrcliError`, which ends the command with that
  error's exit code and nothing touched. Anything else that a hook raises becomes a finding of the command's
  report (`plugin-failed`), and the command goes on;
- arguments only ever gain fields, and hooks only ever gain arguments;
- hooks run in crcli's own process and in its main thread, one plug-in after another in the order of their
  names. For as long as `crcli_dump_frozen` or `crcli_restore_frozen` takes, the tree stands still.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from crcli.errors import CrcliError, TreeState

if TYPE_CHECKING:
    from collections.abc import Callable

    from crcli.notice.base import SourceKind

# What hooks are given are dataclasses, crcli's own records structs (see pyproject.toml): a plug-in takes them
# apart with what it finds in the standard library.


@dataclass(frozen=True)
class DumpTarget:
    """A tree that is to be dumped. `image` is NAME@ID, `outcome` is killed, running or stopped.

    Before the freeze ID can be an earlier one, where the clock is behind that of an image's host.
    """

    pid: int
    processes: tuple[int, ...]
    image: str
    store: str
    outcome: str


@dataclass(frozen=True)
class RestoreTarget:
    """An image that is to be restored; `meta` holds the facts of its manifest (FORMAT.md, META).

    `host_pids` maps the tree's pids, as it sees them itself, to those that they have here, the root first. It
    is empty before there are any.
    """

    image: str
    store: str
    meta: dict[str, Any] = field(default_factory=dict)
    host_pids: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """How a command failed: what `--json` says of an error, and its exit code."""

    code: str
    message: str
    hint: str
    state: str
    exit_code: int


def failure_of(error: BaseException) -> Failure:
    """Describe an error for the failure hooks."""
    if isinstance(error, CrcliError):
        return Failure(error.code, error.message, error.hint, error.state.value, error.exit_code)
    return Failure("internal", f"{type(error).__name__}: {error}", "", TreeState.RUNNING.value, 1)


def crcli_dump_before_freeze(target: DumpTarget) -> None:
    """The tree was looked at and can be dumped; nothing was touched. The place to quiesce what is outside.

    A tree that is left running and has outrun its trial is dumped again: `crcli_dump_failed` is followed by
    another call of this.
    """


def crcli_dump_frozen(target: DumpTarget) -> None:
    """The tree stands frozen, and files are captured next. Be quick.

    The memory of a tree that runs on was taken. That of one that is to be killed or stopped may be read from
    now on still, where it is.
    """


def crcli_dump_finished(target: DumpTarget, report: dict[str, Any]) -> None:
    """The image is durable and the tree was let go as asked; `report` is what `dump --json` prints."""


def crcli_dump_failed(target: DumpTarget, failure: Failure) -> None:
    """The dump failed; `failure.state` says what the tree does."""


def crcli_restore_before(target: RestoreTarget) -> None:
    """The manifest was checked and this machine can take the image; nothing was started.

    Whether its files are here and its ports and pids are free is looked at next: the place to see to that.
    """


def crcli_restore_frozen(target: RestoreTarget) -> None:
    """The tree is whole again, here, and runs as soon as this returns. It can still fail. Be quick."""


def crcli_restore_finished(target: RestoreTarget, report: dict[str, Any]) -> None:
    """The tree runs; `report` is what `restore --json` prints."""


def crcli_restore_failed(target: RestoreTarget, failure: Failure) -> None:
    """The restore failed, and nothing of it is left running."""


def crcli_notice_sources(register: Callable[[SourceKind], None]) -> None:
    """Call `register` for each kind of notice source that the plug-in brings (crcli/notice/base.py).

    Called by `crcli run` and `crcli watch` before anything begins, and by `crcli plugins`. A kind that takes
    a name which is in use already fails there. Its sources run in threads of their own.
    """
