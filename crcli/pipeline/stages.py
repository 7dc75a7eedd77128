"""The types that the two stories pass from stage to stage, and what they report to whoever watches."""

from __future__ import annotations

import time
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from crcli.errors import worst
from crcli.records import Struct, asdict, field

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from crcli.errors import CrcliError
    from crcli.findings import Finding


class Outcome(StrEnum):
    """What becomes of a tree once its image is durable."""

    KILLED = "killed"
    RUNNING = "running"
    STOPPED = "stopped"


class Stdio(StrEnum):
    """Where a restored tree's terminal and its pipes to processes that are not here lead."""

    LOG = "log"
    INHERIT = "inherit"
    NULL = "null"


class TcpPolicy(StrEnum):
    """What becomes of established TCP connections on restore."""

    AUTO = "auto"
    KEEP = "keep"
    CLOSE = "close"


class PidNamespace(StrEnum):
    """Which pid namespace a tree is restored into."""

    AUTO = "auto"
    HOST = "host"
    NEW = "new"


class ChangedFiles(StrEnum):
    """What a restore does about files that travel in the image and stand here with other contents."""

    REFUSE = "refuse"
    IMAGE = "image"
    HOST = "host"


class OnMismatch(StrEnum):
    """What to do about an image of that name which is of another command, configuration or weights."""

    REFUSE = "refuse"
    FRESH = "fresh"


class OnFailure(StrEnum):
    """What to do when an image cannot be restored here."""

    FAIL = "fail"
    COLD = "cold"
    RETRY = "retry"


NOTIFY_WAIT_S = 2.0
"""How long a dump waits for the on_checkpoint callbacks of `crcli.notify` (seconds), by default."""


RESERVE_S = 1.0
"""What a dump on notice keeps back of the time before its deadline, by default (seconds)."""


PRE_COPY_AUTO = -1
"""As many rounds before the freeze as pay, where the kernel allows for any."""


class DumpOptions(Struct, frozen=True):
    """What a user asks of `crcli dump`. `store` is a URL; `weights` are paths and patterns, or "auto".

    `start_time` (clock ticks since boot) says which process of that pid is meant; None: the one that has it.
    `forecast` says whether to look into memory for a forecast first, and to learn from how it came out.
    `pre_copy` is how many rounds copy memory before the freeze, or PRE_COPY_AUTO.
    `job` is what `crcli run` notes of the job in the image (JSON values).
    """

    pid: int
    store: str
    name: str = ""
    start_time: int | None = None
    outcome: Outcome = Outcome.KILLED
    include: tuple[str, ...] = ()
    trial: bool = True
    dry_run: bool = False
    deadline_s: float | None = None
    weights: tuple[str, ...] = ()
    notify_wait_s: float = NOTIFY_WAIT_S
    forecast: bool = True
    pre_copy: int = 0
    endpoint_url: str | None = None
    job: Mapping[str, Any] | None = None


class RestoreOptions(Struct, frozen=True):
    """What a user asks of `crcli restore`. `image` is NAME, NAME@ID or a URL; `store` a URL.

    `weights_map` says where files of weights are here (old and new path, of files or folders);
    `weights_folders` are searched for the others. `ports` maps ports that the image listens on to those that
    it is to listen on here. `root` is the folder that the tree gets as its root, a path without links
    (empty: ours). `signal` is sent to the tree's first process once it runs (0: none).
    `forced` names findings of the guard (guard/names.py) that are not to stop it. With `lazy` the tree runs
    before its memory is here (see pipeline/pager.py). `gpu_map` says which GPU here takes the place of which
    of the image, each by its UUID or index.
    """

    image: str
    store: str
    pid_namespace: PidNamespace = PidNamespace.AUTO
    tcp: TcpPolicy = TcpPolicy.AUTO
    stdio: Stdio = Stdio.LOG
    changed_files: ChangedFiles = ChangedFiles.REFUSE
    weights_map: tuple[tuple[str, str], ...] = ()
    weights_folders: tuple[str, ...] = ()
    ports: Mapping[int, int] = field(default_factory=dict)
    root: str = ""
    signal: int = 0
    forced: tuple[str, ...] = ()
    lazy: bool = False
    gpu_map: tuple[tuple[str, str], ...] = ()
    endpoint_url: str | None = None


class Progress(Protocol):
    """What the pipelines tell while they work; `ui` implements it."""

    def phase(self, name: str) -> None:
        """A new phase began."""
        ...

    def amount(self, done: int, total: int) -> None:
        """Bytes handled so far in this phase, of `total` (0: unknown)."""
        ...

    def finding(self, finding: Finding) -> None:
        """A fact that the user should see."""
        ...


class Silent:
    """Progress that nobody watches."""

    def phase(self, name: str) -> None:
        """See Progress."""

    def amount(self, done: int, total: int) -> None:
        """See Progress."""

    def finding(self, finding: Finding) -> None:
        """See Progress."""


