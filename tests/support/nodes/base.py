"""What every other machine of a test can do, whatever it is made of.

A command is a text for the shell. It finds the environment of the node and nothing of this process's.
"""

from __future__ import annotations

import base64
import json
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.programs import SLOWNESS

ROOT = Path(__file__).parents[3]
JOBS = "/var/lib/jobs"


class NodeFailed(AssertionError):
    """A node did not do as told, or is gone."""


@dataclass(frozen=True)
class Done:
    """A command that has ended: its exit code, and what it wrote to both streams."""

    code: int
    out: str

    @property
    def json(self) -> dict[str, Any]:
        """The JSON object that it printed, alone on a line."""
        line = next(line for line in reversed(self.out.splitlines()) if line.startswith("{"))
        found: dict[str, Any] = json.loads(line)
        return found


class Node(ABC):
    """A machine with processes, files and a network of its own."""

    slowness = SLOWNESS
    """How many times longer than usual things take there."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.environment: dict[str, str] = {}
        """What commands find there, beside PATH and HOME."""

    @abstractmethod
    def execute(self, command: str, limit_s: float) -> Done:
        """Run one line of the shell in a session and with the variables of its own; wait for its end.

        Raises NodeFailed.
        """

    @abstractmethod
    def cut(self) -> None:
        """Take its network away, as when a cable is pulled: nobody is told."""

    @abstractmethod
    def mend(self) -> None:
        """Give its network back."""

    @abstractmethod
    def kill(self) -> None:
        """End it, and all that runs there, without a word to anybody; done twice it is done."""

    def run(self, command: str, limit_s: float = 60.0, code: int | None = None) -> Done:
        """Run a command of the shell to its end; with `code`, assert that this is its exit code."""
        done = self.execute(command, limit_s * self.slowness)
        assert code is None or done.code == code, f"{self.name}: exit {done.code}: {command}\n{done.out}"
        return done

    def variables(self) -> dict[str, str]:
        """The environment of what runs there."""
        usual = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "PYTHONDONTWRITEBYTECODE": "1"}
        return usual | self.environment

    def python(self, module: str, *arguments: str) -> str:
        """The command that runs a module of this checkout there."""
        return f"cd {shlex.quote(str(ROOT))} && {shlex.join([sys.executable, '-m', module, *arguments])}"

    def crcli(self, *arguments: str, code: int = 0, limit_s: float = 90.0) -> dict[str, Any]:
        """Run a command of crcli there, assert its exit code, and return its JSON."""
        return self.run(f"{self.python('crcli', *arguments, '--json')} 2>&1", limit_s, code).json

    def write(self, path: str, data: bytes) -> None:
        """Put a file there, in place of what was there; its folder is made."""
        text, folder = base64.b64encode(data).decode(), path.rpartition("/")[0]
        self.run(f"mkdir -p {folder}; echo {text} | base64 -d >{shlex.quote(path)}", code=0)

    def read(self, path: str) -> str:
        """The text of a file there."""
        return self.run(f"cat {shlex.quote(path)}", code=0).out

    def processes(self) -> dict[int, str]:
        """Every process there that has not ended: its pid there, and its command line."""
        look = 'for p in /proc/[0-9]*; do echo "${p#/proc/} $(tr "\\0" " " <$p/cmdline)"; done 2>/dev/null'
        lines = (line.split(" ", 1) for line in self.run(look).out.splitlines())
        return {int(pid): command for pid, command in lines if command.strip()}

    def launch(self, name: str, code: str, environment: Mapping[str, str] | None = None) -> Job:
        """Start a Python program as a service is started; return once it says `ready`."""
        folder = f"{JOBS}/{name}"
        self.write(f"{folder}/{name}.py", code.encode())
        words = shlex.join([*(f"{key}={value}" for key, value in (environment or {}).items())])
        program = f"exec env {words} {shlex.quote(sys.executable)} -u {name}.py </dev/null >>output 2>&1"
        start = shlex.quote(f"echo $$ >pid; {program}")
        self.run(f"cd {folder} && setsid --fork sh -c {start} >/dev/null 2>&1", code=0)
        wait = f"while ! [ -s {folder}/pid ]; do sleep 0.01; done; cat {folder}/pid"
        job = Job(self, name, int(self.run(wait, code=0).out))
        job.wait_for(lambda text: "ready" in text.splitlines())
        return job


@dataclass(frozen=True)
class Job:
    """A program on a node; after a move, the same name on another node is the same job."""

    node: Node
    name: str
    pid: int
    """Its pid there: when it started, or after a restore on the host's pids."""

    @property
    def folder(self) -> str:
        """Where its files are, on any node."""
        return f"{JOBS}/{self.name}"

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.node.read(f"{self.folder}/output")

    def on(self, node: Node, pid: int = 0) -> Job:
        """The job as it is on another node, where it has this pid, or still the one that it had."""
        return Job(node, self.name, pid or self.pid)

    def wait_for(self, true: Any, seconds: float = 20.0) -> str:
        """Return the output once `true` says so of it; fail with it when that does not come."""
        end = time.monotonic() + seconds * self.node.slowness
        while not true(text := self.output):
            assert time.monotonic() < end, f"not within {seconds} s on {self.node.name}:\n{text[-2000:]}"
            time.sleep(0.02 * self.node.slowness)
        return text

    def counted(self) -> list[int]:
        """What a counter (tests.support.crcli) has counted, after asserting that its memory never changed."""
        return numbers_in(self.output)

    def assert_goes_on(self, more: int = 5) -> None:
        """Assert that a counter counts on from where it was, leaving out no number and repeating none."""
        before = self.counted()[-1]
        numbers = numbers_in(self.wait_for(lambda text: numbers_in(text)[-1] >= before + more))
        assert numbers == list(range(len(numbers)))


def numbers_in(output: str) -> list[int]:
    """The numbers that a counter printed, each with the same hash beside it."""
    lines = [line.split() for line in output.splitlines() if line[:1].isdigit()]
    whole = [words for words in lines if len(words) == 2 and len(words[1]) == 16]
    assert len({digest for _, digest in whole}) <= 1, "the memory changed"
    return [int(number) for number, _ in whole] or [-1]
