"""Slurm: the signal of `sbatch --signal=B:USR1@SECONDS`, at preemption and before the time limit.

At preemption the batch script gets it only with `SlurmctldParameters=preempt_send_user_signal`. SIGTERM is
not taken here: `scancel` sends it too, and a job that its user has cancelled is not put back into the queue.
"""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from crcli.errors import UsageError
from crcli.notice.base import Notice, nothing, seconds
from crcli.notice.signals import NAMES, OnSignal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from crcli.notice.base import Source, Surroundings

_ASK_S = 2.0
_REQUEUE_S = 15.0


class SlurmSignal(OnSignal):
    """Tells of the signal; once the job is saved, it has Slurm put the job back into its queue."""

    def __init__(self, number: signal.Signals, surroundings: Surroundings) -> None:
        super().__init__("slurm", [number], surroundings)
        self._job = surroundings.environ.get("SLURM_JOB_ID", "")

    def _notice(self, signal_name: str, at: float) -> Notice:
        return Notice(
            self.name,
            f"Slurm ends the job ({signal_name})",
            deadline=self._end(at),
            on_saved=self._requeue if self._job else nothing,
        )

    def _end(self, at: float) -> float | None:
        """When the job ends: the earliest of what Slurm says now, what it said at the start, and the grace.

        A preempted job's end is moved to the end of the partition's GraceTime.
        """
        environ = self._surroundings.environ
        epochs = [
            _local(_job(self._job, environ).get("EndTime", "")),
            seconds(environ.get("SLURM_JOB_END_TIME")),
        ]
        now, wall = time.monotonic(), time.time()
        ends = [now + epoch - wall for epoch in epochs if epoch is not None]
        if (grace := self._surroundings.deadline(at)) is not None:
            ends.append(grace)
        return min(ends, default=None)

    def _requeue(self) -> None:
        state = _job(self._job, self._surroundings.environ).get("JobState", "RUNNING")
        if state != "RUNNING":  # cancelled meanwhile, or requeued by Slurm itself
            return
        code, said = _run(["scontrol", "requeue", self._job], _REQUEUE_S, self._surroundings.environ)
        if code:
            raise RuntimeError(f"`scontrol requeue {self._job}` failed: {said.strip() or code}")


def _job(job: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What Slurm says of a job, by its own names; nothing where it does not answer in time."""
    if not job:
        return {}
    code, said = _run(["scontrol", "--oneliner", "show", "job", job], _ASK_S, environ)
    return {} if code else dict(word.split("=", 1) for word in said.split() if "=" in word)


def _run(command: list[str], limit_s: float, environ: Mapping[str, str]) -> tuple[int, str]:
    """Exit code and output of a command of Slurm's; 127 where it could not be run, 124 if too slow."""
    import subprocess

    # How times are written is the user's choice, but not here.
    plain = {**environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        done = subprocess.run(
            command,
            env=plain,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit_s,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return 124, "no answer in time"
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def _local(text: str) -> float | None:
    """Seconds of the epoch of a time as Slurm writes it: local, without a zone; None for `Unknown`."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None


def make(name: str, argument: str, surroundings: Surroundings) -> list[Source]:
    """The source of `--notice slurm[:USR1]`."""
    wanted = f"sig{argument or 'usr1'}".lower().replace("sigsig", "sig")
    if wanted not in NAMES:
        raise UsageError(f"--notice slurm: takes a signal such as USR2, not {argument!r}")
    return [SlurmSignal(NAMES[wanted], surroundings)]
