"""A Slurm cluster on this machine, for as long as a block lasts: a controller and two nodes that preempt.

    with cluster(folder) as slurm:
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
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from crcli import kernel
from tests.support.faults import network_of_our_own

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

GRACE_S = 20
READY_S = 30.0
SLOW_S = 60.0
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
    """A cluster that runs, in `folder`."""

    folder: Path

    def submit(self, script: Path, *options: str, env: Mapping[str, str] | None = None) -> str:
        """Submit a batch script; return the job's id."""
        return self._run("sbatch", "--parsable", *options, str(script), env=env).strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, by its own names."""
        said = self._run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def wait_for(self, job: str, *states: str) -> dict[str, str]:
        """Return what Slurm says of a job once it is in one of these states."""
        deadline = time.monotonic() + SLOW_S
        while (facts := self.job(job)).get("JobState") not in states:
            if time.monotonic() > deadline:
                raise SlurmFailed(f"job {job} is not {states}: {facts}\n{self.logs()}")
            time.sleep(0.1)
        return facts

    def cancel(self, job: str) -> None:
        """End a job, whatever it is doing."""
        self._run("scancel", job)

    def logs(self) -> str:
        """The ends of all logs, for messages."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

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
def cluster(folder: Path) -> Iterator[Slurm]:
    """A cluster whose state, logs and sockets are in `folder`; its daemons and jobs end with the block."""
    folder.chmod(0o755)
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
    slurm = Slurm(folder)
    with network_of_our_own(), ExitStack() as daemons:
        _start(daemons, folder, "munged", *_munge_options(folder))
        _wait_for(lambda: (folder / "munge.socket").exists(), slurm, "munged")
        _ip("link add lan type bridge", f"addr add {_CONTROLLER}/24 dev lan", "link set lan up")
        _start(daemons, folder, "slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for name, address in _NODES.items():
            keeper = _start(daemons, folder, *_NODE, "sh", "-c", _NODE_INIT, name, address)
            _join(keeper.pid, name)
        _wait_for(lambda: _idle(slurm) == len(_NODES), slurm, "both nodes")
        yield slurm


_NODE = ("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")

_NODE_INIT = """
hostname "$0"
while ! ip addr add "$1/24" dev eth0 2>/dev/null; do sleep 0.05; done
ip link set lo up; ip link set eth0 up
slurmd -D -N "$0" -f "$SLURM_CONF" &
while :; do wait; sleep 1; done
"""
"""The first process of a node: it waits for its network, and reaps what jobs leave behind. All end with it."""


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _environment(folder: Path) -> dict[str, str]:
    return {"PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf"), "SLURM_TIME_FORMAT": "standard"}


def _munge_options(folder: Path) -> list[str]:
    files = {"key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed", "socket": "socket"}
    return ["--foreground", *(f"--{option}={folder}/munge.{end}" for option, end in files.items())]


def _start(daemons: ExitStack, folder: Path, *command: str) -> subprocess.Popen[bytes]:
    """Start a daemon that ends with the block, or with us."""
    with (folder / f"{Path(command[0]).name}.out.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **_environment(folder)},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=lambda: kernel.die_with_parent(signal.SIGKILL),
        )

    def end() -> None:
        process.kill()
        process.wait()

    daemons.callback(end)
    return process


def _join(keeper: int, name: str) -> None:
    """Give a node an interface that leads to the bridge."""
    inside = f"/proc/{keeper}/task/{keeper}/children"
    deadline = time.monotonic() + READY_S
    while not (children := Path(inside).read_text().split()):
        if time.monotonic() > deadline:
            raise SlurmFailed(f"{name} does not start")
        time.sleep(0.02)
    _ip(
        f"link add to-{name} type veth peer name eth0 netns {children[0]}",
        f"link set to-{name} master lan up",
    )


def _ip(*commands: str) -> None:
    for words in commands:
        subprocess.run(["ip", *words.split()], check=True, stdin=subprocess.DEVNULL)


def _idle(slurm: Slurm) -> int:
    try:
        said = slurm._run("scontrol", "--oneliner", "show", "nodes")
    except SlurmFailed:
        return 0
    return said.count("State=IDLE ")


def _wait_for(true: Callable[[], bool], slurm: Slurm, what: str) -> None:
    deadline = time.monotonic() + READY_S
    while not true():
        if time.monotonic() > deadline:
            raise SlurmFailed(f"{what}: not there\n{slurm.logs()}")
        time.sleep(0.1)
