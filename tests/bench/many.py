"""Many small agents dumped again and again by one command each round, all left running.

    python -m tests.bench.many [--agents 50] [--rounds 20] [--store file|s3] [--out]

Before each round every agent has worked a little. At the end the store is asked for every image, and a random
sample is restored: counter and hash of its state must be what the agent had said before that round. Beside
each round stands how long the bare store takes for as many objects of as many bytes.
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
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from crcli import kernel
from crcli.store.open import open_store
from tests.bench.__main__ import RESULTS
from tests.bench.commands import BenchError, run
from tests.support.crcli import end, our_child_above, tree_of
from tests.support.s3servers import start_moto

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.support.s3servers import S3Server

_PROGRAM = Path(__file__).parent / "agent.py"
_REPORT_LIMIT_S = 60.0
_ROUND_LIMIT_S = 600.0


def main() -> int:
    """Measure, verify, print, write down if asked."""
    options = _parse()
    if os.getuid() != 0:
        sys.exit("needs root")
    kernel.become_subreaper()
    folder = Path(tempfile.mkdtemp(prefix="crcli-many-", dir=options.folder))
    try:
        with start_moto() if options.store == "s3" else nullcontext() as server, ExitStack() as held:
            bench = Bench(folder, server, options.mebibytes)
            bench.start(options.agents, held)
            rounds = [bench.round(number) for number in range(options.rounds)]
            figures = summarise(rounds) | {"images": bench.count()}
            bench.stop()
            figures["verified"] = bench.verify(options.verify)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(as_text(figures))
    if options.out:
        print(f"\nwritten to {_write(options, figures, rounds)}")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.many", description=__doc__)
    parser.add_argument("--agents", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--rounds", type=int, default=20, help="how often all are dumped (default: 20)")
    parser.add_argument("--mebibytes", type=int, default=10, help="state of each, in MiB (default: 10)")
    parser.add_argument("--store", choices=("file", "s3"), default="file", help="default: file")
    parser.add_argument("--verify", type=int, default=20, help="images restored at the end (default: 20)")
    parser.add_argument("--folder", help="where the directory store is (default: TMPDIR)")
    parser.add_argument("--out", action="store_true", help=f"write all figures into {RESULTS}")
    return parser.parse_args()


@dataclass
class Agent:
    """A running agent, and what it says of itself."""

    process: subprocess.Popen[bytes]
    report_path: Path
    reported: int = 0

    def next_report(self) -> dict[str, Any]:
        """Wait for the report after the last one."""
        limit = time.monotonic() + _REPORT_LIMIT_S
        while time.monotonic() < limit:
            try:
                report: dict[str, Any] = json.loads(self.report_path.read_text())
            except FileNotFoundError:
                report = {"number": 0}
            if report["number"] > self.reported:
                self.reported = report["number"]
                return report
            time.sleep(0.005)
        raise BenchError(f"no report from {self.process.pid}")


@dataclass(frozen=True)
class Round:
    """One dump of all: seconds on the wall and of CPU, what it said of each, and the bare store's seconds."""

    wall_s: float
    cpu_s: float
    dumps: Sequence[dict[str, Any]]
    bare_s: float


