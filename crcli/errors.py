"""One tree of errors. Each says what happened, what to do next, and what became of the tree.

The exit codes are a contract (DESIGN.md): a scheduler decides by them. `python -m crcli.errors` prints the
table that stands in README; a test compares the two.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from crcli.cause import Cause
    from crcli.findings import Finding


class TreeState(StrEnum):
    """What became of the process tree that a command was asked to work on."""

    UNTOUCHED = "untouched"
    RUNNING = "running"
    STOPPED = "stopped"
    DEAD = "dead"


EXIT_CODES: dict[int, tuple[str, str]] = {
    0: ("done", "nothing"),
    1: ("crcli itself failed (a bug)", "report it, with --json output and the log that it names"),
    2: ("wrong usage", "correct the command line"),
    10: ("preflight refused; the tree was not touched", "act on the finding, or choose another pid"),
    11: ("dump failed; the tree is running", "try again later, or act on the hint"),
    12: ("dump failed; the tree is not running", "read the hint: it says what state the tree is in"),
    20: ("guard refused; nothing was started", "restore on a host that fits, or act on the finding"),
    21: ("restore failed; nothing was left running", "try again, here or elsewhere"),
    22: ("the image is damaged or not what it claims", "use an older image; `crcli verify` lists the damage"),
    23: (
        "the name is claimed by another holder; nothing was started",
        "wait until it has ended; `crcli lease ls` says who it is",
    ),
    24: ("the image is of another job; nothing was started", "choose another name, or start afresh"),
    30: ("store unreachable or refused", "check the URL, credentials and network, then try again"),
    31: ("no such image, or no such object", "`crcli ls` shows what the store holds"),
    40: ("this host lacks something", "`crcli doctor` says what, and how to get it"),
    75: ("`run` and `watch`: the job is saved, or was not started here", "start the same command again"),
}


WORST_FIRST = (12, 1, 2, 40, 31, 30, 11, 10)
"""What a dump can end with, the worst first: a tree that does not run, a bug, what stands in the way of every
tree, then what only one of them has."""


def worst(codes: Iterable[int]) -> int:
    """The exit code for several trees, each of which has one: 0 when all are done, else the worst."""
    failed = [code for code in codes if code]
    return min(failed, key=WORST_FIRST.index) if failed else 0


def exit_code_table() -> str:
    """The exit codes as a Markdown table, and the order among them, without a last newline."""
    order = ", ".join(map(str, WORST_FIRST))
    sentence = (
        f"A dump of several trees ends with 0 when all are done, else with the first of {order} that one has."
    )
    rows = [("Exit", "What it means", "What to do next"), ("---:", "---", "---")]
    rows += [(str(code), meaning, remedy) for code, (meaning, remedy) in EXIT_CODES.items()]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", sentence])


class CrcliError(Exception):
    """Base of every error that crcli reports on purpose.

    `message` says what happened in one sentence, `hint` what the user can do next (may be empty), `state`
    what became of the tree, `findings` the evidence, `cause` why CRIU failed, where it is CRIU that did.
    """

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "internal"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "",
        state: TreeState = TreeState.UNTOUCHED,
        findings: Sequence[Finding] = (),
        cause: Cause | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.state = state
        self.findings = tuple(findings)
        self.cause = cause


class UsageError(CrcliError):
    """The command line asks for something that makes no sense."""

    exit_code = 2
    code = "usage"


class ImagePinned(UsageError):
    """An image that is to stay was to be removed."""

    code = "image-pinned"


class PreflightRefused(CrcliError):
    """The tree cannot be dumped as it is; it was not touched."""

    exit_code = 10
    code = "preflight-refused"


class DumpFailed(CrcliError):
    """The dump did not become an image; `state` says whether the tree runs (exit 11) or not (exit 12)."""

    code = "dump-failed"

    @property
    def exit_code(self) -> int:  # type: ignore[override]  # the one error whose code depends on the tree
        return 11 if self.state in (TreeState.RUNNING, TreeState.UNTOUCHED) else 12


class TooLate(DumpFailed):
    """The deadline is out of reach by the forecast; nothing was begun."""

    code = "too-late"


class GuardRefused(CrcliError):
    """This host cannot take the image; nothing was started."""

    exit_code = 20
    code = "guard-refused"


class RestoreFailed(CrcliError):
    """The restore was begun and undone; nothing of it is left running. `image` is NAME@ID, where known."""

    exit_code = 21
    code = "restore-failed"
    image: str = ""


class JobMismatch(CrcliError):
    """The image of that name is of another command, configuration or weights; nothing was started."""

    exit_code = 24
    code = "job-mismatch"


class TryAgain(CrcliError):
    """The job was not started here, and its image stands: the same command is to be started again."""

    exit_code = 75
    code = "try-again"


class ImageDamaged(CrcliError):
    """An object of the image is missing, unreadable, or not what its hash says."""

    exit_code = 22
    code = "image-damaged"


class ImageTooNew(ImageDamaged):
    """An object is of a format that a later crcli writes: it may be whole, and cannot be read here."""

    code = "image-too-new"


class NameClaimed(CrcliError):
    """Somebody else holds the name, and lives as far as can be seen; nothing was started.

    `claim` is what the store says of it (`Claim.as_json`).
    """

    exit_code = 23
    code = "name-claimed"

    def __init__(self, message: str, *, hint: str = "", claim: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, hint=hint)
        self.claim = dict(claim or {})


class StoreError(CrcliError):
    """The store cannot be reached, or refused a request."""

    exit_code = 30
    code = "store"


class StoreUnreachable(StoreError):
    """No answer came from the store: it has neither done nor refused what was asked."""


class ObjectExists(StoreError):
    """A conditional put found that the object is there already."""

    code = "object-exists"


class NotFound(StoreError):
    """The store answered, and has no such object or image."""

    exit_code = 31
    code = "not-found"


class HostLacks(CrcliError):
    """Something that crcli needs (CRIU, a capability, a kernel feature) is not here."""

    exit_code = 40
    code = "host-lacks"


if __name__ == "__main__":
    print(exit_code_table())
