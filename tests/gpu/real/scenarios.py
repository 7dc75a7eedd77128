"""What is tried on a GPU, each scenario by itself: a subject, a way, and what must be the same afterwards.

    python -m tests.gpu.real.scenarios NAME SETTING RESULT

runs one in a process of its own and writes what is known so far into RESULT (JSON) after every step, so that
one that has to be killed has told how far it came.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from crcli import kernel
from tests.gpu.real import growth
from tests.gpu.real.commands import Failed, end_descendants, must_run
from tests.gpu.real.setting import Setting
from tests.gpu.real.subject import PROGRAMS, Step, Subject
from tests.gpu.real.ways import ByCrcli, Plainly, Way

START_LIMIT_S = 50.0
"""Importing PyTorch, whose files the probe has read before, cuInit, and the first kernels."""

STEP_LIMIT_S = 30.0
GOES_ON_ELSEWHERE = 75
"""What `crcli run` ends with when its job was dumped because of a notice."""

ALL_STEPS_LIMIT_S = 70.0


@dataclass
class Run:
    """One scenario under way: where it happens, and what is known of it so far."""

    name: str
    setting: Setting
    result: Path
    said: dict[str, Any] = field(default_factory=lambda: {"outcome": "running", "doing": "", "figures": {}})
    _since: float = 0.0

    @property
    def folder(self) -> Path:
        """For all that this scenario writes."""
        return self.setting.folder / self.name

    def doing(self, what: str) -> None:
        """Say what comes next; the seconds that each took are noted."""
        now = time.monotonic()
        if self.said["doing"]:
            self.said.setdefault("took_s", {})[self.said["doing"]] = round(now - self._since, 2)
        self.said["doing"], self._since = what, now
        self._write()

    def note(self, **figures: Any) -> None:
        """Keep what was measured or compared."""
        self.said["figures"] |= figures
        self._write()

    def ended(self, outcome: str, **why: str) -> None:
        """Say how it ended: passed, failed or skipped."""
        self.doing("")
        del self.said["doing"]
        self.said |= {"outcome": outcome, **why}
        self._write()

    def crcli(self, size: int = 0) -> ByCrcli:
        """crcli, with a store of this scenario's."""
        return ByCrcli(self.setting, self.folder / "crcli", size)

    def plainly(self, size: int = 0) -> Plainly:
        """The plain sequence."""
        return Plainly(self.setting, self.folder / "plain", size)

    def _write(self) -> None:
        partial = self.result.with_suffix(".partial")
        partial.write_text(json.dumps(self.said, indent=1))
        os.rename(partial, self.result)


class Skipped(Exception):
    """This cannot be tried here, for the reason given."""


def main(name: str, setting: str, result: str) -> int:
    """Run the scenario of this name."""
    run = Run(name, Setting.from_text(setting), Path(result))
    kernel.become_subreaper()
    try:
        SCENARIOS[name].story(run)
        run.ended("passed")
    except Skipped as why:
        run.ended("skipped", why=str(why))
    except Failed as failed:
        run.ended("failed", why=f"{run.said['doing']}: {failed}", evidence=failed.evidence)
    except Exception as error:
        run.ended("failed", why=f"{run.said['doing']}: {error!r}", evidence=traceback.format_exc())
    finally:
        end_descendants()
    return 0


def counter(run: Run, library: str, way: Way, environment: Mapping[str, str] | None = None) -> None:
    """A counter and random bytes in GPU memory: it counts on without a gap, and the bytes are the same."""
    folder = run.folder / "subject"
    with Subject(
        run.setting, folder, "counter", *_size(run), library=library, environment=environment
    ) as subject:
        run.doing("start")
        run.note(gpu_bytes=subject.wait_ready(START_LIMIT_S))
        subject.wait_steps(5, STEP_LIMIT_S)
        _moved(run, way, subject)
        run.doing("compare")
        subject.wait_more(10, STEP_LIMIT_S)
        _assert_counted(subject.steps())
    run.note(same="count and bytes", steps=len(subject.steps()))


