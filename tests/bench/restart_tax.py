"""The restart tax: what evictions make a job cost, with and without `crcli run`.

    python -m tests.bench.restart_tax [--jobs 10] [--steps 100] [--rates 10 30 50] [--parallel 1] [--out]

A job is tests/bench/step_agent.py. Each time that it starts it is evicted with a probability of 10, 30 or
50 %, at a moment that is equally likely anywhere in what is left of it; both ways draw the same lots. To be
evicted is to get SIGTERM, and SIGKILL after the grace time. Without crcli the job begins anew, with it the
same command is started again. Its cost is the time that a machine was taken for it, from each start to
each end, in units of what the same job costs undisturbed and without crcli, which runs beside the others:
what slows the machine down slows down all. Every job's result must be the undisturbed one's.

Without crcli a job costs 1 + r / (1 - r) / 2 at the rate r, since half of every lost attempt is lost on the
average. An eviction is drawn for each start, also for one that has little left to do: with crcli, which
starts in the middle, that is more evictions per hour than without.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from tests.bench.__main__ import RESULTS
from tests.bench.commands import BenchError
from tests.bench.plot import Curve, plot
from tests.support.crcli import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROGRAM = Path(__file__).parent / "step_agent.py"
SAVED = 75
GOAL = 1.05
GRACE_S = 30.0
_LIMIT = 20.0
"""An attempt that takes this many times the undisturbed job's time hangs."""


@dataclass(frozen=True)
class Agent:
    """What a job does: its steps, how long each waits, how much memory each adds."""

    steps: int
    wait_s: float
    mebibytes: int

    def command(self, folder: Path) -> list[str]:
        """How it is started."""
        arguments = [str(self.steps), str(self.wait_s), str(self.mebibytes), str(folder)]
        return [sys.executable, str(PROGRAM), *arguments]

    def left(self, folder: Path) -> float:
        """Which part of the job is still to be done, from 0 to 1."""
        try:
            done = (folder / "progress").read_text().count("\n")
        except FileNotFoundError:
            done = 0
        return 1 - min(done, self.steps) / self.steps


@dataclass(frozen=True)
class Attempt:
    """One start of a job: how long it took, and whether it was evicted."""

    wall_s: float
    evicted: bool
    code: int
    after_notice_s: float = 0.0
    """How long it still held its machine once it was evicted."""


@dataclass
class Job:
    """A job, all of its attempts, and what came out."""

    attempts: list[Attempt] = field(default_factory=list)
    result: str = ""

    @property
    def wall_s(self) -> float:
        """For how long a machine was taken."""
        return sum(attempt.wall_s for attempt in self.attempts)

    @property
    def evictions(self) -> int:
        """How often it was evicted."""
        return sum(attempt.evicted for attempt in self.attempts)


def lots(rate: float, seed: object) -> Iterator[float | None]:
    """For each start of a job: where in what is left of it it is evicted (0 to 1), or None."""
    draw = random.Random(repr((rate, seed)))
    while True:
        is_evicted, where = draw.random() < rate, draw.random()
        yield where if is_evicted else None


def expected_without(rate: float) -> float:
    """What a job costs that begins anew each time, in units of an undisturbed one."""
    return 1 + rate / (1 - rate) / 2


