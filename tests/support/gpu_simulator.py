"""A simulated GPU host for tests: its libraries, its device nodes, its configuration, what goes wrong on it.

tests/gpu/sim/README.md says what the simulator is like. Tests take the fixture `sim` (tests/gpu/conftest.py).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import itertools
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.crcli import COMMAND_LIMIT_SECONDS, Crcli, launched, wait_until
from tests.support.programs import Program

SOURCES = Path(__file__).parents[1] / "gpu" / "sim"
MIB = 1 << 20
STATES = ("running", "locked", "checkpointed", "failed")

_LIBRARIES = {
    "libcuda.so.1": (
        ["driver.c", "checkpoint.c", "restore_thread.c", "memory.c", "host.c", "faults.c", "other_process.c"],
        ["-Wl,-soname,libcuda.so.1"],
    ),
    "libnvidia-ml.so.1": (
        ["nvml.c", "memory.c", "host.c", "other_process.c"],
        ["-Wl,-soname,libnvidia-ml.so.1"],
    ),
}
_FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-format-truncation", "-pthread"]


def build() -> Path:
    """Return the folder with the simulator's libraries and programs, compiled if that was not done before.

    Its name tells from what it was made, and it appears whole or not at all: tests may run beside each other.
    """
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.[ch]")):
        digest.update(path.name.encode() + path.read_bytes())
    digest.update(subprocess.run(["gcc", "--version"], check=True, capture_output=True).stdout)
    folder = Path(tempfile.gettempdir()) / f"crcli-gpu-simulator-{digest.hexdigest()[:16]}"
    if not folder.exists():
        unfinished = Path(tempfile.mkdtemp(prefix="crcli-gpu-simulator-", dir=folder.parent))
        _compile(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another test was faster
            shutil.rmtree(unfinished)
    return folder


def _compile(folder: Path) -> None:
    for name, (sources, flags) in _LIBRARIES.items():
        paths = [SOURCES / "src" / source for source in sources]
        _gcc("-shared", "-fPIC", "-Wl,-Bsymbolic", *flags, "-o", folder / name, *paths)
    for program in sorted((SOURCES / "programs").glob("*.c")):
        _gcc("-o", folder / program.stem, program, f"-L{folder}", "-l:libcuda.so.1")


def _gcc(*arguments: str | Path) -> None:
    done = subprocess.run(["gcc", *_FLAGS, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NODES = ("nvidiactl", "nvidia-uvm", *(f"nvidia{minor}" for minor in range(8)))
_ZERO = os.makedev(1, 5)
_UNSUPPORTED = tuple(os.makedev(10, minor) for minor in (229, 237, 256, 183, 234, 232))
"""Devices that can be opened without doing anything, and for which CRIU has no code: fuse, loop-control, …"""
_GATE, _USERS = "/run/crcli-gpu-simulator.lock", "/run/crcli-gpu-simulator.users"


def why_not_here() -> str:
    """Why the simulator cannot be used on this machine; empty when it can."""
    if os.path.exists("/proc/driver/nvidia"):
        return "this machine has a real NVIDIA driver: the simulator leaves it alone"
    if os.geteuid():
        return "only root can make device nodes and run CRIU"
    return ""


@contextmanager
def device_nodes() -> Iterator[None]:
    """Within the block /dev has NVIDIA's nodes, which stand for other devices; the last user removes them.

    They are shared by all tests on this machine, whichever checkout they are of.
    """
    with open(_USERS, "a+") as users:
        with _gate():
            fcntl.flock(users, fcntl.LOCK_SH)
            for name in NODES:
                _make_node(f"/dev/{name}")
        try:
            yield
        finally:
            with _gate():
                fcntl.flock(users, fcntl.LOCK_UN)
                if _is_last(users.fileno()):
                    for name in NODES:
                        _remove_node(f"/dev/{name}")


@contextmanager
def _gate() -> Iterator[None]:
    with open(_GATE, "a") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield


def _is_last(users: int) -> bool:
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make_node(path: str) -> None:
    """Make a node that CRIU refuses to dump; that of UVM can be mapped instead, and is seen in the maps."""
    if os.path.exists(path):
        return
    for device in (_ZERO,) if path.endswith("uvm") else _UNSUPPORTED:
        os.mknod(path, stat.S_IFCHR | 0o666, device)
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
            return
        except OSError:
            os.unlink(path)
    raise AssertionError(f"no device for {path} may be opened here")


def _remove_node(path: str) -> None:
    """Remove a node that is ours: one of NVIDIA's driver has another number."""
    try:
        if os.stat(path).st_rdev in (_ZERO, *_UNSUPPORTED):
            os.unlink(path)
    except FileNotFoundError:
        pass


