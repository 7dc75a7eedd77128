"""The two ways to move a subject that are compared: crcli, and the plain sequence."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.gpu.real.commands import Failed, Ran, run
from tests.gpu.real.plain import telling_lines
from tests.gpu.real.setting import Setting
from tests.gpu.real.subject import Subject

Figures = dict[str, Any]
"""What a way said and what it took; see `dump` and `restore` of each."""

_LEAST_S = 40.0
_FIRST_STEP_LIMIT_S = 20.0
_MOST_LOG = 60_000
_USUAL_LOG_LEVEL = 2


class Way(Protocol):
    """How a subject is dumped and restored. Everything lies in one folder, which `forget` removes."""

    def dump(self, subject: Subject, *options: str) -> Figures:
        """It is dumped and gone (or runs on, with --leave-running): `dump_s`, `image_bytes`, `phases`."""
        ...

    def restore(self, subject: Subject) -> Figures:
        """It goes on: `restore_s` (the command), `first_step_s` (until it had made a step), `phases`."""
        ...

    def cool(self) -> None:
        """Nothing that the restore will read is in the page cache."""
        ...

    def forget(self) -> None:
        """The images are gone."""
        ...


@dataclass
class ByCrcli:
    """`crcli dump` and `crcli restore`, with a store in the folder."""

    setting: Setting
    folder: Path
    size: int = 0
    """Bytes that move, to bound the time."""

    restoring: tuple[str, ...] = ()
    """Options of every restore."""

    def dump(self, subject: Subject, *options: str) -> Figures:
        """See Way; `frozen_ms`, `stored_bytes` and so on are crcli's own words."""
        subject.remember()
        done = self._run("dump", str(subject.pid), "--name", "subject", *options)
        report = done.json
        if report["outcome"] == "killed":
            subject.died()
        own = {"dump_s": done.wall_s, "image_bytes": report["stored_bytes"], "saved": self._saved()}
        return own | _told(
            report,
            "memory_bytes",
            "zero_bytes",
            "weights_bytes",
            "frozen_ms",
            "total_ms",
            "phases",
            "gpu",
            "findings",
        )

    def restore(self, subject: Subject) -> Figures:
        """See Way."""
        before = len(subject.steps())
        done = self._run("restore", "subject", *self.restoring)
        report = done.json
        subject.came_back(report["host_pid"])
        first = subject.first_step_since(done.began, before, _FIRST_STEP_LIMIT_S)
        return {"restore_s": done.wall_s, "first_step_s": first} | _told(
            report, "ready_ms", "total_ms", "missing_bytes", "phases", "gpu", "findings"
        )

    def job(self, library: str, *options: str) -> tuple[str, ...]:
        """What a command line begins with that is run as the job `subject`, its program as on its own."""
        crcli = (sys.executable, "-m", "crcli", "run", "--name", "subject", "--notice", "sigterm", *options)
        path = self.setting.programs_environment(library).get("PYTHONPATH", "")
        return (*crcli, "--store", f"file://{self.folder}/store", "--", "env", f"PYTHONPATH={path}")

    def _saved(self) -> list[Figures]:
        """Where the driver had put what was on GPUs, of each process: how many runs, and how many bytes."""
        shown = self._run("show", "subject").json.get("gpu") or {"processes": []}
        runs = [process["saved"] for process in shown["processes"]]
        return [
            {"runs": len(one), "bytes": 4096 * sum(pages for _, pages in one), "first": one[:8]}
            for one in runs
        ]

    def index(self, path: Path) -> float:
        """Prepare a file of weights, which crcli does once for each; return the seconds that it took."""
        command = [sys.executable, "-m", "crcli", "weights", "index", str(path)]
        done = run(command, self.setting.limit_s(_LEAST_S, self.size), self.setting.crcli_environment())
        if done.code != 0:
            raise Failed(done.title, done.said)
        return done.wall_s

    def cool(self) -> None:
        """See Way."""
        drop_page_cache()

    def forget(self) -> None:
        """See Way."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, *arguments: str) -> Ran:
        store = f"file://{self.folder}/store"
        command = [sys.executable, "-m", "crcli", *arguments, "--store", store, "--json"]
        os.sync()
        done = run(command, self.setting.limit_s(_LEAST_S, self.size), self.setting.crcli_environment())
        if done.code != 0:
            raise Failed(f"crcli {arguments[0]}: {_error_of(done)}", f"{done.said}\n{self.logs()}")
        return done

    def logs(self) -> str:
        """What crcli kept of CRIU's logs, which it does when something failed."""
        logs = sorted(Path(self.setting.crcli_environment()["CRCLI_LOG_DIR"]).glob("*"), key=os.path.getmtime)
        texts = (
            f"{path}:\n{telling_lines(path.read_text(errors='replace'))}"
            for path in logs[-3:]
            if path.is_file()
        )
        return "\n".join(texts)[-_MOST_LOG:]


