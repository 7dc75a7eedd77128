"""What the programs here share: lines of progress, paced, and a digest of their memory when asked.

Each line goes into a file by one write, so that whoever reads it sees whole lines only:

    ready USED          it has allocated all that it will; USED bytes of GPU memory, as it counts them
    step N VALUE TIME   VALUE is what must be the same in an uninterrupted run; TIME is seconds since 1970
    digest HEX          of all its GPU memory: written once for each signal SIGRTMIN + 1
    done N              after the last step; it then waits to be killed
"""

from __future__ import annotations

import os
import signal
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable


def arguments(what: str, steps: int, pace: float) -> ArgumentParser:
    """The command line that all programs have, with these defaults."""
    parser = ArgumentParser(description=what)
    parser.add_argument("--progress", required=True, help="the file for the lines")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=steps, help=f"how many (default: {steps})")
    parser.add_argument("--pace", type=float, default=pace, help=f"seconds of rest a step (default: {pace})")
    return parser


class Progress:
    """The file of lines. `digest` tells what memory holds; it is called between two steps only."""

    def __init__(self, options: Namespace, digest: Callable[[], str]) -> None:
        self._fd = os.open(options.progress, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._pace = options.pace
        self._digest = digest
        self._asked = 0
        self._answered = 0
        self._steps = 0
        signal.signal(signal.SIGRTMIN + 1, self._ask)  # SIGUSR1 LLVM takes away, in Triton

    def ready(self, used: int) -> None:
        """Say that all memory is allocated."""
        self._say(f"ready {used}")

    def step(self, value: str) -> None:
        """Say what this step gave, answer who asked, and rest."""
        self._say(f"step {self._steps} {value} {time.time():.6f}")
        self._steps += 1
        self._answer()
        time.sleep(self._pace)

    def done(self) -> None:
        """Say that it was the last, and wait to be killed."""
        self._say(f"done {self._steps}")
        while True:
            self._answer()
            time.sleep(0.05)

    def _answer(self) -> None:
        while self._answered < self._asked:
            self._answered += 1
            self._say(f"digest {self._digest()}")

    def _ask(self, *_: object) -> None:
        self._asked += 1

    def _say(self, line: str) -> None:
        os.write(self._fd, f"{line}\n".encode())
