"""CRIU's own static test programs (zdtm, host flavor), each dumped and restored by crcli without any option.

The source of CRIU is not part of this project: name a folder where it lies unpacked, of the release that
`criu --version` names (`apt-get source criu`). `packages.txt` beside this file lists what compiling it takes.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from crcli import kernel
from tests.support.crcli import ROOT, end, tree_of
from tests.zdtm.leftovers import Before, have_only, hierarchies, suite_cgroups
from tests.zdtm.suite import Case, Reasons, build, cases

Outcome: TypeAlias = dict[str, Any]
"""Of one case: its name, status (PASS FAIL XFAIL XPASS NOSTART SKIP), the reason, findings, seconds."""

LIMIT_S = 400.0
"""How long one case may take, all in all."""

BAD = ("FAIL", "XPASS")


def main() -> int:
    """Run the cases, print what became of them; 1 when one failed."""
    options = _parse()
    if os.getuid() != 0:
        sys.exit("needs root")
    source = options.source.resolve()
    if not _alone_in(source):
        sys.exit(f"another run is at work in {source}")
    if options.build:
        build(source)
    kernel.become_subreaper()
    began = time.monotonic()
    found = cases(source)
    if unknown := set(options.only or ()) - {case.name for case in found}:
        sys.exit(f"no such program, or not compiled (--build): {', '.join(sorted(unknown))}")
    chosen = [case for case in found if not options.only or case.name in options.only]
    before = Before(source)
    with suite_cgroups():
        outcomes = _all(chosen, source, options)
    before.restore()
    _show(outcomes, time.monotonic() - began)
    if options.out:
        options.out.write_text(json.dumps(outcomes, indent=1) + "\n")
    return int(any(outcome["status"] == "FAIL" for outcome in outcomes))


def _alone_in(source: Path) -> bool:
    """Whether no other run works in this source: each removes the files that it did not find there."""
    folder = os.open(source, os.O_RDONLY | os.O_CLOEXEC)  # held, and the lock with it, until we end
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zdtm", description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="CRIU's source, unpacked")
    parser.add_argument("--build", action="store_true", help="compile the programs first")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these programs only")
    parser.add_argument("--jobs", type=int, default=1, help="so many at a time (default: 1)")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--raw", action="store_true", help="CRIU itself with fixed options instead of crcli")
    way.add_argument("--lazy", action="store_true", help="restore lazily")
    way.add_argument("--again", action="store_true", help="dump with --leave-running first, then once more")
    parser.add_argument("--out", type=Path, help="write what became of each into this JSON file")
    parser.add_argument("--keep", type=Path, help="keep logs, images and stores of failures in this folder")
    return parser.parse_args()


def _all(chosen: list[Case], source: Path, options: argparse.Namespace) -> list[Outcome]:
    """Run cases side by side, and after them those that want to be alone."""
    reasons = Reasons()
    outcomes = [_outcome(case, "SKIP", reason) for case in chosen if (reason := reasons.to_skip(case))]
    skipped = {outcome["name"] for outcome in outcomes}
    left = [case for case in chosen if case.name not in skipped]
    together = [case for case in left if options.jobs > 1 and "excl" not in case.flags]
    alone = [case for case in left if case not in together]
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes += pool.map(lambda case: _one(case, source, options), together)
    known = hierarchies()
    for case in alone:
        have_only(known)
        outcomes.append(_one(case, source, options))
    return sorted(outcomes, key=lambda outcome: str(outcome["name"]))


def _outcome(case: Case, status: str, reason: str, **more: Any) -> Outcome:
    return {"name": case.name, "status": status, "reason": reason, **more}


def _one(case: Case, source: Path, options: argparse.Namespace) -> Outcome:
    folder = Path(tempfile.mkdtemp(prefix="crcli-zdtm-"))
    try:
        outcome = _outcome(case, **_work(case, source, folder, _way(options)))
        if options.keep and outcome["status"] in (*BAD, "NOSTART"):
            shutil.copytree(folder, options.keep / case.name, dirs_exist_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{outcome['status']:7} {case.name} {outcome['reason'][:300]}", file=sys.stderr, flush=True)
    return outcome


def _way(options: argparse.Namespace) -> list[str]:
    """The worker's option for the way in which cases are moved."""
    return [f"--{way}" for way in ("raw", "lazy", "again") if getattr(options, way)]


def _work(case: Case, source: Path, folder: Path, way: list[str]) -> dict[str, Any]:
    """Have a case done by a worker, which is ended with all below it when it takes too long."""
    command = [sys.executable, "-m", "tests.zdtm.worker", str(source), case.name, str(folder), *way]
    with (folder / "verdict").open("w+b") as verdict, (folder / "trouble").open("w+b") as trouble:
        worker = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=verdict, stderr=trouble, process_group=0
        )
        try:
            worker.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(worker)
        verdict.seek(0)
        trouble.seek(0)
        try:
            found: dict[str, Any] = json.loads(verdict.read())
        except ValueError:
            said = trouble.read().decode(errors="replace")[-1000:]
            return {"status": "FAIL", "reason": f"the worker ended with {worker.returncode}: {said}"}
    return found


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End a worker, and with it the namespace of all that it started."""
    if worker.returncode is not None:
        return
    below = tree_of(worker.pid)[1:]
    worker.kill()
    worker.wait()
    end(below)


def _show(outcomes: list[Outcome], seconds: float) -> None:
    counts = Counter(outcome["status"] for outcome in outcomes)
    started = len(outcomes) - counts["SKIP"] - counts["NOSTART"]
    for outcome in outcomes:
        if outcome["status"] in (*BAD, "XFAIL", "NOSTART"):
            print(f"{outcome['status']:7} {outcome['name']}\n        {outcome['reason']}")
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    print(f"{len(outcomes)} programs, {started} started: {told}; {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
