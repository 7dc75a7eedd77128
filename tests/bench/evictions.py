"""Jobs below `crcli run` whose machines are taken away, over and over, by every kind of notice.

    python -m tests.bench.evictions [--jobs 100] [--seed 1] [--kinds aws …] [--parallel 1]

Each job is evicted by a kind of notice drawn by lot, at random moments (also before it has begun, and while
it is being restored), until it has ended; its output must be what it writes undisturbed, and every notice of
which a saved job came must have been answered. A failure shows the job and all that was said.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.crcli import ROOT
from tests.support.evictions import EVICTIONS, Eviction
from tests.support.jobs import result_of_steps, steps

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS, PAUSE_S = 100, 0.05
_LONGEST_S = 8.0
"""An eviction comes so late at most: a little later than the job takes."""
_MOST_EVICTIONS = 3
_SAVED, _DONE = 75, 0


@dataclass(frozen=True)
class Told:
    """How one job went: its kind of notice, how often it was saved, and told before it had begun."""

    kind: str
    saved: int
    not_begun: int


class Wrong(Exception):
    """A job that did not come to what it must."""


def main() -> int:
    """Run all jobs; 1 if any came to something else."""
    options = _parse()
    if os.getuid() != 0:
        sys.exit("needs root")
    expected = result_of_steps(STEPS)
    folder = Path(tempfile.mkdtemp(prefix="crcli-evictions-", dir=options.folder))
    told: list[Told] = []
    wrong: list[str] = []

    def one(number: int) -> None:
        draw = random.Random(f"{options.seed}-{number}")
        kind = draw.choice(options.kinds)
        place = folder / str(number)
        place.mkdir()
        try:
            told.append(_job(EVICTIONS[kind](place), kind, draw, place, expected))
            shutil.rmtree(place)
        except (Wrong, AssertionError) as error:
            wrong.append(f"job {number} ({kind}): {error}\n{_said(place)}")
            print(wrong[-1], file=sys.stderr, flush=True)

    with ThreadPoolExecutor(options.parallel) as threads:
        list(threads.map(one, range(options.jobs)))
    print(as_text(told, len(wrong)))
    if wrong:
        print(f"what they left is in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return int(bool(wrong))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.evictions", description=__doc__)
    parser.add_argument("--jobs", type=int, default=100, help="how many (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="of the lots (default: 1)")
    parser.add_argument("--kinds", nargs="+", default=[*EVICTIONS], choices=[*EVICTIONS], help="default: all")
    parser.add_argument("--parallel", type=int, default=1, help="jobs at once (default: 1)")
    parser.add_argument("--folder", help="where everything is (default: TMPDIR)")
    return parser.parse_args()


def _job(machine: Eviction, kind: str, draw: random.Random, place: Path, expected: str) -> Told:
    """Run one job to its end."""
    saved = not_begun = 0
    output = place / "out"
    with machine.there():
        for attempt in range(1, 100):
            is_evicted = attempt <= _MOST_EVICTIONS
            code = _attempt(machine, draw.uniform(0, _LONGEST_S) if is_evicted else None, place)
            if code == _DONE:
                if (found := output.read_text()) != expected:
                    raise Wrong(f"wrote something else: {found}")
                return Told(kind, saved, not_begun)
            if not is_evicted:
                raise Wrong(f"attempt {attempt} ended with {code}")
            if code == _SAVED and "is durable" in (place / "err").read_text():
                machine.check_answer()
                saved += 1
            elif _has_begun(place):
                raise Wrong(f"attempt {attempt} ended with {code}")
            else:  # a signal before anybody listens ends crcli itself
                not_begun += 1
            machine.another()
    raise Wrong("has no end")


def _attempt(machine: Eviction, evict_after_s: float | None, place: Path) -> int:
    """Start the job, have its machine taken away after that time, and return how it ended."""
    command = [sys.executable, "-m", "crcli", "run", "--name", "job", "--store", f"file://{place}/store"]
    command += ["--notice", machine.spec, *steps(STEPS, PAUSE_S)]
    places = {"CRCLI_LOG_DIR": "logs", "CRCLI_RATES": "rates.json", "CRCLI_STATE_DIR": "state"}
    environ = {**os.environ, **{name: str(place / one) for name, one in places.items()}, **machine.environ}
    with (place / "out").open("ab") as out, (place / "err").open("wb") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        try:
            if evict_after_s is not None:
                try:
                    return process.wait(evict_after_s)
                except subprocess.TimeoutExpired:
                    machine.take_away(process.pid)
            return process.wait(120)
        except subprocess.TimeoutExpired as error:
            raise Wrong("hangs") from error
        finally:
            process.kill()
            process.wait()


def _has_begun(place: Path) -> bool:
    """Whether the last attempt came so far that there was a job."""
    said = (place / "err").read_text()
    return "crcli: started" in said or "crcli: restored" in said


def _said(place: Path) -> str:
    return (place / "err").read_text(errors="replace")[-4000:] if (place / "err").exists() else ""


def as_text(told: Sequence[Told], wrong: int) -> str:
    """The counts for people."""
    lines = []
    for kind in sorted({one.kind for one in told}):
        jobs = [one for one in told if one.kind == kind]
        saved, not_begun = sum(one.saved for one in jobs), sum(one.not_begun for one in jobs)
        lines.append(f"{kind:<12}{len(jobs):>5} jobs, saved {saved} times, told {not_begun} times too early")
    lines.append(f"{len(told)} jobs came to the result of an undisturbed one, {wrong} did not")
    return "\n".join(lines)


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
