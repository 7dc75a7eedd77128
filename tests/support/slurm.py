"""A Slurm cluster on this machine, for as long as a block lasts: a controller and two nodes that preempt.

    with cluster() as slurm:
        job = slurm.submit(script, "--partition=low")
        slurm.wait_for(job, "RUNNING")

Debian's packages, nothing of the system's configuration, no service manager. All of it lives in a network
that the thread has for itself. The nodes `n1` and `n2` have processes, a network, a name and mounts of their
own, and the same files: to a job, two machines with a shared file system. A job in the partition `high`
preempts one in `low`, which is told by a signal of its choice, has GRACE_S, and is requeued.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from crcli import kernel
from tests.support.faults import network_of_our_own
from tests.support.programs import SLOWNESS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GRACE_S = 20
SLOW_S = 60.0 * SLOWNESS
"""How long anything may take (seconds)."""
_CONTROLLER = "10.77.1.254"
_NODES = {"n1": "10.77.1.1", "n2": "10.77.1.2"}
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "ip", "unshare")

_CONFIGURATION = """
ClusterName=crcli
SlurmctldHost={host}({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits for as long as its credentials could still be used.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldParameters=preempt_send_user_signal
SlurmctldPort=16817
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=2
{nodes}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """What this host lacks for a cluster; empty when it lacks nothing."""
    if os.getuid() != 0:
        return "needs root"
    lacking = [name for name in _PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"no {lacking[0]}" if lacking else ""


class SlurmFailed(Exception):
    """The cluster does not start, or does not get where it is expected to; the logs' ends are in it."""


@dataclass
class Slurm:
    """A cluster that runs; its state, logs and sockets are in `folder`."""

    folder: Path
    daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def submit(self, script: Path, *options: str, env: Mapping[str, str] | None = None) -> str:
        """Submit a batch script; return the job's id."""
        return self._run("sbatch", "--parsable", *options, str(script), env=env).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, by its own names."""
        said = self._run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait_for(self, job: str, *states: str) -> dict[str, str]:
        """Return what Slurm says of a job once it is in one of these states."""
        self.wait_until(lambda: self.job(job)["JobState"] in states, f"job {job} is {' or '.join(states)}")
        return self.job(job)

    def wait_until(self, true: Callable[[], bool], what: str, seconds: float = SLOW_S) -> None:
        """Return once it is so."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self.daemons):
                raise SlurmFailed(f"{what}: not in {seconds} s\n{self.logs()}")
            time.sleep(0.05)

    def clear(self) -> None:
        """End all jobs; return when the nodes are free."""
        self._run("scancel", "--signal=KILL", "--full", "--user=root")
        self._run("scancel", "--user=root")
        self.wait_until(lambda: not self._run("squeue", "--noheader").strip(), "all jobs have ended")

    def logs(self) -> str:
        """The ends of all logs, for messages."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a daemon, which ends with us at the latest."""
        with (self.folder / f"{Path(command[0]).name}.out.log").open("ab") as log:
            daemon = subprocess.Popen(
                command,
                env={**os.environ, **_environment(self.folder)},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
            )
        self.daemons.append(daemon)
        return daemon

    def _end(self) -> None:
        """Kill all daemons, and with the nodes' first processes whatever runs there."""
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()

    def _run(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            command,
            env={**os.environ, **_environment(self.folder), **(env or {})},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SLOW_S,
        )
        if done.returncode:
            raise SlurmFailed(f"{command}: {done.stderr}\n{self.logs()}")
        return done.stdout


@contextmanager
def cluster() -> Iterator[Slurm]:
    """A cluster; its daemons and jobs end with the block."""
    with tempfile.TemporaryDirectory(prefix="crcli-slurm-") as folder, network_of_our_own():
        slurm = Slurm(Path(folder))
        try:
            _bring_up(slurm)
            yield slurm
        finally:
            slurm._end()


def _bring_up(slurm: Slurm) -> None:
    folder = slurm.folder
    folder.chmod(0o755)  # munge insists
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    nodes = (f"NodeName={name} NodeAddr={address} CPUs=1 RealMemory=500" for name, address in _NODES.items())
    text = _CONFIGURATION.format(
        folder=folder,
        host=os.uname().nodename,
        controller=_CONTROLLER,
        nodes="\n".join(nodes),
        grace=GRACE_S,
    )
    (folder / "slurm.conf").write_text(text)
    slurm._start("munged", *_munge_options(folder))
    slurm.wait_until((folder / "munge.socket").exists, "munged is there")
    _ip("link add lan type bridge", f"addr add {_CONTROLLER}/24 dev lan", "link set lan up")
    slurm._start("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
    for name, address in _NODES.items():
        keeper = slurm._start(*_NODE, "sh", "-c", _NODE_INIT, name, address)
        inside = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
        slurm.wait_until(lambda inside=inside: inside.read_text() != "", f"{name} has a first process")
        _ip(f"link add to-{name} type veth peer name eth0 netns {inside.read_text().split()[0]}")
        _ip(f"link set to-{name} master lan up")
    slurm.wait_until(lambda: _idle(slurm) == len(_NODES), "both nodes are there")


_NODE = ("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")

_NODE_INIT = """
hostname "$0"
while ! ip addr add "$1/24" dev eth0 2>/dev/null; do sleep 0.05; done
ip link set lo up; ip link set eth0 up
slurmd -D -N "$0" -f "$SLURM_CONF" &
while :; do wait; sleep 1; done
"""
"""The first process of a node: it waits for its network and reaps what jobs leave behind; all end with it."""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _environment(folder: Path) -> dict[str, str]:
    return {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf"), "SLURM_TIME_FORMAT": "standard"}


def _munge_options(folder: Path) -> list[str]:
    files = {"key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed", "socket": "socket"}
    return ["--foreground", *(f"--{option}={folder}/munge.{end}" for option, end in files.items())]


def _ip(*commands: str) -> None:
    for words in commands:
        subprocess.run(["ip", *words.split()], check=True, stdin=subprocess.DEVNULL)


def _idle(slurm: Slurm) -> int:
    try:
        said = slurm._run("scontrol", "--oneliner", "show", "nodes")
    except SlurmFailed:
        return 0
    return said.count("State=IDLE ")