class Stopwatch:
    """Times named phases in milliseconds, and tells a Progress when one begins."""

    def __init__(self, progress: Progress) -> None:
        self.begun = time.monotonic()
        self.phases: dict[str, float] = {}
        self.progress = progress

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; a phase entered twice adds up."""
        self.progress.phase(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - began)

    def again(self) -> Stopwatch:
        """Another, started when this one was, whose phases are still to come."""
        watch = Stopwatch(self.progress)
        watch.begun = self.begun
        return watch

    def add(self, name: str, seconds: float) -> None:
        """Add time to a phase."""
        self.phases[name] = round(self.phases.get(name, 0.0) + seconds * 1000, 2)

    def since_start_ms(self) -> float:
        """Milliseconds since this watch was started."""
        return round((time.monotonic() - self.begun) * 1000, 2)

    def left_s(self, deadline_s: float | None) -> float | None:
        """What is left of a time that counts from the start (seconds); None: it has no end."""
        return None if deadline_s is None else deadline_s - self.since_start_ms() / 1000


class Forecast(Struct, frozen=True):
    """How long a tree will stand still, the bytes that will go to the store, and how long the dump takes.

    Each is what the report of the dump means by the same name.
    """

    frozen_ms: float
    stored_bytes: int
    total_ms: float

    def as_json(self) -> dict[str, float]:
        """The promised JSON object."""
        return asdict(self)


class DumpReport(Struct):
    """What `crcli dump --json` says; sizes in bytes, times in milliseconds.

    `frozen_ms` runs from the freeze to the moment when all of the tree's state had left it, which is what a
    tree that lives on stands still (with the trial, where that has to find it frozen). A tree that is to be
    killed is held longer, until its image is proven and durable: `phases["trial"]` and `phases["hold"]`.
    `forecast` was made before the freeze; None where it could not be.
    """

    image: str
    name: str
    id: str
    store: str
    pid: int
    processes: int
    memory_bytes: int = 0
    zero_bytes: int = 0
    weights_bytes: int = 0
    reused_bytes: int = 0
    stored_bytes: int = 0
    frozen_ms: float = 0.0
    total_ms: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    outcome: str = ""
    forecast: Forecast | None = None
    weights: Sequence[dict[str, Any]] = ()
    """For each file of weights: `path`, `bytes` (its size), `left_out_bytes` of memory that are found in it,
    and `found_bytes` of the file that are found in memory."""
    rounds: Sequence[dict[str, Any]] = ()
    """For each round before the freeze: the `bytes` of memory that it sent, and its `frozen_ms`."""
    pre_copied_bytes: int = 0
    wasted_bytes: int = 0
    """How much of what the rounds sent the image does not use: it was written to again, or given back."""
    gpu: dict[str, Any] | None = None
    """Of a tree that uses GPUs: its CUDA `processes`, their `memory_bytes` on GPUs, and the driver's `states`
    (of each `pid`) at the end."""
    findings: Sequence[Finding] = ()

    def as_json(self) -> dict[str, Any]:
        """The promised JSON object."""
        return {
            **asdict(self),
            "forecast": self.forecast and self.forecast.as_json(),
            "findings": [finding.as_json() for finding in self.findings],
        }


class TreeResult(Struct, frozen=True):
    """What became of one of several trees: the report of its dump, or the error that it ended with."""

    pid: int
    report: DumpReport | None = None
    error: CrcliError | None = None

    @property
    def exit_code(self) -> int:
        """What a dump of this tree alone would have ended with."""
        return self.error.exit_code if self.error is not None else 0


class DumpsReport(Struct, frozen=True):
    """What `crcli dump` of several trees did, in the order in which they were named; time in milliseconds."""

    dumps: tuple[TreeResult, ...]
    total_ms: float

    @property
    def done(self) -> tuple[DumpReport, ...]:
        """The reports of the trees that were dumped."""
        return tuple(one.report for one in self.dumps if one.report is not None)

    @property
    def exit_code(self) -> int:
        """0 when all were dumped, else the worst of their codes."""
        return worst(one.exit_code for one in self.dumps)

    def sums(self) -> dict[str, float]:
        """Over the trees that were dumped: counts, bytes, and how long each stood still."""
        done = self.done
        frozen = sorted(report.frozen_ms for report in done) or [0.0]
        return {
            "trees": len(self.dumps),
            "done": len(done),
            **{name: sum(getattr(report, name) for report in done) for name in _SUMMED},
            "frozen_ms_median": frozen[len(frozen) // 2],
            "frozen_ms_most": frozen[-1],
            "total_ms": self.total_ms,
        }


_SUMMED = ("processes", "memory_bytes", "zero_bytes", "weights_bytes", "reused_bytes", "stored_bytes")


class RestoreReport(Struct):
    """What `crcli restore --json` says; times in milliseconds.

    `pid` is the root's pid as the tree sees it, `host_pid` as this host does. `ready_ms` runs from the
    command's start until the tree runs. After a lazy restore `missing_bytes` of its memory were still to come
    then, and the process `pager` fetches them; both are 0 after an eager one.
    """

    image: str
    id: str
    pid: int
    processes: int
    host_pid: int
    pid_namespace: str
    ready_ms: float = 0.0
    total_ms: float = 0.0
    missing_bytes: int = 0
    pager: int = 0
    phases: dict[str, float] = field(default_factory=dict)
    gpu: dict[str, Any] | None = None
    """Of a tree that uses GPUs: as in a dump's report, and the `map` of GPUs that took another's place."""
    findings: Sequence[Finding] = ()

    def as_json(self) -> dict[str, Any]:
        """The promised JSON object."""
        return {**asdict(self), "findings": [finding.as_json() for finding in self.findings]}