def like_reference(run: Run, program: str, way: Way, *needs: str, steps: int = 0) -> None:
    """What it gives, step by step, is what an uninterrupted run beside it gives; so is its memory at the end.

    Skipped where the programs' Python lacks one of the modules that it `needs`.
    """
    if not run.setting.has_torch:
        raise Skipped("no PyTorch for the programs here")
    if missing := run.setting.missing(*needs):
        raise Skipped(f"no {', '.join(missing)} for the programs here")
    count = min(steps or run.setting.steps, run.setting.steps)
    wanted = ("--steps", str(count))
    with (
        Subject(run.setting, run.folder / "reference", program, *wanted, "--pace", "0") as reference,
        Subject(run.setting, run.folder / "subject", program, *wanted) as subject,
    ):
        run.doing("start")
        subject.wait_ready(START_LIMIT_S)
        subject.wait_steps(count // 8, STEP_LIMIT_S)
        before = _moved(run, way, subject)
        run.note(steps_before=before)
        if before >= count:
            raise Failed("it was at its end before the dump")
        run.doing("steps after the restore, and without interruption")
        reference.wait_done(ALL_STEPS_LIMIT_S)
        expected, memory = reference.steps(), reference.digest(STEP_LIMIT_S)
        subject.wait_done(ALL_STEPS_LIMIT_S)
        run.doing("compare")
        _assert_same(subject.steps(), expected)
        if subject.digest(STEP_LIMIT_S) != memory:
            raise Failed("its memory at the end is not that of the uninterrupted run")
    run.note(same="every step and the memory at the end", steps=len(expected))


def pair(run: Run, way: Way) -> None:
    """Two processes with memory on one GPU, in one tree: both count on."""
    library = run.setting.library
    with Subject(run.setting, run.folder / "subject", "pair", *_size(run), library=library) as subject:
        run.doing("start")
        subject.wait_ready(START_LIMIT_S)
        _until(lambda: len(subject.steps(".child")) >= 5, START_LIMIT_S, "the child does not count")
        subject.wait_steps(5, STEP_LIMIT_S)
        _moved(run, way, subject)
        before = len(subject.steps(".child"))
        run.doing("compare")
        subject.wait_more(10, STEP_LIMIT_S)
        _until(lambda: len(subject.steps(".child")) >= before + 10, STEP_LIMIT_S, "the child stands still")
        _assert_counted(subject.steps())
        _assert_counted(subject.steps(".child"))
    run.note(same="count and bytes of both")


def left_running(run: Run) -> None:
    """Dumped alive, twice: it counts on; its last image, restored once it is dead, counts on from there."""
    way, library = run.crcli(), run.setting.library
    with Subject(run.setting, run.folder / "subject", "counter", *_size(run), library=library) as subject:
        run.doing("start")
        subject.wait_ready(START_LIMIT_S)
        subject.wait_steps(10, STEP_LIMIT_S)
        run.doing("dump")
        run.note(dump=way.dump(subject, "--leave-running"))
        subject.wait_more(10, STEP_LIMIT_S)
        run.doing("dump again")
        run.note(dump_again=way.dump(subject, "--leave-running"))
        subject.wait_more(10, STEP_LIMIT_S)
        steps = subject.steps()
        _assert_counted(steps)
        run.note(still_s=max(later.time - one.time for one, later in pairwise(steps)))
        run.doing("kill")
        subject.remember()
        os.kill(subject.pid, signal.SIGKILL)
        subject.died()
        before = len(subject.steps())
        run.doing("restore")
        run.note(restore=way.restore(subject))
        run.doing("compare")
        subject.wait_more(10, STEP_LIMIT_S)
        again = subject.steps()[before:]
        if not 0 < again[0].number < before:
            raise Failed(f"the copy went on at step {again[0].number}, of {before}")
        _assert_counted([*steps[: again[0].number], *again])
    run.note(same="count and bytes, of both copies")


def evicted(run: Run, *options: str) -> None:
    """A job of `crcli run` is told to go, and goes on by the same command line, as another process."""
    library, way = run.setting.library, run.crcli()
    under = way.job(library, *options)
    with Subject(
        run.setting, run.folder / "subject", "counter", *_size(run), library=library, under=under
    ) as job:
        run.doing("start")
        job.wait_ready(START_LIMIT_S)
        job.wait_steps(10, STEP_LIMIT_S)
        run.doing("notice")
        told = time.time()
        if (code := job.told_to_go(STEP_LIMIT_S)) != GOES_ON_ELSEWHERE:
            raise Failed(f"told to go it ended with {code}", f"{job.said}\n{way.logs()}")
        run.note(gone_s=time.time() - told)
        job.died()
        before = len(job.steps())
        run.doing("start again")
        again = time.time()
        job.start()
        try:
            run.note(first_step_s=job.first_step_since(again, before, START_LIMIT_S))
        except Failed as failed:
            raise Failed(str(failed), f"{failed.evidence}\n{way.logs()}") from failed
        job.wait_more(10, STEP_LIMIT_S)
        run.doing("compare")
        _assert_counted(job.steps())
    run.note(same="count and bytes")


def weights(run: Run, *, cold: bool = False) -> None:
    """A model of many GiB: crcli with --weights, then the plain sequence, both measured."""
    setting = run.setting
    path = setting.folder / "model" / "weights.safetensors"
    size = setting.weights_bytes + setting.cache_bytes
    by_crcli = run.crcli(size)
    if growth.available_bytes() < 2 * size:
        run.doing("use memory once")
        run.note(memory=growth.touched(2 * size))
    run.doing("make the model")
    _make_model(setting, path)
    run.doing("index the model")
    run.note(
        index_s=by_crcli.index(path), weights_bytes=setting.weights_bytes, cache_bytes=setting.cache_bytes
    )
    _measured(run, "crcli", by_crcli, path, cold, "--weights", str(path))
    _measured(run, "plain", run.plainly(size), path, cold)
    run.note(same="all memory")


def _measured(run: Run, title: str, way: Way, path: Path, cold: bool, *options: str) -> None:
    """Dump and restore one worker in this way; the digest of its memory is what it was for all workers."""
    setting = run.setting
    size = setting.weights_bytes + setting.cache_bytes
    limit_s, known = setting.limit_s(START_LIMIT_S, size), path.with_suffix(".digest")
    arguments = ("--file", str(path), "--cache", str(setting.cache_bytes))
    folder = run.folder / f"worker-{title}"
    with Subject(setting, folder, "weights", *arguments, library=setting.library) as worker:
        run.doing(f"{title}: start")
        run.note(gpu_bytes=worker.wait_ready(limit_s))
        if not known.exists():
            known.write_text(worker.digest(limit_s))
        run.doing(f"{title}: dump")
        run.note(**{f"{title}_dump": way.dump(worker, *options)})
        if cold:
            way.cool()
        run.doing(f"{title}: restore")
        run.note(**{f"{title}_restore": way.restore(worker)})
        run.doing(f"{title}: compare")
        if worker.digest(limit_s) != known.read_text():
            raise Failed("the memory is not what it was")
        _assert_counted(worker.steps())
    way.forget()


def _make_model(setting: Setting, path: Path) -> None:
    """The file of weights is there, made once for all scenarios."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    command = [setting.python, str(PROGRAMS / "make_weights.py"), str(path), "--device", setting.device]
    command += ["--bytes", str(setting.weights_bytes), "--with", setting.library]
    limit_s = setting.limit_s(START_LIMIT_S, setting.weights_bytes)
    must_run(command, limit_s, setting.programs_environment(setting.library))


def _moved(run: Run, way: Way, subject: Subject) -> int:
    """Dumped, killed and restored; return after how many steps."""
    run.doing("dump")
    run.note(dump=way.dump(subject))
    before = len(subject.steps())
    run.doing("restore")
    run.note(restore=way.restore(subject))
    return before


def _size(run: Run) -> tuple[str, str]:
    return "--mebibytes", str(run.setting.counter_mib)


def _assert_counted(steps: list[Step]) -> None:
    """Every number once and in order, the count with it, and the same bytes beside it at every step."""
    for at, step in enumerate(steps):
        if step.number != at or int(step.value.partition(":")[0]) != at + 1:
            raise Failed(f"the step after {at} says {step}")
    if len({step.value.partition(":")[2] for step in steps}) != 1:
        raise Failed("the bytes in GPU memory changed")


def _assert_same(steps: list[Step], expected: list[Step]) -> None:
    for step, wanted in zip(steps, expected, strict=True):
        if (step.number, step.value) != (wanted.number, wanted.value):
            raise Failed(f"step {wanted.number} gave {step.value}, without interruption {wanted.value}")


def _until(true: Callable[[], bool], limit_s: float, otherwise: str) -> None:
    end = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > end:
            raise Failed(f"{otherwise} within {limit_s:.0f} s")
        time.sleep(0.01)


@dataclass(frozen=True)
class Scenario:
    """One scenario: its story, how long it may run, and how much time must be left to begin it (seconds)."""

    title: str
    story: Callable[[Run], None]
    limit_s: float
    least_s: float
    only_on: tuple[str, ...] = ("gpu", "simulator", "host")


def _like_reference(program: str, *needs: str) -> Callable[[Run], None]:
    """The program by crcli, compared with an uninterrupted run of fewer steps than the usual."""
    return lambda run: like_reference(run, program, run.crcli(), *needs, steps=160)


def _counter_by(
    library: str = "", *, plain: bool = False, restoring: tuple[str, ...] = (), **environment: str
) -> Callable[[Run], None]:
    """The counter with this library, or with what programs use here, and these variables in its environment;
    restored with these options."""

    def story(run: Run) -> None:
        wanted = library or run.setting.library
        if wanted == "host":
            run.setting = replace(run.setting, on="host")
        counter(
            run,
            wanted,
            replace(run.plainly(), log_level=4) if plain else replace(run.crcli(), restoring=restoring),
            environment,
        )

    return story


SCENARIOS: Mapping[str, Scenario] = {
    "cpu-plain": Scenario("no GPU: CRIU alone", _counter_by("host", plain=True), 40, 10),
    "cpu-crcli": Scenario("no GPU", _counter_by("host"), 40, 10),
    "driver-plain": Scenario(
        "CUDA's driver API alone, plain sequence",
        _counter_by("driver", plain=True),
        70,
        20,
        ("gpu", "simulator"),
    ),
    "driver-crcli": Scenario("CUDA's driver API alone", _counter_by("driver"), 70, 20, ("gpu", "simulator")),
    "counter": Scenario("PyTorch: a counter", _counter_by(), 90, 25),
    "counter-plain": Scenario("PyTorch: a counter, plain sequence", _counter_by(plain=True), 90, 25),
    "generate": Scenario(
        "PyTorch: tokens with a KV cache", lambda run: like_reference(run, "generate", run.crcli()), 100, 35
    ),
    "weights-1": Scenario("PyTorch: a large model, --weights", weights, 240, 70),
    "train": Scenario("PyTorch: training", lambda run: like_reference(run, "train", run.crcli()), 100, 35),
    "pair": Scenario("PyTorch: two processes on one GPU", lambda run: pair(run, run.crcli()), 90, 25),
    "left-running": Scenario("PyTorch: a counter, left running", left_running, 90, 25),
    "evicted": Scenario("PyTorch: a counter, as a job that is evicted", evicted, 120, 35),
    "evicted-here": Scenario(
        "the same in the host's pid namespace", lambda run: evicted(run, "--pid-namespace", "host"), 120, 35
    ),
    "lazy": Scenario("PyTorch: a counter, restored lazily", _counter_by(restoring=("--lazy",)), 90, 25),
    "cupy": Scenario("CuPy: a counter", _counter_by("cupy"), 90, 25, ("gpu",)),
    "loader": Scenario("PyTorch: forked DataLoader workers", _like_reference("loader"), 100, 30),
    "compiled": Scenario(
        "PyTorch: torch.compile and CUDA graphs", _like_reference("compiled"), 120, 40, ("gpu", "host")
    ),
    "llama": Scenario("transformers: a Llama's tokens", _like_reference("llama", "transformers"), 100, 30),
    "served": Scenario(
        "HTTP server and spawned engine", _like_reference("served", "aiohttp", "uvloop"), 100, 30
    ),
    "jaxed": Scenario("JAX: training", _like_reference("jaxed", "jax"), 100, 30),
    "streams": Scenario("PyTorch: streams, pinned memory", _like_reference("streams"), 90, 30, ("gpu",)),
    "monitored": Scenario(
        "PyTorch: asks NVML all the time", _like_reference("monitored", "pynvml"), 90, 30, ("gpu",)
    ),
    "parallel": Scenario("PyTorch: DDP over NCCL, alone", _like_reference("parallel"), 90, 30, ("gpu",)),
    "jitted": Scenario("Triton: a kernel of its own", _like_reference("jitted", "triton"), 90, 30, ("gpu",)),
    "expandable": Scenario(
        "PyTorch: a counter, expandable segments",
        _counter_by(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"),
        90,
        25,
        ("gpu",),
    ),
    "async": Scenario(
        "PyTorch: a counter, cudaMallocAsync",
        _counter_by(PYTORCH_CUDA_ALLOC_CONF="backend:cudaMallocAsync"),
        90,
        25,
        ("gpu",),
    ),
    "weights-2": Scenario("PyTorch: a large model, --weights", weights, 200, 60),
    "weights-3": Scenario("PyTorch: a large model, --weights", weights, 200, 60),
    "weights-cold": Scenario(
        "PyTorch: a large model, --weights, cold disk", lambda run: weights(run, cold=True), 240, 80
    ),
}
"""By name, what matters most first."""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