@dataclass
class Bench:
    """Where jobs run, and how long one takes undisturbed."""

    agent: Agent
    folder: Path
    store: str
    options: Sequence[str] = ()
    undisturbed_s: float = 0.0
    result: str = ""

    def learn(self) -> None:
        """Run the job plainly once: what it comes to, and how long that takes (evictions fall into it)."""
        job = self.run("first", iter([None]), with_crcli=False)
        self.undisturbed_s, self.result = job.wall_s, job.result

    def run(self, name: str, evictions: Iterator[float | None], *, with_crcli: bool) -> Job:
        """Run one job to its end, however often it is evicted; raise BenchError where it ends otherwise."""
        folder = self.folder / name
        folder.mkdir()
        job = Job()
        while True:
            if not with_crcli:
                (folder / "progress").unlink(missing_ok=True)
            where = next(evictions)
            at_s = None if where is None else where * self.agent.left(folder) * self.undisturbed_s
            command = self.agent.command(folder)
            if with_crcli:
                command = self._below_crcli(name, command)
            attempt = self._attempt(command, at_s, folder / "output")
            job.attempts.append(attempt)
            if attempt.code == 0:  # also when it was quicker than its eviction
                break
            if attempt.code != (SAVED if with_crcli else -signal.SIGTERM) or not attempt.evicted:
                said = (folder / "output").read_text(errors="replace")[-2000:]
                raise BenchError(f"{name} ended with {attempt.code}: {said}")
        job.result = (folder / "result").read_text()
        if self.result and job.result != self.result:
            raise BenchError(f"{name} came to another result than undisturbed")
        return job

    def _below_crcli(self, name: str, command: list[str]) -> list[str]:
        crcli = [sys.executable, "-m", "crcli", "run", "--name", name, "--store", self.store]
        return [*crcli, "--notice", "sigterm", *self.options, "--", *command]

    def _attempt(self, command: Sequence[str], evict_at_s: float | None, output: Path) -> Attempt:
        """Start a command, evict it at that time, and wait for its end."""
        limit_s = _LIMIT * max(self.undisturbed_s, self.agent.steps * (self.agent.wait_s + 1))
        places = {"CRCLI_STATE_DIR": "state", "CRCLI_LOG_DIR": "logs", "CRCLI_RATES": "rates.json"}
        environ = {name: str(self.folder / place) for name, place in places.items()}
        environ |= {**os.environ, **environ, "CRCLI_GRACE": str(GRACE_S)}
        with open(output, "ab") as file:
            began = time.monotonic()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            try:
                return self._evicted(process, began, limit_s, evict_at_s)
            finally:
                _kill_group(process)

    def _evicted(
        self, process: subprocess.Popen[bytes], began: float, limit_s: float, evict_at_s: float | None
    ) -> Attempt:
        """Wait for a process, and evict it at that time after it began."""
        try:
            code = process.wait(limit_s if evict_at_s is None else evict_at_s)
            return Attempt(time.monotonic() - began, False, code)
        except subprocess.TimeoutExpired as error:
            if evict_at_s is None:
                raise BenchError(f"an attempt hangs: {error}") from error
        told = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        now = time.monotonic()
        return Attempt(now - began, True, code, now - told)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Take the machine away: nothing that was started on it is left."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@dataclass(frozen=True)
class Row:
    """What one rate of evictions made jobs cost."""

    rate: float
    undisturbed_s: float
    evictions_without: int
    evictions_with: int
    expected: float
    without: float
    with_crcli: float
    after_notice_s: float
    same_results: int


WAYS = ("undisturbed", "without", "with")


def measure(bench: Bench, rate: float, jobs: int, parallel: int) -> tuple[Row, dict[str, list[Job]]]:
    """Run so many jobs each way at one rate."""

    def one(task: tuple[int, str]) -> Job:
        number, way = task
        evictions = iter([None]) if way == "undisturbed" else lots(rate, number)
        return bench.run(f"tax-{rate * 100:.0f}-{number}-{way}", evictions, with_crcli=way == "with")

    with ThreadPoolExecutor(parallel) as threads:
        done = list(threads.map(one, [(number, way) for number in range(jobs) for way in WAYS]))
    found = {way: done[place :: len(WAYS)] for place, way in enumerate(WAYS)}
    return summarise(rate, found, bench.result), found


def summarise(rate: float, found: dict[str, list[Job]], result: str) -> Row:
    """The figures of one rate."""
    undisturbed_s, *walls_s = (mean(job.wall_s for job in found[way]) for way in WAYS)
    without, with_crcli = (wall_s / undisturbed_s for wall_s in walls_s)
    saves = [one.after_notice_s for job in found["with"] for one in job.attempts if one.code == SAVED]
    return Row(
        rate=rate,
        undisturbed_s=undisturbed_s,
        evictions_without=sum(job.evictions for job in found["without"]),
        evictions_with=sum(job.evictions for job in found["with"]),
        expected=expected_without(rate),
        without=without,
        with_crcli=with_crcli,
        after_notice_s=median(saves) if saves else 0.0,
        same_results=sum(job.result == result for jobs in found.values() for job in jobs),
    )