@dataclass(frozen=True)
class SimulatedGpu:
    """A GPU to configure; `minor` is the number of /dev/nvidiaN (0 to 7)."""

    uuid: str
    minor: int
    memory_bytes: int = 64 * MIB
    name: str = "Simulated H100"
    compute: str = "9.0"
    persistence: bool = False
    mig: bool = False

    @property
    def line(self) -> str:
        """As the file `host` has it."""
        flags = f"{self.persistence:d} {self.mig:d}"
        return f"gpu {self.uuid} {self.minor} {self.memory_bytes} {self.compute} {flags} {self.name}\n"


def gpu(number: int, **facts: object) -> SimulatedGpu:
    """Return a GPU whose UUID ends in this number; its minor number is one less unless it is named."""
    facts = {"minor": number - 1} | facts
    return SimulatedGpu(f"GPU-51000000-0000-4000-8000-{number:012d}", **facts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Call:
    """One line of the record of calls: `what` is `begin`, `end`, or the action of a fault that befell it."""

    seconds: float
    caller: int
    name: str
    pid: int
    what: str
    result: int


@dataclass(frozen=True)
class Fault:
    """A fault that waits for its call."""

    path: Path

    def release(self) -> None:
        """Take it away; a call that hangs in it goes on."""
        self.path.unlink(missing_ok=True)


@dataclass
class SimulatedHost:
    """A host with simulated GPUs: two of them, of 64 MiB each, unless `configure` says otherwise."""

    folder: Path
    libraries: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        for name in ("faults", "calls", "gpus"):
            (self.folder / name).mkdir(parents=True)
        self.configure(gpu(1), gpu(2))
        self._driver = ctypes.CDLL(str(self.libraries / "libcuda.so.1"))

    @property
    def environment(self) -> dict[str, str]:
        """What crcli and programs must find in their environment to see these GPUs."""
        before = os.environ.get("LD_LIBRARY_PATH")
        path = f"{self.libraries}:{before}" if before else str(self.libraries)
        return {"LD_LIBRARY_PATH": path, "CRCLI_GPU_SIM": str(self.folder)}

    def configure(
        self,
        *gpus: SimulatedGpu,
        driver: str = "580.95.05",
        api: int = 13000,
        init_ms: int = 0,
        context_bytes: int = MIB,
        tells_processes: bool = True,
    ) -> None:
        """Make it this host from now on, also for processes that know it as another one (the restored).

        `api` is the driver's CUDA version (12080: 12.8). `init_ms` is how long cuInit takes, `context_bytes`
        what a process has of a GPU before it allocates anything, `tells_processes` whether NVML says who uses
        a GPU.
        """
        self.gpus = gpus
        text = f"driver {driver}\napi {api}\ninit_ms {init_ms}\ncontext_bytes {context_bytes}\n"
        text += f"tells_processes {tells_processes:d}\n" + "".join(one.line for one in gpus)
        new = self.folder / "host.new"
        new.write_text(text)
        new.rename(self.folder / "host")

    def inject(
        self,
        call: str,
        action: str,
        value: int = 0,
        *,
        pid: int = 0,
        skip: int = 0,
        times: int = 1,
        after: bool = False,
    ) -> Fault:
        """Have a coming call suffer: see tests/gpu/sim/src/faults.c for the words.

        `call`: init, tid, state, lock, checkpoint, restore, unlock; of the process `pid`, or of any.
        `action`: error (returns the CUresult `value`), delay (`value` ms), hang (until released), fail (the
        process becomes FAILED), die (the caller is killed); each before the call does anything, or `after`
        it was done.
        """
        path = self.folder / "faults" / f"{next(self._numbers):04d}"
        when = "after" if after else "before"
        unfinished = self.folder / "fault.new"
        unfinished.write_text(f"{call} {pid} {skip} {times} {when} {action} {value}\n")
        unfinished.rename(path)
        return Fault(path)

    def calls(self, name: str = "") -> list[Call]:
        """Return all calls so far (of this name), oldest first; those of the test itself are left out."""
        try:
            lines = (self.folder / "calls.log").read_text().splitlines()
        except FileNotFoundError:
            return []
        words = (line.split() for line in lines)
        found = [Call(float(w[0]), int(w[1]), w[2], int(w[3]), w[4], int(w[5])) for w in words]
        return [one for one in found if one.caller != os.getpid() and name in ("", one.name)]

    def wait_for(self, name: str, what: str, count: int = 1) -> Call:
        """Return the newest such line of the record once there are `count` of them."""

        def found() -> list[Call]:
            return [one for one in self.calls(name) if one.what == what]

        wait_until(lambda: len(found()) >= count, f"no {name} {what}", COMMAND_LIMIT_SECONDS)
        return found()[-1]

    def state(self, pid: int) -> str:
        """Return what the driver says of a process: one of STATES, or `gone` for one that it does not know.

        Like the driver it waits while the process is frozen.
        """
        number = ctypes.c_int()
        error = self._driver.cuCheckpointProcessGetState(pid, ctypes.byref(number))
        return "gone" if error else STATES[number.value]

    def is_cuda(self, pid: int) -> bool:
        """Whether the process has a restore thread; answers at once, also of a frozen one."""
        return self._driver.cuCheckpointProcessGetRestoreThreadId(pid, ctypes.byref(ctypes.c_int())) == 0

    def call(self, name: str, pid: int) -> int:
        """Call `cuCheckpointProcessNAME(pid, NULL)` from the test, and return its CUresult; not Restore."""
        result: int = getattr(self._driver, f"cuCheckpointProcess{name}")(pid, None)
        return result

    def in_use(self, number: int = 0) -> int:
        """Return how many bytes of the host's GPU with this index are in use, all processes together."""
        sum_of = 0
        for path in (self.folder / "gpus" / self.gpus[number].uuid).glob("*"):
            try:
                file = path.open("rb")
            except FileNotFoundError:  # its process has just closed it
                continue
            with file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:  # its process lives
                    sum_of += int.from_bytes(file.read(8), "little")
        return sum_of

    @contextmanager
    def start_program(
        self, *options: str, program: str = "gpu_counter", ready: str = "ready", **environment: str
    ) -> Iterator[Program]:
        """Run one of tests/gpu/sim/programs, or another program, on this host until the block ends."""
        folder = self.folder / f"program-{next(self._numbers)}"
        folder.mkdir()
        argv = [program if "/" in program else str(self.libraries / program), *options]
        with launched(argv, folder, env=os.environ | self.environment | environment) as running:
            if ready:
                running.wait_for(ready)
            yield running

    @contextmanager
    def start_tree(self, *options: str, megabytes: int = 2) -> Iterator[tuple[Program, list[Program]]]:
        """Run a tree of three on two GPUs: the root on the first, one child on the second, one on both.

        Gives the root and, in that order, all three as programs of which each has an output of its own.
        """
        outputs = [self.folder / f"child-{next(self._numbers)}" for _ in range(2)]
        size, more = f"--megabytes {megabytes}", " ".join(options)
        children = [
            f"--gpu 1 {size} --seed 2 --output {outputs[0]} {more}",
            f"--gpu 0 --gpu 1 {size} --seed 3 --output {outputs[1]} {more}",
        ]
        started = [word for child in children for word in ("--child", child)]
        with self.start_program("--gpu", "0", *size.split(), *options, *started) as root:
            family = [root]
            for output in outputs:
                family.append(Program(root.process, output))
                wait_until(output.exists, "a child does not start")
                family[-1].wait_for("ready")
            yield root, family


@dataclass
class GpuCrcli(Crcli):
    """The command on a simulated host."""

    host: SimulatedHost | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What the command finds in its environment."""
        found = super().environment
        return found | self.host.environment if self.host else found


@contextmanager
def simulated_host(folder: Path) -> Iterator[SimulatedHost]:
    """A simulated host whose files are in this folder; nodes in /dev are there within the block."""
    with ExitStack() as stack:
        stack.enter_context(device_nodes())
        yield SimulatedHost(folder, build())
