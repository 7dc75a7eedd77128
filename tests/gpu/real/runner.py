"""Everything, within a number of seconds: the probe, then the scenarios, what matters most first.

    python -m tests.gpu.real.runner --out DIR --work DIR --budget SECONDS [--on gpu] [--only NAME…]

It is started by `python -m tests.gpu.real run`, in an environment that has crcli and CRIU. Each probe step
and each scenario is a process of its own with a time limit; what it leaves behind is killed. Nothing is
waited for longer than the time that is left.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import signal
import sys
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from crcli import __version__, kernel
from crcli.criu.binary import criu_command
from crcli.errors import CrcliError
from tests.gpu.real import probe
from tests.gpu.real.commands import doing_of_descendants, end_descendants, run
from tests.gpu.real.prepare import commit
from tests.gpu.real.record import Record
from tests.gpu.real.scenarios import SCENARIOS, Scenario
from tests.gpu.real.setting import MIB, PLACES, Setting
from tests.gpu.real.table import judged

RESERVE_S = 8.0
"""Kept for the end: what a scenario left behind has to be killed, and the results written."""

NOT_HERE = {
    "gpu": "",
    "simulator": "simulated GPUs: a trial of the machinery, no result",
    "host": "no GPU, memory of the host stood in for it: a trial of the machinery, no result",
}


_VERSIONS = """
import importlib.metadata, json
print(json.dumps({one.name: one.version for one in importlib.metadata.distributions()}))
"""


@dataclass(frozen=True)
class Budget:
    """The time of the whole run. `began` is in seconds since 1970: the set-up before us counts too."""

    seconds: float
    began: float

    def left_s(self) -> float:
        """What may still be used, less what is kept for the end."""
        return self.began + self.seconds - RESERVE_S - time.time()

    def limit_for(self, scenario: Scenario) -> float:
        """For how long it may run; 0 when too little time is left to begin."""
        left = self.left_s()
        return min(scenario.limit_s, left) if left >= scenario.least_s else 0.0


class Stopped(Exception):
    """The run goes no further, for the reason given."""


def main() -> int:
    """Run what there is time for; the results are in the folder `--out`, as they come."""
    options = _options()
    signal.signal(signal.SIGTERM, _terminated)
    setting = _setting(options)
    setting.folder.mkdir(parents=True, exist_ok=True)
    budget = Budget(options.budget, options.began)
    record = Record(Path(options.out), options.began, _header(setting, options))
    try:
        if not options.no_probe:
            _probe(setting, budget, record, options.probe or list(probe.STEPS))
        _scenarios(setting, budget, record, options.only or list(SCENARIOS), options.keep_going)
    except Stopped as why:
        record.stopped(str(why))
    except Exception:
        record.stopped(traceback.format_exc())
    finally:
        end_descendants()
        shutil.rmtree(setting.work, ignore_errors=True)
        record.set(goals=judged(record.data), gpu_memory_at_end=_gpu_memory(setting), ended=True)
    _say(f"{record.data['stopped'] or 'done'}, after {record.data['seconds']:.0f} s")
    return (
        0 if all(one["outcome"] in ("passed", "skipped") for one in record.data["scenarios"].values()) else 1
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.real.runner", description=__doc__)
    parser.add_argument("--out", required=True, help="the folder for results.json")
    parser.add_argument("--work", required=True, help="a folder with much room, which is removed at the end")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (%(default)s)")
    parser.add_argument("--began", type=float, default=time.time(), help="when the set-up began")
    parser.add_argument("--on", choices=PLACES, default="gpu", help="all but gpu are trials of the machinery")
    parser.add_argument("--python", default=sys.executable, help="what the programs run on (this one)")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--probe", nargs="+", choices=probe.STEPS, metavar="STEP", help="these steps only")
    parser.add_argument("--no-probe", action="store_true", help="the machine is known from an earlier run")
    parser.add_argument("--keep-going", action="store_true", help="also where the first scenarios all failed")
    parser.add_argument("--weights-mib", type=int, help="the size of the model's weights")
    parser.add_argument("--cache-mib", type=int, help="the size of its empty cache")
    return parser.parse_args()


def _setting(options: argparse.Namespace) -> Setting:
    """The sizes that suit the place, or those asked for."""
    setting = Setting.of(options.on, options.work, options.python)
    asked = {"weights_bytes": options.weights_mib, "cache_bytes": options.cache_mib}
    return replace(setting, **{name: size * MIB for name, size in asked.items() if size is not None})


def _header(setting: Setting, options: argparse.Namespace) -> dict[str, Any]:
    """What the results are of: not a word of this may be missing where figures are shown."""
    try:
        criu = run([*criu_command(), "--version"], 20).out.split("\n")[0]
    except CrcliError as error:
        criu = str(error)
    there = run([setting.python, "-c", _VERSIONS], 60, setting.programs_environment("torch"))
    shown = ("torch", "cupy-cuda13x", "safetensors", "numpy", "cuda-bindings", "cuda-core", "nvidia-ml-py")
    packages = json.loads(there.out) if there.code == 0 else {}
    return {
        "on": setting.on,
        "not_a_result": NOT_HERE[setting.on],
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(options.began)),
        "budget_s": options.budget,
        "set_up_s": round(time.time() - options.began, 1),
        "crcli": {"version": __version__, "commit": commit()},
        "criu": criu,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "gpus": _smi(setting, "name,driver_version"),
        "packages": {name: packages.get(name, "") for name in shown},
        "sizes": {"weights_bytes": setting.weights_bytes, "cache_bytes": setting.cache_bytes},
    }


def _probe(setting: Setting, budget: Budget, record: Record, steps: list[str]) -> None:
    gvisor = False
    for step in steps:
        limit_s = probe.STEPS[step][1]
        if (step in probe.NEED_CUDA and not setting.has_cuda) or (step in probe.NEED_KERNEL and gvisor):
            continue
        found = _probed(step, setting, max(1.0, min(limit_s, budget.left_s())))
        record.note("probe", step, found)
        gvisor = gvisor or found.get("gvisor", False)
        _say(f"probe {step}: {found.get('error', 'ok')[:300]} ({found['seconds']:.1f} s)")
    if gvisor:
        raise Stopped("this is gVisor: it has no CRIU, so nothing can be dumped here")


def _probed(step: str, setting: Setting, limit_s: float) -> dict[str, Any]:
    """One step of the probe, in a process of its own: what it found, or how it ended."""
    kernel.become_subreaper()
    command = [sys.executable, "-m", "tests.gpu.real.probe", step, setting.as_text()]
    done = run(command, limit_s, setting.crcli_environment())
    left = end_descendants()
    found: dict[str, Any] = {"seconds": round(done.wall_s, 2)} | ({"left": left} if left else {})
    try:
        found |= json.loads(done.out)
    except ValueError:
        found["error"] = done.said[-4000:]
    return found


def _scenarios(setting: Setting, budget: Budget, record: Record, names: list[str], keep_going: bool) -> None:
    for name in names:
        scenario = SCENARIOS[name]
        if setting.on not in scenario.only_on:
            found = {"outcome": "skipped", "why": f"not on {setting.on}"}
        elif limit_s := budget.limit_for(scenario):
            _say(f"{name} …")
            found = tried(name, setting, limit_s)
        else:
            found = {"outcome": "not run", "why": f"{budget.left_s():.0f} s left of {budget.seconds:.0f}"}
        record.note("scenarios", name, {"title": scenario.title, **found})
        _say(f"{name}: {found['outcome']} {found.get('why', '')[:1000]} ({found.get('seconds', 0):.1f} s)")
        if not keep_going:
            _stop_if_hopeless(record)


def tried(name: str, setting: Setting, limit_s: float) -> dict[str, Any]:
    """One scenario, in a process of its own: what it said, also when it had to be killed.

    All that it started and left comes to us, and is ended.
    """
    kernel.become_subreaper()
    result = setting.folder / f"{name}.json"
    command = [sys.executable, "-m", "tests.gpu.real.scenarios", name, setting.as_text(), str(result)]
    done = run(command, limit_s, setting.crcli_environment())
    hung = "" if done.code is not None else doing_of_descendants()
    left = end_descendants()
    try:
        found: dict[str, Any] = json.loads(result.read_text())
    except (OSError, ValueError):
        found = {"outcome": "failed", "why": "it said nothing", "evidence": f"{done.said}\n{hung}"}
    if found["outcome"] == "running":
        found |= {
            "outcome": "failed",
            "why": f"{found['doing']}: killed after {limit_s:.0f} s",
            "evidence": f"{done.said}\n{hung}",
        }
    found |= {"seconds": round(done.wall_s, 1), "left": left}
    if found["outcome"] == "failed":
        found["evidence"] = f"{found.get('evidence', '')}\n{_kernel_log()}"
        found["gpu_memory_after"] = _gpu_memory(setting)
    shutil.rmtree(setting.folder / name, ignore_errors=True)
    return {name: value for name, value in found.items() if value}


def _kernel_log() -> str:
    """Its end: what NVIDIA's kernel driver says of errors (Xid), who was killed for want of memory."""
    return f"kernel:\n{run(['sh', '-c', 'dmesg | tail -n 40'], 10).out}"


def _gpu_memory(setting: Setting) -> str:
    """What of the GPU's memory is in use, when nobody should use any."""
    return _smi(setting, "memory.used,memory.total")


def _smi(setting: Setting, query: str) -> str:
    """What nvidia-smi says of the GPUs; nothing where there are none."""
    if setting.on != "gpu":
        return ""
    return run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], 20).out.strip()


def _stop_if_hopeless(record: Record) -> None:
    """Time on such a machine is dear: stop when what everything else builds on has failed."""
    outcomes = {name: found["outcome"] for name, found in record.data["scenarios"].items()}
    for both, why in (
        (("cpu-plain", "cpu-crcli"), "not even a process without a GPU can be dumped and restored here"),
        (("driver-plain", "counter", "counter-plain"), "no CUDA process can be dumped and restored here"),
    ):
        if all(outcomes.get(name) == "failed" for name in both):
            raise Stopped(
                f"{why}: see probe and {' and '.join(both)} (--keep-going runs the rest all the same)"
            )


def _terminated(_: int, __: FrameType | None) -> NoReturn:
    raise Stopped("told to end (SIGTERM)")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
