"""What became of a tree whose dump failed: what can still be set right, and the error that says it."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from crcli.criu.options import LOG_NAME
from crcli.criu.rescue import free_sockets, remove_link_remaps, remove_tables
from crcli.criu.rpc import CriuDied, CriuTimeout
from crcli.criu.standby import AfterDeath
from crcli.errors import CrcliError, DumpFailed, PreflightRefused, TreeState
from crcli.findings import note
from crcli.pipeline.interrupts import Interrupted
from crcli.pipeline.logs import explain_failure
from crcli.pipeline.watch import tree_state
from crcli.process.crash import Fates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crcli.criu.workspace import Workspace
    from crcli.pipeline.stages import DumpOptions, DumpReport
    from crcli.process.identity import ProcessId
    from crcli.process.tree import Tree


class Outrun(DumpFailed):
    """The tree was not as it had been when it was looked at, and runs on: the dump is made again, carefully.
    Nothing was published."""

    def __init__(self, name: str, failure: DumpFailed, why: str, report: DumpReport, root: ProcessId) -> None:
        super().__init__(failure.message, hint=failure.hint, state=failure.state, cause=failure.cause)
        self.frozen_ms = report.frozen_ms
        self.told = frozenset(finding.message for finding in report.findings)
        self.root = root
        self.finding = note(
            name,
            f"{failure.message}, {why}",
            {"frozen_ms": report.frozen_ms},
            "dumps it again, with packets held back, and frozen until reads, writes and the trial are over",
        )

    def alone(self) -> Outrun:
        """Itself, without what led to it, which holds all that the first dump had."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)


class CriuKilled(BaseException):
    """CRIU was killed while it waited for us. Not to be handled on the way up, as an interrupt is not."""


CRIU_GONE = (CriuDied, CriuTimeout, CriuKilled)
"""What is raised where CRIU may be there no more, to let go of the tree."""


@contextmanager
def failing_at_its_deadline(tree: Tree) -> Iterator[None]:
    """A signal before the freeze ends the command; a deadline that passes then is a dump that failed."""
    try:
        yield
    except Interrupted as error:
        if error.number != signal.SIGALRM:
            raise
        raise DumpFailed(
            f"the dump was {error}, before the tree was frozen",
            hint="nothing was lost; give it more time",
            state=tree_state(tree),
        ) from error


def set_right(tree: Tree, images: Workspace, network: int | None, *, is_durable: bool) -> AfterDeath:
    """CRIU and the standby are both gone, which held this tree: set right what can still be set right. It
    was to be killed if its image `is_durable`."""
    members = tree.identities
    if is_durable and not all(member.alive() for member in members):
        for member in members:
            member.send(signal.SIGKILL)
        return AfterDeath(finished=True, held=())
    if LOG_NAME not in images.names():  # it ended before it came to the tree: nobody can have died of it
        return AfterDeath(finished=False, held=())
    fates = Fates(members)
    pids = [process.pid for process in tree.living]
    free_sockets(pids)
    remove_link_remaps(pids)
    remove_tables(images.read(LOG_NAME), network)
    return AfterDeath(finished=False, held=tuple(members), lost=tuple(fates.crashed()))


def died_with_criu(tree: Tree, after: AfterDeath) -> str:
    """Name a process that did not survive CRIU's death; empty when all did."""
    labels = {process.pid: process.label for process in tree}
    return next((labels.get(one.pid, str(one.pid)) for one in after.lost), "")


def failure(
    error: BaseException,
    state: TreeState,
    images: Workspace,
    *,
    durable: str = "",
    is_holding: bool = False,
    victims: str = "",
) -> BaseException:
    """The error to raise for one that ended a dump, saying that the tree is in this `state` now.

    `durable` names the image if it came to be, `is_holding` says whether all pages were taken by then, and
    `victims` who died with CRIU.
    """
    if durable:
        return DumpFailed(
            f"the image {durable} is durable, but the dump did not end as asked: {error}",
            hint="the tree still runs beside its image" if state == TreeState.RUNNING else "",
            state=state,
        )
    if isinstance(error, Interrupted):
        return DumpFailed(f"the dump was {error}", hint="nothing was lost; run it again", state=state)
    if isinstance(error, CriuDied | CriuKilled) and victims:
        return DumpFailed(
            f"CRIU was killed while its code ran inside {victims}, which died of it",
            hint="this tree is not whole any more: end it and start it again",
            state=TreeState.DEAD,
        )
    if isinstance(error, CriuDied | CriuKilled):
        return explained(images, "CRIU died during the dump", state)
    if isinstance(error, CriuTimeout):
        return explained(images, "CRIU took too long", state)
    if isinstance(error, PreflightRefused) and is_holding:
        return DumpFailed(f"while the tree stood still, {error.message}", hint=error.hint, state=state)
    if isinstance(error, CrcliError):
        if not isinstance(error, PreflightRefused):
            error.state = state
        return error
    if isinstance(error, OSError):
        return DumpFailed(f"the dump failed: {error}", state=state)
    error.state = state  # type: ignore[attr-defined]  # a bug of ours: what became of the tree counts
    return error


def lost(options: DumpOptions, state: TreeState) -> DumpFailed:
    """The error of a dump whose own process was killed: CRIU lets go of a tree whose image is not durable."""
    return DumpFailed(
        f"the process of crcli that dumped {options.pid} was killed",
        hint=f"`crcli ls {options.name}` says whether its image became durable; else run it again",
        state=state,
    )


def explained(images: Workspace, what: str, state: TreeState) -> DumpFailed:
    """The error for a CRIU that failed, with what its log says of the cause."""
    cause = explain_failure(images, "dump")
    return DumpFailed(f"{what}: {cause.meaning}", hint=cause.remedy, state=state, cause=cause)