@dataclass
class Plainly:
    """The plain sequence, its images in the folder."""

    setting: Setting
    folder: Path
    size: int = 0
    log_level: int = _USUAL_LOG_LEVEL

    def dump(self, subject: Subject, *options: str) -> Figures:
        """See Way; `dump_s` is without, `durable_s` with what it takes until the files are on the disk."""
        subject.remember()
        done = self._run("dump", str(self.folder / "images"), str(subject.pid), *options)
        if "--leave-running" not in options:
            subject.died()
        phases = done.json["phases"]
        return {
            "dump_s": done.wall_s - phases["sync"],
            "durable_s": done.wall_s,
            "image_bytes": done.json["bytes"],
            "phases": phases,
            "cuda": len(done.json["cuda"]),
            **self._calls(done),
        }

    def restore(self, subject: Subject) -> Figures:
        """See Way."""
        before = len(subject.steps())
        done = self._run("restore", str(self.folder / "images"))
        subject.came_back(subject.pid)
        first = subject.first_step_since(done.began, before, _FIRST_STEP_LIMIT_S)
        told = {"restore_s": done.wall_s, "first_step_s": first, "phases": done.json["phases"]}
        return told | self._calls(done)

    def cool(self) -> None:
        """See Way."""
        drop_page_cache()

    def forget(self) -> None:
        """See Way."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _calls(self, done: Ran) -> Figures:
        """Every call to CUDA with its code, where all is to be told."""
        return {"calls": done.json.get("calls", [])} if self.log_level > _USUAL_LOG_LEVEL else {}

    def _run(self, *arguments: str) -> Ran:
        command = [sys.executable, "-m", "tests.gpu.real.plain", *arguments, f"--log-level={self.log_level}"]
        command += [] if self.setting.has_cuda else ["--no-cuda"]
        os.sync()
        done = run(command, self.setting.limit_s(_LEAST_S, self.size), self.setting.crcli_environment())
        if done.code != 0:
            raise Failed(f"plain {arguments[0]}: {_plain_error(done)}", done.said.replace("\\n", "\n"))
        return done


def drop_page_cache() -> None:
    """The page cache is empty of what is on disk already; raises Failed where this is not allowed."""
    subprocess.run(["sync"], check=True, timeout=60)
    try:
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
    except OSError as error:
        raise Failed(f"the page cache cannot be dropped: {error}") from error


def _told(report: dict[str, Any], *names: str) -> Figures:
    told = {name: report[name] for name in names if name in report}
    if "findings" in told:
        told["findings"] = [finding["name"] for finding in told["findings"]]
    return told


def _error_of(done: Ran) -> str:
    """crcli's own message, and where it says so, its hint and what became of the tree."""
    try:
        error = json.loads(done.out)["error"]
    except (ValueError, KeyError, TypeError):
        return done.title
    said = [f"exit {done.code}", error.get("message"), error.get("hint"), f"tree {error.get('state')}"]
    return "; ".join(str(one) for one in said if one)


def _plain_error(done: Ran) -> str:
    try:
        return str(json.loads(done.out)["error"])
    except (ValueError, KeyError):
        return done.title
