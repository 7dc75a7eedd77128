"""The ways in which a machine is taken away: for each, how `crcli run` hears of it, and what it must answer.

Clouds are small servers on loopback that answer as the vendors document; Kubernetes is its preStop hook and
then SIGTERM; Slurm is its signal and a `scontrol` that notes what it was asked.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

from tests.support.crcli import ROOT, wait_until
from tests.support.metadata_servers import Aws, Azure, Gcp
from tests.support.notices import ENOUGH_S, free_port

GRACE_S = 60


class Eviction:
    """A machine that can be taken away. `spec` is what `--notice` says, `environ` what a job finds there."""

    spec = ""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ: dict[str, str] = {"CRCLI_GRACE": str(GRACE_S)}

    @contextmanager
    def there(self) -> Iterator[None]:
        """Within the block the machine, and what tells of its end, is there."""
        yield

    def take_away(self, pid: int) -> None:
        """Give notice to the `crcli run` of this pid."""
        raise NotImplementedError

    def check_answer(self) -> None:
        """Fail unless whoever gave notice was told that the job is saved."""

    def another(self) -> None:
        """From here on it is another machine, which stays."""


class _Signal(Eviction):
    """A signal to crcli itself."""

    def __init__(self, folder: Path, spec: str, number: signal.Signals) -> None:
        super().__init__(folder)
        self.spec, self._number = spec, number

    def take_away(self, pid: int) -> None:
        os.kill(pid, self._number)


class _File(Eviction):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.path = folder / "leave"
        self.spec = f"file:{self.path}"

    def take_away(self, pid: int) -> None:
        self.path.write_text(str(GRACE_S))

    def check_answer(self) -> None:
        assert self.path.with_name("leave.saved").exists()

    def another(self) -> None:
        self.path.unlink(missing_ok=True)
        self.path.with_name("leave.saved").unlink(missing_ok=True)


class _Kubernetes(_File):
    """The preStop hook, and once it has ended, SIGTERM."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.spec = "kubernetes"
        self.environ["CRCLI_NOTICE_FILE"] = str(self.path)
        self.hook: subprocess.Popen[bytes] | None = None

    def take_away(self, pid: int) -> None:
        command = [str(ROOT / "scripts" / "hooks" / "kubernetes" / "pre-stop")]
        self.hook = subprocess.Popen(command, env={**os.environ, **self.environ})

    def check_answer(self) -> None:
        assert self.hook is not None and self.hook.wait(ENOUGH_S) == 0
        super().check_answer()


class _Http(Eviction):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()
        self.spec = f"http:127.0.0.1:{self.port}"

    def take_away(self, pid: int) -> None:
        # crcli may have begun a moment ago: whoever gives notice tries again.
        def posted() -> bool:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=ENOUGH_S)
            try:
                connection.request("POST", "/", f'{{"seconds": {GRACE_S}, "reason": "drained"}}')
                return connection.getresponse().status == 202
            except OSError:
                return False
            finally:
                connection.close()

        wait_until(posted, "nobody listens", ENOUGH_S)


class _Aws(Eviction):
    spec = "aws"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.service = Aws()

    @contextmanager
    def there(self) -> Iterator[None]:
        with self.service.serving():
            self.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = self.service.url
            yield

    def take_away(self, pid: int) -> None:
        self.service.interrupt(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 120)))

    def another(self) -> None:
        self.service.items.clear()


class _Gcp(Eviction):
    spec = "gcp"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.service = Gcp()

    @contextmanager
    def there(self) -> Iterator[None]:
        with self.service.serving():
            self.environ["GCE_METADATA_HOST"] = f"127.0.0.1:{self.service.port}"
            yield

    def take_away(self, pid: int) -> None:
        self.service.set("preempted", "TRUE")

    def another(self) -> None:
        self.service.set("preempted", "FALSE")


class _Azure(Eviction):
    spec = "azure"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.service = Azure()
        self.count = 0

    @contextmanager
    def there(self) -> Iterator[None]:
        with self.service.serving():
            self.environ["CRCLI_AZURE_METADATA_ENDPOINT"] = self.service.url
            yield

    def take_away(self, pid: int) -> None:
        self.count += 1
        then = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + GRACE_S))
        self.service.schedule(f"event-{self.count}", "Preempt", NotBefore=then)

    def check_answer(self) -> None:
        assert self.service.started == [f"event-{self.count}"]

    def another(self) -> None:
        self.service.events.clear()
        self.service.started.clear()


class _Slurm(Eviction):
    spec = "slurm"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.requeued = folder / "requeued"
        scontrol = folder / "slurm" / "scontrol"
        scontrol.parent.mkdir(parents=True, exist_ok=True)
        scontrol.write_text(
            f'#!/bin/sh\n[ "$1" != requeue ] || exec echo "$@" >>{self.requeued}\n'
            f"echo JobId=17 JobState=RUNNING EndTime=$(date -d '+{GRACE_S} sec' +%Y-%m-%dT%H:%M:%S)\n"
        )
        scontrol.chmod(0o755)
        self.environ |= {"SLURM_JOB_ID": "17", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}

    def take_away(self, pid: int) -> None:
        os.kill(pid, signal.SIGUSR1)

    def check_answer(self) -> None:
        assert self.requeued.read_text() == "requeue 17\n"

    def another(self) -> None:
        self.requeued.unlink(missing_ok=True)


EVICTIONS = {
    "sigterm": lambda folder: _Signal(folder, "sigterm", signal.SIGTERM),
    "sigusr2": lambda folder: _Signal(folder, "sigusr2", signal.SIGUSR2),
    "systemd": lambda folder: _Signal(folder, "systemd", signal.SIGTERM),
    "kubernetes": _Kubernetes,
    "slurm": _Slurm,
    "file": _File,
    "http": _Http,
    "aws": _Aws,
    "gcp": _Gcp,
    "azure": _Azure,
}