def as_table(rows: Sequence[Row], jobs: int) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| Evicted, of starts | without crcli (expected) | with `crcli run` "
        "| evictions, without and with | saved in (median) |",
        "|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row.rate:.0%} | {row.without:.2f} ({row.expected:.2f}) | {row.with_crcli:.3f} "
        f"| {row.evictions_without}, {row.evictions_with} | {row.after_notice_s:.2f} s |"
        for row in rows
    ]
    same, undisturbed_s = sum(row.same_results for row in rows), mean(row.undisturbed_s for row in rows)
    lines.append(
        f"\nCost of a job in units of an undisturbed one ({undisturbed_s:.0f} s), means of {jobs} jobs; "
        f"{same} of {len(WAYS) * jobs * len(rows)} results are the undisturbed one's."
    )
    return "\n".join(lines)


def as_plot(rows: Sequence[Row]) -> str:
    """The same as an SVG."""
    percent = [row.rate * 100 for row in rows]
    curves = [
        Curve("without crcli", [row.without for row in rows], "#c0392b"),
        Curve("with crcli run", [row.with_crcli for row in rows], "#1f6fb2"),
    ]
    expected = Curve("expected without", [row.expected for row in rows], "#c0392b", dashed=True)
    return plot(
        percent,
        [*curves, expected],
        title="What evictions make a job cost",
        x="evicted, percent of starts",
        y="cost, undisturbed = 1",
    )


def main() -> int:
    """Measure, print the table, write figures and plot if asked; 1 where the goal was missed."""
    options = _parse()
    if os.getuid() != 0:
        sys.exit("needs root")
    folder = Path(tempfile.mkdtemp(prefix="crcli-tax-", dir=options.folder))

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rows, details = [], {}
    try:
        agent = Agent(options.steps, options.wait, options.mebibytes)
        bench = Bench(agent, folder, options.store or f"file://{folder}/store", options.run_option)
        bench.learn()
        say(f"undisturbed: {bench.undisturbed_s:.1f} s, {options.steps * options.mebibytes} MiB at the end")
        for percent in options.rates:
            row, found = measure(bench, percent / 100, options.jobs, options.parallel)
            say(f"{percent} %: {row}")
            rows.append(row)
            details[f"{percent}"] = {way: [asdict(job) for job in jobs] for way, jobs in found.items()}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(as_table(rows, options.jobs))
    if options.out:
        print(f"\nwritten to {_write(options, rows, details)}")
    return int(any(row.with_crcli > GOAL for row in rows))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.restart_tax", description=__doc__)
    parser.add_argument("--jobs", type=int, default=10, help="of each kind (default: 10)")
    parser.add_argument("--steps", type=int, default=100, help="of an agent (default: 100)")
    parser.add_argument("--wait", type=float, default=0.8, help="seconds a step waits (default: 0.8)")
    parser.add_argument("--mebibytes", type=int, default=2, help="that a step adds (default: 2)")
    parser.add_argument("--rates", type=int, nargs="+", default=[10, 30, 50], help="in percent")
    parser.add_argument("--parallel", type=int, default=1, help="jobs at once (default: 1)")
    parser.add_argument("--store", help="default: a folder")
    parser.add_argument("--run-option", action="append", default=[], help="one more option of crcli run")
    parser.add_argument("--folder", help="where everything is (default: TMPDIR)")
    parser.add_argument("--out", action="store_true", help=f"write figures and plot into {RESULTS}")
    return parser.parse_args()


def _write(options: argparse.Namespace, rows: Sequence[Row], details: dict[str, Any]) -> Path:
    now = datetime.now(UTC)
    names = ("jobs", "steps", "wait", "mebibytes", "parallel", "run_option")
    text = {
        "taken": now.isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "kernel": os.uname().release},
        "options": {name: getattr(options, name) for name in names},
        "rows": [asdict(row) for row in rows],
        "jobs": details,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"restart-tax-{now:%Y%m%d}.json"
    path.write_text(json.dumps(text, indent=1) + "\n")
    path.with_suffix(".svg").write_text(as_plot(rows))
    return path


if __name__ == "__main__":
    sys.exit(main())