@dataclass
class Bench:
    """The agents, the store, and what every image must hold."""

    folder: Path
    server: S3Server | None
    mebibytes: int
    agents: list[Agent] = field(default_factory=list)
    expected: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def store(self) -> str:
        """The URL of the store."""
        return f"file://{self.folder}/store" if self.server is None else self.server.url("many")

    @property
    def env(self) -> dict[str, str]:
        """What crcli finds in its environment."""
        state = {"CRCLI_LOG_DIR": "logs", "CRCLI_RATES": "rates.json", "CRCLI_STATE_DIR": "state"}
        places = {name: str(self.folder / place) for name, place in state.items()}
        return places | (self.server.env if self.server is not None else {})

    def start(self, count: int, held: ExitStack) -> None:
        """Start the agents; they end with `held`."""
        for number in range(count):
            path = self.folder / f"report-{number}"
            process = subprocess.Popen(
                [sys.executable, str(_PROGRAM), str(self.mebibytes), str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            held.callback(_kill, process)
            self.agents.append(Agent(process, path))
        for agent in self.agents:
            agent.next_report()

    def round(self, number: int) -> Round:
        """Have all agents work, and dump them."""
        for agent in self.agents:
            agent.process.send_signal(signal.SIGUSR1)
        said = [agent.next_report() for agent in self.agents]
        pids = [str(agent.process.pid) for agent in self.agents]
        done = self._crcli("dump", *pids, "--leave-running")
        dumps = done.json["dumps"]
        lost = [one for one in dumps if "error" in one]
        if lost or len(dumps) != len(pids):
            raise BenchError(f"round {number}: {len(dumps)} dumps, of which failed: {lost}")
        self.expected |= {one["image"]: report for one, report in zip(dumps, said, strict=True)}
        bare_s = self._put([one["stored_bytes"] for one in dumps])
        print(
            f"round {number + 1}: {done.wall_s:.1f} s, bare store {bare_s:.2f} s", file=sys.stderr, flush=True
        )
        return Round(done.wall_s, done.cpu_s, dumps, bare_s)

    def count(self) -> int:
        """How many images there are; raise BenchError unless they are exactly those that were reported."""
        there = {one["image"] for one in self._crcli("ls").json["images"]}
        if there != set(self.expected):
            raise BenchError(f"{len(there)} images, {len(self.expected)} reported")
        return len(there)

    def stop(self) -> None:
        """End the agents: only their images are left."""
        for agent in self.agents:
            _kill(agent.process)

    def verify(self, count: int) -> int:
        """Restore a random sample and ask each what it is; return how many were what they must be."""
        sample = random.sample(sorted(self.expected), min(count, len(self.expected)))
        by_pid = {agent.process.pid: agent for agent in self.agents}
        for image in sample:
            restored = self._crcli("restore", image).json
            anchor = our_child_above(restored["host_pid"])
            try:
                agent, must = by_pid[int(image.partition("@")[0].rpartition("-")[2])], self.expected[image]
                agent.reported = must["number"]
                agent.report_path.unlink()
                os.kill(restored["host_pid"], signal.SIGUSR2)
                report = agent.next_report()
                if (report["counter"], report["hash"]) != (must["counter"], must["hash"]):
                    raise BenchError(f"{image} is not what it was: {report} instead of {must}")
            finally:
                end(tree_of(anchor))
        return len(sample)

    def _crcli(self, *arguments: str) -> Any:
        command = [sys.executable, "-m", "crcli", *arguments, "--store", self.store, "--json"]
        return run(command, _ROUND_LIMIT_S, self.env)

    def _put(self, sizes: Sequence[int]) -> float:
        """Seconds that the bare store takes for objects of these sizes, put by a thread for each core."""
        blocks = [os.urandom(size) for size in sizes]
        url = f"file://{self.folder}/bare" if self.server is None else self.server.url("bare")
        before = {name: os.environ.get(name) for name in self.env}
        os.environ.update(self.env)
        store = open_store(url)
        try:
            store.warm(for_writing=True)
            began = time.monotonic()
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                for _ in threads.map(lambda one: store.put(f"put/{one[0]}", one[1]), enumerate(blocks)):
                    pass
            return time.monotonic() - began
        finally:
            store.close()
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def summarise(rounds: Sequence[Round]) -> dict[str, Any]:
    """The figures of a run: milliseconds where a name says so, else seconds, bytes and fractions."""
    dumps = [one for each in rounds for one in each.dumps]
    frozen = sorted(one["frozen_ms"] for one in dumps)
    phases = {name: median(one["phases"].get(name, 0.0) for one in dumps) for name in dumps[0]["phases"]}
    wall = sum(each.wall_s for each in rounds)
    return {
        "checkpoints": len(dumps),
        "frozen_ms": {
            "median": median(frozen),
            **{f"p{share}": frozen[min(len(frozen) - 1, len(frozen) * share // 100)] for share in (90, 99)},
            "max": frozen[-1],
        },
        "checkpoints_per_s": len(dumps) / wall,
        "cpu_s_each": sum(each.cpu_s for each in rounds) / len(dumps),
        "phases_ms": phases,
        "slowest_phase": max(phases, key=lambda name: phases[name]),
        "first_round": _of_round(rounds[0]),
        "second_round": _of_round(rounds[min(1, len(rounds) - 1)]),
        "last_round": _of_round(rounds[-1]),
        "bare_store_share": sum(each.bare_s for each in rounds) / wall,
    }


def _of_round(one: Round) -> dict[str, float]:
    return {
        "wall_s": one.wall_s,
        "cpu_s": one.cpu_s,
        "total_ms": median(dump["total_ms"] for dump in one.dumps),
        "prepare_ms": median(dump["phases"]["prepare"] for dump in one.dumps),
        "stored_kib": median(dump["stored_bytes"] for dump in one.dumps) / 1024,
        "bare_s": one.bare_s,
    }


def as_text(figures: dict[str, Any]) -> str:
    """The figures for people."""
    frozen = ", ".join(f"{name} {value:.1f}" for name, value in figures["frozen_ms"].items())
    phases = ", ".join(f"{name} {value:.1f}" for name, value in figures["phases_ms"].items())
    lines = [
        f"{figures['checkpoints']} checkpoints, {figures['images']} images in the store, "
        f"{figures['verified']} restored and compared",
        f"frozen (ms): {frozen}",
        f"{figures['checkpoints_per_s']:.2f} checkpoints/s, "
        f"{figures['cpu_s_each'] * 1000:.0f} ms of CPU each",
        f"phases (ms, medians): {phases}; slowest: {figures['slowest_phase']}",
    ]
    for name in ("first_round", "second_round", "last_round"):
        one = figures[name]
        lines.append(
            f"{name.replace('_', ' '):<12} {one['wall_s']:.1f} s ({one['cpu_s']:.1f} s of CPU), each "
            f"{one['total_ms']:.0f} ms (prepare {one['prepare_ms']:.0f} ms), {one['stored_kib']:.0f} KiB "
            f"stored; the bare store took {one['bare_s']:.2f} s"
        )
    lines.append(f"the bare store would take {figures['bare_store_share'] * 100:.1f} % of the time")
    return "\n".join(lines)


def _write(options: argparse.Namespace, figures: dict[str, Any], rounds: Sequence[Round]) -> Path:
    now = datetime.now(UTC)
    text = {
        "taken": now.isoformat(timespec="seconds"),
        "machine": {"cpus": os.cpu_count(), "kernel": os.uname().release},
        "options": {name: getattr(options, name) for name in ("agents", "rounds", "mebibytes", "store")},
        "figures": figures,
        "rounds": [_of_round(one) for one in rounds],
        "frozen_ms": [[one["frozen_ms"] for one in each.dumps] for each in rounds],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"many-{options.store}-{now:%Y%m%dT%H%M%S}.json"
    path.write_text(json.dumps(text, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())
