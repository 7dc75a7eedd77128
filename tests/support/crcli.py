"""The real command for tests: `python -m crcli` as a process of its own, its JSON, and what it brought back.

This process is made a subreaper: what a killed tree leaves behind, and every tree that a `crcli restore`
detached, comes to us and is reaped here by its pid. So no pid stays taken because another init is slow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from crcli import kernel
from tests.support.programs import SLOWNESS, Program, kill_all

ROOT = Path(__file__).parents[2]
COMMAND_LIMIT_SECONDS = 60.0 * SLOWNESS

COUNTER = """
import itertools, random, time, zlib
memory = random.Random({seed}).randbytes({kilobytes} << 10)
print('ready')
for number in itertools.count():
    print(number, f'{{zlib.crc32(memory):016x}}')
    time.sleep(0.01)
"""
"""The code of a program that prints a counter and the checksum of its memory, line after line.

Many of them count beside each other, a hundred times a second: CRC-32 takes a sixth of what BLAKE2 does.
"""


def counter(seed: int = 1, kilobytes: int = 512) -> str:
    """Return the code of a program that counts, with this much random memory beside it."""
    return COUNTER.format(seed=seed, kilobytes=kilobytes)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that it printed."""
        found: dict[str, Any] = json.loads(self.out)
        return found


@dataclass
class Crcli:
    """The command with a store of its own. Leave with `clean_up`, which ends all that was restored."""

    folder: Path
    restored: list[psutil.Process] = field(default_factory=list)
    """Every process of every tree that was restored, and the first ones of their namespaces."""

    def __post_init__(self) -> None:
        kernel.become_subreaper()

    @property
    def store(self) -> str:
        """The URL of the store."""
        return f"file://{self.folder}/store"

    @property
    def environment(self) -> dict[str, str]:
        """What the command finds in its environment."""
        return os.environ | {
            "CRCLI_LOG_DIR": f"{self.folder}/logs",
            "CRCLI_RATES": f"{self.folder}/rates.json",
            "CRCLI_STATE_DIR": f"{self.folder}/state",
            "CRCLI_CACHE_DIR": f"{self.folder}/cache",
        }

    @contextmanager
    def start(self, *arguments: str, **popen: Any) -> Iterator[subprocess.Popen[str]]:
        """A command under way; it has ended when the block has, by force if it must."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
        process = subprocess.Popen(
            [sys.executable, "-m", "crcli", *arguments],
            cwd=ROOT,
            env=self.environment,
            text=True,
            **options,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def run(self, *arguments: str, code: int = 0, limit: float = COMMAND_LIMIT_SECONDS) -> Done:
        """Run a command to its end, and assert its exit code."""
        with self.start(*arguments) as process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired as late:
                raise AssertionError(f"no end within {limit} s: {arguments}\n{late.stderr!r}") from None
        assert process.returncode == code, f"exit {process.returncode}: {arguments}\n{out}\n{err}"
        return Done(process.returncode, out, err)

    def dump(self, pid: int, *options: str, code: int = 0) -> dict[str, Any]:
        """Dump a tree, and return the report; what was killed is reaped, as its parent would."""
        tree = tree_of(pid)
        done = self.run("dump", str(pid), "--store", self.store, "--json", *options, code=code).json
        if done.get("outcome") == "killed":
            reap(tree)
        return done

    def restore(self, image: str, *options: str, code: int = 0) -> dict[str, Any]:
        """Restore an image, and return the report; the tree lives until `clean_up`."""
        done = self.run("restore", image, "--store", self.store, "--json", *options, code=code).json
        if "host_pid" in done:
            self.adopt(done["host_pid"])
        return done

    def adopt(self, host_pid: int) -> None:
        """Have a restored tree, of which this is the root, ended by `clean_up`."""
        self.restored += tree_of(our_child_above(host_pid))

    def move(self, pid: int, *options: str) -> dict[str, Any]:
        """Dump a tree, restore it, and return the restore's report."""
        return self.restore(self.dump(pid)["image"], *options)

    def clean_up(self) -> None:
        """End every tree that was restored, and reap it."""
        end(self.restored)
        self.restored.clear()


def tree_of(pid: int) -> list[psutil.Process]:
    """Return a process and its descendants, the root first; nothing when there is no such process."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def our_child_above(pid: int) -> int:
    """Return the ancestor of a process (or itself) that is a child of ours."""
    process = psutil.Process(pid)
    while process.ppid() != os.getpid():
        parent = process.parent()
        assert parent is not None, f"{pid} is not below us"
        process = parent
    return int(process.pid)


def end(processes: list[psutil.Process]) -> None:
    """Kill these processes and their descendants, parents first: they may start new ones. Reap them."""
    trees = (one for process in processes if process.is_running() for one in tree_of(process.pid))
    doomed = list(dict.fromkeys([*trees, *processes]))
    for one in doomed:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
    reap(doomed)


def reap(processes: Iterable[psutil.Process], seconds: float = 10.0 * SLOWNESS) -> None:
    """Return once none of these processes exists: each is ending, and we reap those that come to us."""
    end = time.monotonic() + seconds
    left = list(processes)
    while left:
        for process in left:
            try:
                os.waitpid(process.pid, os.WNOHANG)
            except ChildProcessError:
                pass
        left = [process for process in left if process.is_running()]
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.002)


def wait_until(true: Callable[[], bool], otherwise: str, seconds: float = 10.0 * SLOWNESS) -> None:
    """Return once `true` says so; fail, saying what is the case instead, when it does not in time."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, otherwise
        time.sleep(0.01)


def counted(program: Program) -> list[int]:
    """Return what a counter has printed so far, after asserting that its memory never changed."""
    lines = [line.split() for line in program.output.splitlines() if line[:1].isdigit()]
    whole = [words for words in lines if len(words) == 2 and len(words[1]) == 16]
    assert len({digest for _, digest in whole}) == 1, "the memory changed"
    return [int(number) for number, _ in whole]


def assert_goes_on(program: Program, more: int = 5) -> None:
    """Assert that a counter counts on from where it was, leaving out no number and repeating none."""
    before = counted(program)[-1]
    wait_until(lambda: counted(program)[-1] >= before + more, f"it stands still:\n{program.output[-2000:]}")
    numbers = counted(program)
    assert numbers == list(range(len(numbers)))


def install_plugin(site: Path, name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have crcli find a plug-in with this code."""
    about = site / f"{name}-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[crcli.plugins]\n{name} = {name}\n")
    (site / f"{name}.py").write_text(textwrap.dedent(code))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))


@contextmanager
def launched(command: Sequence[str], folder: Path, **popen: Any) -> Iterator[Program]:
    """Run a program as a service is run (its own session, its output in a file) until the block ends."""
    output_path = folder / "output"
    with output_path.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            **popen,
        )
    started = tree_of(process.pid)
    try:
        yield Program(process, output_path)
    finally:
        kill_all(process.pid)
        process.wait()
        end(started)


@contextmanager
def crcli_in(folder: Path) -> Iterator[Crcli]:
    """The command with a store in this folder; what it restored ends with the block."""
    command = Crcli(folder)
    try:
        yield command
    finally:
        command.clean_up()
